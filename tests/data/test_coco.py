import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from dino.data.coco import CocoImages, _objects_of, classes_of, collate, read_annotations, usable_box
from dino.structures import Target
from dino.utils.files import DataError

from ..coco_files import COLOURS, CocoFiles, write_coco


def unchanged(image, objects):
    return image, objects


def test_sound_annotations_are_returned_as_they_are(tmp_path):
    files = write_coco(tmp_path)
    assert read_annotations(*files) == files.read()


def test_missing_files_are_named(tmp_path):
    files = write_coco(tmp_path)
    with pytest.raises(DataError, match=r"annotations not found: .*absent\.json"):
        read_annotations(tmp_path / "absent.json", files.images)
    with pytest.raises(DataError, match=r"image folder not found: .*absent"):
        read_annotations(files.annotations, tmp_path / "absent")
    with pytest.raises(DataError, match="image folder not found"):
        read_annotations(files.annotations, files.annotations)


BROKEN = {
    "text": b"no JSON",
    "truncated": b'{"images": [{"id": 1',
    "binary": b"\xff\xfe\x00\x01",
    "deep": b"[" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_json_is_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"can't read annotations .*broken\.json: .*COCO format"):
        read_annotations(path, tmp_path)


@pytest.mark.parametrize("content", [[], 3, {}, {"images": {}, "annotations": [], "categories": []}])
def test_other_json_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"other\.json: the list 'images' is missing"):
        read_annotations(path, tmp_path)


def change_entry(kind, index, **values):
    def change(content):
        for key, value in values.items():
            if value is None:
                del content[kind][index][key]
            else:
                content[kind][index][key] = value

    return change


def replace_list(kind, value):
    return lambda content: content.update({kind: value})


