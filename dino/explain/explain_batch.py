"""`dino explain`: pictures of what a checkpoint does with one training batch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms import v2

from dino.data.coco import CocoImages, ShortSide, collate
from dino.layers import HungarianMatcher, SetCriterion
from dino.utils.files import DataError, free_name, make_folder
from dino.weights.description import Preprocessing, model_from_checkpoint

from . import scenes
from .canvas import Scene, save
from .record import record

EXAMPLE = """
example:
  dino explain train.json images --weights output/mine/model_final.pth --image 0001.jpg --image 0002.jpg
Draws the selected anchors, denoising queries, the attention mask, the boxes of each decoder layer, sampling points of
the deformable attention, gradients and losses. docs/how_it_works.md and docs/method.md say how to read them.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dino explain", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS.json", help="in COCO format")
    parser.add_argument("images", type=Path, metavar="IMAGES_FOLDER", help="folder of the images")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint, from which the network is rebuilt")
    parser.add_argument(
        "--image", action="append", default=[], help="file name of an image of the batch, as in the annotations; the "
        "first one is drawn (default: the first two that have objects)"
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    parser.add_argument("--output", type=Path, help="folder (default: a new one, output/explained)")
    return parser.parse_args(argv)


def read_data(annotations: Path, images: Path, preprocessing: Preprocessing) -> CocoImages:
    """Images as the network expects them."""
    mean, std = ([value / 255 for value in values] for values in preprocessing[:2])
    resize = ShortSide(preprocessing.short_side, preprocessing.max_size)
    clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    return CocoImages(
        annotations,
        images,
        v2.Compose([resize, *clean, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]),
    )


def choose(data: CocoImages, wanted: Sequence[str]) -> list[int]:
    """Places of the images of these file names, or of the first two with objects.

    Raises:
        DataError: a name is not in the data; the first image has no objects.
    """
    places = {entry["file_name"]: place for place, entry in enumerate(data.images)}
    if missing := [name for name in wanted if name not in places]:
        raise DataError(
            f"{missing[0]!r} is no file_name of the annotations, which begin with {next(iter(places), None)!r}"
        )
    full = [place for place, entry in enumerate(data.images) if data.objects[entry["id"]]]
    chosen = [places[name] for name in wanted] or full[:2]
    if not chosen or chosen[0] not in full:
        raise DataError("the image to be drawn has no objects: there is nothing to noise. Choose another with --image")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """The verb."""
    args = parse_arguments(argv)
    network, names, preprocessing = model_from_checkpoint(args.weights)
    data = read_data(args.annotations, args.images, preprocessing)
    if data.names != names:
        raise DataError(f"{args.weights} was trained for the classes {names}, {args.annotations} has {data.names}")
    images, padding, targets, _ = collate([data[place] for place in choose(data, args.image)])
    torch.manual_seed(args.seed)
    try:
        recorded = record(network, images, padding, targets, SetCriterion(matcher=HungarianMatcher()))
    except ValueError as error:
        raise DataError(f"{args.weights}: {error}") from error
    height, width = (~padding[0]).sum(0).max(), (~padding[0]).sum(1).max()
    mean, std = (torch.tensor(values)[:, None, None] / 255 for values in preprocessing[:2])
    pixels = (images[0, :, :height, :width] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    scene = Scene(recorded, 0, pixels, targets, names)
    folder = args.output or free_name(Path("output/explained"))
    make_folder(folder)
    for name, draw in scenes.SCENES.items():
        save(draw(scene), folder / f"{name}.png")
    save(scenes.noise(network.denoising), folder / "noise.png")
    print(f"{len(scenes.SCENES) + 1} pictures written to {folder}")
