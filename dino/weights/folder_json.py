"""The files of a transformers folder: which they are, and their JSON texts within bounds. Needs no PyTorch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dino.utils.files import DataError
from dino.utils.printable import printable

MODEL_TYPE = "dino_detr"
CONFIG, PROCESSOR, INDEX = "config.json", "preprocessor_config.json", "model.safetensors.index.json"
_INDICES = (INDEX, "pytorch_model.bin.index.json")  # which shard has a tensor
WEIGHT_FILES = ("model.safetensors", INDEX, "pytorch_model.bin", _INDICES[1])  # in the order of preference
MOST_TEXT = 16 << 20  # bytes of a JSON file
_MOST_SHARDS = 1000
_SHARD = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}\.(safetensors|bin)", re.ASCII)  # a plain name in the same folder
_NUMBERED = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)  # folders that transformers' Trainer writes


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DataError: it is missing, too large, nested too deep, or something else.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_TEXT + 1)
        if len(text) > MOST_TEXT:
            raise DataError(f"can't read {path}: it has more than {MOST_TEXT:,} bytes")
        found = json.loads(text)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # numbers of too many digits, too
        raise DataError(f"can't read {path}: it is no JSON ({str(error)[:100]})") from error
    if not isinstance(found, dict):
        raise DataError(f"can't read {path}: an object was expected, not {type(found).__name__}")
    return found


def find_weights(folder: Path) -> Path | None:
    """The weights in a folder that transformers wrote: a file, or the index of several; None for any other folder.

    Raises:
        DataError: the folder holds another model than DINO, or no weights.
    """
    if not (folder / CONFIG).is_file():
        return None
    there = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if there is None and "model_type" not in read_json(folder / CONFIG):
        return None
    check_model_type(folder)
    if there is None:
        raise DataError(f"the folder {folder} lacks its weights: model.safetensors was expected beside {CONFIG}")
    return there


def check_model_type(folder: Path) -> None:
    """Raise a DataError unless the config in a folder is one of DINO."""
    stated = read_json(folder / CONFIG).get("model_type")
    if stated != MODEL_TYPE:
        kind = f"a model of the type {printable(stated, 100)}" if stated is not None else "a model of no stated type"
        raise DataError(f"the folder {folder} holds {kind} (model_type in {CONFIG}): only {MODEL_TYPE} is read")


def find_newest(folder: Path) -> Path | None:
    """The weights of the newest `checkpoint-NUMBER` in a folder, of those that are whole; None without any.

    Raises:
        DataError: see `find_weights`.
    """
    numbers = {path: _NUMBERED.fullmatch(path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    newest = sorted((path for path, found in numbers.items() if found), key=lambda path: -int(numbers[path][1]))
    whole = (path for path in newest if any((path / name).is_file() for name in WEIGHT_FILES))
    return next(filter(None, map(find_weights, whole)), None)


def is_index(path: Path) -> bool:
    """Whether this is an index of shards, by its name."""
    return path.name in _INDICES


def read_index(path: Path) -> dict[str, list[str]]:
    """Read an index: file name of a shard -> the names of the tensors in it.

    Raises:
        DataError: it is broken, or names a file that is not in its own folder.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise DataError(f"can't use {path}: weight_map, a dict of tensor -> file, was expected")
    shards: dict[str, list[str]] = {}
    for tensor, name in places.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise DataError(f"can't use {path}: {printable(name, 100)} is no name of a file with weights beside it")
        shards.setdefault(name, []).append(tensor)
    if len(shards) > _MOST_SHARDS:
        raise DataError(f"can't use {path}: it names {len(shards):,} files, at most {_MOST_SHARDS:,} were expected")
    return shards


def check_shards(path: Path) -> dict[str, list[str]]:
    """`read_index`, with every shard there.

    Raises:
        DataError: one is missing; see `read_index`.
    """
    shards = read_index(path)
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if missing:
        raise DataError(f"the folder {path.parent} lacks {', '.join(missing[:3])}, which {path.name} names")
    return shards
