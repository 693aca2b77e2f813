"""Two data sets in COCO format made one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino.utils.files import DataError, resolve_inside


def merge_annotations(sets: Sequence[tuple[dict[str, Any], Path]]) -> tuple[dict[str, Any], Path]:
    """Join checked annotations -> the joint ones, and the folder that their file names are relative to.

    Classes are the same if their names are. All ids are new.

    Args:
        sets: annotations and image folder of each data set.

    Raises:
        DataError: two data sets list the same file.
    """
    root = Path(os.path.commonpath([os.path.abspath(folder) for _, folder in sets]))
    names = dict.fromkeys(c["name"] for data, _ in sets for c in sorted(data["categories"], key=lambda c: c["id"]))
    ids = {name: number for number, name in enumerate(names, 1)}
    images: dict[str, dict] = {}
    annotations: list[dict] = []
    for data, folder in sets:
        classes = {c["id"]: ids[c["name"]] for c in data["categories"]}
        numbers = _add_images(images, data["images"], folder, root)
        for a in data["annotations"]:
            new = {"image_id": numbers[a["image_id"]], "category_id": classes[a["category_id"]]}
            annotations.append({**a, "id": len(annotations) + 1, **new})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": list(images.values()), "annotations": annotations, "categories": categories}, root


def _add_images(images: dict[str, dict], entries: list[dict], folder: Path, root: Path) -> dict[int, int]:
    """Add the entries of a data set to `images`, by name relative to `root` -> old id, new id."""
    numbers = {}
    for entry in entries:
        name = Path(os.path.relpath(resolve_inside(folder, entry["file_name"]), root)).as_posix()
        if name in images:
            raise DataError(f"both data sets list {name}: keep it in one of them")
        numbers[entry["id"]] = len(images) + 1
        images[name] = {**entry, "id": len(images) + 1, "file_name": name}
    return numbers
