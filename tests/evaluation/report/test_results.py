"""Detections as `dino predict` writes them, and what does not belong to the data."""

import copy
import json

import pytest

from dino.evaluation.report.results import read_results
from dino.utils.files import DataError

DATA = {
    "images": [
        {"id": 10, "file_name": "a/one.png", "width": 50, "height": 40},
        {"id": 20, "file_name": "b/one.png", "width": 50, "height": 40},
        {"id": 30, "file_name": "b/two.png", "width": 50, "height": 40},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 42, "name": "dog"}],
    "annotations": [],
}
BOX = {"bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
FOUND = {
    "images": [
        {"id": 1, "file_name": "b/one.png", "width": 50, "height": 40},
        {"id": 2, "file_name": "two.png", "width": 50, "height": 40},
    ],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "bird"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "score": 0.5, **BOX},
        {"id": 2, "image_id": 2, "category_id": 2, "score": 1, **BOX},
    ],
}


@pytest.fixture
def read(tmp_path):
    def run(content):
        path = tmp_path / "found.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return read_results(path, DATA)

    return run


def test_images_by_file_name_and_classes_by_name(read):
    assert read(FOUND) == [
        {"image_id": 20, "category_id": 42, "bbox": [1, 2, 3, 4], "score": 0.5},
        {"image_id": 30, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 1.0},
    ]


@pytest.mark.parametrize("name", ["b\\one.png", "./b/one.png", "b//one.png"])
def test_writings_of_one_name(read, name):
    content = copy.deepcopy(FOUND)
    content["images"][0]["file_name"] = name
    assert [found["image_id"] for found in read(content)] == [20, 30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(file_name="one.png"), "1 image of 2 not in the annotations, first 'one.png'"),
        (lambda c: c["images"][1].update(file_name="x/three\x1b.png"), r"first 'x/three\\x1b.png'"),
        (lambda c: c["images"][0].update(file_name="c/two.png"), "2 images of 2 not in the annotations"),
        (lambda c: c["images"][1].update(file_name="./b/one.png"), "two images are the image 20"),
        (lambda c: c["images"][0].update(width=100), "b/one.png is 100x40 in the detections, but 50x40"),
        (lambda c: c["images"][0].update(id=2), "image id 2 occurs twice"),
        (lambda c: c["images"].append({"id": 5}), "needs a whole number as its id, and a file_name"),
        (lambda c: c["categories"][0].pop("name"), "needs a whole number as its id, and a name"),
        (lambda c: c["categories"].append([]), "needs a whole number as its id, and a name"),
        (lambda c: c["annotations"][1].update(category_id=3), "annotation 1: the class 'bird' is none of"),
        (lambda c: c["annotations"][1].update(category_id=9), "no category has the id 9"),
        (lambda c: c["annotations"][1].update(image_id=10), "no image has the id 10"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), "annotation 1: bbox must be four"),
        (lambda c: c["annotations"][1].pop("score"), "annotation 1: score must be"),
        (lambda c: [a.pop("score") for a in c["annotations"]], "annotations without scores, no detections"),
        (lambda c: c.pop("images"), "the list 'images' is missing"),
    ],
)
def test_what_does_not_belong_to_the_data_is_refused(read, change, message):
    content = copy.deepcopy(FOUND)
    change(content)
    with pytest.raises(DataError, match=message) as error:
        read(content)
    assert "found.json" in str(error.value)


def test_nothing_found(read):
    assert read({**FOUND, "annotations": []}) == []
    with pytest.raises(DataError, match="must be a list"):
        read("text")
