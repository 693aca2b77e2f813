"""Exports of other programs become the same data in COCO's format."""

import json

import pytest

from dino.data.coco import read_annotations
from dino.data.importers.read_source import read_source
from dino.data.importers.recognition import recognise
from dino.data.importers.source import to_coco
from dino.utils.files import DataError

from .exports import EXPORTS, HEIGHT, WIDTH, yolo


def assert_same(found, content, prefix=""):
    """The objects of each image, in order, and their boxes."""
    names = {c["id"]: c["name"] for c in found["categories"]}
    known = {c["id"]: c["name"] for c in content["categories"]}
    assert len(found["images"]) == len(content["images"])
    for image, truth in zip(found["images"], content["images"], strict=True):
        assert image["file_name"].endswith(truth["file_name"])
        assert (image["width"], image["height"]) == (WIDTH, HEIGHT)
        ours = [(names[a["category_id"]], a["bbox"]) for a in found["annotations"] if a["image_id"] == image["id"]]
        theirs = [(known[a["category_id"]], a["bbox"]) for a in content["annotations"] if a["image_id"] == truth["id"]]
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert [box for _, box in ours] == [pytest.approx(box, abs=1e-9) for _, box in theirs]


@pytest.mark.parametrize("form", EXPORTS)
def test_every_format(tmp_path, form):
    write, name = EXPORTS[form]
    content = write(tmp_path)
    source = tmp_path / name
    parsed = json.loads(source.read_text()) if source.suffix == ".json" else None
    assert recognise(source, parsed) == form
    (train,) = read_source(source).values()
    found = to_coco(train)
    assert_same(found, content)
    order = ["red", "green", "blue"] if form == "cvat" else ["blue", "green", "red"]
    assert [c["name"] for c in found["categories"]] == order
    path = tmp_path / "train.json"
    path.write_text(json.dumps(found))
    assert read_annotations(path, train.folder) == found


def test_yolo(tmp_path):
    contents = yolo(tmp_path)
    for source in (tmp_path, tmp_path / "data.yaml"):
        sources = read_source(source)
        assert list(sources) == ["train", "val"]
        for split, name in (("train", "train"), ("val", "valid")):
            assert_same(to_coco(sources[split]), contents[name])
            assert [c["name"] for c in to_coco(sources[split])["categories"]] == ["red", "green", "blue"]


def test_yolo_without_yaml_and_with_outlines(tmp_path):
    yolo(tmp_path / "a", splits=("train",))
    root = tmp_path / "a/train"
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    lines = ["0 0.1 0.2 0.5 0.2 0.5 0.6", "2 0.1 0.1 0.3 0.1 0.3 0.2 0.1 0.2", ""]
    (root / "labels/image_1.txt").write_text("\n".join(lines))
    found = to_coco(read_source(root)["train"])
    boxes = [a["bbox"] for a in found["annotations"] if a["image_id"] == 1]
    assert boxes[0] == pytest.approx([7.2, 12.8, 28.8, 25.6])
    assert boxes[1] == pytest.approx([7.2, 6.4, 14.4, 6.4])


