"""`dino explain`: pictures of what a checkpoint does with one training batch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms import v2

from dino.data.coco import CocoImages, ShortSide
from dino.layers import HungarianMatcher, SetCriterion
from dino.modeling.detector import Detector, to_target
from dino.utils.files import DataError, free_name, make_folder
from dino.weights.description import detector_from_checkpoint

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


def _read_data(annotations: Path, images: Path, detector: Detector) -> CocoImages:
    """Open a data set whose images are resized for the detector."""
    resize = ShortSide(detector.preprocessing.short_side, detector.preprocessing.max_size)
    clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    return CocoImages(annotations, images, v2.Compose([resize, *clean]))


def _choose(data: CocoImages, wanted: Sequence[str]) -> list[int]:
    """Indices of the images of these file names, or of the first two with objects.

    Raises:
        DataError: a name is not in the data; the first image has no objects.
    """
    indices = {entry["file_name"]: index for index, entry in enumerate(data.images)}
    if missing := [name for name in wanted if name not in indices]:
        raise DataError(
            f"{missing[0]!r} is no file_name of the annotations, which begin with {next(iter(indices), None)!r}"
        )
    full = [index for index, entry in enumerate(data.images) if data.objects[entry["id"]]]
    chosen = [indices[name] for name in wanted] or full[:2]
    if not {*chosen[:1]} & {*full}:
        raise DataError("the image to be drawn has no objects: there is nothing to noise. Choose another with --image")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    args = parse_arguments(argv)
    explain_batch(args.annotations, args.images, args.weights, args.image, seed=args.seed, output=args.output)


def explain_batch(
    annotations: Path, folder: Path, weights: Path, wanted: Sequence[str] = (), *, seed: int = 0, output: Path | None
) -> None:
    """Draw every scene of a batch.

    Args:
        annotations, folder: data in COCO format.
        weights: a checkpoint.
        wanted: file names of the batch's images; by default the first two with objects. The first image is drawn.
        seed: of the noise.
        output: folder; None for a new one, output/explained.

    Raises:
        DataError: data or weights can't be used, or don't fit.
    """
    detector = detector_from_checkpoint(weights)
    data = _read_data(annotations, folder, detector)
    if data.names != detector.names:
        raise DataError(f"{weights} was trained for the classes {detector.names}, {annotations} has {data.names}")
    samples = [data[index] for index in _choose(data, wanted)]
    pixels = [image.as_subclass(torch.Tensor) for image, _, _ in samples]
    targets = [
        to_target(objects["labels"], objects["boxes"].as_subclass(torch.Tensor), image.shape[1:])
        for image, objects, _ in samples
    ]
    torch.manual_seed(seed)
    try:
        recorded = record(detector.network, *detector.batch(pixels), targets, SetCriterion(matcher=HungarianMatcher()))
    except ValueError as error:
        raise DataError(f"{weights}: {error}") from error
    scene = Scene(recorded, 0, pixels[0].permute(1, 2, 0).numpy() / 255, targets, detector.names)
    output = output or free_name(Path("output/explained"))
    make_folder(output)
    for name, draw in scenes.SCENES.items():
        save(draw(scene), output / f"{name}.png")
    save(scenes.noise(detector.network.denoising), output / "noise.png")
    print(f"{len(scenes.SCENES) + 1} pictures written to {output}")
