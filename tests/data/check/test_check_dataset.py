"""`dino check` as people call it."""

import errno
import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from dino import cli
from dino.data.check.image_files import _read_file
from dino.data.coco import CocoImages, read_annotations
from dino.evaluation import average_precision
from dino.utils.files import DataError

from ...coco_files import write_coco
from ...tools.programs import contents

BCCD = Path(os.environ.get("DINO_BCCD", Path(__file__).parents[4] / "shared/data/bccd"))


def check(*arguments):
    return cli.main(["check", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    return write_coco(tmp_path / "train", counts=(3, 3, 0, 3))


def test_a_clean_set(files, capsys):
    assert check(*files) == 0
    out = capsys.readouterr().out
    assert "4 images (1 without objects), 9 objects, 3 classes" in out
    assert out.endswith("verdict: ready to train, no issues\n")
    assert "images/s" in out
    assert "objects after resizing: median" in out


def test_first_offenders_are_listed_and_the_exit_code_is_1(files, capsys):
    files.change(lambda c: [a.update(bbox=[n, 1, 0, 0]) for n, a in enumerate(c["annotations"][:5])])
    assert check(*files, "--show", 2) == 1
    out = capsys.readouterr().out
    assert "error: boxes without area (5). Remove them" in out
    assert "annotation 2 of image_1.png: [1, 1, 0, 0] in an image of 72x64\n  … and 3 more" in out
    assert "\nlevel    issue                  number  --fix\nerror    boxes without area          5  drops\nverd" in out
    assert "verdict: not ready to train (5 errors, 0 warnings): --fix writes cleaned copies" in out


def make_crowd(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def test_data_without_objects(files, tmp_path, capsys):
    """An error of training data, a warning of validation data."""
    val = write_coco(tmp_path / "val", counts=(2, 1), seed=5)
    val.change(make_crowd)
    numbers = "has no objects: 2 images, 3 annotations, 3 of them crowd regions (iscrowd=1), 0 boxes without area"
    assert check(*files, "--val", *val) == 0
    out = capsys.readouterr().out
    assert "warning: no objects at all in the validation data (1). Annotate them, or expect no AP" in out
    assert f"{val.annotations} {numbers}" in out
    assert check(*val, "--fix", tmp_path / "fixed.json") == 1
    out, error = capsys.readouterr()
    assert "error: no objects at all (1). Annotate objects" in out
    assert f"{val.annotations} {numbers}" in out
    assert "can't fix without you: no objects at all" in error
    val.change(lambda content: content["annotations"].clear())
    assert check(*val) == 1
    assert "2 images, 0 annotations, 0 of them crowd" in capsys.readouterr().out


def test_warnings_leave_the_exit_code_0(files, capsys):
    files.change(lambda c: c["annotations"][0].update(bbox=[60, 1, 20, 20], area=400))
    assert check(*files) == 0
    assert "warning: boxes that cross the border of their image (1)" in capsys.readouterr().out


def test_without_opening_images(files, capsys):
    (Path(files.images) / "image_1.png").unlink()
    assert check(*files, "--no-images") == 0
    assert "images/s" not in capsys.readouterr().out
    assert check(*files) == 1
    assert "error: missing files (1)" in capsys.readouterr().out


def test_fix_writes_a_cleaned_copy(files, capsys, tmp_path):
    def change(content):
        content["annotations"][0]["bbox"] = [1, 1, 0, 0]
        content["annotations"][1]["bbox"] = [60, 1, 20, 20]
        content["annotations"][1]["area"] = 400
        content["annotations"][2]["id"] = 1

    files = write_coco(tmp_path / "more", counts=(3, 3, 0, 3, 3))
    files.change(change)
    before = contents(tmp_path)
    assert check(*files, "--fix", tmp_path / "fixed.json") == 1
    line = "11 of 12 objects kept, 11 of them changed; 1 object dropped: boxes without area"
    assert f"cleaned copy written to {tmp_path / 'fixed.json'}: {line}" in capsys.readouterr().out
    fixed = json.loads((tmp_path / "fixed.json").read_text())
    assert fixed["annotations"][0]["bbox"] == [60, 1, 12, 20]
    assert [a["id"] for a in fixed["annotations"]] == list(range(1, 12))
    assert check(tmp_path / "fixed.json", files.images) == 0
    (tmp_path / "fixed.json").unlink()
    assert contents(tmp_path) == before


def test_fix_writes_copies_of_both_files_or_none(files, tmp_path, capsys):
    """Roboflow lists a group of classes as a class, in training and validation data."""
    val = write_coco(tmp_path / "val", counts=(2, 2), seed=3)
    for one in (files, val):
        one.change(lambda c: c["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"}))
        one.change(lambda c: [category.update(supercategory="things") for category in c["categories"][1:]])
    copies = tmp_path / "train_clean.json", tmp_path / "val_clean.json"
    assert check(*files, "--fix", *copies, "--val", *val) == 0
    assert capsys.readouterr().out.count("cleaned copy written to") == 2
    assert check(copies[0], files.images, "--val", copies[1], val.images) == 0
    assert "verdict: ready to train" in capsys.readouterr().out
    for path in copies:
        assert [c["name"] for c in json.loads(path.read_text())["categories"]] == ["red", "green", "blue"]
        path.unlink()
    val.change(lambda c: c["categories"][1].update(name="green"))
    assert check(*files, "--fix", *copies, "--val", *val) == 1
    assert not any(path.exists() for path in copies)
    with pytest.raises(SystemExit):
        check(*files, "--fix", *copies)
    assert "--fix takes one file, or two with --val" in capsys.readouterr().err


def test_fix_refuses_what_it_can_not_decide(files, capsys, tmp_path):
    files.change(lambda c: c["categories"][1].update(name="red"))
    assert check(*files, "--fix", tmp_path / "fixed.json") == 1
    captured = capsys.readouterr()
    assert "error: categories without an id or a name of their own (1)" in captured.out
    assert "error: can't fix without you: categories without" in captured.err
    assert not (tmp_path / "fixed.json").exists()


@pytest.mark.parametrize("option", ["--fix", "--preview", "--sheet"])
def test_an_output_that_exists_is_refused(files, capsys, tmp_path, option):
    target = tmp_path / "taken"
    target.write_text("precious")
    assert check(*files, option, target) == 1
    assert "taken exists: choose another name" in capsys.readouterr().err
    assert target.read_text() == "precious"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("option", ["--fix", "--preview", "--sheet"])
def test_a_refused_write_leaves_nothing(files, capsys, tmp_path, monkeypatch, option, number):
    before = contents(tmp_path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    assert check(*files, option, tmp_path / "out") == 1
    assert f"can't write {tmp_path}/out: [Errno {number}]" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_train_and_val_are_compared(files, capsys, tmp_path):
    val = write_coco(tmp_path / "val", seed=1)
    assert check(*files, "--val", *val) == 0
    picture = Image.open(Path(files.images) / "image_2.png")
    picture.save(Path(val.images) / "image_1.png", compress_level=0)
    val.change(lambda c: c["categories"][2].update(name="azure"))
    capsys.readouterr()
    assert check(*files, "--val", *val) == 1
    out = capsys.readouterr().out
    assert "only in training: ['blue'], only in validation: ['azure']" in out
    assert "images that the validation data has too (1)" in out
    assert "image_2.png is image_1.png of the validation data" in out


def test_other_ids_and_another_order_of_classes(files, capsys, tmp_path):
    val = write_coco(tmp_path / "val", seed=1, category_ids=(5, 6, 7))
    assert check(*files, "--val", *val) == 0
    assert "class ids that differ from the validation data" in capsys.readouterr().out

    def rename(content):
        for category, name in zip(content["categories"], ("green", "red", "blue"), strict=True):
            category["name"] = name

    val.change(rename)
    assert check(*files, "--val", *val) == 1
    assert "the same names in another order: ['red', 'green', 'blue'], in validation" in capsys.readouterr().out


def test_a_shared_file_is_found_without_opening_it(files, capsys, tmp_path):
    shutil.copy(files.annotations, tmp_path / "val.json")
    assert check(*files, "--no-images", "--val", tmp_path / "val.json") == 1
    assert "images that the validation data has too (4)" in capsys.readouterr().out


def test_fix_takes_shared_images_out_of_the_training_data(files, tmp_path):
    content = files.read()
    (tmp_path / "val.json").write_text(json.dumps({**content, "images": content["images"][:1], "annotations": []}))
    assert check(*files, "--val", tmp_path / "val.json", "--fix", tmp_path / "fixed.json") == 1
    assert check(tmp_path / "fixed.json", files.images, "--val", tmp_path / "val.json") == 0


def test_tiny_objects_crowds_and_unlisted_images(files, capsys):
    def change(content):
        content["annotations"][0].update(bbox=[5, 5, 0.5, 0.5], area=0.25)
        content["annotations"] += [
            {"id": 100 + n, "image_id": 3, "category_id": 1, "bbox": [n / 4, 5, 20, 20]} for n in range(101)
        ]
        content["images"].pop()
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 4]

    files.change(change)
    assert check(*files) == 0
    out = capsys.readouterr().out
    assert "annotation 1 of image_1.png: [5, 5, 0.5, 0.5] is 6.2 pixels large after resizing" in out
    assert "image_3.png has 101" in out
    assert "note: training ignores 1 image in" in out
    assert "such as image_4.png" in out


def test_the_preview_is_one_file_with_everything_inside(tmp_path):
    files = write_coco(tmp_path / "bilder mit ä", counts=(2, 1), category_ids=(1, 2))

    def change(content):
        content["categories"][0]["name"] = "<script>alert(1)</script>"
        content["annotations"][0].update(bbox=[60, 1, 20, 20], area=400)

    files.change(change)
    assert check(*files, "--preview", tmp_path / "preview.html") == 0
    page = (tmp_path / "preview.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert "http" not in page
    assert "boxes that cross the border of their image" in page


BROKEN = {
    "absent": (None, "annotations not found"),
    "empty": (b"", "can't read annotations"),
    "binary": (b"\xff\xfe\x00", "can't read annotations"),
    "truncated": (b'{"images": [', "can't read annotations"),
    "deep": (b"[" * 100_000, "can't read annotations"),
    "endless number": (b"[" + b"9" * 5000 + b"]", "can't read annotations"),
    "list": (b"[]", "the list 'images' is missing"),
    "no categories": (b'{"images": [], "annotations": []}', "the list 'categories' is missing"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_annotations(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert check(tmp_path / "a.json", tmp_path) == (2 if content is None else 1)
    error = capsys.readouterr().err
    assert message in error
    assert "a.json" in error
    assert error.count("error: ") == 1


def test_entries_of_the_wrong_type_are_listed(files, capsys):
    def change(content):
        content["images"] += ["a.png", None, 3, {"id": "7"}]
        content["annotations"] += [None, [], "x", {"id": None}, {"id": 50, "bbox": {}}]
        content["categories"] += [None, {"id": True, "name": "x"}, {"id": 9}]

    files.change(change)
    assert check(*files) == 1
    out = capsys.readouterr().out
    assert "images without id, file name or size (4)" in out
    assert "objects of no known image or class (5)" in out
    assert "categories without an id or a name of their own (3)" in out


def test_an_empty_set_and_a_missing_folder(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    assert check(path, tmp_path) == 1
    assert "there are no categories" in capsys.readouterr().out
    assert check(path, tmp_path / "absent") == 2
    assert "image folder not found" in capsys.readouterr().err


def test_names_with_spaces_unicode_and_what_can_be_no_file(tmp_path, capsys):
    files = write_coco(tmp_path / "ein Ordner é", counts=(1, 1))
    os.rename(Path(files.images) / "image_1.png", Path(files.images) / "bild ü.png")

    def rename(content):
        content["images"][0]["file_name"] = "bild ü.png"
        content["images"].append({"id": 9, "file_name": "\ud800.png", "width": 5, "height": 5})
        content["images"].append({"id": 10, "file_name": "a\0b.png", "width": 5, "height": 5})

    files.change(rename)
    assert check(*files, "--preview", tmp_path / "preview.html") == 1
    out = capsys.readouterr().out
    assert "error: missing files (2)" in out
    assert "1 errors" not in out
    assert "bild ü.png: 1 object" in (tmp_path / "preview.html").read_text()


def test_huge_and_strange_pictures_are_unreadable_not_fatal(tmp_path):
    bomb = tmp_path / "bomb.bmp"
    header = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    size = (60_000).to_bytes(4, "little")
    bomb.write_bytes(header + size * 2 + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24))
    assert "decompression bomb" in _read_file(bomb).problem
    os.mkfifo(tmp_path / "pipe.png")
    assert _read_file(tmp_path / "pipe.png").problem == "missing"
    (tmp_path / "empty.jpg").touch()
    assert "cannot identify image file" in _read_file(tmp_path / "empty.jpg").problem


@pytest.mark.parametrize("cut", [10, 1000])
def test_a_truncated_jpeg_is_noticed(tmp_path, cut):
    """Although it is decoded at an eighth of its size."""
    files = write_coco(tmp_path, counts=(3,), suffix=".jpg", width=300, height=200)
    path = Path(files.images) / "image_1.jpg"
    assert _read_file(path).problem is None
    path.write_bytes(path.read_bytes()[:-cut])
    assert "truncated" in _read_file(path).problem


def test_a_set_of_crowd_regions_is_learned_from_on_request(files, tmp_path, capsys):
    """As CVAT writes masks: every object is a crowd region."""
    files.change(make_crowd)
    assert check(*files) == 1
    out = capsys.readouterr().out
    assert "warning: crowd regions, which training leaves out (9). If each is one object, add --crowd objects" in out
    assert "9 of them crowd regions (iscrowd=1), 0 boxes without area in the image. If each crowd region is one" in out
    assert out.endswith("(1 error, 9 warnings): if each crowd region is one object, --crowd objects --fix\n")
    assert check(*files, "--crowd", "objects", "--fix", tmp_path / "fixed.json") == 0
    assert "9 of 9 objects kept, 9 of them changed" in capsys.readouterr().out
    assert {a["iscrowd"] for a in json.loads((tmp_path / "fixed.json").read_text())["annotations"]} == {0}
    assert check(tmp_path / "fixed.json", files.images) == 0


def test_fix_refuses_to_lose_many_objects_or_a_class(files, tmp_path, capsys):
    (Path(files.images) / "image_1.png").unlink()
    assert check(*files, "--fix", tmp_path / "fixed.json") == 1
    reason = (
        "3 of 9 objects would go (3 objects dropped: missing files). Correct these, or permit the loss: --max-loss 1"
    )
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "fixed.json").exists()
    assert check(*files, "--fix", tmp_path / "fixed.json", "--max-loss", "0.4") == 1
    assert "6 of 9 objects kept, 0 of them changed; 3 objects dropped: missing files" in capsys.readouterr().out

    files = write_coco(tmp_path / "rare", counts=(5,) * 4)

    def make_rare(content):
        for number, a in enumerate(content["annotations"]):
            a["category_id"] = 1 + (number > 9)
        content["annotations"][0].update(category_id=3, bbox=[5, 5, 0, 0])

    files.change(make_rare)
    assert check(*files, "--fix", tmp_path / "rare.json") == 1
    assert "all objects of 'blue' would go" in capsys.readouterr().err
    assert check(*files, "--fix", tmp_path / "rare.json", "--max-loss", "1") == 1
    assert (tmp_path / "rare.json").exists()


def test_truncated_jpegs_can_be_kept(tmp_path, capsys):
    """Cameras leave files without their last bytes."""
    files = write_coco(tmp_path / "cut", counts=(3, 3), suffix=".jpg", width=300, height=200)
    path = Path(files.images) / "image_1.jpg"
    path.write_bytes(path.read_bytes()[:-20])
    assert check(*files, "--fix", tmp_path / "fixed.json") == 1
    out, error = capsys.readouterr()
    assert "error: truncated files (1). Replace them; --truncated keep completes JPEG files\n  image_1.jpg" in out
    assert "3 of 6 objects would go" in error
    before = path.read_bytes()
    assert check(*files, "--fix", tmp_path / "fixed.json", "--truncated", "keep") == 1
    assert "1 truncated JPEG file completed with grey, in place" in capsys.readouterr().out
    assert path.read_bytes()[: len(before)] == before
    assert check(tmp_path / "fixed.json", files.images) == 0


def test_undecided_orientations_are_decided_by_a_person(tmp_path, capsys):
    """Boxes that fit both pictures."""
    for choice, box in (("upright", [3, 5, 20, 10]), ("stored", [49, 3, 10, 20])):
        files = write_coco(tmp_path / choice, counts=(1,), category_ids=(1,))
        path = Path(files.images) / "image_1.png"
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).save(path, exif=exif)
        files.change(lambda c: c["annotations"][0].update(bbox=[3, 5, 20, 10]))
        fixed = tmp_path / f"{choice}.json"
        assert check(*files, "--fix", fixed) == 1
        out, error = capsys.readouterr()
        assert "image_1.png is 64x72, stored as 72x64 (orientation 6)" in out
        assert "can't fix without you: sizes before the EXIF rotation, and boxes that fit both pictures" in error
        assert check(*files, "--fix", fixed, "--exif", choice) == 1
        content = json.loads(fixed.read_text())
        assert (content["images"][0]["width"], content["images"][0]["height"]) == (64, 72)
        assert content["annotations"][0]["bbox"] == box
        assert check(fixed, files.images) == 0


def test_accents_in_names_match_in_both_forms(tmp_path, capsys):
    """Apple's file systems store é as two characters."""
    files = write_coco(tmp_path / "names", counts=(1, 1), category_ids=(1,))
    (Path(files.images) / "image_1.png").rename(Path(files.images) / unicodedata.normalize("NFD", "café 1.png"))
    files.change(lambda c: c["images"][0].update(file_name=unicodedata.normalize("NFC", "CAFÉ%201.png")))
    assert check(*files, "--fix", tmp_path / "fixed.json") == 1
    assert "error: file names that match a file only after a change (1)" in capsys.readouterr().out
    assert check(tmp_path / "fixed.json", files.images) == 0


def test_a_byte_order_mark_is_read(files):
    content = Path(files.annotations).read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        Path(files.annotations).write_bytes(content.encode(encoding))
        assert check(*files) == 0


def test_names_can_not_control_the_terminal(files, capsys):
    def rename(content):
        content["categories"][0]["name"] = "red\x1b[31m\n" + "x" * 500
        content["images"][0]["file_name"] = "\x1b]0;gone\x07.png"

    files.change(rename)
    assert check(*files) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert max(map(len, out.splitlines())) < 300


CASES = Path(__file__).parents[4] / "shared/cases/annotations"
FIXED_FIRST = {"one_image_entry_per_object", "rf_same", "label_studio_backslash", "rle_ann"}  # training refuses them


@pytest.mark.skipif(not (CASES.is_dir() and BCCD.is_dir()), reason="the collected files are not there")
@pytest.mark.parametrize("path", sorted(CASES.glob("*.json")), ids=lambda path: path.stem)
def test_collected_files(path, tmp_path, capsys):
    """Each ends with 109 objects on 6 images: as it is, or as a cleaned copy."""
    content = json.loads(path.read_bytes())
    names = {image["file_name"].rpartition("\\")[2] for image in content["images"]}
    (tmp_path / "images").mkdir()
    for name in names:
        shutil.copy(BCCD / "images" / name, tmp_path / "images" / name)
    fixed = tmp_path / "fixed.json"
    crowd = ["--crowd", "objects"] if path.stem == "rle_ann" else []
    code = check(path, tmp_path / "images")
    out = capsys.readouterr().out
    assert code == (path.stem in FIXED_FIRST)
    assert ("numbers written as text" in out) == (
        path.stem in ("iscrowd_str", "string_ref_only", "float_ids", "float_sizes")
    )
    assert check(path, tmp_path / "images", "--fix", fixed, *crowd) == (code and not crowd)
    for source in [fixed] if code else [path, fixed]:
        data = CocoImages(source, tmp_path / "images", lambda image, objects: (image, objects))
        assert sum(map(len, data.objects.values())) == 109
        assert len(data) == 6
        assert data.problem is None
        assert average_precision.evaluate(data.data, [])["AP"] == 0
    if path.stem == "rle_ann":
        data = CocoImages(path, tmp_path / "images", lambda image, objects: (image, objects))
        assert "109 of them crowd regions" in data.problem
        data = CocoImages(path, tmp_path / "images", lambda image, objects: (image, objects), crowd="objects")
        assert sum(map(len, data.objects.values())) == 109
    elif code and path.stem != "label_studio_backslash":
        with pytest.raises(DataError, match="`dino check … --fix`"):
            read_annotations(path, tmp_path / "images")


@pytest.mark.skipif(not BCCD.is_dir(), reason="the blood cells are not there: set DINO_BCCD")
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_blood_cells_are_clean(capsys, split):
    assert check(BCCD / f"{split}.json", BCCD / "images", "--val", BCCD / "val.json") == 0
    assert "verdict: ready to train, no issues" in capsys.readouterr().out
