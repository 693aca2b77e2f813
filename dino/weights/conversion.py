"""Conversion of checkpoint files from and to the formats of other DINO programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from dino.modeling.detector import Detector
from dino.utils.files import DataError, UserError, write_whole
from dino.utils.paths import WEIGHTS

from .addresses import locate
from .checkpoint_formats import (
    BRANCHES,
    UNUSED_LABELS,
    coco_to_contiguous,
    convert,
)
from .coco_classes import RAW_COCO_CLASSES, coco_names
from .description import build_network, detector_for_classes, read_category_ids, read_description, set_classes
from .file_weights import FileWeights, read_weights
from .inferred_description import Unshown, find_unshown, name_classes, with_description
from .load_report import reason_of
from .loading import load_weights
from .names import StateDict
from .reading import DESCRIPTION, read_content
from .transformers_folder import keeps_losses
from .transformers_writing import write_folder


class _Position(NamedTuple):
    """Constants of the position encoding, as far as a person states them."""

    temperature: float | None
    offset: float | None


class _Input(NamedTuple):
    """What is converted."""

    content: dict[str, Any]  # of the file
    found: FileWeights
    own: StateDict  # to write, in own format
    source: str  # the file, as it was named

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.own["decoder.class_heads.0.bias"])


def convert_file(
    source: str | Path,
    target: Path,
    *,
    to: str,
    coco80: bool = False,
    copy: str = "auto",
    temperature: float | None = None,
    offset: float | None = None,
) -> None:
    """Convert one file.

    Args:
        source: a checkpoint in any known format (.pth, .safetensors, a folder of transformers), an address, or the name
            of published weights.
        target: the file to write, or with `to` huggingface the folder, unless its name ends as that of a file with
            weights; must not exist.
        to: the format to write: own, official, detrex, huggingface, mmdetection, or "safetensors" for own format in
            such a file.
        coco80: of 91 classes (raw ids), keep the 80 that COCO has.
        copy: "model", "ema", or "auto" for the running average if the file has one.
        temperature, offset: of the position encoding that `source` was trained with, for the description.

    Raises:
        DataError: `source` can't be used, or the other program can't express the model.
        UserError: `target` exists, or one of the two constants is missing.
    """
    if target.exists():
        raise UserError(f"{target} exists: choose another name, or move it away")
    position = _Position(temperature, offset)
    given = _read(str(source), coco80, copy)
    _check_position(position, given.found.format)
    if to == "huggingface" and target.suffix.lower() not in WEIGHTS:
        _write_folder(target, given, position)
    else:
        _write_file(target, given, position, to, copy)


def _read(source: str, coco80: bool, copy: str) -> _Input:
    """Read what is to be converted.

    Raises:
        DataError: it can't be used.
    """
    content = read_content(locate(source))
    with _errors_of(source):
        found = read_weights(content, copy)
        return _Input(content, found, _read_own(found, coco80), source)


@contextmanager
def _errors_of(source: str) -> Iterator[None]:
    """Turn what broken weights can raise into a DataError that names their file."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"can't convert {source}: {reason_of(error)}") from error


def _write_file(target: Path, given: _Input, position: _Position, to: str, copy: str) -> None:
    """Write a file, see `convert_file`."""
    describable = to in ("own", "safetensors")  # the other formats have no place for a description
    with _errors_of(given.source):
        state = given.own if describable else convert(given.own, to=to)
    extra = _describe_or_warn(given, position) if describable else {}
    _print_report(given, extra.get("about") or given.content.get("about"), copy)
    target.parent.mkdir(parents=True, exist_ok=True)
    if "safetensors" in (to, target.suffix.removeprefix(".")):
        _write_safetensors(target, state, extra)
    else:
        write_whole(target, lambda part: torch.save({"model": state, **extra}, part))
    what = f"{to} format, {len(state)} tensors, {given.classes} classes"
    print(f"{target}: {what}; {given.source} was in {given.found.format} format")
    if not describable:
        _print_dropped(given.own, to)
        for setting in sorted(_unwritten(given.content)):
            print(f"dropped: {setting}; the {to} format has no place for it, so set it in the other program")


def _unwritten(content: Mapping) -> set[str]:
    """Settings that change what the network computes, that no tensor shows, and that other programs have off."""
    about = content.get("about")
    text = about.get("config") if isinstance(about, Mapping) else None
    found: set[str] = set()

    def note(node: dict[str, Any]) -> dict[str, Any]:
        if node.get("activation", "relu") != "relu":
            found.add(f"the activation {node['activation']!s:.20}")
        if node.get("dilated") or str(node.get("_target_")).endswith(".dilated_stages"):
            found.add("the dilated stage of the ResNet")
        return node

    with suppress(ValueError, RecursionError):  # a broken description is none
        json.loads(text if isinstance(text, str) else "{}", object_hook=note)
    return found


def _check_position(position: _Position, format_: str) -> None:
    """Raise a UserError where one constant is stated, and the other could be any of those that the program has used."""
    if format_ in ("detrex", "mmdetection") and (position.temperature is None) != (position.offset is None):
        raise UserError(f"--temperature and --offset belong together for a file of {format_}: give both")


