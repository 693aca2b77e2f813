"""Reading of detections in COCO's results format, with checks: any program may have made them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dino.data.coco import find, load_json
from dino.data.coco_values import is_box, is_number
from dino.utils.files import DataError


def read_results(path: str | Path, data: dict[str, Any]) -> list[dict]:
    """Read detections of the images of `data`.

    Returns:
        entries with image_id, category_id, bbox (xywh in pixels) and score.

    Raises:
        DataError: the file is missing or broken, or an entry refers to nothing or has no box or score.
    """
    entries = load_json(path, "detections")
    if not isinstance(entries, list):
        raise DataError(f"{path}: detections must be a list of entries in COCO's results format")
    images = {image["id"]: image for image in data["images"]}
    categories = {category["id"]: category for category in data["categories"]}
    return [_check_entry(f"{path}: detection {n}", entry, images, categories) for n, entry in enumerate(entries)]


def _check_entry(where: str, entry: Any, images: dict[int, dict], categories: dict[int, dict]) -> dict:
    """Check one detection -> its four fields."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object with image_id, category_id, bbox and score")
    if find(images, entry.get("image_id")) is None:
        raise DataError(
            f"{where}: no image has the id {entry.get('image_id')!r}. Do annotations and detections belong together?"
        )
    if find(categories, entry.get("category_id")) is None:
        raise DataError(
            f"{where}: no category has the id {entry.get('category_id')!r}; known: {sorted(categories)[:20]}"
        )
    box, score = entry.get("bbox"), entry.get("score")
    if not is_box(box) or not all(map(math.isfinite, box)):
        raise DataError(f"{where}: bbox must be four finite numbers [x, y, width, height] in pixels, but is {box!r}")
    if not is_number(score) or not math.isfinite(score):
        raise DataError(f"{where}: score must be a finite number, but is {score!r}")
    return {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": box, "score": float(score)}
