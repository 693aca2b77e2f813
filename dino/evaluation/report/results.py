"""Reading of detections in COCO's results format or as `dino predict` writes them; any program may have made them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from dino.data.coco import check_lists, find, load_json
from dino.data.coco_values import is_box, is_number
from dino.utils.files import DataError, counted
from dino.utils.printable import printable

_FORMS = "detections must be a list of entries in COCO's results format, or a file that `dino predict` wrote"


def read_results(path: str | Path, data: dict[str, Any]) -> list[dict]:
    """Read detections of the images of `data`.

    Args:
        path: a list of entries in COCO's results format, whose ids are those of `data`; or COCO's whole form with
            images, categories, and annotations that have a score, as `predictions.json`. Its images are found by file
            name, or by base name where that is unique, its classes by name.
        data: checked COCO-format annotations.

    Returns:
        entries with image_id, category_id, bbox (xywh in pixels) and score.

    Raises:
        DataError: the file is missing or broken; an entry refers to nothing or has no box or score; images or classes
            of the whole form are not those of `data`.
    """
    content = load_json(path, "detections")
    if isinstance(content, dict):
        return _read_whole_form(path, content, data)
    if not isinstance(content, list):
        raise DataError(f"{path}: {_FORMS}")
    images = {image["id"]: image for image in data["images"]}
    categories = {category["id"]: category for category in data["categories"]}
    return [_check_entry(f"{path}: detection {n}", entry, images, categories) for n, entry in enumerate(content)]


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


def _read_whole_form(path: str | Path, content: dict, data: dict[str, Any]) -> list[dict]:
    """The detections of COCO's whole form, with the ids of `data`."""
    try:
        check_lists(content)
    except DataError as error:
        raise DataError(f"{path}: {_FORMS}; {error}") from None
    try:
        image_ids = _match_images(_by_id(content["images"], "image", "file_name"), data["images"])
        names = _by_id(content["categories"], "category", "name")
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if content["annotations"] and not any(isinstance(a, dict) and "score" in a for a in content["annotations"]):
        raise DataError(f"{path} has annotations without scores, no detections: `dino predict` writes detections")
    category_ids = _match_categories(names, data["categories"])
    found = []
    for n, entry in enumerate(content["annotations"]):
        where = f"{path}: annotation {n}"
        checked = _check_entry(where, entry, image_ids, names)
        label = category_ids.get(entry["category_id"])
        if label is None:
            known = ", ".join(printable(c["name"]) for c in data["categories"][:20])
            name = printable(names[checked["category_id"]])
            raise DataError(f"{where}: the class '{name}' is none of the data's classes ({known})")
        found.append({**checked, "image_id": image_ids[checked["image_id"]], "category_id": label})
    return found


def _by_id(entries: list, kind: str, key: str) -> dict[int, Any]:
    """Id -> value of `key`, a text, of checked entries; for images the whole entry."""
    values: dict[int, Any] = {}
    for entry in entries:
        number, value = (entry.get("id"), entry.get(key)) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(value, str):
            raise DataError(f"every {kind} needs a whole number as its id, and a {key}; not so {printable(entry, 200)}")
        if number in values:
            raise DataError(f"the {kind} id {number} occurs twice")
        values[number] = entry if kind == "image" else value
    return values


def _match_categories(names: dict[int, str], categories: list[dict]) -> dict[int, int]:
    """Category id of a file of detections -> that of the data, by name."""
    ids = {category["name"]: category["id"] for category in categories}
    return {number: ids[name] for number, name in names.items() if name in ids}


def _match_images(predicted: dict[int, dict], images: list[dict]) -> dict[int, int]:
    """Image id of a file of detections -> that of the data, by file name; else by base name, where it is unique.

    Raises:
        DataError: an image is not in the data, or has another size there, or two are the same image.
    """
    names = {number: _normal(image["file_name"]) for number, image in predicted.items()}
    exact = {_normal(image["file_name"]): image for image in images}
    base = _unique(images, lambda image: _base(image["file_name"]))
    single = Counter(map(_base, names.values()))
    matches, strangers = {}, []
    for number, name in names.items():
        by_base = base.get(_base(name)) if single[_base(name)] == 1 else None
        image = exact.get(name, by_base)
        if image is None:
            strangers.append(predicted[number]["file_name"])
        else:
            _check_size(predicted[number], image)
            matches[number] = image["id"]
    if strangers:
        raise DataError(
            f"{counted(len(strangers), 'image')} of {len(names):,} not in the annotations, first "
            f"'{printable(strangers[0])}'. Annotations and detections must be of the same images, found by file_name"
        )
    twice = [number for number, count in Counter(matches.values()).items() if count > 1]
    if twice:
        raise DataError(f"two images are the image {twice[0]} of the annotations: merge their detections")
    return matches


def _check_size(predicted: dict, image: dict) -> None:
    """Raise a DataError where a file of detections states another size than the annotations."""
    theirs, ours = ((entry.get("width"), entry.get("height")) for entry in (predicted, image))
    if None not in theirs and theirs != ours:
        raise DataError(
            f"image {printable(predicted['file_name'])} is {printable(theirs[0])}x{printable(theirs[1])} in the "
            f"detections, but {ours[0]}x{ours[1]} in the annotations: boxes would not fit. Predict on the same files"
        )


def _normal(name: str) -> str:
    """A relative name with / between folders, without "./"."""
    return str(PurePosixPath(name.replace("\\", "/")))


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _unique(images: list[dict], key: Callable[[dict], str]) -> dict[str, dict]:
    """Images by a key, those alone with it."""
    counts = Counter(map(key, images))
    return {key(image): image for image in images if counts[key(image)] == 1}
