"""Convert checkpoints between this project, the official program, detrex and Hugging Face's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file

from dino.utils.files import DataError, UserError, write_whole
from dino.weights.description import Preprocessing

from .checkpoint_formats import (
    COCO_IDS,
    RAW_COCO_CLASSES,
    UNUSED_LABELS,
    coco_to_contiguous,
    convert,
    recognise,
)
from .inferred_description import describe_network
from .names import StateDict
from .reading import average_of, read_content, weights_of


def convert_file(
    source: Path,
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
        to: the form to write: a key of SIGNATURES, or "safetensors" for the own form in such a file.
        coco80: of 91 classes (raw ids), keep the 80 that COCO has.
        copy: "model", "ema", or "auto" for the running average if the file has one.
        temperature, offset: of the position encoding that `source` was trained with, for the description.

    Raises:
        DataError: the input can't be used, or the model has no such form.
        UserError: the output exists.
    """
    if target.exists():
        raise UserError(f"{target} exists: choose another name, or move it away")
    content = read_content(source)
    describable = to in ("own", "safetensors")
    try:
        form = recognise(weights_of(content))
        own = read_own(content, coco80, copy)
        state = own if describable else convert(own, to=to)
    except ValueError as error:  # a DataError, too
        raise DataError(f"can't convert {source}: {error}") from error
    extra = describe(content, own, form, temperature, offset) if describable else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    if "safetensors" in (to, target.suffix.removeprefix(".")):
        write_safetensors(target, state, extra)
    else:
        write_whole(target, lambda part: torch.save({"model": state, **extra}, part))
    classes = len(own["decoder.class_heads.0.bias"])
    print(f"{target}: {to} form, {len(state)} tensors, {classes} classes; {source} was in {form} form")
    if UNUSED_LABELS in own and to == "detrex":
        print("lost: the label embeddings that belong to no class; detrex has no place for them")


def read_own(content: dict[str, Any], coco80: bool, copy: str) -> StateDict:
    """The weights that are asked for, in own form."""
    own, average = convert(weights_of(content)), average_of(content)
    if copy == "ema" and average is None:
        raise DataError("it has no running average (EMA) of the weights")
    if average is not None and copy != "model":
        print("taken: the running average (EMA) of the weights")
        own |= convert(average)
    if not coco80:
        return own
    classes = len(own["decoder.class_heads.0.bias"])
    if classes != RAW_COCO_CLASSES:
        raise DataError(f"--coco80 is for models with the 91 raw ids of COCO, this one has {classes} classes")
    print("lost: the rows of the 11 ids that COCO does not use, in class heads and label embedding")
    return coco_to_contiguous(own)


def describe(
    content: dict[str, Any], own: StateDict, form: str | None, temperature: float | None, offset: float | None
) -> dict[str, Any]:
    """Class names and description for a file in own form: those of the input, or what can be known of another's."""
    if form == "own":
        return {key: content[key] for key in ("names", "about") if key in content}
    extra = {}
    names = coco_names(len(own["decoder.class_heads.0.bias"]))
    if names:
        extra["names"] = names
        print(f"names: those of COCO, since there are {len(names)} classes")
    if form == "detrex" and None in (temperature, offset):
        print("no description: say --temperature and --offset (10000 -0.5 for detrex' 12 epochs, 20 0 for its 24)")
        return extra
    network = describe_network(own, temperature or 20.0, offset or 0.0)
    if network is None:
        print("no description: its backbone is no ResNet. Use the file with a recipe: train.init_checkpoint=…")
        return extra
    about = {"config": json.dumps({"network": network}), "preprocessing": Preprocessing()._asdict()}
    return extra | {"about": about}


def coco_names(classes: int) -> list[str] | None:
    """The names of COCO's classes where a model has 80, or 91 raw ids of them."""
    raw = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {RAW_COCO_CLASSES: list(raw), len(COCO_IDS): [raw[i] for i in COCO_IDS]}.get(classes)


def write_safetensors(path: Path, state: StateDict, extra: dict[str, Any]) -> None:
    """A file of tensors, with everything else as JSON text in its metadata."""
    tensors = {key: value.clone().contiguous() for key, value in state.items()}  # it takes no tensor under two names
    metadata = {key: json.dumps(value) for key, value in extra.items()}
    write_whole(path, lambda part: save_file(tensors, part, {"format": "pt", **metadata}))
