"""Exports in the layouts, units and odd forms that programs write; what must not be read silently is refused."""

import json

import pytest
from PIL import Image

from dino.data.importers.read_source import read_source
from dino.data.importers.recognition import explain, recognise
from dino.data.importers.source import to_coco
from dino.utils.files import DataError
from tests.coco_files import NAMES, write_coco

from .layouts import (
    contents,
    write_createml,
    write_cvat,
    write_label_studio,
    write_labelme,
    write_roboflow_yolo,
    write_ultralytics,
    write_voc,
)


@pytest.fixture
def files(tmp_path):
    return write_coco(tmp_path / "coco", counts=(2, 0, 3, 1, 4))


def imported(source, images=None):
    (train,) = read_source(source, images).values()
    return to_coco(train)


def splits_of(source):
    return {split: to_coco(part) for split, part in read_source(source).items()}


def notes_of(source):
    return [note for part in read_source(source).values() for note in part.notes]


def left_out_of(source):
    return sum(image.left_out for part in read_source(source).values() for image in part.images)


WRITERS = {
    "voc": write_voc,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "label_studio": write_label_studio,
    "create_ml": write_createml,
}


@pytest.mark.parametrize("form", WRITERS)
def test_a_round_trip_to_the_last_digit(tmp_path, files, form):
    source = WRITERS[form](tmp_path / "export", files)
    found = imported(source)
    assert contents(found) == contents(files.read())
    folder = source if source.is_dir() else source.parent
    assert recognise(folder) == form
    assert contents(imported(folder)) == contents(found)


@pytest.mark.parametrize("with_test", [True, False])
def test_roboflow(tmp_path, files, with_test):
    """Its data.yaml names a test split even where there is none."""
    val = write_coco(tmp_path / "val", counts=(1, 2), seed=5)
    source = write_roboflow_yolo(tmp_path / "export", files, val, val if with_test else None)
    for path in (source, source / "data.yaml"):
        found = splits_of(path)
        assert list(found) == ["train", "val", "test"][: 2 + with_test]
        assert contents(found["train"]) == contents(files.read())
        assert contents(found["val"]) == contents(val.read())
        assert [c["name"] for c in found["val"]["categories"]] == list(NAMES)
    notes = "".join(notes_of(source))
    assert ("'../test/images', the test split of data.yaml, is not in it" in notes) is not with_test


def test_a_missing_split_is_not_another_folder(tmp_path, files):
    source = write_roboflow_yolo(tmp_path / "export", files, files)
    (source / "valid").rename(source / "elsewhere")
    (source / "images").mkdir()
    assert list(read_source(source)) == ["train"]


@pytest.mark.parametrize("path", ["../datasets/shapes", "/home/somebody/datasets/shapes", "."])
def test_ultralytics(tmp_path, files, path):
    val = write_coco(tmp_path / "val", counts=(1, 2), seed=5)
    source = write_ultralytics(tmp_path / "export", files, val, path)
    found = splits_of(source)
    assert contents(found["train"]) == contents(files.read())
    assert contents(found["val"]) == contents(val.read())
    (source / "shapes.yaml").unlink()
    with pytest.raises(DataError, match="no list of class names"):
        read_source(source)
    (source / "classes.txt").write_text("\n".join(NAMES) + "\n")
    again = splits_of(source)
    assert [contents(part) for part in again.values()] == [contents(part) for part in found.values()]


def test_a_text_that_lists_images(tmp_path, files):
    source = write_ultralytics(tmp_path / "export", files, files)
    names = [f"data/images/train/{image['file_name']}\n" for image in files.read()["images"]]
    (source / "train.txt").write_text("".join(names))
    (source / "shapes.yaml").write_text(f"train: train.txt\nnames: {list(NAMES)}")
    assert contents(imported(source)) == contents(files.read())
    (source / "train.txt").write_text("absent.png\n")
    with pytest.raises(DataError, match=r"train\.txt: no image 'absent\.png'"):
        read_source(source)


def yolo_of_one_image(folder, line, extra=""):
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    Image.new("RGB", (200, 100)).save(folder / "images/a.png")
    (folder / "labels/a.txt").write_text(line)
    (folder / "data.yaml").write_text(f"train: images\nnames: [one, two]\n{extra}")
    return folder


