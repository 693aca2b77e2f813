"""A network or a `Detector` from its checkpoint alone: no recipe, and for most backbones no Detectron2.

A checkpoint of this project has `names` and `category_ids` of the classes, and under `about` the recipe's `model` as
JSON text (`config`) and what the network expects of its images (`preprocessing`). Files are not trusted: a description
can build the parts listed in `network_parts.py` and nothing else, and can't name a file or an address.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dino.modeling import DINO
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import DataError

from .checkpoint_formats import recognise
from .class_rows import check_known
from .detector_backbones import name_any_detector
from .inferred_description import open_checkpoint
from .load_report import Report
from .loading import load_weights
from .names import StateDict
from .network_parts import PARTS as PARTS  # for others
from .network_parts import build_network, check_description, set_classes
from .reading import average_of, weights_of
from .size_check import SizeGuard, check_size

_MOST_NAMES, _LONGEST_NAME = 100_000, 1000  # classes; characters
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LONGEST_CONFIG = 2**20  # characters


class _ModelFromCheckpoint(NamedTuple):
    """The result of `model_from_checkpoint`."""

    network: DINO  # in evaluation mode, on the CPU
    names: list[str]  # of the classes
    preprocessing: Preprocessing


def detector_from_checkpoint(path: str | Path, copy: str = "auto") -> Detector:
    """Build the `Detector` of a checkpoint: network, weights, class names and preprocessing.

    Arguments and errors as of `model_from_checkpoint`.

    Returns:
        the detector, in evaluation mode, on the CPU.
    """
    path, content = open_checkpoint(path)
    network, names, preprocessing = _build_model(content, path, copy)
    return Detector(network, preprocessing, names, category_ids=read_category_ids(content, path)).eval()


def model_from_checkpoint(path: str | Path, *, copy: str = "auto") -> _ModelFromCheckpoint:
    """Build the network of a checkpoint with its weights.

    torchvision's ResNets replace Detectron2's. Other backbones of Detectron2 need Detectron2.

    Args:
        path: a checkpoint of this or another program: a file, an address, the name of published weights, or the folder
            of a run, see `dino.weights.locate`.
        copy: "model", "ema" or "auto", as of `load_weights`.

    Raises:
        DataError: the file is missing, broken or unsafe; it has no description; or the description asks for a part that
            is not on the list, or for Detectron2 where that is not installed.
    """
    path, content = open_checkpoint(path)
    return _build_model(content, path, copy)


def detector_for_classes(
    content: Mapping, path: str | Path, names: Sequence[str], *, copy: str = "auto"
) -> tuple[Detector, Report]:
    """Build the `Detector` of a checkpoint for the classes of a data set, and report on its weights.

    The detector has the rows of these classes, by name. As many other names leave all rows in place.

    Args:
        content: of the file, see `open_checkpoint`.
        path: the file, for messages.
        names: of the classes of the data.
        copy: "model", "ema" or "auto", as of `load_weights`.

    Returns:
        the detector, in evaluation mode, on the CPU; and the report.

    Raises:
        DataError: see `model_from_checkpoint`; or the data has classes that the model lacks.
    """
    config, known, preprocessing = read_description(content, path)
    check_known(known, names, path)
    network = _build_bounded(config, content, path, copy, len(names) if len(names) != len(known) else None)
    report = load_weights(network, content, copy=copy, name=str(path), classes=names)
    _check_whole(report, path)
    _check_heads(network, names, path)
    return Detector(network, preprocessing, names).eval(), report


def _build_bounded(config: dict, content: Mapping, path: str | Path, copy: str, classes: int | None = None) -> DINO:
    """Build the network of a file, no larger than its weights, with random ones; for fewer `classes` than the file's.

    Raises:
        DataError: it is larger, or can't be built.
    """
    compared = check_network_size(config, content, path, copy)
    node = config["network"] if classes is None else set_classes(config["network"], len(content["names"]), classes)
    try:
        with nullcontext() if compared else SizeGuard(_all_weights(content, copy)):
            return build_network({"network": node})
    except Exception as error:  # wrong arguments can raise anything
        raise _cannot_build(path, error) from error


def _check_whole(report: Report, path: str | Path) -> None:
    """Raise a DataError if a file lacked tensors of its own model."""
    if report.fresh:
        raise DataError(f"{path} lacks weights of its own model: {', '.join(list(report.fresh)[:3])}")


def _check_heads(network: DINO, names: Sequence[str], path: str | Path) -> None:
    """Raise a DataError unless a network has a name for each of its classes."""
    classes = len(network.decoder.class_heads[0].bias)
    if len(names) != classes:
        raise DataError(f"{path} has {len(names)} names for {classes} classes")


def _build_model(content: Mapping, path: str | Path, copy: str) -> _ModelFromCheckpoint:
    """`model_from_checkpoint` for the content of a file."""
    config, names, preprocessing = read_description(content, path)
    network = _build_bounded(config, content, path, copy)
    _check_whole(load_weights(network, content, copy=copy, name=str(path)), path)
    _check_heads(network, names, path)
    return _ModelFromCheckpoint(network.eval(), names, preprocessing)


def _name_kind(content: Mapping) -> str:
    """What a file without a description seems to be, for a message; "" where nothing shows."""
    with suppress(ValueError):  # a DataError too
        state = weights_of(content)
        if recognise(state) == "own":
            return (
                ": it is a bare state dict. For the checkpoint of Detectron2's own lazyconfig_train_net.py, put the "
                "config.yaml of its run beside it. Evaluate that of another training program with its recipe, dino "
                "eval FILE --config-file RECIPE; convert the original of a converted file again (detrex' with "
                "--temperature and --offset)"
            )
        return f": it is {name_any_detector(state) or 'no detector'}"
    return ""


def check_network_size(config: Mapping, content: Mapping, path: str | Path, copy: str = "auto") -> bool:
    """Check that a described network is not larger than the weights of its file, before memory is taken for it.

    Args:
        config: of `read_description`.
        content: of `read_content`.
        path: the file, for messages.
        copy: "model", "ema" or "auto", as of `load_weights`.

    Returns:
        as of `check_size`.

    Raises:
        DataError: it is larger, or can't be built.
    """
    try:
        return check_size(lambda: build_network(config), _all_weights(content, copy))
    except Exception as error:  # wrong arguments can raise anything
        raise _cannot_build(path, error) from error


def _all_weights(content: Mapping, copy: str) -> StateDict:
    """The tensors of a file and of their running average; none of a file without weights."""
    found: StateDict = {}
    for read in (weights_of, partial(average_of, copy=copy)):
        with suppress(DataError):
            found |= read(content) or {}
    return found


def read_description(content: Mapping, path: str | Path) -> tuple[dict, list[str], Preprocessing]:
    """Read the config, the class names and the preprocessing from the content of a checkpoint, and check them.

    Raises:
        DataError: see `model_from_checkpoint`.
    """
    about, names = content.get("about"), content.get("names")
    if not isinstance(about, Mapping) or not isinstance(about.get("config"), str) or not _is_list_of(names, str):
        raise DataError(
            f"{path} does not describe its model{_name_kind(content)}. Give a detector's checkpoint; of others' "
            "files, `dino convert` says what they lack"
        )
    try:
        _check_names(names)
        preprocessing = _read_preprocessing(about.get("preprocessing"))
        config = _read_config(about["config"])
    except Exception as error:  # JSON can hold anything
        raise _cannot_build(path, error) from error
    return config, list(names), preprocessing


def _check_names(names: Sequence[str]) -> None:
    """Raise a DataError for class names that no data set has."""
    if len(names) > _MOST_NAMES:
        raise DataError(f"{len(names):,} names of classes: at most {_MOST_NAMES:,} were expected")
    odd = next((name for name in names if len(name) > _LONGEST_NAME or _CONTROL.search(name)), None)
    if odd is not None:
        raise DataError(f"the class name {odd[:50]!r} is longer than {_LONGEST_NAME}, or has control characters")


def _read_config(text: str) -> dict:
    """Read and check the `config` of a description.

    Raises:
        DataError: see `model_from_checkpoint`.
    """
    if len(text) > _LONGEST_CONFIG:
        raise DataError(f"a description of {len(text):,} characters: at most {_LONGEST_CONFIG:,} were expected")
    config = json.loads(text)
    check_description(config["network"])
    return config


def read_category_ids(content: Mapping, path: str | Path) -> list[int]:
    """Read the ids of the classes in the data set, by label: 1, 2, … in files from before they were stored.

    Args:
        content: of `read_content`.
        path: the file, for messages.

    Raises:
        DataError: they are no ids, or not one for each class.
    """
    names = content.get("names") or ()
    ids = content.get("category_ids", list(range(1, len(names) + 1)))
    whole = isinstance(ids, list | tuple) and all(type(number) is int and abs(number) < 2**63 for number in ids)
    if not whole or len(set(ids)) != len(ids) or len(ids) != len(names):
        raise DataError(f"{path}: category_ids must be {len(names)} different whole numbers, one for each class")
    return list(ids)


def _cannot_build(path: str | Path, error: Exception) -> DataError:
    why = error if isinstance(error, DataError) else f"{type(error).__name__}: {str(error)[:300]}"
    return DataError(f"can't build the model of {path}: {why}")


def _read_preprocessing(values: Any) -> Preprocessing:
    """Check what a checkpoint says about images.

    Raises:
        DataError: a value is missing, unknown, or makes no sense.
    """
    if not isinstance(values, Mapping) or {*values, *_ADDED} != set(Preprocessing._fields):
        raise DataError(f"preprocessing must be a dict of {', '.join(Preprocessing._fields)}")
    for name, value in values.items():
        expected, fits = _EXPECTED[name]
        if not fits(value):
            raise DataError(f"preprocessing: {name} is {reprlib.repr(value)}, but {expected} was expected")
    return Preprocessing(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()})


def _is_list_of(value: Any, kind: type | tuple) -> bool:
    """Whether `value` is a list or tuple of nothing but `kind`, and not empty."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, kind) for item in value)


