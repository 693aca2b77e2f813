import contextlib
import io
import random

import numpy as np
import pytest
from PIL import Image

from dino.data.images import IMAGE_SUFFIXES, read_image
from dino.utils.files import DataError

RAMP = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)  # of grey values


def save(path, pixels, **options):
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def assert_rgb(image, expected, tolerance=0):
    assert image.dtype == np.uint8
    assert image.shape == (*expected.shape[:2], 3)
    difference = np.abs(image.astype(int) - expected.astype(int).reshape(*expected.shape[:2], -1))
    assert difference.max() <= tolerance


def test_channels_are_red_green_blue(tmp_path):
    pixels = np.stack([RAMP, RAMP // 2, 255 - RAMP], -1)
    assert_rgb(read_image(save(tmp_path / "colour.png", pixels)), pixels)


def test_grey(tmp_path):
    assert_rgb(read_image(save(tmp_path / "grey.png", RAMP)), RAMP)


def test_one_bit(tmp_path):
    bits = RAMP > 100
    assert_rgb(read_image(save(tmp_path / "bits.png", Image.fromarray(bits))), bits * np.uint8(255))


@pytest.mark.parametrize("alpha", [0, 128])
def test_transparency_is_dropped(tmp_path, alpha):
    pixels = np.stack([RAMP, RAMP, RAMP, np.full_like(RAMP, alpha)], -1)
    assert_rgb(read_image(save(tmp_path / "rgba.png", pixels)), RAMP)
    assert_rgb(read_image(save(tmp_path / "la.png", Image.fromarray(pixels).convert("LA"))), RAMP)


def test_palette(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:2] = (200, 10, 30)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    assert palette.mode == "P"
    assert_rgb(read_image(save(tmp_path / "palette.png", palette)), pixels, tolerance=2)


def test_cmyk(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:] = (200, 40, 90)
    path = save(tmp_path / "cmyk.jpg", Image.fromarray(pixels).convert("CMYK"), quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert_rgb(read_image(path), pixels, tolerance=4)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    path = save(tmp_path / f"deep{suffix}", RAMP.astype(np.uint16) * 257)
    with Image.open(path) as image:
        assert image.mode.startswith("I;16")
    assert_rgb(read_image(path), RAMP)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_numbers(tmp_path, dtype):
    assert_rgb(read_image(save(tmp_path / "wide.tif", RAMP.astype(dtype))), RAMP)
    assert_rgb(read_image(save(tmp_path / "wider.tif", RAMP.astype(dtype) * 257)), RAMP)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    """A red corner at the top left, stored in any of the eight ways that EXIF knows."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = (250, 0, 0)
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "turned.jpg", np.ascontiguousarray(turned), exif=exif, quality=100, subsampling=0)
    assert_rgb(read_image(path), upright, tolerance=30)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_ending_of_the_list_can_be_read(tmp_path, suffix):
    pixels = np.full((16, 16, 3), 120, np.uint8)
    assert_rgb(read_image(save(tmp_path / f"image{suffix}", pixels)), pixels, tolerance=3)


def test_the_array_can_be_written_to(tmp_path):
    image = read_image(save(tmp_path / "grey.png", RAMP))
    image[0, 0] = 1
    assert image.flags.writeable


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_files_are_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"half{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"can't read image .*half\{suffix}: .*truncated.* Replace the file or remove"):
        read_image(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"image not found: .*absent\.jpg\. Check the image folder"):
        read_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize("content", [b"", b"hello, I am a text\n", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_images_are_named(tmp_path, content):
    path = tmp_path / "text.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"can't read image .*text\.jpg"):
        read_image(path)


def test_folders_are_no_images(tmp_path):
    with pytest.raises(DataError, match="can't read image"):
        read_image(tmp_path)


def test_suspiciously_large_files_are_named(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", RAMP)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # an error comes from twice as many
    with pytest.raises(DataError, match=r"can't read image .*bomb\.png: .*decompression bomb"):
        read_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it finds on the way
@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_damaged_files_give_pixels_or_one_kind_of_error(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # a damaged header can ask for any amount of memory
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, format=Image.registered_extensions()[suffix])
    draw = random.Random(0)
    path = tmp_path / f"damaged{suffix}"
    for _ in range(60):
        damaged = bytearray(content.getvalue())
        for _ in range(draw.randint(1, 8)):
            # Headers say most, so most of the damage is done there.
            damaged[int(len(damaged) * draw.random() ** 3)] = draw.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert read_image(path).shape[2] == 3


def test_dark_deep_images_stay_dark(tmp_path):
    """A 16-bit file is scaled by its type, not by its largest number."""
    path = tmp_path / "dark.png"
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(path)
    assert read_image(path).max() == 1


def test_float_images_between_0_and_1_are_scaled(tmp_path):
    path = tmp_path / "float.tif"
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(path)
    assert (read_image(path) == 128).all()
