"""Reading weight files without running what they contain."""

from __future__ import annotations

import argparse
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dino.utils.files import DataError

from .content_check import MOST_INFLATED, check_content
from .folder_json import CONFIG, MODEL_TYPE, WEIGHT_FILES, check_shards, is_index, read_json
from .names import StateDict
from .pickle_check import BoundedFile, PickleCheck
from .pickles import read_pickle
from .signatures import split_copies
from .stand_ins import PYTORCH_NAMES, PYTORCH_STAND_INS
from .transformers_folder import describe_folder

DESCRIPTION = ("names", "category_ids", "about")  # what a file of this project has besides tensors
# Under which programs keep the weights, DeepSpeed under `module`, and their running average.
_STATE_KEYS = ("model", "state_dict", "model_state", "model_state_dict", "module", "blobs")
_EMA_KEYS = ("ema_model", "ema_state", "ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model_state_dict")
_DEPTH = 5  # of dicts in dicts
_MOST_AT_ONCE = 2**26  # bytes of a zip file's list of contents, of a pickle, and of a text in it
_MOST_HEADER = 2**24  # bytes of a safetensors file's list of tensors, and texts


def read_content(path: str | Path) -> dict[str, Any]:
    """Read a weight file: plain data, and tensors on the CPU. Runs no code of the file.

    A `.safetensors` file gives `model`, and `names` and `about` from its metadata. `dino.weights.pickles` reads `.pkl`
    files. All others are PyTorch's; these may hold an argparse.Namespace, as those of the official program do. Settings
    and states of trainers become data or `Skipped`, see `stand_ins`. The weights in a folder of transformers get the
    description of the JSON files beside them; an index gives the tensors of all its files.

    Raises:
        DataError: the file is missing, cut short, altered, or holds more than plain data; or it claims more memory, or
            nests deeper, than a weight file does.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weights not found: {path}")
    content = _read_shards(path) if is_index(path) else _read_file(path)
    return content | _describe_beside(path) if "about" not in content else content


def _read_shards(path: Path) -> dict[str, Any]:
    """Read the files that an index names -> `model`."""
    state: StateDict = {}
    for name, tensors in check_shards(path).items():
        found = weights_of(_read_file(path.parent / name))
        missing = [tensor for tensor in tensors if tensor not in found]
        if missing:
            raise DataError(f"can't use the weights {path}: {name} lacks {', '.join(missing[:3])}")
        state |= {tensor: found[tensor] for tensor in tensors}
    return {"model": state}


def _describe_beside(path: Path) -> dict[str, Any]:
    """The description of weights in a folder of transformers; {} for all other files."""
    config = path.parent / CONFIG
    if path.name not in WEIGHT_FILES or not config.is_file():
        return {}
    try:
        kind = read_json(config).get("model_type")
    except DataError:  # the weights were named alone: `find_weights` reads the config of a folder first
        return {}
    return describe_folder(path.parent) if kind == MODEL_TYPE else {}


def _read_file(path: Path) -> dict[str, Any]:
    """`read_content` for a single file."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pkl":
        return read_pickle(path)
    try:
        content = _read_torch(path)
    except _AlteredError as error:
        raise DataError(f"can't use the weights {path}: the file was altered since it was written ({error})") from None
    except Exception as error:  # a broken file can raise anything
        raise DataError(f"can't read the weights {path}: {_name_other(path) or _reason(error)}") from error
    if not isinstance(content, Mapping):
        raise DataError(f"can't use the weights {path}: a dict was expected, not {type(content).__name__}")
    return dict(content)


class _AlteredError(Exception):
    """The checksum of a part of a zip file differs."""


def _reason(error: Exception) -> str:
    """Why a file can't be read, without PyTorch's advice to load it unsafely."""
    refused = re.search(r"GLOBAL (\S+) ", str(error))
    if refused:
        return f"the file contains {refused[1]}, which is not plain data"
    if isinstance(error, DataError):
        return str(error)[:300]
    return f"the file is cut short, or no weight file ({type(error).__name__})"


