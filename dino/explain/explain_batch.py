"""Draw what a checkpoint computes for one training batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms import v2

from dino.data.coco import CocoImages, ShortSide, collate
from dino.layers import HungarianMatcher, SetCriterion
from dino.utils.files import DataError, make_folder
from dino.weights.description import Preprocessing, model_from_checkpoint

from . import scenes
from .canvas import Scene, save
from .record import record


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


def explain_batch(
    annotations: Path, images: Path, weights: Path, folder: Path, *, wanted: Sequence[str] = (), seed: int = 0
) -> None:
    """Draw every scene of a batch.

    Args:
        annotations, images: data in COCO format.
        weights: a checkpoint.
        folder: for the pictures.
        wanted: file names of the batch's images; by default the first two with objects. The first image is drawn.
        seed: of the noise.

    Raises:
        DataError: data or weights can't be used, or don't fit.
    """
    network, names, preprocessing = model_from_checkpoint(weights)
    data = read_data(annotations, images, preprocessing)
    if data.names != names:
        raise DataError(f"{weights} was trained for the classes {names}, {annotations} has {data.names}")
    batch, padding, targets, _ = collate([data[index] for index in choose(data, wanted)])
    torch.manual_seed(seed)
    try:
        recorded = record(network, batch, padding, targets, SetCriterion(matcher=HungarianMatcher()))
    except ValueError as error:
        raise DataError(f"{weights}: {error}") from error
    height, width = (~padding[0]).sum(0).max(), (~padding[0]).sum(1).max()
    mean, std = (torch.tensor(values)[:, None, None] / 255 for values in preprocessing[:2])
    pixels = (batch[0, :, :height, :width] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    scene = Scene(recorded, 0, pixels, targets, names)
    make_folder(folder)
    for name, draw in scenes.SCENES.items():
        save(draw(scene), folder / f"{name}.png")
    save(scenes.noise(network.denoising), folder / "noise.png")
    print(f"{len(scenes.SCENES) + 1} pictures written to {folder}")
