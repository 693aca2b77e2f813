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

STATE_KEYS = ("model", "state_dict", "model_state", "blobs")  # under which programs keep the weights
EMA_KEYS = ("ema_model", "ema_state", "ema")  # and their running average


def read_content(path: str | Path) -> dict[str, Any]:
    """All that a weight file holds: plain data and tensors on the CPU.

    `.safetensors` files give `model` and what their metadata say, `.pkl` files go through `dino.weights.pickles`. All
    others are PyTorch's, in which the argparse.Namespace of the official program is let through as well.

    Raises:
        DataError: the file is missing, cut short, or holds anything but plain data; nothing in it was run.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weights not found: {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".pkl":
        return read_pickle(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        altered = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()  # PyTorch does not look
    except Exception as error:  # a broken file can raise anything
        raise DataError(f"can't read the weights {path}: {reason(error)}") from error
    if altered:
        raise DataError(f"can't use the weights {path}: the file was altered since it was written ({altered})")
    if not isinstance(content, Mapping):
        raise DataError(f"can't use the weights {path}: a dict was expected, not {type(content).__name__}")
    return dict(content)


def reason(error: Exception) -> str:
    """What was wrong with a file, without PyTorch's advice to load it unsafely."""
    refused = re.search(r"GLOBAL (\S+) ", str(error))
    if refused:
        return f"it contains {refused[1]}, which is not plain data"
    return f"it is cut short, or no weight file ({type(error).__name__})"


def read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors as `model`, beside `names` and `about` from JSON texts in the metadata."""
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            known = {key: json.loads(texts[key]) for key in ("names", "about") if key in texts}
            return {**known, "model": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"can't read the weights {path}: {error}") from error


def weights_of(content: Mapping[str, Any]) -> StateDict:
    """The state dict in the content of a file: under one of the usual keys, or the content itself.

    Raises:
        DataError: there are no tensors in it.
    """
    state = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    return to_tensors(state)


def average_of(content: Mapping[str, Any]) -> StateDict | None:
    """The running average of the weights in the content of a file, or None."""
    state = next((content[key] for key in EMA_KEYS if isinstance(content.get(key), Mapping)), None)
    if state is None:
        return None
    return to_tensors(
        next((state[key] for key in ("module", *STATE_KEYS) if isinstance(state.get(key), Mapping)), state)
    )


def to_tensors(state: Mapping[str, Any]) -> StateDict:
    """The entries of a dict that are tensors or arrays.

    Raises:
        DataError: there are none.
    """
    arrays = {str(k): torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
    tensors = {key: value for key, value in arrays.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(f"there are no weights in it: its entries are {', '.join(map(str, state))[:200] or 'none'}")
    return tensors
