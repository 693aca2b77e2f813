"""Issues that show in the annotations alone, without opening an image."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino.data.coco import find, has_size, usable_box
from dino.data.coco_values import is_box, is_number, short
from dino.utils.files import DataError, resolve_inside

from .issues import Issue
from .notation import TOLERANCE, infer_notation, to_xywh

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
    categories, category_issues = _read_categories(data["categories"], data["annotations"])
    images, in_images = _read_images(data["images"], folder)
    objects, in_annotations = _read_objects(data, images, categories)
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


def _read_categories(entries: list, annotations: list) -> tuple[dict[int, dict], list[Issue]]:
    """Sound categories by id, and the issues of the rest."""
    sound, issues, names = {}, [], set()
    for index, entry in enumerate(entries):
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(name, str):
            problem = "has no whole number as its id, or no name"
        elif _is_parent_of_namesake(entry, entries, annotations):
            issues.append(Issue("namesake", "categories", index, f"class {name!r}, beside a class of that name"))
            continue
        elif number in sound:
            problem = f"has the id of {sound[number]['name']!r}"
        elif name in names:
            problem = "has a name that another one has"
        else:
            sound[number] = entry
            names.add(name)
            continue
        issues.append(Issue("category", "categories", index, f"category {short(entry)} {problem}"))
    if not entries:
        issues.append(Issue("category", "categories", 0, "there are no categories"))
    return sound, issues


def _is_parent_of_namesake(entry: dict, entries: list, annotations: list) -> bool:
    """Whether a category without objects is the super-category of a class of the same name."""
    name = entry["name"]
    namesakes = [e for e in entries if isinstance(e, dict) and e is not entry and e.get("name") == name]
    if entry.get("supercategory") == name or not any(e.get("supercategory") == name for e in namesakes):
        return False
    return not any(isinstance(a, dict) and a.get("category_id") == entry["id"] for a in annotations)


def _read_images(entries: list, folder: str | Path) -> tuple[dict[int, dict], list[Issue]]:
    """Sound images by id, and the issues of the rest.

    Images that share an id are not sound. A file that is listed again is no sound image and, after `correct`, no issue.
    """
    times = Counter(
        number
        for number, _ in {
            (entry["id"], str(entry.get("file_name")))
            for entry in entries
            if isinstance(entry, dict) and type(entry.get("id")) is int
        }
    )
    sound, issues, files = {}, [], set()
    for index, entry in enumerate(entries):
        kind, text = _image_issue(entry, folder, times)
        if kind:
            issues.append(Issue(kind, "images", index, text))
        elif Path(entry["file_name"]) not in files:
            sound[entry["id"]] = entry
            files.add(Path(entry["file_name"]))
    return sound, issues


def _image_issue(entry: Any, folder: str | Path, times: Counter) -> tuple[str, str]:
    """Kind and text of an image's first issue; two empty texts if it is sound."""
    if not isinstance(entry, dict) or type(entry.get("id")) is not int:
        return "image", f"image {short(entry)} has no whole number as its id"
    number, name = entry["id"], entry.get("file_name")
    if not isinstance(name, str):
        return "image", f"image {number} has no file_name"
    if times[number] > 1:
        return "image_id", f"image {name}: {times[number]} images have the id {number}"
    try:
        path = resolve_inside(folder, name)
    except DataError as error:
        return "path", str(error)
    if not has_size(entry):
        if not _is_file(path):
            return "missing", name
        sizes = f"{short(entry.get('width'))} and {short(entry.get('height'))}"
        return "image", f"image {name}: width and height must be positive whole numbers, but are {sizes}"
    return "", ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _read_objects(
    data: dict[str, Any], images: dict[int, dict], categories: dict[int, dict]
) -> tuple[list[Object], list[Issue]]:
    """Annotations with an image, a class and four numbers, and the issues of the rest.

    Objects of an image that has an issue of its own have none because of it.
    """
    listed = {e["id"]: e for e in data["images"] if isinstance(e, dict) and type(e.get("id")) is int}
    objects, issues, seen = [], [], set()
    for index, entry in enumerate(data["annotations"]):
        if not isinstance(entry, dict):
            issues.append(Issue("reference", "annotations", index, f"annotation {short(entry)} is no entry of COCO"))
            continue
        issues += _id_issues(entry, index, seen)
        if find(listed, entry.get("image_id")) and not find(images, entry["image_id"]):
            continue
        kind, text = _object_issue(entry, images, categories)
        if kind:
            issues.append(Issue(kind, "annotations", index, f"annotation {short(entry.get('id'))}{text}"))
        else:
            objects.append(Object(index, entry, images[entry["image_id"]]))
    return objects, issues


