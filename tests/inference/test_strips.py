import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dino.data.images import read_image
from dino.inference import strips
from dino.inference.strips import Strips
from dino.utils.files import DataError

from .test_predictor import paint, painted, picture

pytest.importorskip("pyvips", reason="pyvips is not installed")

HEIGHT, WIDTH = 300, 200
DTYPES = {"I;16": np.uint16, "F": np.float32}
CASES = [
    *(("L", suffix) for suffix in (".jpg", ".png", ".tif")),
    *(("RGB", suffix) for suffix in (".jpg", ".png", ".tif", ".webp")),
    ("RGBA", ".png"),
    ("P", ".png"),
    ("I;16", ".png"),
    ("I;16", ".tif"),
    ("F", ".tif"),
]


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    """Everything is large, and read in strips of 64 rows."""
    monkeypatch.setattr(strips, "LARGE", 1000)
    monkeypatch.setattr(strips, "_ROWS", 64)


def read(image):
    return read_image(image, input_range=(0, 1000) if image.mode in DTYPES else None)


def write(path, mode="RGB", **options):
    smooth = Image.fromarray(picture(30, 20)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    if mode in DTYPES:
        values = np.asarray(smooth.convert("L")).astype(DTYPES[mode]) * 4
        Image.fromarray(values).save(path, **options)
    else:
        smooth.convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(("mode", "suffix"), CASES)
def test_strips_have_the_pixels_of_the_whole(tmp_path, mode, suffix):
    path = write(tmp_path / f"a{suffix}", mode)
    whole = read_image(path, input_range=(0, 1000) if mode in DTYPES else None)
    found = Strips.open(path, read, 10**6)
    assert found.shape == whole.shape
    for y0, y1, x0, x1 in ((0, 100, 0, 50), (0, 100, 150, 200), (80, 180, 0, 200), (299, 300, 3, 4), (0, 10, 0, 10)):
        assert (found[y0:y1, x0:x1] == whole[y0:y1, x0:x1]).all()
        assert len(found._rows) <= y1 - y0 + 64


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_compressed_tiffs(tmp_path, compression):
    path = write(tmp_path / "a.tif", compression=compression)
    whole, found = read_image(path), Strips.open(path, read, 10**6)
    assert np.abs(found[0:HEIGHT, 0:WIDTH].astype(int) - whole).max() <= (2 if compression == "jpeg" else 0)


@pytest.mark.parametrize("size", [(30, 20), (37, 50), (300, 200), (70, 3), (1, 1), (400, 300)])
def test_shrinking_is_that_of_pillow(tmp_path, size):
    path = write(tmp_path / "a.png")
    with Image.open(path) as image:
        expected = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=2))
    assert (Strips.open(path, read, 10**6).shrink(size) == expected).all()


def test_only_large_plain_files(tmp_path, monkeypatch):
    plain, turned = write(tmp_path / "plain.jpg"), tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    write(turned, exif=exif)
    (tmp_path / "text.jpg").write_bytes(b"no picture")
    assert Strips.open(plain, read, 10**6)
    for path in (turned, tmp_path / "text.jpg", tmp_path / "absent.jpg", write(tmp_path / "a.bmp")):
        assert Strips.open(path, read, 10**6) is None
    for mode, suffix in (("CMYK", ".jpg"), ("CMYK", ".tif"), ("RGBA", ".tif"), ("LA", ".png"), ("1", ".tif")):
        assert Strips.open(write(tmp_path / f"{mode}{suffix}", mode), read, 10**6) is None
    assert Strips.open(plain, read, None) is None
    assert Strips.open(plain, read, HEIGHT * WIDTH - 1) is None
    monkeypatch.setattr(strips, "LARGE", HEIGHT * WIDTH)
    assert Strips.open(plain, read, 10**6) is None
    monkeypatch.setattr(strips, "LARGE", 1000)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    assert Strips.open(plain, read, 10**6) is None


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = tmp_path / f"half{suffix}"
    Image.fromarray(picture(HEIGHT, WIDTH)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"can't read image .*half\{suffix}: "):
        painted(tile=64, max_pixels=10**6)(path)


def test_files_that_end_between_two_strips_are_named(tmp_path):
    """The rows before the end are found; the DataError comes where they stop."""
    path = write(tmp_path / "late.jpg")
    found = Strips.open(path, read, 10**6)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"can't read image .*late\.jpg: .*Replace the file or remove it"):
        found[0:HEIGHT, 0:WIDTH]


def test_numbers_that_are_none_are_named(tmp_path):
    pixels = np.zeros((HEIGHT, WIDTH), np.float32)
    pixels[200, 7] = np.nan
    Image.fromarray(pixels).save(tmp_path / "holes.tif")
    with pytest.raises(DataError, match=r"can't read image .*holes\.tif: it has NaN or infinite pixels"):
        Strips.open(tmp_path / "holes.tif", read, 10**6)[0:HEIGHT, 0:WIDTH]


def test_tiles_in_strips_find_what_tiles_of_the_whole_find(tmp_path):
    boxes = [(10, 10, 40, 30), (205, 80, 230, 105), (390, 190, 420, 210)]
    path = tmp_path / "large.png"
    Image.fromarray(paint(400, 600, *boxes)).save(path)
    whole = painted(tile=128)(path)
    found = painted(tile=128, max_pixels=10**6, batch_size=3)(path)
    assert found.strips is not None
    assert whole.strips is None
    assert len(found) == len(whole)
    assert np.abs(found.boxes.numpy() - whole.boxes.numpy()).max() < 0.5
    assert found.image_size == (400, 600)


def test_drawings_are_shrunk(tmp_path, monkeypatch):
    monkeypatch.setattr("dino.inference.detections._DRAWN_SIDE", 300)
    path = tmp_path / "large.png"
    Image.fromarray(paint(400, 600, (200, 80, 300, 180))).save(path)
    found = painted(tile=512, max_pixels=10**6)(path)
    drawn = found.draw()
    assert drawn.size == (300, 200)
    plain = Image.fromarray(paint(400, 600, (200, 80, 300, 180))).resize((300, 200))
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)).max(2) > 60
    ys, xs = np.nonzero(difference)
    assert 95 <= xs.min() <= 105  # the box, at half its size
    assert ys.max() <= 100
    assert isinstance(ImageDraw.Draw(drawn), ImageDraw.ImageDraw)
