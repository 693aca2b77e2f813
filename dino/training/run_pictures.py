"""Pictures of a run: a training batch as the network sees it, and predictions beside the true boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from dino.inference.drawing import arrange, draw_boxes, draw_detections, fit
from dino.inference.palette import Colour, colour_of
from dino.structures import SCORE_THRESH, Detections
from dino.utils.files import counted, write_whole

POSITIVE, NEGATIVE = (0, 200, 130), (255, 90, 0)  # denoising queries
_TRUE = (255, 255, 255)  # objects beside their denoising queries
MOST_IMAGES = 8
_WIDTH, _MOST_PANELS = 1600, 4  # pixels of a picture of a run, about; panels in a row
_MOST_NAMED = 12  # classes in a legend


def draw_train_batch(
    path: str | Path,
    images: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    names: Sequence[str],
    denoising: Sequence[Mapping[Colour, Tensor]] = (),
) -> None:
    """Write a PNG of augmented images and their objects; beside them, their denoising queries.

    Args:
        path: of the PNG.
        images: (3, H, W) uint8 RGB each; the first MOST_IMAGES are drawn.
        boxes: (G, 4) each, xyxy in pixels of the image.
        labels: (G,) int64 each.
        names: of the classes.
        denoising: for each image, boxes (G, 4) of POSITIVE and of NEGATIVE queries of one group; empty for none.

    Raises:
        UserError: the file can't be written.
    """
    pairs = bool(denoising)
    shown, seen = [], set()
    for number, image in enumerate(images[:MOST_IMAGES]):
        picture, scale = _fit_panel(image, min(len(images), MOST_IMAGES), pairs)
        seen.update(labels[number].tolist())
        shown.append(_draw_objects(picture, boxes[number] * scale, labels[number], names))
        if pairs:
            shown.append(_draw_queries(picture, boxes[number] * scale, denoising[number], scale))
    heads = ["objects", "denoising queries of one group"] if pairs else []
    legend = _legend(seen, names)
    if pairs:
        legend |= {"positive query": POSITIVE, "negative query": NEGATIVE, "dashed: the object": _TRUE}
    title = f"Training batch: {counted(len(images[:MOST_IMAGES]), 'augmented image')}"
    _save(path, shown, title, heads, legend)


def draw_val_predictions(
    path: str | Path,
    images: Sequence[Tensor],
    found: Sequence[Detections],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    names: Sequence[str],
    score_thresh: float = SCORE_THRESH,
    title: str = "",
) -> None:
    """Write a picture of images: each with its predictions and, beside it, with its true boxes.

    Args:
        path: of the picture; one with the suffix ".jpg" is written as JPEG, any other as PNG.
        images: (3, H, W) uint8 RGB each; the first MOST_IMAGES are drawn.
        found: detections of each image, xyxy in its pixels.
        boxes: true ones, (G, 4) each, xyxy in pixels of the image.
        labels: true ones, (G,) int64 each.
        names: of the classes.
        score_thresh: lowest score that is drawn.
        title: above the pictures; the number of images by default.

    Raises:
        UserError: the file can't be written.
    """
    shown, seen = [], set()
    for number, image in enumerate(images[:MOST_IMAGES]):
        picture, scale = _fit_panel(image, min(len(images), MOST_IMAGES), True)
        kept = found[number].scores >= score_thresh
        predicted = Detections(*(values[kept].cpu() for values in found[number]))
        seen.update(predicted.labels.tolist(), labels[number].tolist())
        texts = [
            f"{names[label]} {score:.2f}"
            for label, score in zip(predicted.labels.tolist(), predicted.scores.tolist(), strict=True)
        ]
        shown.append(draw_detections(picture, (predicted.boxes * scale).tolist(), predicted.labels.tolist(), texts))
        shown.append(_draw_objects(picture, boxes[number] * scale, labels[number], names))
    heads = [f"predicted, scores of {score_thresh:.2f} and more", "true"]
    title = title or f"Predictions on {counted(len(images[:MOST_IMAGES]), 'validation image')}"
    _save(path, shown, title, heads, _legend(seen, names))


def _fit_panel(image: Tensor, count: int, pairs: bool) -> tuple[Image.Image, float]:
    """(3, H, W) uint8 RGB -> the picture at the size of a panel, and its scale."""
    panels = min(2 * count, _MOST_PANELS) if pairs else _columns(count)
    side = _WIDTH // max(panels, 2)
    return fit(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), side, side)


def _columns(count: int) -> int:
    """Panels in a row of `count` of them."""
    return min(_MOST_PANELS, round((count + 0.5) ** 0.5 + 0.5))


def _draw_objects(picture: Image.Image, boxes: Tensor, labels: Tensor, names: Sequence[str]) -> Image.Image:
    """A picture with the true boxes and their names."""
    return draw_detections(picture, boxes.tolist(), labels.tolist(), [names[label] for label in labels.tolist()])


def _draw_queries(picture: Image.Image, boxes: Tensor, queries: Mapping[Colour, Tensor], scale: float) -> Image.Image:
    """A picture with denoising queries, the first kind on top, and the dashed objects above them."""
    for colour, own in reversed(queries.items()):
        picture = draw_boxes(picture, (own * scale).tolist(), [colour] * len(own))
    return draw_boxes(picture, boxes.tolist(), [_TRUE] * len(boxes), dash=5)


def _legend(labels: set[int], names: Sequence[str]) -> dict[str, Colour]:
    """Names and colours of the classes that occur, the first ones."""
    shown = sorted(labels)[:_MOST_NAMED]
    legend = {names[label]: colour_of(label) for label in shown}
    left_out = len(labels) - len(shown)
    return legend | ({f"and {left_out} more classes": (90, 90, 90)} if left_out else {})


def _save(path: str | Path, shown: list[Image.Image], title: str, heads: list[str], legend: dict[str, Colour]) -> None:
    """Write the panels as one picture, a JPEG or a PNG."""
    if not shown:
        return
    columns = min(len(shown), _MOST_PANELS) if heads else _columns(len(shown))
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    page = arrange(rows, title, heads, legend)
    look = {"format": "jpeg", "quality": 90} if Path(path).suffix == ".jpg" else {"format": "png"}
    write_whole(path, lambda part: page.save(part, **look))