def _id_issues(entry: dict, index: int, seen: set[int]) -> Iterator[Issue]:
    """The issue of an annotation's id; `seen` holds the ids before it, and receives its own."""
    number = entry.get("id")
    if type(number) is int and number not in seen and number != 0:
        seen.add(number)
        return
    in_image = f"image {short(entry.get('image_id'))}"
    kind = "zero_id" if type(number) is int and number not in seen else "annotation_id"
    yield Issue(kind, "annotations", index, f"annotation id {short(number)}, {in_image}")
    if type(number) is int:
        seen.add(number)


def _object_issue(entry: dict, images: dict[int, dict], categories: dict[int, dict]) -> tuple[str, str]:
    """Kind and text of the issue that makes an annotation unusable; two empty texts if there is none."""
    image, category = find(images, entry.get("image_id")), find(categories, entry.get("category_id"))
    if image is None or category is None:
        ids = f"image_id {short(entry.get('image_id'))}, category_id {short(entry.get('category_id'))}"
        return "reference", f": {ids}"
    if not is_box(entry.get("bbox")) or not all(map(math.isfinite, entry["bbox"])):
        return "box", f" of {image['file_name']}: {short(entry.get('bbox'))}"
    if entry.get("iscrowd", 0) not in (0, 1):
        return "iscrowd", f" of {image['file_name']}: {short(entry['iscrowd'])}"
    return "", ""


def _check_boxes(objects: list[Object]) -> Iterator[Issue]:
    """Boxes without area, outside, partly outside, or in another notation."""
    boxes = np.array([o.box for o in objects], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([(o.image["width"], o.image["height"]) for o in objects], dtype=np.float64).reshape(-1, 2)
    notation = infer_notation(boxes, sizes)
    for o in objects if notation else _suspects(objects, boxes, sizes):
        kind = notation or _box_issue(o)
        if kind:
            size = f"{o.image['width']}x{o.image['height']}"
            yield Issue(kind, "annotations", o.index, f"{o.where}: {o.box} in an image of {size}")


def _suspects(objects: list[Object], boxes: np.ndarray, sizes: np.ndarray) -> Iterator[Object]:
    """The objects that `_box_issue` must look at: few, in a file of many."""
    x, y, w, h = boxes.T
    width, height = sizes.T
    outside = (w <= 0) | (h <= 0) | (np.minimum(x, y) < -TOLERANCE)
    outside |= (x + w > width + TOLERANCE) | (y + h > height + TOLERANCE)
    stated = np.array([o.entry["area"] if is_number(o.entry.get("area")) else 0.0 for o in objects], dtype=np.float64)
    other_area = (stated > 0) & (np.abs(stated - w * h) > 0.01 * stated)
    yield from (objects[index] for index in np.flatnonzero(outside | other_area))


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
    return "beyond" if _overflows(o) or min(x, y) < -TOLERANCE else ""


def _fits(box: list[float], image: dict) -> bool:
    """Whether the four numbers, read as two corners, are a box inside the image."""
    width, height = image["width"], image["height"]
    inside = min(box[:2]) >= -TOLERANCE and box[2] <= width + TOLERANCE and box[3] <= height + TOLERANCE
    return inside and usable_box(to_xywh(box, "xyxy", width, height), width, height) is not None


def _overflows(o: Object) -> bool:
    """Whether a box, read as xywh, crosses the right or the lower border."""
    x, y, width, height = o.box
    return x + width > o.image["width"] + TOLERANCE or y + height > o.image["height"] + TOLERANCE


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