@pytest.mark.parametrize(
    ("line", "extra", "box"),
    [
        ("1 0.5 0.5 0.2 0.4", "", [80, 30, 40, 40]),
        ("1.0 5e-1 0.5 0.2 0.4", "", [80, 30, 40, 40]),
        ("1 0.5 0.5 0.2 0.4 0.1 0.1 2 0.9 0.9 1", "kpt_shape: [2, 3]", [80, 30, 40, 40]),  # a pose
        ("1 0.1 0.2 0.5 0.2 0.5 0.6", "", [20, 20, 80, 40]),  # an outline
        ("1 0.1 0.5 0.3 0.1 0.5 0.5 0.3 0.9", "", [20, 10, 80, 80]),  # a rotated box
    ],
)
def test_lines_of_yolo(tmp_path, line, extra, box):
    assert contents(imported(yolo_of_one_image(tmp_path / "data", line, extra))) == {"a.png": [("two", box)]}


@pytest.mark.parametrize(
    ("line", "extra", "message"),
    [
        ("1 0.1 0.2 0.5 0.2 0.5 0.6 7 8", "", "line 1: a box must be in fractions of the image, but reaches 8"),
        ("1 0.1 0.2 0.5 0.2 0.5 0.6 0.7", "", "points of an outline, not 7 numbers"),
        ("1 0.5 0.5 0.2 0.4", "kpt_shape: 3", "kpt_shape of data.yaml must be"),
        ("1 0.5 0.5 0.2 0.4", "a: &x [1]\nb: *x", "aliases"),
    ],
)
def test_broken_yolo(tmp_path, line, extra, message):
    with pytest.raises(DataError, match=message):
        imported(yolo_of_one_image(tmp_path / "data", line, extra))


def test_texts_in_another_place_are_not_missed(tmp_path):
    source = yolo_of_one_image(tmp_path / "data", "1 0.5 0.5 0.2 0.4")
    (source / "labels/a.txt").rename(source / "a.txt")
    with pytest.raises(DataError, match="1 image, but no text with objects"):
        read_source(source)


def test_images_without_a_text_have_no_objects(tmp_path):
    source = yolo_of_one_image(tmp_path / "data", "1 0.5 0.5 0.2 0.4")
    Image.new("RGB", (50, 40)).save(source / "images/b.jpg")
    (source / "images/._b.jpg").write_text("a file of macOS")
    assert contents(imported(source)) == {"a.png": [("two", [80, 30, 40, 40])], "b.jpg": []}
    assert "1 image without a text, kept without objects" in notes_of(source)[0]


def test_voc_counts_from_one_in_its_own_files_only(tmp_path, files):
    source = write_voc(tmp_path / "export", files, database="The VOC2007 Database")
    assert contents(imported(source)) == contents(files.read())


def test_splits_of_voc(tmp_path, files):
    source = write_voc(tmp_path / "sets", files)
    (source / "ImageSets/Main").mkdir(parents=True)
    (source / "ImageSets/Main/val.txt").write_text("image_1\nimage_3\n")
    found = splits_of(source)
    assert {split: len(part["images"]) for split, part in found.items()} == {"train": 3, "val": 2}
    assert found["train"]["categories"] == found["val"]["categories"]


@pytest.mark.parametrize("form", ["voc", "create_ml", "labelme"])
def test_folders_of_splits(tmp_path, files, form):
    """As Roboflow exports: images of the same names may lie in both."""
    source = tmp_path / "roboflow"
    for name in ("train", "valid"):
        if form == "voc":
            write_voc(source, files, name, name, "roboflow.com")
        else:
            WRITERS[form](source / name, files)
    found = splits_of(source)
    for split, name in (("train", "train"), ("val", "valid")):
        assert found[split]["images"][0]["file_name"] == f"{name}/image_1.png"
        assert contents(found[split]) == contents(files.read())


BOX = "<bndbox><xmin>1.5</xmin><ymin>2</ymin><xmax>11</xmax><ymax>22</ymax></bndbox>"


