import contextlib
import io
import random
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from dino.data.check.image_files import _read_file
from dino.data.images import END_OF_JPEG, IMAGE_SUFFIXES, _register_heif, list_images, read_image
from dino.utils.files import DataError, UserError

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
def test_wide_numbers_need_a_range(tmp_path, dtype):
    path = save(tmp_path / "wide.tif", RAMP.astype(dtype))
    with pytest.raises(DataError, match=r"wide\.tif: its mode [IF] has no range of its own: .*\. Set input_range="):
        read_image(path)
    assert_rgb(read_image(path, (0, 255)), RAMP)
    assert_rgb(read_image(save(tmp_path / "wider.tif", RAMP.astype(dtype) * 257), (0, 65535)), RAMP)
    assert_rgb(read_image(save(tmp_path / "moved.tif", RAMP.astype(dtype) - 100), (-100, 155)), RAMP)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_one_rule_for_all_images(tmp_path, dtype):
    """A pixel of 1,000 gives the same grey whatever else is in the image; values outside are clipped."""
    dark = np.full((2, 3), 1000, dtype)
    bright = dark.copy()
    bright[0, 0] = 60_000
    one, other = (read_image(save(tmp_path / f"{n}.tif", a), (500, 1500)) for n, a in enumerate((dark, bright)))
    assert (one == 128).all()
    assert (other[1:] == 128).all()
    assert (other[0, 0] == 255).all()


