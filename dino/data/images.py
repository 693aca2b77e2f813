"""Reading image files: every mode becomes 8-bit RGB, and every failure names the file."""

from __future__ import annotations

import glob
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from dino.utils.files import DataError

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB and apply its EXIF orientation.

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


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image file in pixels after its EXIF orientation, read from the header.

    Raises:
        DataError: the file is missing, or no image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except FileNotFoundError:
        raise DataError(f"image not found: {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"can't read image {path}: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pillow image of any mode -> (H, W, 3) uint8."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        values = values * _full_scale(image.mode, values.max(initial=0))
        return np.repeat(np.clip(values, 0, 255).round().astype(np.uint8)[:, :, None], 3, 2)
    return np.array(image.convert("RGB"))


def _full_scale(mode: str, largest: float) -> float:
    """Factor that scales values of a Pillow mode to 0..255; for modes without a range, from the largest value."""
    if mode.startswith("I;16") or largest > 255:
        return 255 / 65535
    return 255.0 if mode == "F" and largest <= 1 else 1.0


def list_images(source: str | Path) -> list[Path]:
    """List image files: a file itself, those directly in a folder, or the matches of a glob.

    Raises:
        DataError: there is no such file or folder, or no image in it.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = list(path.iterdir())
    elif glob.has_magic(str(source)):
        found = [Path(name) for name in glob.glob(str(source), recursive=True)]
    else:
        raise DataError(f"input not found: {source}")
    images = sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not images:
        where = f"in the folder {source}" if path.is_dir() else f"match {source}"
        raise DataError(f"no images {where}; known endings: {' '.join(sorted(IMAGE_SUFFIXES))}")
    return images


def resize_tensor(image: Tensor, size: tuple[int, int]) -> Tensor:
    """As `resize_image`, for a tensor (3, H, W) with values 0 to 255, rounded to 8 bits; stays on its device."""
    pixels = image.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return torch.from_numpy(resize_image(pixels, size)).permute(2, 0, 1).to(image.device)


def resize_image(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8 of `size` (h, w), bilinear with antialiasing.

    Training with Detectron2 resizes by the same function of Pillow, in Detectron2's `ResizeTransform`.
    """
    return np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
