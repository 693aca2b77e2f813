"""Faults that the annotations show by themselves, without opening an image."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dino.data.coco import find, is_box, is_number, usable_box
from dino.utils.files import DataError, resolve_inside

from .issues import Fault

TOLERANCE = 1.0  # pixels by which annotation tools round beyond the border
FEWEST = 8  # boxes from which a habit of the whole file is inferred
CROWD = 100  # detections of an image that COCO's AP counts


class Object(NamedTuple):
    """An annotation that has an image, a class and four numbers."""

    index: int  # in the list of annotations
    entry: dict
    image: dict

    @property
    def where(self) -> str:
        """For the start of a message."""
        return f"annotation {self.entry.get('id')!r} of {self.image['file_name']}"

    @property
    def box(self) -> list[float]:
        """As written, which ought to be xywh in pixels."""
        return self.entry["bbox"]


class Contents(NamedTuple):
    """What of a file can be relied upon."""

    images: dict[int, dict]  # sound entries by id
    categories: dict[int, dict]
    objects: list[Object]


def find_faults(data: dict[str, Any], folder: str | Path) -> tuple[list[Fault], Contents]:
    """Every fault of parsed COCO-format annotations, and what remains without the entries that can't be read.

    Args:
        data: with lists under "images", "annotations" and "categories".
        folder: that the file names are relative to; nothing in it is opened.
    """
    categories, in_categories = read_categories(data["categories"])
    images, in_images = read_images(data["images"], folder)
    objects, in_annotations = read_objects(data["annotations"], images, categories)
    faults = [*in_categories, *in_images, *in_annotations, *check_boxes(objects), *check_copies(objects)]
    used = {o.entry["category_id"] for o in objects}
    if objects:
        for index, entry in enumerate(data["categories"]):
            if isinstance(entry, dict) and find(categories, entry.get("id")) is entry and entry["id"] not in used:
                kind = "supercategory" if is_parent(entry, categories) else "unused"
                faults.append(Fault(kind, "categories", index, f"class {entry['name']!r}"))
    return faults, Contents(images, categories, objects)


def is_parent(entry: dict, categories: dict[int, dict]) -> bool:
    """Whether other categories name this one as theirs: some annotation tools list a group of classes as a class."""
    return any(c.get("supercategory") == entry["name"] for c in categories.values() if c is not entry)


def read_categories(entries: list) -> tuple[dict[int, dict], list[Fault]]:
    """Sound categories by id, and the faults of the others."""
    sound, faults, names = {}, [], set()
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
        faults.append(Fault("category", "categories", index, f"category {short(entry)} {problem}"))
    if not entries:
        faults.append(Fault("category", "categories", 0, "there are no categories"))
    return sound, faults


def read_images(entries: list, folder: str | Path) -> tuple[dict[int, dict], list[Fault]]:
    """Sound images by id, and the faults of the others. Of an id that occurs twice, no image is sound."""
    times = Counter(entry.get("id") for entry in entries if isinstance(entry, dict) and type(entry.get("id")) is int)
    sound, faults, files = {}, [], {}
    for index, entry in enumerate(entries):
        kind, text = image_fault(entry, folder, times, files)
        if kind:
            faults.append(Fault(kind, "images", index, text))
        else:
            sound[entry["id"]] = entry
            files[str(Path(entry["file_name"]))] = entry["id"]
    return sound, faults


def image_fault(entry: Any, folder: str | Path, times: Counter, files: dict[str, int]) -> tuple[str, str]:
    """Kind and text of the first fault of one image; two empty texts if there is none."""
    if not isinstance(entry, dict) or type(entry.get("id")) is not int:
        return "image", f"image {short(entry)} has no whole number as its id"
    number, name = entry["id"], entry.get("file_name")
    if not isinstance(name, str):
        return "image", f"image {number} has no file_name"
    if not all(type(entry.get(key)) is int and 0 < entry[key] < 2**31 for key in ("width", "height")):
        sizes = f"{short(entry.get('width'))} and {short(entry.get('height'))}"
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


def read_objects(
    entries: list, images: dict[int, dict], categories: dict[int, dict]
) -> tuple[list[Object], list[Fault]]:
    """Annotations with an image, a class and four numbers, and the faults of the others."""
    objects, faults, seen = [], [], set()
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            faults.append(Fault("reference", "annotations", index, f"annotation {short(entry)} is no entry of COCO"))
            continue
        number, in_image = entry.get("id"), f"image {short(entry.get('image_id'))}"
        if type(number) is not int or number in seen:
            faults.append(Fault("annotation_id", "annotations", index, f"annotation id {short(number)}, {in_image}"))
        elif number == 0:
            faults.append(Fault("zero_id", "annotations", index, f"annotation id 0, {in_image}"))
        if type(number) is int:
            seen.add(number)
        image, category = find(images, entry.get("image_id")), find(categories, entry.get("category_id"))
        if image is None or category is None:
            what = f"image_id {short(entry.get('image_id'))}, category_id {short(entry.get('category_id'))}"
            faults.append(Fault("reference", "annotations", index, f"annotation {short(number)}: {what}"))
        elif not is_box(entry.get("bbox")) or not all(map(math.isfinite, entry["bbox"])):
            text = f"annotation {short(number)} of {image['file_name']}: {short(entry.get('bbox'))}"
            faults.append(Fault("box", "annotations", index, text))
        else:
            objects.append(Object(index, entry, image))
    return objects, faults


def check_boxes(objects: list[Object]) -> Iterator[Fault]:
    """Boxes of no size, outside, reaching beyond, or in another notation."""
    if len(objects) >= FEWEST and all(-0.001 <= x <= 1.001 for o in objects for x in o.box):
        for o in objects:
            yield Fault("fractions", "annotations", o.index, f"{o.where}: {o.box}")
        return
    all_corners = len(objects) >= FEWEST and all(o.box[2] > o.box[0] and o.box[3] > o.box[1] for o in objects)
    all_corners = all_corners and all(fits(o.box, o.image) for o in objects) and any(map(overflows, objects))
    for o in objects:
        kind = "xyxy" if all_corners else box_fault(o)
        if kind:
            size = f"{o.image['width']}x{o.image['height']}"
            yield Fault(kind, "annotations", o.index, f"{o.where}: {o.box} in an image of {size}")


def box_fault(o: Object) -> str:
    """The kind of fault of one box; an empty text if there is none."""
    x, y, width, height = o.box
    if width <= 0 or height <= 0:
        return "zero"
    by_area = notation_by_area(o.entry)
    if fits(o.box, o.image) and (by_area == "xyxy" or (overflows(o) and by_area != "xywh")):
        return "xyxy"
    if usable_box(o.box, o.image["width"], o.image["height"]) is None:
        return "outside"
    return "beyond" if overflows(o) or min(x, y) < -TOLERANCE else ""


def fits(box: list[float], image: dict) -> bool:
    """Whether the four numbers, read as two corners, are a box in the image."""
    width, height = image["width"], image["height"]
    inside = min(box[:2]) >= -TOLERANCE and box[2] <= width + TOLERANCE and box[3] <= height + TOLERANCE
    return inside and usable_box(from_corners(box), width, height) is not None


def from_corners(box: list[float]) -> list[float]:
    """xyxy -> xywh."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def overflows(o: Object) -> bool:
    """Whether a box, read as xywh, reaches beyond the right or the lower border."""
    x, y, width, height = o.box
    return x + width > o.image["width"] + TOLERANCE or y + height > o.image["height"] + TOLERANCE