def test_voc_with_a_wrong_name_and_a_wrong_size(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    text = f"<annotation><filename>wrong.bmp</filename>SIZE<object><name>a</name>{BOX}</object></annotation>"
    (tmp_path / "a.xml").write_text(text.replace("SIZE", ""))
    assert contents(imported(tmp_path)) == {"a.png": [("a", [1.5, 2, 9.5, 20])]}
    (tmp_path / "a.xml").write_text(text.replace("SIZE", "<size><width>100</width><height>50</height></size>"))
    with pytest.raises(DataError, match=r"a\.xml: annotated at 100x50 pixels, but a\.png has 200x100"):
        imported(tmp_path)


def labelme_file(folder, *shapes, **more):
    folder.mkdir()
    Image.new("RGB", (200, 100)).save(folder / "a.png")
    (folder / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": list(shapes), **more}))
    return folder


def test_masks_of_labelme(tmp_path):
    """Their points are the first and the last pixel."""
    source = labelme_file(tmp_path / "data", {"label": "a", "points": [[10, 20], [29, 39]], "shape_type": "mask"})
    assert contents(imported(source)) == {"a.png": [("a", [10, 20, 20, 20])]}


def test_groups_of_labelme_are_one_object(tmp_path):
    part = {"label": "a", "group_id": 1, "shape_type": "polygon"}
    source = labelme_file(
        tmp_path / "data",
        part | {"points": [[10, 20], [30, 20], [30, 60]]},
        part | {"points": [[50, 20], [60, 20], [60, 70]]},
        part | {"points": [[1, 1], [2, 2], [3, 1]], "group_id": 2},
        part | {"points": [[1, 1], [2, 2]], "shape_type": "line"},
    )
    assert contents(imported(source)) == {"a.png": [("a", [1, 1, 2, 1]), ("a", [10, 20, 50, 50])]}
    assert left_out_of(source) == 1


def cvat_file(folder, shapes, meta=""):
    folder.mkdir()
    Image.new("RGB", (200, 100)).save(folder / "a.png")
    image = f'<image id="0" name="a.png" width="200" height="100">{shapes}</image>'
    (folder / "annotations.xml").write_text(f"<annotations>{meta}\n{image}</annotations>")
    return folder


def test_rotated_ellipses_of_cvat(tmp_path):
    shape = '<ellipse label="a" cx="50" cy="40" rx="20" ry="10" rotation="90"/>'
    assert contents(imported(cvat_file(tmp_path / "data", shape))) == {"a.png": [("a", [40, 20, 20, 40])]}


def test_labels_of_cvat_keep_their_order_without_parts_of_skeletons(tmp_path):
    labels = "".join(f"<label><name>{name}</name></label>" for name in ("z", "a", "m"))
    part = "<label><name>nose</name><parent>a</parent></label>"
    meta = f"<meta><project><labels>{labels}{part}</labels></project></meta>"
    shapes = '<box label="m" xtl="1" ytl="2" xbr="3" ybr="4"/><polyline label="a" points="1,2;3,4"/>'
    source = cvat_file(tmp_path / "data", shapes, meta)
    assert [c["name"] for c in imported(source)["categories"]] == ["z", "a", "m"]
    assert left_out_of(source) == 1


def test_subsets_of_cvat(tmp_path, files):
    for subset in ("Train", "Validation"):
        write_cvat(tmp_path / "export" / subset, files, subset)
    found = splits_of(tmp_path / "export")
    assert contents(found["train"]) == contents(found["val"]) == contents(files.read())
    assert {i["file_name"].partition("/")[0] for i in found["val"]["images"]} == {"Validation"}


ADDRESSES = ["/data/local-files/?d=photos/{}", "s3://bucket/photos/{}", "https://example.org/a%20b/{}?token=1", "{}"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_of_label_studio(tmp_path, files, address):
    source = write_label_studio(tmp_path / "export", files, address)
    assert contents(imported(source)) == contents(files.read())
    pictures = (tmp_path / "export/pictures").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"no image .*\(5 of 5 images\)\. --images names another folder"):
        imported(source)
    assert contents(imported(source, pictures)) == contents(files.read())


def label_studio_file(folder, *regions, orientation=1, **task):
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (200, 100)).save(folder / "a.jpg", exif=exif)
    whole = {"id": 5, "data": {"image": "/data/upload/1/a.jpg"}, "annotations": [{"result": list(regions)}], **task}
    (folder / "export.json").write_text(json.dumps([whole]))
    return folder / "export.json"


RECTANGLE = {"x": 10, "y": 20, "width": 20, "height": 40, "rotation": 0, "rectanglelabels": ["a"]}
ELLIPSE = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 0, "ellipselabels": ["a"]}
SIZE = {"original_width": 200, "original_height": 100}


@pytest.mark.parametrize(
    ("value", "box"),
    [
        (RECTANGLE, [20, 20, 40, 40]),
        (RECTANGLE | {"rotation": 90, "height": 30}, [-10, 20, 30, 40]),
        (ELLIPSE, [80, 30, 40, 40]),
        (ELLIPSE | {"radiusY": 10, "rotation": 90}, [90, 30, 20, 40]),
        ({"points": [[10, 20], [30, 20], [30, 60]], "polygonlabels": ["a"]}, [20, 20, 40, 40]),
        ({"x": 10, "y": 20, "width": 20, "height": 40, "labels": ["a"]}, [20, 20, 40, 40]),  # <Rectangle>, <Labels>
    ],
)
def test_regions_of_label_studio(tmp_path, value, box):
    source = label_studio_file(tmp_path / "data", {"type": "any", "value": value, **SIZE})
    assert contents(imported(source)) == {"a.jpg": [("a", box)]}


