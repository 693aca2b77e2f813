"""Reading image files: every mode becomes 8-bit RGB, and every failure names the file."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class DataError(ValueError):
    """Something is wrong with a file that a person gave; the message names it and says what to do."""


def message_of(error: BaseException) -> str:
    """What to tell a person: the text of an error, without the traceback that a data loader's worker puts around it."""
    text = str(error)
    return text.rstrip().rpartition(f"{type(error).__name__}: ")[2] if "Original Traceback" in text else text


def resolve_inside(folder: str | Path, file_name: str) -> Path:
    """`folder / file_name`, if that lies inside the folder.

    Raises:
        DataError: the name is absolute, empty, or climbs out of the folder.
    """
    pure = PurePosixPath(file_name)
    climbs = ".." in pure.parts or ".." in PureWindowsPath(file_name).parts
    if not file_name or pure.is_absolute() or PureWindowsPath(file_name).is_absolute() or climbs:
        raise DataError(f"file_name {file_name!r} leaves the image folder {folder}: write it relative to that folder")
    return Path(folder) / pure


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8, RGB, upright (its EXIF orientation applied).

    Grey, palette, RGBA (transparency dropped), CMYK and 16-bit files are converted; 16 bits are scaled to 8.

    Raises:
        DataError: the file is missing, no image, truncated, or suspiciously large (Pillow's decompression bomb check).
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DataError(
            f"image not found: {path}. Check the image folder and the file names in the annotations"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"can't read image {path}: {error}. Replace the file or remove it from the data set") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a Pillow image of any mode."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1
        return np.repeat(np.clip(values * scale, 0, 255).round().astype(np.uint8)[:, :, None], 3, 2)
    return np.array(image.convert("RGB"))