def test_rotated_boxes_and_other_shapes(tmp_path):
    EXPORTS["cvat"][0](tmp_path / "cvat")
    path = tmp_path / "cvat/annotations.xml"
    head, _, tail = path.read_text().partition('name="image_2.png" width="72" height="64">')
    shapes = (
        '<box label="red" xtl="10" ytl="20" xbr="30" ybr="24" rotation="90"></box>'
        '<ellipse label="red" cx="20" cy="30" rx="5" ry="7"></ellipse>'
        '<mask label="red" rle="1, 2" left="3" top="4" width="5" height="6"></mask>'
        '<points label="red" points="1,2"></points>'
    )
    path.write_text(f'{head}name="image_2.png" width="72" height="64">{shapes}{tail}')
    found = to_coco(read_source(path)["train"])
    boxes = [a["bbox"] for a in found["annotations"] if a["image_id"] == 2]
    assert boxes == [pytest.approx([18, 12, 4, 20]), [15, 23, 10, 14], [3, 4, 5, 6]]

    EXPORTS["label_studio"][0](tmp_path / "ls")
    path = tmp_path / "ls/export.json"
    tasks = json.loads(path.read_text())
    value = {"x": 50, "y": 25, "width": 25, "height": 12.5, "rotation": 90, "rectanglelabels": ["red"]}
    outline = {"points": [[10, 10], [20, 10], [20, 30]], "polygonlabels": ["green"]}
    tasks[1]["annotations"][1]["result"] = [
        {"type": "rectanglelabels", "value": value, "original_width": WIDTH, "original_height": HEIGHT},
        {"type": "polygonlabels", "value": outline},
        {"type": "choices", "value": {"choices": ["night"]}},
    ]
    path.write_text(json.dumps(tasks))
    source = read_source(path)["train"]
    assert [image.left_out for image in source.images] == [0, 1, 0, 0]
    found = to_coco(source)
    boxes = [a["bbox"] for a in found["annotations"] if a["image_id"] == 2]
    assert boxes == [pytest.approx([36 - 8, 16, 8, 18]), pytest.approx([7.2, 6.4, 7.2, 12.8])]

    EXPORTS["labelme"][0](tmp_path / "labelme")
    path = tmp_path / "labelme/image_2.json"
    entry = json.loads(path.read_text())
    entry["shapes"] = [{"label": "red", "shape_type": "circle", "points": [[20, 20], [23, 24]]}]
    entry["shapes"].append({"label": "red", "shape_type": "line", "points": [[20, 20], [23, 24]]})
    path.write_text(json.dumps(entry))
    found = to_coco(read_source(tmp_path / "labelme")["train"])
    assert [a["bbox"] for a in found["annotations"] if a["image_id"] == 2] == [[15, 15, 10, 10]]


def test_label_studio_without_frames(tmp_path):
    """Its format "JSON-MIN"."""
    content = EXPORTS["label_studio"][0](tmp_path)
    path = tmp_path / "export.json"
    tasks = []
    for task in json.loads(path.read_text()):
        results = task["annotations"][1]["result"]
        labels = [{**r["value"], "original_width": WIDTH, "original_height": HEIGHT} for r in results]
        tasks.append({"id": task["id"], "image": task["data"]["image"], "label": labels, "annotator": 1})
    path.write_text(json.dumps(tasks))
    assert_same(to_coco(read_source(path)["train"]), content)


def test_tasks_that_nobody_annotated_are_no_empty_images(tmp_path):
    EXPORTS["label_studio"][0](tmp_path)
    path = tmp_path / "export.json"
    tasks = json.loads(path.read_text())
    tasks[0]["annotations"] = []
    del tasks[2]["annotations"][1]  # the other one was cancelled
    path.write_text(json.dumps(tasks))
    source = read_source(path)["train"]
    assert source.unlabelled == 2
    assert [image.name[-11:] for image in source.images] == ["image_2.png", "image_4.png"]


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
BROKEN = {
    "truncated XML": ("cvat", "annotations.xml", lambda t: t[:-40], "no XML"),
    "entities": ("cvat", "annotations.xml", lambda t: BOMB + t, "XML with a document type"),
    "number": ("cvat", "annotations.xml", lambda t: t.replace('xtl="', 'xtl="x'), "shape 1, xtl: a finite number"),
    "infinite": ("voc", "Annotations/image_1.xml", lambda t: t.replace("<xmin>", "<xmin>1e999"), "object 1, xmin"),
    "no class": (
        "voc",
        "Annotations/image_1.xml",
        lambda t: t.replace("<name>", "<nom>").replace("</name>", "</nom>"),
        "has no class",
    ),
    "escape": (
        "voc",
        "Annotations/image_1.xml",
        lambda t: t.replace("image_1", "../../etc/passwd"),
        "image_1.xml: no image",
    ),
    "twice": (
        "voc",
        "Annotations/image_1.xml",
        lambda t: t.replace("image_1", "image_2"),
        "image_2.png is listed already",
    ),
    "not JSON": ("label_studio", "export.json", lambda t: t[:-5], "can't read annotations"),
    "percent": (
        "label_studio",
        "export.json",
        lambda t: t.replace('"x": ', '"x": "a", "z": '),
        "result 1, x: a finite number",
    ),
    "pixels": (
        *("label_studio", "export.json", lambda t: t.replace('"x": ', '"x": 4')),
        "result 1: a box must be in fractions of the image, but reaches",
    ),
    "no image": (
        "label_studio",
        "export.json",
        lambda t: t.replace("/data/upload", "x").replace(".png", ""),
        "names no image",
    ),
    "no label": (
        "label_studio",
        "export.json",
        lambda t: t.replace('"rectanglelabels": [', '"other": ['),
        "it has no class",
    ),
    "points": (
        "labelme",
        "image_1.json",
        lambda t: t.replace('"points": [[', '"points": [[null, '),
        "an outline must be",
    ),
    "no path": (
        "labelme",
        "image_1.json",
        lambda t: t.replace("imagePath", "path"),
        "no file of labelme|unknown|imagePath",
    ),
    "centre": (
        "create_ml",
        "export.json",
        lambda t: t.replace('"width"', '"w"'),
        "annotation 1, width: a finite number",
    ),
}


