"""Reading weight files without running what they contain."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino.utils.files import DataError
from dino.weights.pickles import read_pickle

from .names import StateDict

DESCRIPTION = ("names", "category_ids", "about")  # what a file of this project has besides tensors
_STATE_KEYS = ("model", "state_dict", "model_state", "blobs")  # under which programs keep the weights
_EMA_KEYS = ("ema_model", "ema_state", "ema")  # and their running average


def read_content(path: str | Path) -> dict[str, Any]:
    """Read a weight file: plain data, and tensors on the CPU. Runs no code of the file.

    A `.safetensors` file gives `model`, and `names` and `about` from its metadata. `dino.weights.pickles` reads `.pkl`
    files. All others are PyTorch's; these may hold an argparse.Namespace, as those of the official program do.

    Raises:
        DataError: the file is missing, cut short, altered, or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weights not found: {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pkl":
        return read_pickle(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        altered = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()  # PyTorch does not check
    except Exception as error:  # a broken file can raise anything
        raise DataError(f"can't read the weights {path}: {_reason(error)}") from error
    if altered:
        raise DataError(f"can't use the weights {path}: the file was altered since it was written ({altered})")
    if not isinstance(content, Mapping):
        raise DataError(f"can't use the weights {path}: a dict was expected, not {type(content).__name__}")
    return dict(content)


def _reason(error: Exception) -> str:
    """Why a file can't be read, without PyTorch's advice to load it unsafely."""
    refused = re.search(r"GLOBAL (\S+) ", str(error))
    if refused:
        return f"the file contains {refused[1]}, which is not plain data"
    return f"the file is cut short, or no weight file ({type(error).__name__})"


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read tensors as `model`, and `names` and `about` from JSON texts in the metadata."""
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            known = {key: json.loads(texts[key]) for key in DESCRIPTION if key in texts}
            return {**known, "model": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"can't read the weights {path}: {error}") from error


def weights_of(content: Mapping[str, Any]) -> StateDict:
    """Find the state dict in the content of a file: under one of the usual keys, or the content itself.

    Raises:
        DataError: it has no tensors.
    """
    state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    return _to_tensors(state)


def average_of(content: Mapping[str, Any], copy: str = "auto") -> StateDict | None:
    """Find the running average of the weights in the content of a file; None if there is none.

    Args:
        content: of `read_content`.
        copy: "auto"; "model" for None in any case; "ema" for an error if there is none.

    Raises:
        DataError: there is none, but `copy` is "ema"; or it has no tensors.
    """
    state = next((content[key] for key in _EMA_KEYS if isinstance(content.get(key), Mapping)), None)
    if state is None and copy == "ema":
        raise DataError("the file has no running average (EMA) of the weights")
    if state is None or copy == "model":
        return None
    return _to_tensors(
        next((state[key] for key in ("module", *_STATE_KEYS) if isinstance(state.get(key), Mapping)), state)
    )


def _to_tensors(state: Mapping[str, Any]) -> StateDict:
    """Keep the entries of a dict that are tensors or arrays, as tensors.

    Raises:
        DataError: there are none.
    """
    arrays = {str(k): torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
    tensors = {key: value for key, value in arrays.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(f"the file has no weights: its entries are {', '.join(map(str, state))[:200] or 'none'}")
    return tensors
