"""Issues that show when the image files are opened: all of them, in parallel."""

from __future__ import annotations

import hashlib
import io
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image
from tqdm import tqdm

from dino.data.images import END_OF_JPEG, IMAGE_SUFFIXES, needs_range, open_image
from dino.utils.files import resolve_inside

from .issues import Issue


class ImageFile(NamedTuple):
    """Facts of an image file.

    Args:
        size: width and height in pixels as stored, before the EXIF orientation.
        orientation: EXIF's number; 1 is upright, 5 to 8 exchange width and height.
        digest: of size and pixels; independent of name and metadata.
        problem: why the file can't be used, "missing" if it does not exist; None if it is sound.
        wide: whether reading it needs an `input_range`.
    """

    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    digest: bytes = b""
    problem: str | None = None
    wide: bool = False

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height with the EXIF orientation applied."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def _read_file(path: Path) -> ImageFile:
    """Decode one file to its end."""
    if not os.path.isfile(path):
        return ImageFile(problem="missing")
    try:
        with open_image(path) as image:
            size = image.size
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            # JPEG is decoded at an eighth of its size, which still reads the whole file and is several times as fast.
            image.draft(None, (max(size[0] // 8, 1), max(size[1] // 8, 1)))
            image.load()
            wide = needs_range(image)
            digest = hashlib.blake2b(repr((size, image.mode)).encode() + image.tobytes(), digest_size=16).digest()
    except Exception as error:  # Pillow's decoders raise all sorts of errors on broken files
        return ImageFile(problem=str(error) or type(error).__name__)
    return ImageFile(size, orientation if orientation in range(1, 9) else 1, digest, wide=wide)


def completed_jpeg(path: Path) -> tuple[Path, bytes] | None:
    """A truncated JPEG file, and its bytes with an end, so that its missing lines are grey; None for other files."""
    content = path.read_bytes() + END_OF_JPEG
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return (path, content) if image.format == "JPEG" else None
    except Exception:  # see `_read_file`
        return None


def read_files(images: list[dict], folder: str | Path, label: str) -> list[ImageFile]:
    """Decode the files of sound image entries, in parallel, with a progress bar."""
    paths = [resolve_inside(folder, image["file_name"]) for image in images]
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata and large images; failures become issues
        progress = tqdm(pool.map(_read_file, paths), desc=label, total=len(paths), unit=" images", disable=None)
        start = time.perf_counter()
        files = list(progress)
    seconds = time.perf_counter() - start
    print(f"{label}: {len(files)} in {seconds:.1f} s, {len(files) / seconds:.0f} images/s")
    return files


def check_files(images: list[tuple[int, dict]], files: list[ImageFile]) -> Iterator[Issue]:
    """Compare the annotations of each image with its file.

    Args:
        images: index in the list of images, and entry, which has a size; sizes and orientations are corrected.
        files: of the same images.
    """
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for (index, image), file in zip(images, files, strict=True):
        name, stated = image["file_name"], (image["width"], image["height"])
        if file.problem == "missing":
            yield Issue("missing", "images", index, name)
            continue
        if file.problem:
            kind = "truncated" if "truncated" in file.problem else "unreadable"
            yield Issue(kind, "images", index, f"{name}: {file.problem}")
            continue
        sizes = f"{name} is {_as_text(file.upright)}, but the annotations say {_as_text(stated)}"
        if stated == file.upright and file.orientation != 1:
            yield Issue("rotated", "images", index, f"{name}: orientation {file.orientation}")
        elif stated not in (file.upright, file.size):  # the stored size: see `corrections.py`
            yield Issue("size", "images", index, sizes)
        if file.wide:
            yield Issue("wide", "images", index, name)
        others = by_digest[file.digest]
        if others:
            yield Issue("same_image", "images", index, f"{name} has the same pixels as {others[0]}")
        others.append(name)


def _as_text(size: tuple[int, int]) -> str:
    """Width x height."""
    return f"{size[0]}x{size[1]}"


def unlisted(folder: str | Path, known: set[str]) -> list[str]:
    """Image files of the folder, by relative name, that are not among the known ones: training ignores them."""
    found = []
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            if (
                path.suffix.lower() in IMAGE_SUFFIXES
                and not name.startswith(".")
                and str(path.relative_to(folder)) not in known
            ):
                found.append(str(path.relative_to(folder)))
    return sorted(found)
