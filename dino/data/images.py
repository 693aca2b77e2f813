"""Reading image files: every mode becomes 8-bit RGB, and every failure names the file."""

from __future__ import annotations

import glob
import importlib
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from dino.utils.files import DataError, UserError
from dino.utils.paths import PathError, expand, hint

_HEIF_SUFFIXES = {".heic", ".heif", ".hif"}  # with the plug-in pillow-heif
IMAGE_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".tif", ".tiff", ".webp"),
    *_HEIF_SUFFIXES,
}
END_OF_JPEG = b"\xff\xd9"  # appended to a truncated JPEG file, makes Pillow fill the missing lines with grey
_FULL_16_BITS = (0.0, 65535.0)
_FULL_12_BITS = (0.0, 4095.0)
_UNSAFE_FORMATS = {"EPS"}  # Pillow reads these with another program, Ghostscript
_BANDS = {"RGBA": 4, "RGBa": 4, "CMYK": 4}  # of a TIFF file of a mode; 3 at most for any other mode
_WIDE = {"I": "whole numbers of 16 or 32 bits with a sign", "F": "floats"}
_GREY_16_BITS = ("PNG", "PPM")  # formats whose mode I has 16 bits: 32 do not exist
_PLAIN = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr")  # modes of 8 bits
_BLOCK = 1 << 22  # pixels that are scaled at a time
_REPLACE = "Replace the file or remove it from the data set"
_LIMIT_LOCK = threading.RLock()  # Pillow's limit holds for the whole process