def notation_by_area(entry: dict) -> str:
    """What the annotation's own `area` says of its four numbers: "xywh", "xyxy", or an empty text for nothing."""
    area, (x, y, width, height) = entry.get("area"), entry["bbox"]
    if not is_number(area) or area <= 0:
        return ""
    if abs(area - width * height) <= 0.01 * area:
        return "xywh"
    is_box_area = not entry.get("segmentation")  # else that of an outline, which can be anything
    return "xyxy" if is_box_area and abs(area - (width - x) * (height - y)) <= 0.01 * area else ""


def check_copies(objects: list[Object]) -> Iterator[Fault]:
    """Objects that occur twice with the same class and box, and images with very many objects."""
    by_image: dict[int, list[Object]] = defaultdict(list)
    for o in objects:
        by_image[o.image["id"]].append(o)
    for group in by_image.values():
        seen = set()
        for o in group:
            key = (o.entry["category_id"], *o.box)
            if key in seen:
                yield Fault("object_twice", "annotations", o.index, f"{o.where}: {o.box}")
            seen.add(key)
        if len(group) > CROWD:
            text = f"{group[0].image['file_name']} has {len(group)}"
            yield Fault("crowded", "annotations", group[0].index, text)


def short(value: Any) -> str:
    """A value from the file, in at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
