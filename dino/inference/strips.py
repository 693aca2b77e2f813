"""Very large image files, decoded from top to bottom as far as tiles need it, with the library pyvips."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from dino.utils.files import DataError

LARGE = 178_956_970  # pixels: Pillow's limit, up to which files are decoded whole
_ROWS = 256  # that are decoded at a time,
_MOST_PIXELS = 1 << 26  # or fewer, unless one row has more pixels
_LOADERS = ("jpegload", "pngload", "tiffload", "webpload")
_BANDS = {("srgb", "uchar"): (3, 4), ("b-w", "uchar"): (1,), ("grey16", "ushort"): (1,), ("b-w", "float"): (1,)}
_PARTS_OF_TIFF = ((273, 279), (324, 325))  # tags: offsets and numbers of bytes of strips, or of tiles
_DTYPES = {"uchar": np.uint8, "ushort": np.uint16, "float": np.float32}


class Strips:
    """An image file whose pixels are decoded when they are asked for: a few rows are in memory, never all.

    Rows are asked for from top to bottom. To start again costs a second decoding.

    Args:
        path: a JPEG, PNG, TIFF or WebP file.
        image: the file, as `pyvips.Image` found it.
        read: makes pixels (h, w, 3) uint8 of a Pillow image, see `read_image`.

    Attributes:
        shape: (H, W, 3).
    """

    def __init__(self, path: Path, image: Any, read: Callable[[Any], np.ndarray]):
        self.path = path
        self.dtype = _DTYPES[image.format]
        self.bands = image.bands
        self.shape = (image.height, image.width, 3)
        self.read = read
        self._step = max(1, min(_ROWS, _MOST_PIXELS // image.width))
        self._region: Any = None
        self._top = self._next = 0  # rows of the file: of the first one in memory, and the next one to decode
        self._rows = np.empty((0, image.width, 3), np.uint8)

    @classmethod
    def open(cls, path: Path, read: Callable[[Any], np.ndarray], max_pixels: int | None) -> Strips | None:
        """Open a file; None unless it is large, pyvips is installed, and a strip of it can be read as the whole is.

        Args:
            read: see above. max_pixels: most pixels that a file may have; None for Pillow's limit.
        """
        vips = _load_vips()
        if vips is None or max_pixels is None or max_pixels <= LARGE:
            return None
        try:
            image = _open(vips, path)
            large = LARGE < image.width * image.height <= max_pixels
            return cls(path, image, read) if large and _is_plain(image) and _is_whole(path, image) else None
        except vips.Error:  # Pillow finds out what is wrong with it
            return None

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        """Rows and columns, both with a start and a stop, as (h, w, 3) uint8.

        Raises:
            DataError: the file can't be decoded.
        """
        rows, columns = place
        if self._region is None or rows.start < self._top:
            self._start()
        while self._next < rows.stop:
            fresh = self._decode(min(self._step, self.shape[0] - self._next))
            kept = self._rows[max(rows.start - self._top, 0) :]
            self._rows = np.concatenate([kept, fresh])
            self._next += len(fresh)
            self._top = self._next - len(self._rows)
        first = rows.start - self._top
        return self._rows[first : first + rows.stop - rows.start, columns]

    def shrink(self, size: tuple[int, int]) -> np.ndarray:
        """The whole picture, resized to (height, width): averages of blocks first, then bilinear, as Pillow's
        `reducing_gap=2` does.
        """
        height, width = self.shape[:2]
        factors = tuple(max(1, int(old / new / 2)) for old, new in zip((width, height), size[::-1], strict=True))
        step = max(1, self._step // factors[1]) * factors[1]
        parts = []
        for start in range(0, height, step):
            part = np.ascontiguousarray(self[start : min(start + step, height), 0:width])
            parts.append(np.asarray(Image.fromarray(part).reduce(factors)))
        box = (0, 0, width / factors[0], height / factors[1])
        reduced = Image.fromarray(np.concatenate(parts))
        return np.array(reduced.resize(size[::-1], Image.Resampling.BILINEAR, box=box))

    def _start(self) -> None:
        """Begin at the first row."""
        vips = _load_vips()
        try:
            self._region = vips.Region.new(_open(vips, self.path))
        except vips.Error as error:
            raise self._broken(error) from error
        self._top = self._next = 0
        self._rows = self._rows[:0]

    def _decode(self, rows: int) -> np.ndarray:
        """The next rows as (rows, W, 3) uint8."""
        width = self.shape[1]
        try:
            data = self._region.fetch(0, self._next, width, rows)
        except _load_vips().Error as error:
            raise self._broken(error) from error
        values = np.frombuffer(data, self.dtype).reshape(rows, width, self.bands)
        picture = Image.fromarray(values[:, :, 0] if self.bands == 1 else values)
        picture.filename = str(self.path)  # for messages
        return self.read(picture)

    def _broken(self, error: Exception) -> DataError:
        text = " ".join(str(error).split())
        return DataError(f"can't read image {self.path}: {text}. Replace the file or remove it from the data set")


def _load_vips() -> ModuleType | None:
    """The library, or None where it is not installed."""
    logging.getLogger("pyvips").setLevel(logging.ERROR)  # what matters becomes an error here
    try:
        return importlib.import_module("pyvips")
    except (ImportError, OSError):  # OSError: its binding without the library
        return None


def _open(vips: ModuleType, path: Path) -> Any:
    """The head of a file; `pyvips.Error` if none of `_LOADERS` reads it."""
    image = vips.Image.new_from_file(str(path), access="sequential", fail_on="truncated")
    if not image.get("vips-loader").startswith(_LOADERS):
        raise vips.Error("another format")
    return image


def _is_plain(image: Any) -> bool:
    """Whether strips of an image are read as the whole is: upright, one page of grey or colours, no odd bits."""
    names = image.get_fields()
    bands = _BANDS.get((image.interpretation, image.format), ())
    odd = "bits-per-sample" in names and image.get("bits-per-sample") not in (8, 16, 32)
    turned = "orientation" in names and image.get("orientation") != 1
    four_of_tiff = image.bands == 4 and image.get("vips-loader").startswith("tiff")  # perhaps infrared
    return image.bands in bands and not (odd or turned or four_of_tiff)


def _is_whole(path: Path, image: Any) -> bool:
    """Whether a TIFF file has all its parts (pyvips fills those of truncated files); True for other formats."""
    if not image.get("vips-loader").startswith("tiff"):
        return True
    try:
        with TiffImagePlugin.TiffImageFile(path) as file:
            tags = file.tag_v2
            places, lengths = next(pair for pair in _PARTS_OF_TIFF if pair[0] in tags)
            return max(map(sum, zip(tags[places], tags[lengths], strict=True))) <= path.stat().st_size
    except Exception:  # of a broken file
        return False