BOX = r"annotation 2 of image image_1\.png: bbox must be four numbers \[x, y, width, height\] in pixels, but is "
FAULTS = {
    "no annotations": (lambda content: content.pop("annotations"), "the list 'annotations' is missing"),
    "no categories": (replace_list("categories", []), "there are no categories"),
    "category without id": (change_entry("categories", 0, id=None), "category None: an id must be a whole number"),
    "category without name": (change_entry("categories", 1, name=None), "category 2 has no name"),
    "category name twice": (change_entry("categories", 1, name="red"), "two categories are called 'red'"),
    "category twice": (change_entry("categories", 0, id=2), "the category id 2 occurs twice"),
    "image twice": (change_entry("images", 0, id=2), "the image id 2 occurs twice"),
    "annotation twice": (change_entry("annotations", 3, id=1), "the annotation id 1 occurs twice"),
    "id as a word": (change_entry("images", 1, id="two"), "image 'two': an id must be a whole number"),
    "id of a list": (change_entry("annotations", 1, id=[1]), r"annotation \[1\]: an id must be a whole number"),
    "no file name": (change_entry("images", 1, file_name=None), "image 2 has no file_name"),
    "file name elsewhere": (change_entry("images", 1, file_name="../x.png"), r"file_name '\.\./x\.png' leaves"),
    "absolute file name": (change_entry("images", 1, file_name="/x.png"), r"file_name '/x\.png' leaves"),
    "file twice": (
        change_entry("images", 1, file_name="./image_1.png"),
        r"\./image_1\.png is listed as image 1 and as image 2: `dino check … --fix` merges them",
    ),
    "no size and no file": (
        change_entry("images", 1, width=0, file_name="absent.png"),
        r"image absent\.png: width and height must be positive whole numbers, but are 0 and 64; image not found",
    ),
    "unknown image": (change_entry("annotations", 1, image_id=99), "annotation 2: no image has the id 99"),
    "no image": (change_entry("annotations", 1, image_id=None), "annotation 2: no image has the id None"),
    "list as image": (change_entry("annotations", 1, image_id=[1]), r"annotation 2: no image has the id \[1\]"),
    "unknown category": (
        change_entry("annotations", 1, category_id=0),
        r"annotation 2 of image image_1\.png: no category has the id 0; known: \[1, 2, 3\]",
    ),
    "list as category": (change_entry("annotations", 1, category_id=[1]), r"annotation 2 .* has the id \[1\]"),
    "no box": (change_entry("annotations", 1, bbox=None), BOX + "null"),
    "short box": (change_entry("annotations", 1, bbox=[1, 2, 3]), BOX + r"\[1, 2, 3\]"),
    "empty box": (change_entry("annotations", 1, bbox=[]), BOX + r"\[\]"),
    "box of words": (change_entry("annotations", 1, bbox=["1", "2", "3", "four"]), BOX),
    "crowd of 2": (change_entry("annotations", 1, iscrowd=2), r"annotation 2 .* iscrowd must be 0 or 1, but is 2"),
    "crowd of a list": (change_entry("annotations", 1, iscrowd=[]), r"annotation 2 .* 0 or 1, but is \[\]"),
    "crowd of a word": (change_entry("annotations", 1, iscrowd="no"), 'annotation 2 .* 0 or 1, but is "no"'),
    "negative area": (change_entry("annotations", 1, area=-1), r"annotation 2 .* area must be a number .*, but is -1"),
    "huge area": (change_entry("annotations", 1, area=10**400), "annotation 2 .* area must be a number"),
    "infinite area": (change_entry("annotations", 1, area=float("nan")), "annotation 2 .* area must be .*, but is NaN"),
    "area of a list": (change_entry("annotations", 1, area=[3]), r"annotation 2 .* area must be .*, but is \[3\]"),
    "box of truths": (change_entry("annotations", 1, bbox=[True, False, True, True]), BOX),
    "image that is no dict": (replace_list("images", ["a.png"]), "image None: an id must be a whole number"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(tmp_path, change, message):
    files = write_coco(tmp_path)
    files.change(change)
    with pytest.raises(DataError, match=r"annotations\.json: " + message):
        read_annotations(*files)


def test_boxes_without_area_are_no_fault_of_the_file(tmp_path):
    """They are common; whoever trains drops them and says so."""
    files = write_coco(tmp_path)
    files.change(change_entry("annotations", 0, bbox=[3, 3, 0, -2]))
    files.change(change_entry("annotations", 1, bbox=[float("nan"), 3, float("inf"), 1e400]))
    read_annotations(*files)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([2, 3, 4, 5], [2, 3, 6, 8]),
        ([-2, -3, 10, 10], [0, 0, 8, 7]),
        ([15, 25, 100, 100], [15, 25, 20, 30]),
        ([0.5, 0.5, 0.01, 0.01], [0.5, 0.5, 0.51, 0.51]),
        ([2, 3, 0, 5], None),
        ([2, 3, 4, -5], None),
        ([20, 3, 4, 5], None),
        ([-4, 3, 4, 5], None),
        ([2, 30, 4, 5], None),
        ([float("nan"), 3, 4, 5], None),
        ([2, 3, float("inf"), 5], None),
    ],
)
def test_usable_box(box, expected):
    found = usable_box(box, 20, 30)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_images_and_objects(tmp_path):
    files = write_coco(tmp_path, category_ids=(7, 40, 900))
    data = CocoImages(*files, unchanged)
    assert len(data) == 4
    assert data.category_ids == [7, 40, 900]
    assert data.names == ["red", "green", "blue"]
    assert data.dropped == 0
    for index, count in enumerate((2, 0, 3, 1)):
        image, objects, entry = data[index]
        assert image.shape == (3, 64, 72)
        assert image.dtype == torch.uint8
        assert objects["boxes"].shape == (count, 4)
        assert objects["labels"].dtype == torch.int64
        assert (entry["height"], entry["width"]) == (64, 72)
    image, objects, _ = data[3]
    x0, y0, x1, y1 = map(int, objects["boxes"][0])
    colour = torch.tensor(COLOURS[objects["labels"][0]], dtype=torch.uint8)[:, None, None]
    assert (image[:, y0:y1, x0:x1] == colour).all()


def test_labels_follow_the_ids_not_the_file(tmp_path):
    files = write_coco(tmp_path, category_ids=(7, 40, 900))
    labels = CocoImages(*files, unchanged)[2][1]["labels"]
    files.change(lambda content: content["categories"].reverse())
    data = CocoImages(*files, unchanged)
    assert data.names == ["red", "green", "blue"]
    assert torch.equal(data[2][1]["labels"], labels)