def _name_other(path: Path) -> str:
    """What a file is that people often have in place of weights, for a message; "" for anything else."""
    with open(path, "rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, such as one that asks to confirm a download: fetch the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs: fetch the file itself (git lfs pull)"
    return "" if start else "it is empty"


def _read_torch(path: Path) -> Any:
    """Read a file of `torch.save`, after a check of all that its reader would take on trust."""
    with BoundedFile(path, _MOST_AT_ONCE) as file:
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":  # the test by which PyTorch chooses its reader
            _check_zip(file, path.stat().st_size)
        elif start[:1] == b"\x80":
            _check_legacy(file)
        else:
            raise ValueError("no pickle")
    given = [argparse.Namespace, *((made, name) for name, made in PYTORCH_STAND_INS.items())]
    with torch.serialization.safe_globals(given):
        content = torch.load(path, map_location="cpu", weights_only=True)
    check_content(content, path.stat().st_size)
    return content


def _check_zip(file: BinaryIO, size: int) -> None:
    """Check the pickles and checksums of a zip file, and that its parts are no larger than the file."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        inflated = sum(part.file_size for part in parts)
        if inflated > MOST_INFLATED * size:
            raise DataError(f"the file of {size:,} bytes inflates to {inflated:,}")
        check = PickleCheck(PYTORCH_NAMES)
        for part in parts:
            if part.filename.lower().endswith(".pkl"):
                if part.file_size > _MOST_AT_ONCE:
                    raise DataError(f"{part.filename} of the file has {part.file_size:,} bytes, more than any weights")
                check.run(io.BytesIO(archive.read(part)))
        altered = archive.testzip()  # PyTorch does not check
    if altered:
        raise _AlteredError(altered)


def _check_legacy(file: BinaryIO) -> None:
    """Check the pickles at the start of a file of `torch.save` before PyTorch 1.6. The numbers follow them."""
    check = PickleCheck(PYTORCH_NAMES)
    for _ in range(5):  # magic number, version, machine, content, keys of the numbers
        check.run(file)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read tensors as `model`, and `names` and `about` from JSON texts in the metadata."""
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MOST_HEADER:
            raise DataError(f"its header has {header:,} bytes, where at most {_MOST_HEADER:,} were expected")
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            known = {key: json.loads(texts[key]) for key in DESCRIPTION if key in texts}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        check_content(state, path.stat().st_size)
    except Exception as error:  # JSON and its nesting can raise anything
        raise DataError(f"can't read the weights {path}: {str(error)[:300]}") from error
    return {**known, "model": _with_second_names(state, texts)}


def _with_second_names(state: StateDict, metadata: Mapping[str, str]) -> StateDict:
    """Add the names that safetensors left out: its `save_model` notes left out -> kept for tensors with several."""
    return {name: state[kept] for name, kept in metadata.items() if kept in state} | state


def weights_of(content: Mapping[str, Any]) -> StateDict:
    """Find the state dict in the content of a file: under one of the usual keys, or the content itself.

    A file that has nothing but a running average gives that.

    Raises:
        DataError: it has no tensors.
    """
    raw, average = _find_copies(content)
    if raw is not None:
        return _to_tensors(raw)
    return _to_tensors(content if average is None else average)


def average_of(content: Mapping[str, Any], copy: str = "auto") -> StateDict | None:
    """Find the running average of the weights in the content of a file; None if there is none.

    Args:
        content: of `read_content`.
        copy: "auto"; "model" for None in any case; "ema" for an error if there is none.

    Raises:
        DataError: there is none, but `copy` is "ema"; there is nothing else, but `copy` is "model"; or it has no
            tensors.
    """
    raw, average = _find_copies(content)
    if raw is not None and average is None:
        copies = split_copies(_to_tensors(raw))  # Lightning keeps both in one dict
        raw, average = copies.raw, copies.average
    if average is None and copy == "ema":
        raise DataError("the file has no running average (EMA) of the weights")
    if average is not None and raw is None and copy == "model":
        raise DataError("the file has no weights but their running average (EMA): copy=model asks for the others")
    return None if average is None or copy == "model" else _to_tensors(average)


def _find_copies(content: Mapping[str, Any]) -> tuple[Mapping | None, Mapping | None]:
    """Find the weights and their running average in the content of a file; None for what it lacks.

    mmengine swaps the two when it saves.
    """
    average = next((_inside(content[key]) for key in _EMA_KEYS if isinstance(content.get(key), Mapping)), None)
    inner = _inside(content)
    raw = inner if inner is not content or _has_tensors(content) else None
    meta = content.get("meta")
    swapped = "ema_state_dict" in content and isinstance(meta, Mapping) and "mmengine_version" in meta
    return (average, raw) if swapped and None not in (raw, average) else (raw, average)


def _inside(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Go into a dict as far as there is another one under one of the usual keys."""
    for _ in range(_DEPTH):
        found = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), None)
        if found is None:
            break
        content = found
    return content


def _has_tensors(state: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor | np.ndarray) for value in state.values())


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
