"""The size that a network may have by the files that it is loaded from: a config may ask for anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, cached_file

from dino.utils.files import DataError
from dino.weights.names import StateDict
from dino.weights.size_check import SizeGuard

_PLACES = ("cache_dir", "revision", "subfolder", "token")  # options of `from_pretrained` that say where a file is
_NAMES = ("model*.safetensors", "pytorch_model*.bin")  # of files with weights, parts and variants too
_PIECES = 1000  # tensors that a file without a list of them may have
_SPARE = 2**25  # numbers beyond twice the files': a backbone's classifier, which is dropped at once
_FOR_A_LABEL = 2**12  # numbers of all layers that may be new for a label: 2**11 in the published models


class _Source(NamedTuple):
    """What `from_pretrained` loads."""

    name: str  # a folder, or a name on the hub
    options: Mapping[str, Any]


_SOURCE: ContextVar[_Source | None] = ContextVar("source", default=None)


@contextmanager
def loading_from(name: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Context where `guard_of_files` knows what is loaded.

    Args:
        name: the first argument of `from_pretrained`.
        options: its other arguments.

    Raises:
        DataError: a file is broken.
    """
    other = name is None or options.get("state_dict") is not None or options.get("gguf_file") is not None
    source = None if other else _Source(str(name), options)
    token = _SOURCE.set(source)
    try:
        yield
    except SafetensorError:  # of a version that opens the weights before it builds the network
        if source is not None:
            _list_weights(_find_folder(source))
        raise
    finally:
        _SOURCE.reset(token)


def guard_of_files(num_labels: int) -> SizeGuard | None:
    """A guard under which a network may become as large as the weights that `from_pretrained` loads into it.

    Args:
        num_labels: of the network. Its layers for them may be new.

    Returns:
        the guard; None if nothing is loaded, or from unknown files.

    Raises:
        DataError: a file is broken.
    """
    source = _SOURCE.get()
    weights = {} if source is None else _list_weights(_find_folder(source))
    if source is None or not weights:
        return None
    grows = bool(source.options.get("ignore_mismatched_sizes"))
    return SizeGuard(weights, spare=_SPARE + grows * num_labels * _FOR_A_LABEL)


def _find_folder(source: _Source) -> Path | None:
    """The folder of the files, in the cache of the hub where `name` is no folder; None if it is unknown."""
    places = {name: source.options[name] for name in _PLACES if source.options.get(name) is not None}
    if Path(source.name).is_dir():
        return Path(source.name, places.get("subfolder", ""))
    try:
        found = cached_file(source.name, CONFIG_NAME, local_files_only=True, **places)
    except (OSError, ValueError):  # a name that no repository can have
        return None
    return None if found is None else Path(found).parent


def _list_weights(folder: Path | None) -> StateDict:
    """The tensors of the files with weights in a folder, without memory.

    Raises:
        DataError: a file is broken.
    """
    found: StateDict = {}
    for path in sorted(path for name in _NAMES for path in (folder.glob(name) if folder else ())):
        if path.suffix == ".safetensors":
            found |= _list_tensors(path)
        else:
            found |= {f"{path.name} {i}": _without_memory(path.stat().st_size // _PIECES + 1) for i in range(_PIECES)}
    return found


def _list_tensors(path: Path) -> StateDict:
    """The tensors of a safetensors file, without memory."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no dict)
        return {name: _without_memory(*shape) for name, shape in shapes.items()}
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(f"can't read the weights {path}: {str(error)[:300]}") from error


def _without_memory(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")
