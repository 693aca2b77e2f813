"""Issues that show in the annotations alone, without opening an image."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dino.data.coco import find, is_box, is_number, usable_box
from dino.utils.files import DataError, resolve_inside

from .issues import Issue

_TOLERANCE = 1.0  # pixels beyond the border that come from rounding
_FEWEST = 8  # boxes from which the notation of the whole file is inferred
_CROWD = 100  # detections of an image that COCO's AP counts


class Object(NamedTuple):
    """An annotation with an image, a class and four numbers."""

    index: int  # in the list of annotations
    entry: dict
    image: dict

    @property
    def where(self) -> str:
        """The start of a message."""
        return f"annotation {self.entry.get('id')!r} of {self.image['file_name']}"

    @property
    def box(self) -> list[float]:
        """The four numbers of the file, xywh in pixels if the file is sound."""
        return self.entry["bbox"]


class Contents(NamedTuple):
    """The sound entries of a file."""

    images: dict[int, dict]  # by id
    categories: dict[int, dict]  # by id
    objects: list[Object]


def find_issues(data: dict[str, Any], folder: str | Path) -> tuple[list[Issue], Contents]:
    """All issues of parsed COCO-format annotations, and the sound entries.

    Args:
        data: lists under "images", "annotations" and "categories".
        folder: of the images; no file is opened.
    """
    categories, category_issues = _read_categories(data["categories"])
    images, in_images = _read_images(data["images"], folder)
    objects, in_annotations = _read_objects(data["annotations"], images, categories)
    issues = [*category_issues, *in_images, *in_annotations, *_check_boxes(objects), *_check_copies(objects)]
    used = {o.entry["category_id"] for o in objects}
    if objects:
        for index, entry in enumerate(data["categories"]):
            if isinstance(entry, dict) and find(categories, entry.get("id")) is entry and entry["id"] not in used:
                kind = "supercategory" if _is_parent(entry, categories) else "unused"
                issues.append(Issue(kind, "categories", index, f"class {entry['name']!r}"))
    return issues, Contents(images, categories, objects)


def _is_parent(entry: dict, categories: dict[int, dict]) -> bool:
    """Whether it is the super-category of others: some annotation tools list a group of classes as a class."""
    return any(c.get("supercategory") == entry["name"] for c in categories.values() if c is not entry)


def _read_categories(entries: list) -> tuple[dict[int, dict], list[Issue]]:
    """Sound categories by id, and the issues of the rest."""
    sound, issues, names = {}, [], set()
    for index, entry in enumerate(entries):
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(name, str):
            problem = "has no whole number as its id, or no name"
        elif number in sound:
            problem = f"has the id of {sound[number]['name']!r}"
        elif name in names:
            problem = "has a name that another one has"
        else:
            sound[number] = entry
            names.add(name)
            continue
        issues.append(Issue("category", "categories", index, f"category {_short(entry)} {problem}"))
    if not entries:
        issues.append(Issue("category", "categories", 0, "there are no categories"))
    return sound, issues


def _read_images(entries: list, folder: str | Path) -> tuple[dict[int, dict], list[Issue]]:
    """Sound images by id, and the issues of the rest. Images that share an id are not sound."""
    times = Counter(entry.get("id") for entry in entries if isinstance(entry, dict) and type(entry.get("id")) is int)
    sound, issues, files = {}, [], {}
    for index, entry in enumerate(entries):
        kind, text = _image_issue(entry, folder, times, files)
        if kind:
            issues.append(Issue(kind, "images", index, text))
        else:
            sound[entry["id"]] = entry
            files[str(Path(entry["file_name"]))] = entry["id"]
    return sound, issues


def _image_issue(entry: Any, folder: str | Path, times: Counter, files: dict[str, int]) -> tuple[str, str]:
    """Kind and text of an image's first issue; two empty texts if it is sound."""
    if not isinstance(entry, dict) or type(entry.get("id")) is not int:
        return "image", f"image {_short(entry)} has no whole number as its id"
    number, name = entry["id"], entry.get("file_name")
    if not isinstance(name, str):
        return "image", f"image {number} has no file_name"
    if not all(type(entry.get(key)) is int and 0 < entry[key] < 2**31 for key in ("width", "height")):
        sizes = f"{_short(entry.get('width'))} and {_short(entry.get('height'))}"
        return "image", f"image {name}: width and height must be positive whole numbers, but are {sizes}"
    if times[number] > 1:
        return "image_id", f"image {name}: {times[number]} images have the id {number}"
    try:
        resolve_inside(folder, name)
    except DataError as error:
        return "path", str(error)
    if str(Path(name)) in files:
        return "file_twice", f"image {number}: {name} is image {files[str(Path(name))]} already"
    return "", ""