def test_deep_images_of_every_container(tmp_path):
    """Pillow gives 16-bit PGM files the mode of 32 bits."""
    deep = RAMP.astype(np.uint16) * 257
    for suffix in (".png", ".tif", ".pgm", ".jp2"):
        assert_rgb(read_image(save(tmp_path / f"deep{suffix}", deep)), RAMP)
        assert_rgb(read_image(save(tmp_path / f"deep{suffix}", deep // 257), [0, 255]), RAMP)
    twelve = tmp_path / "twelve.tif"
    twelve.write_bytes(twelve_bits(RAMP.astype(np.uint16) * 16))
    assert_rgb(read_image(twelve), RAMP, tolerance=1)


def twelve_bits(values):
    """A TIFF file, little-endian, of one strip of values (H, W) below 4096, W even."""
    first, second = values[:, ::2].ravel().astype(int), values[:, 1::2].ravel().astype(int)
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_eight_bits_stay(tmp_path):
    assert_rgb(read_image(save(tmp_path / "grey.png", RAMP), (0, 60_000)), RAMP)


def test_deep_colours_are_no_case_for_a_range(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    pixels = np.stack([RAMP.astype(np.uint16) * 257] * 3, -1)
    for suffix in (".png", ".tif", ".ppm"):
        path = tmp_path / f"deep{suffix}"
        assert cv2.imwrite(str(path), pixels)
        assert_rgb(read_image(path), RAMP)
        with pytest.raises(DataError, match=rf"deep\{suffix}: 16-bit colour has no input_range"):
            read_image(path, (0, 4095))


@pytest.mark.parametrize("value", [(1, 1), (2, 1), (0, np.nan), (0, np.inf), (1,), (1, 2, 3), 7, "ab", (0, 1e-320)])
def test_ranges_that_are_none(tmp_path, value):
    with pytest.raises(UserError, match=r"input_range must be \[low, high\]"):
        read_image(save(tmp_path / "grey.png", RAMP), value)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_named(tmp_path, number):
    pixels = RAMP.astype(np.float32)
    pixels[3, 4] = number
    with pytest.raises(DataError, match=r"can't read image .*holes\.tif: it has NaN or infinite pixels"):
        read_image(save(tmp_path / "holes.tif", pixels), (0, 255))


@pytest.mark.parametrize("bands", [4, 5, 8])
@pytest.mark.parametrize("bits", [8, 16])
def test_many_bands_are_refused(tmp_path, bands, bits):
    """Colour and infrared, as satellites have it; Pillow would drop the rest of 8 bits, and not open 16."""
    path = tmp_path / "bands.tif"
    path.write_bytes(bands_file(bands, bits))
    with pytest.raises(DataError, match=rf"bands\.tif: .*{bands} bands.* Select three bands and save them as 8-bit"):
        read_image(path)


def bands_file(bands, bits, side=4):
    """A TIFF file, little-endian, of red, green, blue and further bands without a meaning."""
    data, extra = bytes(side * side * bands * bits // 8), bands - 3
    lists = struct.pack(f"<{bands}H", *[bits] * bands) + struct.pack(f"<{extra}H", *[0] * extra)
    place = 8 + len(data)
    tags = [(256, side), (257, side), (258, place), (259, 1), (262, 2), (273, 8), (277, bands), (278, side)]
    tags += [(279, len(data)), (338, place + 2 * bands if extra > 2 else 0)]
    counts = {258: (3, bands), 338: (3, extra)}
    entries = b"".join(struct.pack("<HHII", tag, *counts.get(tag, (4, 1)), value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", place + len(lists))
    return header + data + lists + struct.pack("<H", len(tags)) + entries + bytes(4)


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


def need_writer(suffix):
    """Skips without a plug-in, or a library of Pillow."""
    _register_heif()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        pytest.skip(f"Pillow can't write {suffix} here")


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_ending_of_the_list_can_be_read(tmp_path, suffix):
    need_writer(suffix)
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


def test_truncated_jpegs_can_be_kept(tmp_path):
    """As cameras leave them: 20 bytes are missing."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    path = save(tmp_path / "cut.jpg", noise)
    whole, content = read_image(path), path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"cut\.jpg: image file is truncated .*`dino check --fix OUT` with --truncated"):
        read_image(path)
    path.write_bytes(content[:-20] + END_OF_JPEG)  # what `dino check --fix` writes on request
    kept = read_image(path)
    assert (kept[:40] == whole[:40]).all()
    assert (kept[-8:] != whole[-8:]).any()
    path.write_bytes(content + END_OF_JPEG)
    assert (read_image(path) == whole).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (3, 300), (300, 2)])
def test_small_jpegs_are_sound(tmp_path, size):
    path = save(tmp_path / "small.jpg", Image.new("RGB", size, (200, 100, 50)))
    assert read_image(path).shape == (*size[::-1], 3)
    assert _read_file(path)[:2] == (size, 1)
    assert _read_file(path).problem is None


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


@pytest.mark.filterwarnings("ignore:Image size")
def test_the_limit_of_pixels(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png", RAMP)  # 240 pixels
    with pytest.raises(DataError, match=r"large\.png: .*240 pixels, more than the limit of 239.*--max-pixels N"):
        read_image(path, max_pixels=239)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match=r"large\.png: .*decompression bomb.*--max-pixels N"):
        read_image(path)
    assert_rgb(read_image(path, max_pixels=240), RAMP)
    assert Image.MAX_IMAGE_PIXELS == 50


def test_images_in_memory(tmp_path):
    assert_rgb(read_image(Image.fromarray(RAMP)), RAMP)
    with pytest.raises(DataError, match="can't read image in memory: its mode F"):
        read_image(Image.fromarray(RAMP.astype(np.float32)))
    path = save(tmp_path / "half.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"half\.png: image file is truncated"), Image.open(path) as image:
        read_image(image)


def test_no_other_program_reads_files(tmp_path):
    """Pillow starts Ghostscript for PostScript, whatever the file is called."""
    path = tmp_path / "script.jpg"
    save(path, Image.new("RGB", (8, 8)), format="EPS")
    with pytest.raises(DataError, match=r"script\.jpg: cannot identify image file"):
        read_image(path)


def test_heic_without_its_plugin(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with pytest.raises(
        DataError, match=r"phone\.heic: HEIC files need pillow-heif: pip install 'dino-detectron2\[heic\]'"
    ):
        read_image(tmp_path / "phone.heic")


def test_files_of_a_folder(tmp_path):
    names = [f"{n}{s.upper() if n % 2 else s}" for n, s in enumerate(sorted(IMAGE_SUFFIXES))]
    for name in (*names, "._0.jpg", ".hidden.png", "notes.txt", "clip.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    expected = sorted(tmp_path / name for name in names)
    assert list_images(tmp_path) == list_images(f"{tmp_path}/*") == list_images(f"{tmp_path}/**/*.*") == expected
    assert {".jfif", ".avif", ".jp2", ".gif", ".ppm", ".pgm", ".mpo", ".heic", ".heif"} < IMAGE_SUFFIXES
    assert list_images(tmp_path, {".mp4"}) == [tmp_path / "clip.mp4"]
    assert list_images(tmp_path / ".hidden.png") == [tmp_path / ".hidden.png"]


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it finds on the way
@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_damaged_files_give_pixels_or_one_kind_of_error(tmp_path, monkeypatch, suffix):
    need_writer(suffix)
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
    assert (read_image(path, (0, 1)) == 128).all()