def read_image(
    source: str | Path | Image.Image,
    input_range: Sequence[float] | None = None,
    *,
    max_pixels: int | None = None,
) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB and apply its EXIF orientation.

    Grey, palette, RGBA (transparency dropped) and CMYK are converted. Of several pages or frames, the first one counts.
    Deep images are scaled to 8 bits by one rule for all files, never by their own extremes: linearly from
    `input_range`, or by type, where 16 bits are divided by 257.

    Args:
        source: the file, or an image that Pillow opened.
        input_range: the values (low, high) that become 0 and 255 in grey images of 16 bits, 32 bits and floats;
            values outside are clipped. None for the rule by type. 8-bit images are read as they are.
        max_pixels: most pixels that an image may have; None for Pillow's limit of 179 million.

    Raises:
        DataError: the file is missing, no image, truncated or too large; it has more than three bands (except RGBA and
            CMYK), NaN or infinite pixels; or its mode has no range of its own and `input_range` is None.
        UserError: `input_range` is not two rising numbers.
    """
    scale = check_input_range(input_range)
    is_open = isinstance(source, Image.Image)
    path = getattr(source, "filename", "") or "in memory" if is_open else source
    try:
        if is_open:
            return _to_rgb(source, scale)
        with _pixel_limit(max_pixels), open_image(source) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                size = f"{image.width}x{image.height} = {image.width * image.height:,} pixels"
                raise Image.DecompressionBombError(f"it has {size}, more than the limit of {max_pixels:,}")
            return _to_rgb(image, scale)
    except FileNotFoundError:
        raise DataError(
            f"image not found: {path}. Check the image folder and the file names in the annotations"
        ) from None
    except Exception as error:  # Pillow's decoders raise all sorts of errors on broken files
        raise DataError(f"can't read image {path}: {_explain(error, path)}") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image file in pixels after its EXIF orientation, read from the header.

    Raises:
        DataError: the file is missing, or no image.
    """
    try:
        with open_image(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except FileNotFoundError:
        raise DataError(f"image not found: {path}") from None
    except Exception as error:  # see `read_image`
        raise DataError(f"can't read image {path}: {_explain(error, path)}") from error


def needs_range(image: Image.Image) -> bool:
    """Whether the values of an open image have no range of their own, so that `read_image` needs an `input_range`.

    Raises:
        DataError: the image has too many bands, or NaN or infinite pixels.
    """
    if image.mode in _PLAIN and not hasattr(image, "tag_v2"):
        return False
    wide = image.mode in _WIDE and not (image.mode == "I" and image.format in _GREY_16_BITS)
    _to_rgb(image, (0.0, 1.0) if wide else None)
    return wide


def check_input_range(value: Any) -> tuple[float, float] | None:
    """Return an `input_range` of `read_image` as two numbers, or None.

    Raises:
        UserError: it is not two finite numbers, the lower first.
    """
    if value is None:
        return None
    try:
        low, high = (float(number) for number in value)
        rising = low < high and math.isfinite(high - low) and math.isfinite(255 / (high - low))
    except (TypeError, ValueError, OverflowError):
        rising = False
    if not rising:
        raise UserError(f"input_range must be [low, high], two numbers with the lower one first, not {value}")
    return low, high


def _explain(error: Exception, path: str | Path) -> str:
    """What is wrong with a file, and what to do."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"{str(error).rstrip('.')}. If the file is sound, raise the limit: `dino predict --max-pixels N`, "
            "`Predictor(max_pixels=N)`. For training, cut it into smaller images"
        )
    if isinstance(error, UnidentifiedImageError):
        return _explain_unidentified(Path(path))
    text = " ".join(str(error).split()) or type(error).__name__
    if "truncated" in text:
        return f"{text}. {_REPLACE}: `dino check --fix OUT` with --truncated keep (completes JPEG files) or drop"
    return f"{text}. {_REPLACE}"


def _explain_unidentified(path: Path) -> str:
    """What is wrong with a file that Pillow does not recognise."""
    if path.suffix.lower() in _HEIF_SUFFIXES and not _register_heif():
        return "HEIC files need pillow-heif: pip install 'dino-detectron2[heic]'"
    tags = _tags_of_tiff(path)
    if tags is None:
        return f"cannot identify image file. {_REPLACE}"
    bands, bits = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    return f"a TIFF file of {bands} bands of {bits[0]} bits. {_select_bands()}"


def _select_bands() -> str:
    return "Select three bands and save them as 8-bit RGB, or one band as 8 or 16-bit grey"


def _tags_of_tiff(path: Path) -> Any:
    """Tags of the first page of a TIFF file; None for a file of another format, or a broken one."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            if header[:4] not in (b"II*\0", b"MM\0*"):
                return None
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
            tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
    except Exception:  # of a broken file
        return None
    return tags


@contextmanager
def _pixel_limit(number: int | None) -> Iterator[None]:
    """Replace Pillow's limit of pixels, unless `number` is None; one thread at a time."""
    if number is None:
        yield
        return
    with _LIMIT_LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, number
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def open_image(path: str | Path) -> Image.Image:
    """Open a file with Pillow, in the formats that Pillow decodes itself."""
    path = Path(path)
    if path.suffix.lower() in _HEIF_SUFFIXES:
        _register_heif()
    Image.init()
    formats = [name for name in Image.ID if name not in _UNSAFE_FORMATS]
    return Image.open(path, formats=formats)


def _register_heif() -> bool:
    """Let Pillow read HEIC files; whether it can."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _to_rgb(image: Image.Image, input_range: tuple[float, float] | None) -> np.ndarray:
    """Pillow image of any mode -> (H, W, 3) uint8, upright."""
    bands = getattr(image, "tag_v2", {}).get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    if bands > _BANDS.get(image.mode, 3):
        raise DataError(f"it has {bands} bands. {_select_bands()}")
    scale = _range_of(image, input_range)
    image.load()  # the orientation of a PNG file may come after its pixels
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if scale is None:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return np.repeat(_to_bytes(np.asarray(image), *scale)[:, :, None], 3, 2)


def _range_of(image: Image.Image, input_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """The values that become 0 and 255; None for an image of 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        return input_range or _range_of_type(image)
    if input_range is not None and _is_deep_colour(image):
        raise DataError("16-bit colour has no input_range. Save it as 8-bit RGB, or leave out input_range")
    return None


def _range_of_type(image: Image.Image) -> tuple[float, float]:
    """The values that become 0 and 255 in a deep grey image, by its type."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (16,))
        return _FULL_12_BITS if bits == (12,) else _FULL_16_BITS
    if image.mode == "I" and image.format in _GREY_16_BITS:
        return _FULL_16_BITS
    raise DataError(
        f"its mode {image.mode} has no range of its own: {_WIDE[image.mode]}. Set input_range=[low, high], the values "
        "of black and white: model.input_range of a recipe, --input-range of tools/plain_train.py, or input_range of "
        "read_image. It must be the same for all images"
    )


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether a file has colours of 16 bits, of which Pillow reads the upper 8."""
    tiles = getattr(image, "tile", None)
    decoder = tiles[0][3] if tiles else ""
    if image.format == "PPM" and isinstance(decoder, tuple):
        return decoder[1] != 0 and decoder[1] > 255
    return ";16" in str(decoder if isinstance(decoder, str) or not decoder else decoder[0])


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (H, W) of any type -> (H, W) uint8, low -> 0 and high -> 255.

    Raises:
        DataError: a value is NaN or infinite.
    """
    if values.dtype.kind == "u":
        return _scale(np.arange(65536), low, high)[values]
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, _BLOCK // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        part = values[start : start + rows].astype(np.float64)
        if not np.isfinite(part).all():
            raise DataError("it has NaN or infinite pixels. Replace them by numbers and save it again")
        scaled[start : start + rows] = _scale(part, low, high)
    return scaled


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of any shape -> uint8, clipped."""
    return np.clip((values - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)


def list_images(source: str | Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[Path]:
    """List image files: a file itself, those directly in a folder, or the matches of a glob; no hidden files.

    Args:
        suffixes: endings of file names, in lower case.

    Raises:
        DataError: there is no such file or folder, or no image in it.
    """
    path = Path(source := expand(source))
    if path.is_file():
        return [path]
    if path.is_dir():
        found = list(path.iterdir())
    elif glob.has_magic(str(source)):
        found = [Path(name) for name in glob.glob(str(source), recursive=True)]
    else:
        raise PathError(f"input not found: {source}{hint(path, set())}")
    images = sorted(path for path in found if _is_wanted(path, suffixes))
    if not images:
        where = f"in the folder {source}" if path.is_dir() else f"match {source}"
        raise DataError(f"no images {where}; known endings: {' '.join(sorted(suffixes))}")
    return images


def _is_wanted(path: Path, suffixes: Collection[str]) -> bool:
    """Whether a path is a file with one of the endings, and not hidden."""
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def resize_tensor(image: Tensor, size: tuple[int, int]) -> Tensor:
    """As `resize_image`, for a tensor (3, H, W) with values 0 to 255, rounded to 8 bits; stays on its device."""
    pixels = image.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return torch.from_numpy(resize_image(pixels, size)).permute(2, 0, 1).to(image.device)


def resize_image(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8 of `size` (h, w), bilinear with antialiasing.

    Training with Detectron2 resizes by the same function of Pillow, in Detectron2's `ResizeTransform`.
    """
    return np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