@pytest.mark.parametrize(("form", "file", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_sources_are_named(tmp_path, form, file, change, message):
    write, name = EXPORTS[form]
    write(tmp_path)
    path = tmp_path / file
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message) as caught:
        [to_coco(source) for source in read_source(tmp_path / name).values()]
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 700


BROKEN_YOLO = {
    "class": ("train/labels/image_1.txt", "7 0.5 0.5 0.1 0.1", "image_1.txt, line 1: class 7, but there are 3"),
    "half a class": ("train/labels/image_1.txt", "0.5 0.5 0.5 0.1 0.1", "line 1: class 0.5"),
    "short": ("train/labels/image_1.txt", "0 0.5 0.5 0.1", "line 1: a class and 4 numbers"),
    "word": ("train/labels/image_1.txt", "\n0 a 0.5 0.1 0.1", "line 2: a finite number was expected, not 'a'"),
    "pixels": ("train/labels/image_1.txt", "0 30 20 10 10", "line 1: a box must be in fractions of the image, but rea"),
    "score": ("train/labels/image_1.txt", "0 0.5 0.5 0.1 0.1 0.9", "line 1: a class and 4 numbers, or the points"),
    "NaN": ("train/labels/image_1.txt", "0 nan 0.5 0.1 0.1", "line 1: a finite number"),
    "no names": ("data.yaml", "train: train/images", "no list of class names"),
    "twice": ("data.yaml", "train: train/images\nnames: [a, a]", "two classes have one name"),
    "gap": ("data.yaml", "train: train/images\nnames: {0: a, 2: b}", "numbered from 0 on"),
    "elsewhere": ("data.yaml", "train: /etc/images\nnames: [a]", "is not in it"),
    "not YAML": ("data.yaml", "names: [a", "no YAML"),
    "tag": ("data.yaml", "names: !!python/object/apply:os.system [ls]", "no YAML"),
    "list": ("data.yaml", "- a", "the keys names, train and val are missing"),
    "many": ("data.yaml", "train: [a, b]\nnames: [a]", "one folder each"),
}


@pytest.mark.parametrize(("file", "content", "message"), BROKEN_YOLO.values(), ids=BROKEN_YOLO)
def test_broken_yolo_folders_are_named(tmp_path, file, content, message):
    yolo(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        [to_coco(source) for source in read_source(tmp_path).values()]
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("form", [*EXPORTS, "yolo"])
def test_other_formats_given_as_annotations_are_recognised(tmp_path, form):
    write, name = (yolo, "data.yaml") if form == "yolo" else EXPORTS[form]
    write(tmp_path)
    source = tmp_path / name
    with pytest.raises(DataError, match=r"it holds .*\. Convert it: dino data import .* train\.json"):
        read_annotations(source, tmp_path)


OTHERS = {
    "panoptic": {"images": [], "categories": [], "annotations": [{"segments_info": [], "image_id": 1}]},
    "captions": {"images": [], "annotations": [{"caption": "a cat", "image_id": 1, "id": 2}]},
    "keypoints": {"images": [], "categories": [], "annotations": [{"keypoints": [1, 2, 2], "image_id": 1, "id": 2}]},
    "results": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}],
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_files_of_coco_are_recognised(tmp_path, form):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(OTHERS[form]))
    with pytest.raises(DataError, match=f"a.json: it holds .*{form.removesuffix('s')}|detections"):
        read_annotations(path, tmp_path)
    with pytest.raises(DataError, match=r"a\.json holds"):
        read_source(path)


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match="source not found"):
        read_source(tmp_path / "absent")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"unknown format\. These can be imported: yolo, voc"):
        read_source(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(DataError, match="COCO's format already"):
        read_source(tmp_path / "a.json")
