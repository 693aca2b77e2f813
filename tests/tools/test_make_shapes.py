"""The synthetic data has the properties that the demonstration promises."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dino.data.coco import read_annotations

from .programs import load_program


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    load_program("make_shapes").main([str(folder), "--train", "60", "--val", "30"])
    return folder


def test_annotations_are_valid_coco(shapes):
    for split, count in (("train", 60), ("val", 30)):
        data = read_annotations(shapes / f"{split}.json", shapes / split)
        assert len(data["images"]) == count
        assert [c["id"] for c in data["categories"]] == [2, 5, 9]
        for image in data["images"]:
            assert Image.open(shapes / split / image["file_name"]).size == (image["width"], image["height"])
        for a in data["annotations"]:
            x, y, w, h = a["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + w <= 192
            assert y + h <= 160
            assert a["area"] == w * h


def test_objects_are_as_promised(shapes):
    data = json.loads((shapes / "train.json").read_text())
    per_image = Counter(a["image_id"] for a in data["annotations"])
    empty = sum(image["id"] not in per_image for image in data["images"])
    small = np.mean([max(a["bbox"][2:]) < 33 for a in data["annotations"]])
    assert empty >= 1
    assert max(per_image.values()) <= 10
    assert 0.2 < small < 0.45
    assert {a["category_id"] for a in data["annotations"]} == {2, 5, 9}


def test_some_objects_overlap(shapes):
    make_shapes = load_program("make_shapes")
    data = json.loads((shapes / "train.json").read_text())
    boxes = {}
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        boxes.setdefault(a["image_id"], []).append((x, y, x + w, y + h))
    touching = sum(
        min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
        for group in boxes.values()
        for i, a in enumerate(group)
        for b in group[:i]
    )
    assert touching > 3
    assert make_shapes.overlaps((0, 0, 10, 10), [(2, 0, 12, 10)], 0.35)
    assert not make_shapes.overlaps((0, 0, 10, 10), [(9, 9, 30, 30)], 0.35)


def test_splits_differ_and_seeds_repeat(shapes, tmp_path):
    again = tmp_path / "again"
    load_program("make_shapes").main([str(again), "--train", "60", "--val", "30"])
    assert (again / "train.json").read_bytes() == (shapes / "train.json").read_bytes()
    train, val = (np.asarray(Image.open(shapes / split / "00001.png")) for split in ("train", "val"))
    assert (train != val).any()


def test_existing_folder_is_left_alone(shapes):
    before = (shapes / "train.json").read_bytes()
    with pytest.raises(SystemExit, match="exists: choose another folder"):
        load_program("make_shapes").main([str(shapes)])
    assert (shapes / "train.json").read_bytes() == before


def test_easy_shapes_stay_what_they_are(shapes):
    """Published figures name this data; pixels of one image, and all annotations, must not change."""
    annotations = hashlib.sha256((shapes / "train.json").read_bytes()).hexdigest()
    pixels = hashlib.sha256(np.asarray(Image.open(shapes / "train/00001.png")).tobytes()).hexdigest()
    assert (annotations[:16], pixels[:16]) == ("8fa674332c127ebb", "5d3e118fcf43841d")


def test_hard_shapes_are_many_overlapping_and_half_of_them_small(tmp_path):
    program = load_program("make_shapes")
    for name in ("one", "two"):
        program.main([str(tmp_path / name), "--train", "30", "--val", "1", "--hard"])
    assert (tmp_path / "one/train.json").read_bytes() == (tmp_path / "two/train.json").read_bytes()
    data = read_annotations(tmp_path / "one/train.json", tmp_path / "one/train")
    boxes = {image["id"]: [] for image in data["images"]}
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        boxes[a["image_id"]].append((x, y, x + w - 1, y + h - 1))
    assert all(10 <= len(group) <= 25 for group in boxes.values())
    small = np.mean([max(a["bbox"][2:]) < 33 for a in data["annotations"]])
    assert 0.4 < small < 0.6
    pairs = [(box, group[:i]) for group in boxes.values() for i, box in enumerate(group)]
    assert not any(program.overlaps(box, others, program.HARD.max_overlap) for box, others in pairs)
    overlapping = np.mean([program.overlaps(box, others, program.EASY.max_overlap) for box, others in pairs])
    assert overlapping > 0.1
