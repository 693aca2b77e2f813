"""Faults that show only when the image files are opened: all of them, in parallel."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image
from tqdm import tqdm

from dino.data.images import IMAGE_SUFFIXES
from dino.utils.files import resolve_inside

from .issues import Fault


class Picture(NamedTuple):
    """What an image file says about itself.

    Args:
        size: width and height in pixels as stored, before the EXIF orientation.
        orientation: EXIF's number; 1 is upright, 5 to 8 exchange width and height.
        digest: of size and pixels: equal for two files of the same picture, whatever their names and metadata.
        problem: why the file can't be used; None if it can. "missing" if it is not there.
    """

    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    digest: bytes = b""
    problem: str | None = None

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height with the EXIF orientation applied."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def look(path: Path) -> Picture:
    """Decode one file to its end."""
    if not path.is_file():
        return Picture(problem="missing")
    try:
        with Image.open(path) as image:
            size = image.size
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            # JPEG is decoded at an eighth of its size, which still reads the whole file and is several times as fast.
            image.draft(None, (size[0] // 8, size[1] // 8))
            image.load()
            digest = hashlib.blake2b(repr((size, image.mode)).encode() + image.tobytes(), digest_size=16).digest()
    except Exception as error:  # Pillow's decoders raise all sorts of errors on broken files
        return Picture(problem=str(error) or type(error).__name__)
    return Picture(size, orientation if orientation in range(1, 9) else 1, digest)


def look_at_all(images: list[dict], folder: str | Path, label: str) -> list[Picture]:
    """Decode the files of sound image entries, in parallel, with a progress bar."""
    paths = [resolve_inside(folder, image["file_name"]) for image in images]
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata and large pictures; failures are reported anyway
        progress = tqdm(pool.map(look, paths), desc=label, total=len(paths), unit=" images", disable=None)
        return list(progress)


def check_pictures(images: list[tuple[int, dict]], pictures: list[Picture]) -> Iterator[Fault]:
    """Compare what the annotations say of each image with what its file says.

    Args:
        images: place in the list of images, and entry.
        pictures: of the same images.
    """
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for (index, image), picture in zip(images, pictures, strict=True):
        name, stated = image["file_name"], (image["width"], image["height"])
        if picture.problem == "missing":
            yield Fault("missing", "images", index, name)
            continue
        if picture.problem:
            yield Fault("unreadable", "images", index, f"{name}: {picture.problem}")
            continue
        sizes = f"{name} is {as_text(picture.upright)}, but the annotations say {as_text(stated)}"
        if stated == picture.upright and picture.orientation != 1:
            yield Fault("turned", "images", index, f"{name}: orientation {picture.orientation}")
        elif stated == picture.size != picture.upright:
            yield Fault("exif", "images", index, f"{sizes} (orientation {picture.orientation})")
        elif stated != picture.upright:
            yield Fault("size", "images", index, sizes)
        others = by_digest[picture.digest]
        if others:
            yield Fault("same_picture", "images", index, f"{name} shows the same as {others[0]}")
        others.append(name)


def as_text(size: tuple[int, int]) -> str:
    """Width x height."""
    return f"{size[0]}x{size[1]}"


def unlisted(folder: str | Path, known: set[str]) -> list[str]:
    """Names, relative to the folder, of image files that are not among the known ones: training ignores them."""
    found = []
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and str(path.relative_to(folder)) not in known:
                found.append(str(path.relative_to(folder)))
    return sorted(found)
