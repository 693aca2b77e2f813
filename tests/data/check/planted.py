"""Plants issues of known kinds at known entries of a clean data set.

Issues of images go to the second half of the images, issues of objects to the first half, so that each can be seen.
"""

import copy
import json
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...coco_files import write_coco

IMAGES, OBJECTS = 12, 3  # objects per image
WIDTH, HEIGHT = 72, 64


class Planted(NamedTuple):
    kind: str
    name: str  # must occur in the text of the issue
    consequences: frozenset = frozenset()  # kinds that follow by necessity


class Field:
    """A clean data set and its entries without an issue so far."""

    def __init__(self, folder, seed):
        self.folder = folder
        self.files = write_coco(folder, counts=(OBJECTS,) * IMAGES, seed=seed, width=WIDTH, height=HEIGHT)
        self.content = self.files.read()
        for number, a in enumerate(self.content["annotations"]):
            a["category_id"] = number % 3 + 1  # every class in every image, so that none is left without objects
        random = np.random.default_rng(seed)
        half = IMAGES // 2
        self.images = random.permutation(np.arange(half, IMAGES)).tolist()
        self.objects = random.permutation(np.arange(half * OBJECTS)).tolist()

    def image(self):
        return self.content["images"][self.images.pop()]

    def object(self):
        return self.content["annotations"][self.objects.pop()]

    def write(self):
        self.files.write(self.content)
        return self.files


def change_object(kind, **values):
    def plant(field):
        a = field.object()
        a.update(values)
        return Planted(kind, f"annotation {a['id']}")

    return plant


def change_image(kind, **values):
    def plant(field):
        image = field.image()
        name = image["file_name"]
        image.update(values)
        if kind == "number":
            name = f"image {image['id']}"
        return Planted(kind, str(values.get("file_name") or image["id"]) if "file_name" in values else name)

    return plant


def write_id_as_text(field):
    """In the annotations that refer to it too."""
    image = field.image()
    for a in field.content["annotations"]:
        if a["image_id"] == image["id"]:
            a["image_id"] = f" {image['id']}.0"
    image["id"] = str(image["id"])
    return Planted("number", f"image {json.dumps(image['id'])}")


def rename(change):
    def plant(field):
        image = field.image()
        name = image["file_name"]
        image["file_name"] = change(name)
        return Planted("name", f"{image['file_name']} is {name}")

    return plant


def outline(segmentation, **values):
    def plant(field):
        a = field.object()
        x, y, w, h = a["bbox"]
        a["segmentation"] = segmentation(x, y, w, h)
        a.update(values)
        if "bbox" not in values:
            del a["bbox"]
        return Planted("outline", f"annotation {a['id']}")

    return plant


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def runs(x, y, w, h):
    """Run lengths down the columns."""
    inside = [h, HEIGHT - h] * w
    return {"size": [HEIGHT, WIDTH], "counts": [x * HEIGHT + y, *inside[:-1], HEIGHT * (WIDTH - x - w + 1) - y - h]}


def namesake(field):
    """Roboflow names the group of a single class like the class."""
    for category in field.content["categories"]:
        category["supercategory"] = "red"
    field.content["categories"].insert(0, {"id": 0, "name": "red", "supercategory": "none"})
    return Planted("namesake", "class 'red', beside a class of that name")


def entry_for_each_object(field):
    """As some converters write."""
    image = field.image()
    own = [a for a in field.content["annotations"] if a["image_id"] == image["id"]]
    for a in own[1:]:
        a["image_id"] = 1000 + a["id"]
        field.content["images"].append({**image, "id": a["image_id"]})
    return Planted("file_twice", f"image {own[-1]['image_id']}: {image['file_name']} is image {image['id']} already")


def annotation_id_twice(field):
    first, second = field.object(), field.object()
    second["id"] = first["id"]
    return Planted("annotation_id", str(first["id"]))


def annotation_id_zero(field):
    a = field.object()
    a["id"] = 0
    return Planted("zero_id", "annotation id 0")


def group_as_class(field):
    """Roboflow lists the name of the data set, as class 0, the parent of all others."""
    for category in field.content["categories"]:
        category["supercategory"] = "cells"
    field.content["categories"].insert(0, {"id": 0, "name": "cells", "supercategory": "none"})
    return Planted("supercategory", "class 'cells'")


def object_twice(field):
    a = field.object()
    field.content["annotations"].append({**a, "id": 1000})
    return Planted("object_twice", "annotation 1000")


def image_id_twice(field):
    first, second = field.image(), field.image()
    second["id"] = first["id"]
    return Planted("image_id", first["file_name"], frozenset({"reference"}))  # objects of an id that is gone


def file_twice(field):
    image = field.image()
    field.content["images"].append({**image, "id": 1000})
    return Planted("file_twice", image["file_name"])


def missing(field):
    image = field.image()
    (field.folder / image["file_name"]).unlink()
    return Planted("missing", image["file_name"])


def truncated(field):
    image = field.image()
    path = field.folder / image["file_name"]
    path.write_bytes(path.read_bytes()[:-2000])
    return Planted("truncated", image["file_name"])


def no_picture(field):
    image = field.image()
    (field.folder / image["file_name"]).write_text("no image")
    return Planted("unreadable", image["file_name"])


def other_size(field):
    image = field.image()
    path = field.folder / image["file_name"]
    Image.open(path).crop((0, 0, WIDTH - 3, HEIGHT)).save(path)
    return Planted("size", image["file_name"])


