"""Damaged picture files: pixels or a DataError that names the file, in bounded time. Seeded."""

import io
import random
import time

import numpy as np
import pytest
from PIL import Image

from dino.data.check.image_files import ImageFile, _read_file
from dino.data.images import IMAGE_SUFFIXES, _register_heif, list_images, read_image
from dino.utils.files import DataError

MODES = {
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("1", "L", "P"),
    "HEIF": ("L", "RGB", "RGBA"),  # with its plug-in
    "JPEG": ("L", "RGB", "CMYK"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "MPO": ("L", "RGB"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB", "I;16", "F"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
SUFFIXES = {
    "HEIF": ".heic",
    "BMP": ".bmp",
    "JPEG": ".jpg",
    "JPEG2000": ".jp2",
    "TIFF": ".tif",
}  # of the others: .format
COMPRESSIONS = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")
SLOWEST = 5  # seconds


def formats():
    Image.init()
    _register_heif()
    return sorted(form for form in MODES if form in Image.SAVE)


def sound_file(form, draw):
    """A file of any mode and size of a format."""
    mode = draw.choice(MODES[form])
    width, height = draw.choice([(1, 1), (1, 70), (63, 2), (7, 5), (draw.randint(1, 90), draw.randint(1, 90))])
    numbers = np.random.default_rng(draw.randrange(1 << 30))
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(numbers.integers(0, 60_000, (height, width)).astype(dtype))
    else:
        image = Image.fromarray(numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    options = {"compression": draw.choice(COMPRESSIONS)} if form == "TIFF" and mode not in ("I;16", "I", "F") else {}
    if form == "AVIF":
        options = {"speed": 10}
    content = io.BytesIO()
    image.save(content, format=form, **options)
    return content.getvalue()


def truncate(content, draw):
    return content[: int(len(content) * draw.random())]


def cut_the_end(content, draw):
    return content[: -draw.randint(1, 40)]


def flip_bits(content, draw):
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 12)):
        damaged[int(len(damaged) * draw.random() ** 3)] ^= 1 << draw.randrange(8)  # headers more than pixels
    return bytes(damaged)


def write_odd_numbers(content, draw):
    """Numbers of two or four bytes, as sizes and offsets are, become extreme."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place, length = int(len(damaged) * draw.random() ** 3), draw.choice((2, 4))
        damaged[place : place + length] = draw.choice(
            (b"\0" * length, b"\xff" * length, b"\x7f" + b"\xff" * (length - 1))
        )
    return bytes(damaged)


def double(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + content[draw.randrange(len(content)) :] + content[place:]


def fill_in(content, draw):
    return content[: draw.randint(0, 40)] + draw.randbytes(draw.randint(0, 400))


def leave(content, draw):
    return content


DAMAGES = (truncate, cut_the_end, flip_bits, write_odd_numbers, double, fill_in, leave)


def try_file(path, draw):
    """Read a file in every way -> how often that gave pixels. Anything but pixels or a DataError fails."""
    good, messages, start = 0, [], time.perf_counter()
    assert list_images(path.parent) == ([path] if path.suffix in IMAGE_SUFFIXES else pytest.fail(path.suffix))
    for options in ({}, {"input_range": (0, 60_000)}):
        try:
            pixels = read_image(path, **options)
        except DataError as error:
            messages.append(str(error))
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
            good += 1
    assert all(path.name in message and "\n" not in message for message in messages)
    found = _read_file(path)
    assert isinstance(found, ImageFile)
    assert found.problem or min(found.size) > 0
    assert time.perf_counter() - start < SLOWEST
    return good


def fuzz(folder, number, seed):
    """Counts of (files, readings) that gave pixels, over all formats in turn."""
    draw = random.Random(seed)
    good = files = 0
    for index in range(number):
        form = formats()[index % len(formats())]
        content = draw.choice(DAMAGES)(sound_file(form, draw), draw)
        suffix = SUFFIXES.get(form, f".{form.lower()}")
        path = folder / f"file_{index}{suffix}"
        path.write_bytes(content)
        found = try_file(path, draw)
        good, files = good + found, files + bool(found)
        path.unlink()
    return files, good


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)  # a damaged header can ask for any amount of memory


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it finds on the way
@pytest.mark.usefixtures("small_limit")
def test_few_damaged_files(tmp_path):
    files, readings = fuzz(tmp_path, 160, seed=0)
    assert 20 < files < 140  # some are sound, some are not
    assert readings > files


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_files(tmp_path):
    """With Pillow's own limit of pixels."""
    files, _ = fuzz(tmp_path, 2200, seed=1)
    assert 400 < files < 2000
