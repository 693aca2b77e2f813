"""Draw what a checkpoint computes for one training batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import rc_context

from dino.data.coco import CocoImages, collate
from dino.inference.fonts import font_families, legible
from dino.layers import HungarianMatcher, SetCriterion
from dino.utils.files import DataError
from dino.utils.run_folder import hold_folder
from dino.weights.description import detector_from_checkpoint

from . import scenes
from .canvas import Scene, save
from .record import record


def _choose(data: CocoImages, wanted: Sequence[str]) -> list[int]:
    """Indices of the images of these file names, or of the first two with objects.

    Raises:
        DataError: a name is not in the data; the first image has no objects.
    """
    indices = {entry["file_name"]: index for index, entry in enumerate(data.images)}
    if missing := [name for name in wanted if name not in indices]:
        raise DataError(
            f"{missing[0]!r} is no file_name of the annotations; the first is {next(iter(indices), None)!r}"
        )
    full = [index for index, entry in enumerate(data.images) if data.objects[entry["id"]]]
    chosen = [indices[name] for name in wanted] or full[:2]
    if not {*chosen[:1]} & {*full}:
        raise DataError("the image to be drawn has no objects: there is nothing to noise. Choose another with --image")
    return chosen


def explain_batch(
    annotations: Path, images: Path, weights: str | Path, folder: Path, *, wanted: Sequence[str] = (), seed: int = 0
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
    detector = detector_from_checkpoint(weights)
    data = CocoImages.for_detector(annotations, images, detector)
    pixels, targets, _ = collate([data[index] for index in _choose(data, wanted)])
    torch.manual_seed(seed)
    try:
        recorded = record(detector.network, *detector.batch(pixels), targets, SetCriterion(matcher=HungarianMatcher()))
    except ValueError as error:
        raise DataError(f"{weights}: {error}") from error
    scene = Scene(recorded, 0, pixels[0].permute(1, 2, 0).numpy() / 255, targets, detector.names)
    fonts = font_families([legible(name) for name in detector.names])
    with hold_folder(folder), rc_context({"font.family": fonts}):
        for name, draw in scenes.SCENES.items():
            save(draw(scene), folder / f"{name}.png")
        save(scenes.noise(detector.network.denoising), folder / "noise.png")
    print(f"{len(scenes.SCENES) + 1} pictures written to {folder}")
