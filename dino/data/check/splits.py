"""Faults that show only when training and validation data are seen together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dino.utils.files import resolve_inside

from .annotations import Contents
from .image_files import Picture
from .issues import Fault


class Split(NamedTuple):
    """One of the two data sets, as it was read.

    Args:
        images: place in the file's list of images, and entry, of the sound ones.
        pictures: of these images; None where no file was opened.
    """

    folder: str | Path
    contents: Contents
    images: list[tuple[int, dict]]
    pictures: list[Picture] | None


def compare(train: Split, val: Split) -> Iterator[Fault]:
    """Faults of the training data with regard to the validation data."""
    yield from compare_classes(train.contents.categories, val.contents.categories)
    known = identities(val)
    for (index, image), marks in zip(train.images, marks_of(train), strict=True):
        twin = next((known[mark] for mark in marks if mark in known), None)
        if twin is not None:
            yield Fault("shared", "images", index, f"{image['file_name']} is {twin} of the validation data")


def compare_classes(train: dict[int, dict], val: dict[int, dict]) -> Iterator[Fault]:
    """Names must agree in the order of their ids; a label is the place in that order."""
    names, others = ([entries[number]["name"] for number in sorted(entries)] for entries in (train, val))
    if names != others:
        only_train, only_val = ([n for n in a if n not in b] for a, b in ((names, others), (others, names)))
        text = f"only in training: {only_train}, only in validation: {only_val}"
        if not only_train and not only_val:
            text = f"the same names in another order: {names}, in validation {others}"
        yield Fault("classes_differ", "categories", 0, text)
    elif sorted(train) != sorted(val):
        yield Fault("ids_differ", "categories", 0, f"{sorted(train)}, in validation {sorted(val)}")


def marks_of(split: Split) -> Iterator[list]:
    """What tells each image of a split apart from others: its file and, if that was opened, its pixels."""
    pictures = split.pictures or [Picture() for _ in split.images]
    for (_, image), picture in zip(split.images, pictures, strict=True):
        path = os.path.realpath(resolve_inside(split.folder, image["file_name"]))
        yield [path, picture.digest] if picture.digest else [path]


def identities(split: Split) -> dict:
    """File name of the image for each of its marks."""
    pairs = zip(split.images, marks_of(split), strict=True)
    return {mark: image["file_name"] for (_, image), marks in pairs for mark in marks}