def test_label_studio_counts_in_the_upright_image(tmp_path):
    """Its original_width and original_height are those of the stored one."""
    found = imported(label_studio_file(tmp_path / "data", {"value": RECTANGLE, **SIZE}, orientation=6))
    assert (found["images"][0]["width"], found["images"][0]["height"]) == (100, 200)
    assert contents(found) == {"a.jpg": [("a", [10, 40, 20, 80])]}


def test_which_annotation_of_a_task_counts(tmp_path):
    others = [
        {"result": [{"value": RECTANGLE}, {"value": RECTANGLE}], "was_cancelled": True},
        {"result": [{"value": RECTANGLE | {"rectanglelabels": ["b"]}}]},
        {"result": [{"value": RECTANGLE}, {"type": "choices", "value": {"choices": ["x"]}}], "ground_truth": True},
    ]
    source = label_studio_file(tmp_path / "data", annotations=others)
    assert contents(imported(source)) == {"a.jpg": [("a", [20, 20, 40, 40])]}


def test_tasks_without_annotation_and_brushes_are_left_out(tmp_path):
    """An image that nobody looked at would be trained on as an empty one."""
    brush = {"value": {"format": "rle", "rle": [0, 1], "brushlabels": ["a"]}}
    source = label_studio_file(tmp_path / "data", brush, {"value": RECTANGLE})
    tasks = json.loads(source.read_text())
    tasks.append({"id": 6, "data": {"image": "b.jpg"}, "annotations": []})
    source.write_text(json.dumps(tasks))
    assert contents(imported(source)) == {"a.jpg": [("a", [20, 20, 40, 40])]}
    assert left_out_of(source) == 1
    assert [part.unlabelled for part in read_source(source).values()] == [1]
    source.write_text(json.dumps(tasks[1:]))
    with pytest.raises(DataError, match="no annotated images"):
        read_source(source)


def test_classes_in_another_result(tmp_path):
    """<Rectangle> and <Labels> write two results with one id."""
    bare = {key: value for key, value in RECTANGLE.items() if key != "rectanglelabels"}
    both = [{"id": "r", "type": kind, "value": bare} for kind in ("rectangle", "labels")]
    both[1]["value"] = bare | {"labels": ["a"]}
    source = label_studio_file(tmp_path / "data", *both, {"id": "s", "type": "rectangle", "value": bare})
    assert contents(imported(source)) == {"a.jpg": [("a", [20, 20, 40, 40])]}
    assert left_out_of(source) == 1


def test_json_min_of_label_studio(tmp_path):
    source = label_studio_file(tmp_path / "data")
    task = {"image": "/data/upload/1/a.jpg", "id": 3, "label": [RECTANGLE | SIZE], "annotator": 1}
    source.write_text(json.dumps([task]))
    assert contents(imported(source)) == {"a.jpg": [("a", [20, 20, 40, 40])]}


def test_older_files_of_createml(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    box = {"label": "a", "coordinates": {"x": 50, "y": 40, "width": 20, "height": 10}}
    (tmp_path / "a.json").write_text(json.dumps([{"imagefilename": "a.png", "annotation": [box]}]))
    assert contents(imported(tmp_path / "a.json")) == {"a.png": [("a", [40, 35, 20, 10])]}


def test_what_can_not_be_imported_is_called_by_its_name(tmp_path, files):
    (tmp_path / "a.csv").write_text("ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and more")
    points = {"images": [], "annotations": [{"keypoints": [1, 2, 2]}], "categories": []}
    (tmp_path / "points.json").write_text(json.dumps(points))
    for name, words in (("a.csv", "Open Images"), ("a.zip", "unpack it"), ("coco", "name the JSON file")):
        assert words in explain(tmp_path / name)
        with pytest.raises(DataError, match=words):
            read_source(tmp_path / name)
    assert "keypoints without boxes" in explain(tmp_path / "points.json", points)
    points["annotations"][0]["bbox"] = [1, 2, 3, 4]
    assert explain(tmp_path / "points.json", points) == ""
    for content in (b"", b"\x00\xff", b"<html>", b"<", b"{", b"[1"):
        (tmp_path / "x.json").write_bytes(content)
        assert explain(tmp_path / "x.json") == ""
    for data in ([], [1], {}, "text", 3, [{}], [{"image": 3}], {"images": 1, "annotations": 2}):
        assert explain(tmp_path / "x.json", data) == ""