def turn(orientation, kind, box=None):
    """Give a file an orientation; `box`: of one of its objects, which fits the upright picture, or the stored one."""

    def plant(field):
        image = field.image()
        path = field.folder / image["file_name"]
        picture = Image.open(path)
        exif = picture.getexif()
        exif[0x0112] = orientation
        picture.save(path, exif=exif)
        own = [a for a in field.content["annotations"] if a["image_id"] == image["id"]]
        for number, a in enumerate(own):
            a.update(bbox=[5 * number, 10, 20, 15], area=300)  # fits both pictures
        if box:
            own[0].update(bbox=box, area=box[2] * box[3])
        return Planted(kind, image["file_name"])

    return plant


def same_picture(field):
    """A copy under another name and with other metadata."""
    first, second = sorted((field.image(), field.image()), key=lambda image: image["id"])
    picture = Image.open(field.folder / first["file_name"])
    picture.save(field.folder / second["file_name"], compress_level=1, dpi=(72, 72))
    return Planted("same_image", second["file_name"])


def floats(field):
    """Pixels of floats, whose black and white nobody knows."""
    image = field.image()
    image["file_name"] = f"{image['id']}.tif"
    Image.fromarray(np.full((HEIGHT, WIDTH), image["id"] / 7, np.float32)).save(field.folder / image["file_name"])
    return Planted("wide", image["file_name"])


def not_a_number(field):
    image = field.image()
    image["file_name"] = f"{image['id']}.tif"
    Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32)).save(field.folder / image["file_name"])
    return Planted("unreadable", f"{image['file_name']}: it has NaN or infinite pixels")


PLANTERS = {
    "zero width": change_object("zero", bbox=[5, 5, 0, 10], area=0),
    "negative height": change_object("zero", bbox=[5, 5, 10, -3], area=30),
    "outside": change_object("outside", bbox=[200, 5, 10, 10], area=100),
    "left of the image": change_object("outside", bbox=[-40, 5, 20, 10], area=200),
    "beyond": change_object("beyond", bbox=[60, 10, 20, 20], area=400),
    "beyond the left": change_object("beyond", bbox=[-5, 10, 20, 20], area=400),
    "corners": change_object("xyxy", bbox=[40, 35, 62, 60], area=550),
    "corners of a small box": change_object("xyxy", bbox=[5, 5, 25, 20], area=300),
    "text box": change_object("number", bbox=["1", 2, "3e1", 20]),
    "word box": change_object("box", bbox=["one", 2, 3, 4]),
    "polygon": outline(polygon),
    "polygon beside an empty box": outline(polygon, bbox=[0, 0, 0, 0]),
    "mask": outline(runs, bbox=None),
    "text as crowd": change_object("number", iscrowd="0"),
    "truth as crowd": change_object("number", iscrowd=False),
    "score": change_object("score", score=0.5),
    "crowd": change_object("crowd", iscrowd=1),
    "list as crowd": change_object("iscrowd", iscrowd=[]),
    "text as area": change_object("number", area="12.5"),
    "list as area": change_object("area", area=[1]),
    "negative area": change_object("area", area=-1),
    "huge area": change_object("area", area=10**400),
    "class as text": change_object("number", category_id="2"),
    "class with a point": change_object("number", category_id=2.0),
    "id as text": write_id_as_text,
    "short box": change_object("box", bbox=[1, 2, 3]),
    "infinite box": change_object("box", bbox=[1, 2, float("inf"), 4]),
    "huge number": change_object("box", bbox=[1, 2, 10**400, 4]),
    "unknown class": change_object("reference", category_id=99),
    "unknown image": change_object("reference", image_id=99),
    "list as image": change_object("reference", image_id=[1]),
    "annotation id twice": annotation_id_twice,
    "annotation id 0": annotation_id_zero,
    "group as class": group_as_class,
    "object twice": object_twice,
    "image id twice": image_id_twice,
    "file twice": file_twice,
    "entry for each object": entry_for_each_object,
    "namesake": namesake,
    "text as width": change_image("number", width="72"),
    "float as width": change_image("number", width=72.0),
    "no width": change_image("no_size", width=None),
    "zero width of an image": change_image("no_size", width=0, height=0),
    "negative width of an image": change_image("no_size", width=-1),
    "word as width": change_image("no_size", width="wide"),
    "backslash": rename(lambda name: f"images\\{name}"),
    "folder before": rename(lambda name: f"data/train/{name}"),
    "out of the folder": rename(lambda name: f"../../{name}"),
    "absolute": rename(lambda name: f"/home/somebody/{name}"),
    "address": rename(lambda name: f"https://example.org/files/{name}?size=large"),
    "Label Studio's address": rename(lambda name: f"/data/local-files/?d=photos/{name}"),
    "Label Studio's upload": rename(lambda name: f"/data/upload/1/0a1b2c3d-{name}"),
    "capital letters": rename(str.upper),
    "no file name": change_image("image", file_name=None),
    "path": change_image("path", file_name="../../secret.png"),
    "missing": missing,
    "truncated": truncated,
    "no picture": no_picture,
    "floats": floats,
    "NaN": not_a_number,
    "other size": other_size,
    "sideways": turn(6, "exif"),
    "sideways, boxes upright": turn(6, "exif_size", [5, 50, 10, 20]),
    "sideways, boxes as stored": turn(8, "exif_boxes", [60, 5, 10, 20]),
    "upside down": turn(3, "rotated"),
    "same picture": same_picture,
}


def plant(folder, names, seed):
    """-> files, clean content, what was planted."""
    field = Field(folder, seed)
    clean = copy.deepcopy(field.content)
    planted = [PLANTERS[name](field) for name in names]
    return field.write(), clean, planted