def _print_dropped(own: StateDict, to: str) -> None:
    """Say what the format of another program has no place for."""
    if UNUSED_LABELS in own and to == "detrex":
        print("dropped: the label embeddings that belong to no class; detrex has no place for them")
    if to == "detrex":
        print("dropped: the constants of the position encoding; remember them, detrex has no place for them either")
    if any(key.startswith(BRANCHES) for key in own):
        print(f"dropped: the branches, which only training uses; the {to} format has no place for them")


def _read_own(found: FileWeights, coco80: bool) -> StateDict:
    """The weights to convert, in own format."""
    if found.format == "backbone":
        convert(found.state)  # says what the file is
    if not coco80:
        return found.state
    classes = len(found.state["decoder.class_heads.0.bias"])
    if classes != RAW_COCO_CLASSES:
        raise DataError(f"--coco80 needs a model with the 91 raw ids of COCO, but this one has {classes} classes")
    print("dropped: the rows of the 11 ids that COCO does not use, in class heads and label embedding")
    return coco_to_contiguous(found.state)


def _describe(given: _Input, position: _Position) -> dict[str, Any]:
    """What describes the model in a file in own format: the input's own description, or what its tensors show.

    Raises:
        DataError: they don't show it.
    """
    content, classes = given.content, given.classes
    if given.found.format == "own":
        return _with_classes({key: content[key] for key in DESCRIPTION if key in content}, classes)
    described = with_description(content, given.own, _unshown(given, position), given.source)
    _print_names(described["names"], classes)
    return {key: described[key] for key in DESCRIPTION if key in described}


def _describe_or_warn(given: _Input, position: _Position) -> dict[str, Any]:
    """`_describe`; the names of the classes alone, with a warning, where nothing shows more."""
    try:
        return _describe(given, position)
    except DataError as error:
        print(f"warning: no description, so the file serves with a recipe alone: {error}")
    described = name_classes(given.content, given.classes)
    _print_names(described["names"], given.classes)
    return described


def _print_names(names: list[str], classes: int) -> None:
    """Say that the names are those of COCO, where they are."""
    if names == coco_names(classes):
        print(f"names: those of COCO, because the model has {classes} classes")


def _with_classes(described: dict[str, Any], classes: int) -> dict[str, Any]:
    """The description of a file in own format, for COCO's 80 classes where only these are kept of 91."""
    names, about = described.get("names"), described.get("about")
    if classes == RAW_COCO_CLASSES or not isinstance(names, list) or len(names) != RAW_COCO_CLASSES:
        return described
    described = {**described, **name_classes({}, classes)}
    if isinstance(about, Mapping) and isinstance(about.get("config"), str):
        config = set_classes(json.loads(about["config"]), RAW_COCO_CLASSES, classes)
        described["about"] = {**about, "config": json.dumps(config)}
    return described


def _write_folder(target: Path, given: _Input, position: _Position) -> None:
    """Write a folder for transformers.

    Raises:
        DataError: nothing describes the model, or weights of it are missing.
    """
    try:
        content = {"model": given.own, **_describe(given, position)}
    except DataError as error:
        raise DataError(f"can't convert {given.source}: {error}") from error
    config, names, _ = read_description(content, given.source)
    built, report = detector_for_classes(content, given.source, names)
    ids = read_category_ids(content, given.source)
    detector = Detector(built.network, built.preprocessing, names, category_ids=ids)
    for note in given.found.notes:
        print(note)
    print(f"weights: {report}")
    write_folder(target, detector, config)
    print(f"{target}: folder for transformers, {len(names)} classes; {given.source} was in {given.found.format} format")
    if UNUSED_LABELS in given.own:
        print("dropped: the label embeddings that belong to no class; transformers has no place for them")
    if not keeps_losses(config.get("criterion")):
        print("dropped: the losses of its recipe; transformers' Trainer computes those of DINO")


def _unshown(given: _Input, position: _Position) -> Unshown:
    """What no tensor shows: as stated, else as the file says.

    Raises:
        DataError: neither says it.
    """
    asked = None in position
    found = find_unshown(given.content, given.found.format, given.source) if asked else Unshown()
    if position.temperature is not None:
        found = found._replace(temperatures=(position.temperature,) * 2)
    return found if position.offset is None else found._replace(offset=position.offset)


def _print_report(given: _Input, about: Any, copy: str) -> None:
    """Print the report of loading the file into the network that `about` describes; without one, notes on the file."""
    try:
        network = build_network(json.loads(about["config"]))
    except Exception:  # a description can be absent, or hold anything; `dino predict` says what is wrong with it
        for note in given.found.notes:
            print(note)
    else:
        print(f"weights: {load_weights(network, given.content, copy=copy, name=given.source)}")


def _write_safetensors(path: Path, state: StateDict, extra: dict[str, Any]) -> None:
    """Write a file of tensors, with everything else as JSON text in its metadata."""
    tensors = {key: value.clone().contiguous() for key, value in state.items()}  # safetensors refuses shared memory
    metadata = {key: json.dumps(value) for key, value in extra.items()}
    write_whole(path, lambda part: save_file(tensors, part, {"format": "pt", **metadata}))
