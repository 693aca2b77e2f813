"""Issues between training and validation data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dino.utils.files import resolve_inside

from .annotations import Contents
from .image_files import ImageFile
from .issues import Issue


class Split(NamedTuple):
    """One of the two data sets.

    Args:
        images: index in the file's list, and entry, of each sound image.
        files: of these images; None if no file was opened.
    """

    folder: str | Path
    contents: Contents
    images: list[tuple[int, dict]]
    files: list[ImageFile] | None


def compare(train: Split, val: Split) -> Iterator[Issue]:
    """Issues of the training data: other classes, and images that the validation data has too."""
    yield from _compare_classes(train.contents.categories, val.contents.categories)
    known = _names_by_key(val)
    for (index, image), keys in zip(train.images, _keys_of(train), strict=True):
        twin = next((known[key] for key in keys if key in known), None)
        if twin is not None:
            yield Issue("shared", "images", index, f"{image['file_name']} is {twin} of the validation data")


def _compare_classes(train: dict[int, dict], val: dict[int, dict]) -> Iterator[Issue]:
    """Names must agree in the order of their ids: labels follow that order."""
    names, others = ([entries[number]["name"] for number in sorted(entries)] for entries in (train, val))
    if names != others:
        only_train, only_val = ([n for n in a if n not in b] for a, b in ((names, others), (others, names)))
        text = f"only in training: {only_train}, only in validation: {only_val}"
        if not only_train and not only_val:
            text = f"the same names in another order: {names}, in validation {others}"
        yield Issue("classes_differ", "categories", 0, text)
    elif sorted(train) != sorted(val):
        yield Issue("ids_differ", "categories", 0, f"{sorted(train)}, in validation {sorted(val)}")


def _keys_of(split: Split) -> Iterator[list]:
    """What identifies each image: its file and, if the file was opened, its pixels."""
    files = split.files or [ImageFile() for _ in split.images]
    for (_, image), file in zip(split.images, files, strict=True):
        path = os.path.realpath(resolve_inside(split.folder, image["file_name"]))
        yield [path, file.digest] if file.digest else [path]


def _names_by_key(split: Split) -> dict:
    """File name of each image, by its keys."""
    pairs = zip(split.images, _keys_of(split), strict=True)
    return {key: image["file_name"] for (_, image), keys in pairs for key in keys}
