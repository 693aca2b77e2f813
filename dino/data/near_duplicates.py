"""Groups of images that are nearly the same, and a split that keeps each group together."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dino.data.images import open_image
from dino.utils.files import DataError, resolve_inside

_SIMILARITY = 0.9  # least correlation of near-duplicates
_SIDE = 16  # pixels of a thumbnail
_FLAT = 2.0  # grey levels: thumbnails that deviate less are near-duplicates only if they are equal
_BLOCK = 1024  # images that are compared with all others at a time
_ATTEMPTS = 16  # random orders in which groups are dealt out
_MANY = np.iinfo(np.int64).max
_AUGMENTED = re.compile(r"(.+)\.rf\.[0-9a-zA-Z]{16,}")  # Roboflow's names of copies of one image


def group_near_duplicates(images: Sequence[dict], folder: str | Path) -> list[int]:
    """The number of each image's group: that of its first image. Frames of a slow video form one group, by chains.

    Images are nearly the same if their grey thumbnails correlate: they may differ in size, compression, light, a small
    movement; not by mirroring. Copies that Roboflow augmented are known by their names.

    Args:
        images: entries with a `file_name`. folder: of their files.

    Raises:
        DataError: a file can't be read.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        thumbnails = list(pool.map(lambda i: _thumbnail(resolve_inside(folder, i["file_name"])), images))
    groups = np.arange(len(images))
    values = np.array(thumbnails, dtype=np.float32).reshape(len(images), _SIDE * _SIDE)
    values -= values.mean(1, keepdims=True)
    flat = values.std(1) < _FLAT
    same = defaultdict(list)
    for index, image in enumerate(images):
        copy = _AUGMENTED.fullmatch(PurePosixPath(image["file_name"]).stem)
        if copy:
            same[copy[1]].append(index)
        if flat[index]:  # a correlation of it would be noise
            same[thumbnails[index].tobytes()].append(index)
    for members in same.values():
        _join(groups, np.array(members))
    _join_similar(groups, values, np.flatnonzero(~flat))
    return groups.tolist()


def _thumbnail(path: Path) -> np.ndarray:
    """(16, 16): the upright picture in grey, uint8 or, of deep images, float32."""
    try:
        with open_image(path) as image:
            image.draft("L", (8 * _SIDE, 8 * _SIDE))
            grey = image.convert("I").convert("F") if image.mode[0] in "IF" else image.convert("L")
            small = ImageOps.exif_transpose(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX))
            return np.nan_to_num(np.asarray(small))
    except Exception as error:  # Pillow's decoders raise all sorts of errors on broken files
        raise DataError(f"can't read image {path}: {error}. `dino check` lists all such files") from error


def _join(groups: np.ndarray, members: np.ndarray) -> None:
    """Unite the groups of all members."""
    numbers = groups[members]
    if (numbers != numbers[0]).any():
        numbers = np.unique(numbers)
        groups[np.isin(groups, numbers)] = numbers[0]


def _join_similar(groups: np.ndarray, values: np.ndarray, indices: np.ndarray) -> None:
    """Unite the groups of rows, of zero mean, that correlate."""
    rows = values[indices] / np.linalg.norm(values[indices], axis=1, keepdims=True)
    for start in range(0, len(rows), _BLOCK):
        close = rows[start : start + _BLOCK] @ rows[start:].T >= _SIMILARITY
        close[np.arange(len(close)), np.arange(len(close))] = True
        for row in np.flatnonzero(close.sum(1) > 1).tolist():
            _join(groups, indices[start + np.flatnonzero(close[row])])


def choose_validation(data: dict[str, Any], groups: Sequence[int], fraction: float, seed: int) -> set[int]:
    """Ids of the images to validate on: whole groups, so that about `fraction` of each class is among them.

    A class keeps an object to train on. The groups are dealt out in several random orders; the closest result counts.

    Args:
        data: checked annotations in COCO format.
        groups: number of each image's group, see `group_near_duplicates`.
        fraction: of the images, at least one and not all of them.
    """
    numbers, group_of = np.unique(np.array(groups, dtype=np.int64), return_inverse=True)
    sizes = np.bincount(group_of, minlength=len(numbers))
    rows = {image["id"]: group for image, group in zip(data["images"], group_of.tolist(), strict=True)}
    columns = {category["id"]: column for column, category in enumerate(data["categories"])}
    counts = np.zeros((len(numbers), len(columns)), dtype=np.int64)
    places = [(rows[a["image_id"]], columns[a["category_id"]]) for a in data["annotations"]]
    np.add.at(counts, tuple(np.array(places, dtype=np.int64).reshape(-1, 2).T), 1)
    room = min(max(fraction * len(rows), 1), len(rows) - 1)
    best = min(_deal_in_orders(counts, sizes, room, np.random.default_rng(seed)))
    return {image_id for image_id, group in rows.items() if group in best[-1]}


def _deal_in_orders(
    counts: np.ndarray, sizes: np.ndarray, room: float, random: np.random.Generator
) -> Iterator[tuple[float, int, set[int]]]:
    """Distance to the aim, number of the attempt, and groups for validation.

    Args:
        counts: (groups, classes) objects. sizes: (groups,) images. room: images for validation.
    """
    wanted = counts.sum(0) * room / sizes.sum()
    rarest = np.where(counts > 0, counts.sum(0), _MANY).min(1, initial=_MANY)  # class of a group: its objects
    for attempt in range(_ATTEMPTS):
        shuffled = random.permutation(len(sizes))
        keys = (shuffled, -sizes, rarest) if attempt % 2 == 0 else (shuffled, -sizes)
        chosen = _deal(counts, sizes, room, np.lexsort(keys).tolist())
        off = (counts[chosen].sum(0) - wanted) / np.maximum(wanted, 1)
        off_images = (sizes[chosen].sum() - room) / room
        yield float(np.square(off).sum() + (len(off) + 1) * np.square(off_images)), attempt, set(chosen)


def _deal(counts: np.ndarray, sizes: np.ndarray, room: float, order: Sequence[int]) -> list[int]:
    """Groups in an order, each if it brings its classes and the number of images closer to the aim."""
    totals = counts.sum(0)
    wanted = totals * room / sizes.sum()
    taken, images, chosen = np.zeros_like(totals), 0, []
    for group in order:
        used = np.flatnonzero(counts[group])
        before, after = taken[used], taken[used] + counts[group, used]
        if (after >= totals[used]).any():  # nothing of a class would remain to train on
            continue
        change = np.square((after - wanted[used]) / wanted[used]) - np.square((before - wanted[used]) / wanted[used])
        if change.sum() <= 0 and abs(images + sizes[group] - room) < abs(images - room):
            taken[used], images = after, images + sizes[group]
            chosen.append(group)
    return chosen