def test_crowds_and_boxes_without_area_are_no_objects(tmp_path):
    files = write_coco(tmp_path)
    files.change(change_entry("annotations", 0, iscrowd=1))
    files.change(change_entry("annotations", 2, bbox=[5, 5, 0, 5]))
    files.change(change_entry("annotations", 3, bbox=[-5, -5, 15, 15]))
    data = CocoImages(*files, unchanged)
    assert [len(data[i][1]["labels"]) for i in range(4)] == [1, 0, 2, 1]
    assert data[2][1]["boxes"][0].tolist() == [0, 0, 10, 10]
    assert data.dropped == 1


def test_transforms_see_image_and_boxes(tmp_path):
    files = write_coco(tmp_path)
    image, objects, _ = CocoImages(*files, v2.RandomHorizontalFlip(p=1))[3]
    plain_image, plain_objects, _ = CocoImages(*files, unchanged)[3]
    assert torch.equal(image, plain_image.flip(-1))
    x0, y0, x1, y1 = plain_objects["boxes"][0].tolist()
    assert objects["boxes"].tolist() == [[72 - x1, y0, 72 - x0, y1]]


def test_another_size_than_annotated_names_the_file(tmp_path):
    files = write_coco(tmp_path)
    files.change(change_entry("images", 0, width=70))
    with pytest.raises(DataError, match=r"image_1\.png is 72x64, but the annotations say 70x64"):
        CocoImages(*files, unchanged)[0]


def test_images_are_turned_upright_before_they_are_measured(tmp_path):
    files = write_coco(tmp_path, counts=(1,), suffix=".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((72, 64, 3), np.uint8)).save(tmp_path / "image_1.jpg", exif=exif)
    assert CocoImages(*files, unchanged)[0][0].shape == (3, 64, 72)


def test_deep_folders(tmp_path):
    files = write_coco(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "image_1.png").rename(tmp_path / "deep/image_1.png")
    files.change(change_entry("images", 0, file_name="deep/image_1.png"))
    assert CocoImages(*CocoFiles(files.annotations, files.images), unchanged)[0][0].shape == (3, 64, 72)


def test_a_name_that_means_another_file_is_shown_before_training(tmp_path):
    files = write_coco(tmp_path)
    files.change(lambda content: [i.update(file_name="images\\" + i["file_name"].upper()) for i in content["images"]])
    message = r"no file 'images\\\\IMAGE_1\.PNG' in .*, but 'image_1\.png': `dino check … --fix` writes"
    with pytest.raises(DataError, match=message):
        read_annotations(*files)


def test_a_limit_keeps_the_first_images(tmp_path):
    files = write_coco(tmp_path, counts=(2, 0, 3, 1))
    data = CocoImages(*files, unchanged, limit=2)
    assert len(data) == 2
    assert list(data.objects) == [1, 2]
    assert [a["image_id"] for a in data.data["annotations"]] == [1, 1]
    assert len(CocoImages(*files, unchanged, limit=99)) == 4


def test_classes_and_objects_of_a_file(tmp_path):
    files = write_coco(tmp_path, category_ids=(7, 40, 900))
    files.change(lambda content: content["categories"].reverse())
    data = read_annotations(*files)
    classes = classes_of(data)
    assert (classes.names, classes.ids) == (["red", "green", "blue"], [7, 40, 900])
    assert classes.labels == {7: 0, 40: 1, 900: 2}
    images = CocoImages(*files, unchanged)
    assert {number: found.objects for number, found in _objects_of(data).items()} == images.objects


def test_samples_become_lists():
    def sample(height, width, boxes):
        boxes = tv_tensors.BoundingBoxes(torch.tensor(boxes).reshape(-1, 4), format="XYXY", canvas_size=(height, width))
        objects = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
        return tv_tensors.Image(torch.ones(3, height, width)), objects, {"id": height}

    images, targets, entries = collate([sample(8, 20, [[2.0, 2, 12, 6]]), sample(10, 16, [])])
    assert [type(image) for image in images] == [torch.Tensor] * 2
    assert [tuple(image.shape) for image in images] == [(3, 8, 20), (3, 10, 16)]
    assert isinstance(targets[0], Target)
    torch.testing.assert_close(targets[0].boxes, torch.tensor([[7 / 20, 0.5, 0.5, 0.5]]))
    assert type(targets[0].boxes) is torch.Tensor
    assert targets[1].boxes.shape == (0, 4)
    assert [entry["id"] for entry in entries] == [8, 10]
