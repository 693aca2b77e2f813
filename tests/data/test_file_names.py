"""Names of annotation tools find their file, or none; never one outside the folder."""

import random
import string
import time
from urllib.parse import quote

import pytest

from dino.data.file_names import match_names

FILES = [
    "a.jpg",
    "train/a b.jpg",
    "train/é.JPG",
    "val/photo_1.png",
    "val/deep/photo_2.png",
    "0a1b2c3d-x.png",
    "ümlaut%20.tif",
]


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def match(folder, name):
    return match_names([{"file_name": name}], folder).get(0)


MEANT = {
    "images\\train\\a b.jpg": "train/a b.jpg",
    "train/a%20b.jpg": "train/a b.jpg",
    "/home/somebody/val/photo_1.png": "val/photo_1.png",
    "C:\\data\\photo_2.png": "val/deep/photo_2.png",
    "https://example.org/store/photo_1.png?token=a%2Fb": "val/photo_1.png",
    "/data/local-files/?d=x/val/photo_1.png": "val/photo_1.png",
    "/data/local-files/?d=x%5Cval%5Cphoto_1.png": "val/photo_1.png",
    "s3://bucket/val/PHOTO_1.PNG": "val/photo_1.png",
    "./train/../train/e\u0301.jpg": "train/é.JPG",
    "/data/upload/3/99999999-photo_2.png": "val/deep/photo_2.png",
    "a.jpg": None,  # it is there as it is written
    "absent.jpg": None,
    "": None,
    "http://[broken": None,
    "photo_1.png\0": None,
}


@pytest.mark.parametrize(("name", "found"), MEANT.items(), ids=map(repr, MEANT))
def test_what_a_name_means(folder, name, found):
    assert match(folder, name) == found


def test_a_name_of_two_files_is_not_decided(folder):
    (folder / "val/a b.jpg").touch()
    assert match(folder, "other/a b.jpg") is None
    assert match(folder, "other/val/a b.jpg") == "val/a b.jpg"
    assert match(folder, "photo_1.jpg") is None  # another ending is another file


def test_entries_without_a_name_are_passed_over(folder):
    assert match_names([None, 3, {}, {"file_name": 5}, {"file_name": "X/A.JPG"}], folder) == {4: "a.jpg"}


def disguise(name, choose):
    """A name as some tool might write it."""
    for _ in range(choose.randint(1, 3)):
        name = choose.choice(
            [
                lambda n: n.replace("/", "\\"),
                quote,
                lambda n: f"images/{n}",
                lambda n: f"/mnt/{choose.randint(0, 99)}/{n}",
                lambda n: f"https://example.org/{quote(n)}?size={choose.randint(0, 99)}",
                str.upper,
            ]
        )(name)
    return name


def test_fuzzed_names(folder):
    choose, found, start = random.Random(0), 0, time.perf_counter()
    letters = string.ascii_letters + "/\\.%?#: é\0\n\ud800" + "0" * 5
    for _ in range(1500):
        name = disguise(choose.choice(FILES), choose)
        for noise in (name, "".join(choose.choices(letters, k=choose.randint(0, 300))), name + choose.choice(letters)):
            meant = match(folder, noise)
            assert meant is None or meant in FILES
            found += meant is not None
    assert found > 700
    assert time.perf_counter() - start < 60
