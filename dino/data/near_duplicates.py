"""Groups of images that are nearly the same, and a split that keeps each group together."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino.data.images import open_image
from dino.utils.files import DataError, resolve_inside

_SIDE = 8  # of the grid of brightness differences, which gives 64 bits
_BITS = 5  # that may differ between nearly equal images
_BLOCK = 500  # images that are compared with all others at a time


def group_near_duplicates(images: Sequence[dict], folder: str | Path) -> list[int]:
    """The number of each image's group. Images that differ in size, compression or light are nearly the same.

    Args:
        images: entries with a `file_name`. folder: of their files.

    Raises:
        DataError: a file can't be read.
    """
    hashes = np.array([_difference_hash(resolve_inside(folder, i["file_name"])) for i in images], dtype=np.uint64)
    parents = list(range(len(images)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for start in range(0, len(hashes), _BLOCK):
        differing = np.bitwise_count(hashes[start : start + _BLOCK, None] ^ hashes[None, :])
        for row, column in np.argwhere(differing <= _BITS):
            if start + row < column:
                parents[root(int(column))] = root(int(start + row))
    return [root(index) for index in range(len(images))]


def _difference_hash(path: Path) -> int:
    """64 bits: where a picture, shrunk to 9 x 8 grey pixels, gets brighter from left to right."""
    try:
        with open_image(path) as image:
            image.draft("L", (8 * _SIDE, 8 * _SIDE))
            small = image.convert("F").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    except Exception as error:  # Pillow's decoders raise all sorts of errors on broken files
        raise DataError(f"can't read image {path}: {error}. `dino check` lists all such files") from error
    pixels = np.asarray(small)
    bits = np.packbits(pixels[:, 1:] > pixels[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def choose_validation(data: dict[str, Any], groups: Sequence[int], fraction: float, seed: int) -> set[int]:
    """Ids of the images to validate on: whole groups, drawn at random; each class with two groups has one on each side.

    Args:
        data: checked annotations in COCO format.
        groups: number of each image's group, see `group_near_duplicates`.
        fraction: of the images, at least one and not all of them.
    """
    group_of = {image["id"]: group for image, group in zip(data["images"], groups, strict=True)}
    classes: dict[int, set[int]] = defaultdict(set)
    for a in data["annotations"]:
        classes[group_of[a["image_id"]]].add(a["category_id"])
    wanted = min(max(round(fraction * len(data["images"])), 1), len(data["images"]) - 1)
    order = sorted(set(groups))
    random.Random(seed).shuffle(order)
    chosen = _choose_groups(order, Counter(groups), classes, wanted)
    return {image_id for image_id, group in group_of.items() if group in chosen}


def _choose_groups(
    order: Sequence[int], members: Mapping[int, int], classes: Mapping[int, set[int]], wanted: int
) -> set[int]:
    """Groups in an order, up to `wanted` members; first those that bring each class to both sides.

    Args:
        members: number of a group's images. classes: ids of the classes of its objects.
    """
    left = Counter(chain.from_iterable(classes.values()))  # groups to train on, by class
    chosen: set[int] = set()

    def choose(group: int) -> bool:
        """Take a group, if each of its classes has another one to train on."""
        if group in chosen or any(left[number] < 2 for number in classes.get(group, ())):
            return False
        left.subtract(classes.get(group, ()))
        chosen.add(group)
        return True

    for number in sorted(left, key=left.__getitem__):
        if not any(number in classes.get(group, ()) for group in chosen):
            any(choose(group) for group in order if number in classes.get(group, ()))
    size = sum(members[group] for group in chosen)
    for group in order:
        if size + members[group] <= wanted and choose(group):
            size += members[group]
    return chosen


def take_images(data: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The annotations of some images."""
    return {
        **data,
        "images": [image for image in data["images"] if image["id"] in ids],
        "annotations": [a for a in data["annotations"] if a["image_id"] in ids],
    }