def _read_objects(
    entries: list, images: dict[int, dict], categories: dict[int, dict]
) -> tuple[list[Object], list[Issue]]:
    """Annotations with an image, a class and four numbers, and the issues of the rest."""
    objects, issues, seen = [], [], set()
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            issues.append(Issue("reference", "annotations", index, f"annotation {_short(entry)} is no entry of COCO"))
            continue
        number, in_image = entry.get("id"), f"image {_short(entry.get('image_id'))}"
        if type(number) is not int or number in seen:
            issues.append(Issue("annotation_id", "annotations", index, f"annotation id {_short(number)}, {in_image}"))
        elif number == 0:
            issues.append(Issue("zero_id", "annotations", index, f"annotation id 0, {in_image}"))
        if type(number) is int:
            seen.add(number)
        kind, text = _object_issue(entry, images, categories)
        if kind:
            issues.append(Issue(kind, "annotations", index, f"annotation {_short(number)}{text}"))
        else:
            objects.append(Object(index, entry, images[entry["image_id"]]))
    return objects, issues


def _object_issue(entry: dict, images: dict[int, dict], categories: dict[int, dict]) -> tuple[str, str]:
    """Kind and text of the issue that makes an annotation unusable; two empty texts if there is none."""
    image, category = find(images, entry.get("image_id")), find(categories, entry.get("category_id"))
    if image is None or category is None:
        ids = f"image_id {_short(entry.get('image_id'))}, category_id {_short(entry.get('category_id'))}"
        return "reference", f": {ids}"
    if not is_box(entry.get("bbox")) or not all(map(math.isfinite, entry["bbox"])):
        return "box", f" of {image['file_name']}: {_short(entry.get('bbox'))}"
    return "", ""


def _check_boxes(objects: list[Object]) -> Iterator[Issue]:
    """Boxes without area, outside, partly outside, or in another notation."""
    enough = len(objects) >= _FEWEST
    if enough and all(map(_may_be_fractions, objects)):
        for o in objects:
            yield Issue("fractions", "annotations", o.index, f"{o.where}: {o.box}")
        return
    all_corners = enough and all(map(_may_be_corners, objects)) and any(map(_overflows, objects))
    for o in objects:
        kind = "xyxy" if all_corners else _box_issue(o)
        if kind:
            size = f"{o.image['width']}x{o.image['height']}"
            yield Issue(kind, "annotations", o.index, f"{o.where}: {o.box} in an image of {size}")


def _may_be_fractions(o: Object) -> bool:
    return min(o.box) >= -0.001 and max(o.box) <= 1.001


def _may_be_corners(o: Object) -> bool:
    x0, y0, x1, y1 = o.box
    return x1 > x0 and y1 > y0 and _fits(o.box, o.image)


def _box_issue(o: Object) -> str:
    """The kind of a box's issue; an empty text if it is sound."""
    x, y, width, height = o.box
    if width <= 0 or height <= 0:
        return "zero"
    by_area = _notation_by_area(o.entry)
    if _fits(o.box, o.image) and (by_area == "xyxy" or (_overflows(o) and by_area != "xywh")):
        return "xyxy"
    if usable_box(o.box, o.image["width"], o.image["height"]) is None:
        return "outside"
    return "beyond" if _overflows(o) or min(x, y) < -_TOLERANCE else ""


def _fits(box: list[float], image: dict) -> bool:
    """Whether the four numbers, read as two corners, are a box inside the image."""
    width, height = image["width"], image["height"]
    inside = min(box[:2]) >= -_TOLERANCE and box[2] <= width + _TOLERANCE and box[3] <= height + _TOLERANCE
    return inside and usable_box(from_corners(box), width, height) is not None


def from_corners(box: list[float]) -> list[float]:
    """xyxy -> xywh."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _overflows(o: Object) -> bool:
    """Whether a box, read as xywh, crosses the right or the lower border."""
    x, y, width, height = o.box
    return x + width > o.image["width"] + _TOLERANCE or y + height > o.image["height"] + _TOLERANCE


def _notation_by_area(entry: dict) -> str:
    """The notation that fits the annotation's `area`: "xywh", "xyxy", or an empty text if neither does."""
    area, (x, y, width, height) = entry.get("area"), entry["bbox"]
    if not is_number(area) or area <= 0:
        return ""
    if abs(area - width * height) <= 0.01 * area:
        return "xywh"
    is_box_area = not entry.get("segmentation")  # else it is the area of an outline
    return "xyxy" if is_box_area and abs(area - (width - x) * (height - y)) <= 0.01 * area else ""


def _check_copies(objects: list[Object]) -> Iterator[Issue]:
    """Objects that share image, class and box, and images with very many objects."""
    by_image: dict[int, list[Object]] = defaultdict(list)
    for o in objects:
        by_image[o.image["id"]].append(o)
    for group in by_image.values():
        seen = set()
        for o in group:
            key = (o.entry["category_id"], *o.box)
            if key in seen:
                yield Issue("object_twice", "annotations", o.index, f"{o.where}: {o.box}")
            seen.add(key)
        if len(group) > _CROWD:
            text = f"{group[0].image['file_name']} has {len(group)}"
            yield Issue("crowded", "annotations", group[0].index, text)


def _short(value: Any) -> str:
    """A value of the file as JSON of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
