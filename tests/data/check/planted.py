"""Plants issues of known kinds at known entries of a clean data set.

Issues of images go to the second half of the images, issues of objects to the first half, so that each can be seen.
"""

import copy
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
        return Planted(kind, str(values.get("file_name") or image["id"]) if "file_name" in values else name, REFERENCE)

    return plant


REFERENCE = frozenset({"reference"})  # objects lose an image that can't be read


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
    return Planted("image_id", first["file_name"], REFERENCE)


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
    return Planted("unreadable", image["file_name"])


def no_picture(field):
    image = field.image()
    (field.folder / image["file_name"]).write_text("no image")
    return Planted("unreadable", image["file_name"])


def other_size(field):
    image = field.image()
    path = field.folder / image["file_name"]
    Image.open(path).crop((0, 0, WIDTH - 3, HEIGHT)).save(path)
    return Planted("size", image["file_name"])


def turn(orientation, kind):
    def plant(field):
        image = field.image()
        path = field.folder / image["file_name"]
        picture = Image.open(path)
        exif = picture.getexif()
        exif[0x0112] = orientation
        picture.save(path, exif=exif)
        return Planted(kind, image["file_name"])

    return plant


def same_picture(field):
    """A copy under another name and with other metadata."""
    first, second = sorted((field.image(), field.image()), key=lambda image: image["id"])
    picture = Image.open(field.folder / first["file_name"])
    picture.save(field.folder / second["file_name"], compress_level=1, dpi=(72, 72))
    return Planted("same_image", second["file_name"])


PLANTERS = {
    "zero width": change_object("zero", bbox=[5, 5, 0, 10], area=0),
    "negative height": change_object("zero", bbox=[5, 5, 10, -3], area=30),
    "outside": change_object("outside", bbox=[200, 5, 10, 10], area=100),
    "left of the image": change_object("outside", bbox=[-40, 5, 20, 10], area=200),
    "beyond": change_object("beyond", bbox=[60, 10, 20, 20], area=400),
    "beyond the left": change_object("beyond", bbox=[-5, 10, 20, 20], area=400),
    "corners": change_object("xyxy", bbox=[40, 35, 62, 60], area=550),
    "corners of a small box": change_object("xyxy", bbox=[5, 5, 25, 20], area=300),
    "text box": change_object("box", bbox=["1", 2, 3, 4]),
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
    "text as width": change_image("image", width="72"),
    "no file name": change_image("image", file_name=None),
    "path": change_image("path", file_name="../../secret.png"),
    "missing": missing,
    "truncated": truncated,
    "no picture": no_picture,
    "other size": other_size,
    "sideways": turn(6, "exif"),
    "upside down": turn(3, "rotated"),
    "same picture": same_picture,
}


def plant(folder, names, seed):
    """-> files, clean content, what was planted."""
    field = Field(folder, seed)
    clean = copy.deepcopy(field.content)
    planted = [PLANTERS[name](field) for name in names]
    return field.write(), clean, planted
