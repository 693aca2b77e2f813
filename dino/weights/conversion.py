"""Convert checkpoints between this project, the official program, detrex and Hugging Face's form."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file

from dino.utils.files import DataError, write_whole
from dino.weights.description import Preprocessing

from .checkpoint_formats import (
    COCO_IDS,
    RAW_COCO_CLASSES,
    SIGNATURES,
    UNUSED_LABELS,
    coco_to_contiguous,
    convert,
    recognise,
)
from .inferred_description import describe_network
from .names import StateDict
from .reading import average_of, read_content, weights_of

EXAMPLES = """
examples:
  the official 12-epoch checkpoint as one of this project, with COCO's 80 classes and their names inside:
    %(prog)s checkpoint0011_4scale.pth dino_r50_4scale.pth --to own --coco80
  detrex' 12-epoch checkpoint, whose position encoding has other constants:
    %(prog)s dino_r50_4scale_12ep_49_2AP.pth own.pth --to own --temperature 10000 --offset -0.5
  back to the official program: %(prog)s own.pth official.pth --to official
Training and evaluation read all of these forms as they are: train.init_checkpoint=checkpoint0011_4scale.pth
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="dino convert",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN", type=Path, help="a checkpoint in any known form (.pth, .safetensors)")
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write; it must not exist")
    parser.add_argument(
        "--to",
        required=True,
        choices=[*SIGNATURES, "safetensors"],
        help="the form to write; safetensors is the own form in such a file. official and huggingface want a model "
        "whose decoder layers share one pair of heads",
    )
    parser.add_argument(
        "--coco80", action="store_true", help="keep, of 91 classes (raw ids), the 80 that COCO has; this loses rows"
    )
    parser.add_argument(
        "--copy",
        choices=["auto", "model", "ema"],
        default="auto",
        help="ema: the running average; auto: if there is one",
    )
    parser.add_argument("--temperature", type=float, help="of the position encoding that IN was trained with (20)")
    parser.add_argument("--offset", type=float, help="of the same (0)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one file.

    Raises:
        DataError: the input can't be used, the model has no such form, or the output exists.
    """
    args = parse_arguments(argv)
    if args.output.exists():
        raise DataError(f"{args.output} exists: choose another name, or move it away")
    content = read_content(args.input)
    try:
        form = recognise(weights_of(content))
        own = read_own(content, args)
        state = own if args.to in ("own", "safetensors") else convert(own, to=args.to)
    except ValueError as error:  # a DataError, too
        raise DataError(f"can't convert {args.input}: {error}") from error
    extra = describe(content, own, form, args) if args.to in ("own", "safetensors") else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if "safetensors" in (args.to, args.output.suffix.removeprefix(".")):
        write_safetensors(args.output, state, extra)
    else:
        write_whole(args.output, lambda part: torch.save({"model": state, **extra}, part))
    classes = len(own["decoder.class_heads.0.bias"])
    print(f"{args.output}: {args.to} form, {len(state)} tensors, {classes} classes; {args.input} was in {form} form")
    if UNUSED_LABELS in own and args.to == "detrex":
        print("lost: the label embeddings that belong to no class; detrex has no place for them")


def read_own(content: dict[str, Any], args: argparse.Namespace) -> StateDict:
    """The weights that are asked for, in own form."""
    own, average = convert(weights_of(content)), average_of(content)
    if args.copy == "ema" and average is None:
        raise DataError("it has no running average (EMA) of the weights")
    if average is not None and args.copy != "model":
        print("taken: the running average (EMA) of the weights")
        own |= convert(average)
    if not args.coco80:
        return own
    classes = len(own["decoder.class_heads.0.bias"])
    if classes != RAW_COCO_CLASSES:
        raise DataError(f"--coco80 is for models with the 91 raw ids of COCO, this one has {classes} classes")
    print("lost: the rows of the 11 ids that COCO does not use, in class heads and label embedding")
    return coco_to_contiguous(own)


def describe(content: dict[str, Any], own: StateDict, form: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Class names and description for a file in own form: those of the input, or what can be known of another's."""
    if form == "own":
        return {key: content[key] for key in ("names", "about") if key in content}
    extra = {}
    names = coco_names(len(own["decoder.class_heads.0.bias"]))
    if names:
        extra["names"] = names
        print(f"names: those of COCO, since there are {len(names)} classes")
    told = args.temperature is not None and args.offset is not None
    if form == "detrex" and not told:
        print("no description: say --temperature and --offset (10000 -0.5 for detrex' 12 epochs, 20 0 for its 24)")
        return extra
    network = describe_network(own, args.temperature or 20.0, args.offset or 0.0)
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