def _are_colors(value: Any, least: float, most: float) -> bool:
    """Whether `value` is a list of three numbers from `least` to `most`; NaN is none."""
    return _is_list_of(value, (int, float)) and len(value) == 3 and all(least <= number <= most for number in value)


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _is_range(value: Any) -> bool:
    numbers = _is_list_of(value, (int, float)) and len(value) == 2
    return numbers and -1e12 <= value[0] < value[1] <= 1e12 and value[1] - value[0] > 1e-12


# Field of `Preprocessing` -> what a message calls its values, and the test of a value.
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "pixel_mean": ("a list of three numbers from -10,000 to 10,000", lambda value: _are_colors(value, -1e4, 1e4)),
    "pixel_std": ("a list of three numbers from 0.001 to 10,000", lambda value: _are_colors(value, 1e-3, 1e4)),
    "short_side": ("an integer from 1 to 10,000", lambda value: _is_count(value, 10_000)),
    "max_size": ("an integer from 1 to 20,000, or null", lambda value: value is None or _is_count(value, 20_000)),
    "max_detections": ("an integer from 1 to 100,000", lambda value: _is_count(value, 100_000)),
    "input_range": ("two rising numbers or null", lambda value: value is None or _is_range(value)),
}
_ADDED = {"input_range"}  # fields that files from before do not have
