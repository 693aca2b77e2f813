"""`dino data` as people call it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dino import cli

from ..coco_files import write_coco
from ..data.importers.exports import EXPORTS, yolo
from ..tools.programs import contents


def data(*arguments):
    return cli.main(["data", *map(str, arguments)])


def test_a_yolo_folder_becomes_training_and_validation_data(tmp_path, capsys):
    yolo(tmp_path / "export", splits=("train", "valid", "test"))
    train, val = tmp_path / "train.json", tmp_path / "val.json"
    assert data("import", tmp_path / "export", train, "--val", val) == 0
    out = capsys.readouterr().out
    assert f"{train}: 4 images, 6 objects; images in {tmp_path / 'export/train/images'}" in out
    assert "not imported: test" in out
    assert "verdict: ready to train" in out
    words = f"--train {train} {tmp_path / 'export/train/images'} --val {val}"
    assert f"next: dino train dino_r18_small_data {words}" in out
    assert cli.main(["check", str(train), str(tmp_path / "export/train/images")]) == 0


def test_one_export_is_split(tmp_path, capsys):
    EXPORTS["label_studio"][0](tmp_path / "export")
    train, val = tmp_path / "train.json", tmp_path / "val.json"
    assert data("import", tmp_path / "export/export.json", train, "--val", val, "--val-fraction", "0.25") == 0
    assert "3 images to train on, 1 for validation; 0 near-duplicates kept" in capsys.readouterr().out
    names = [{i["file_name"] for i in json.loads(path.read_text())["images"]} for path in (train, val)]
    assert list(map(len, names)) == [3, 1]
    assert not names[0] & names[1]


def test_nothing_is_replaced_and_nothing_half_written(tmp_path, capsys):
    EXPORTS["cvat"][0](tmp_path / "export")
    (tmp_path / "val.json").write_text("precious")
    before = contents(tmp_path)
    assert (
        data("import", tmp_path / "export/annotations.xml", tmp_path / "train.json", "--val", tmp_path / "val.json")
        == 1
    )
    assert "val.json exists: choose another name" in capsys.readouterr().err
    assert data("import", tmp_path / "export/images", tmp_path / "new.json") == 1
    assert contents(tmp_path) == before
    with pytest.raises(SystemExit):
        data("import", tmp_path, tmp_path / "new.json", "--val-fraction", "1")


def test_merge(tmp_path, capsys):
    first = write_coco(tmp_path / "a/images", counts=(2, 1), category_ids=(1, 2))
    second = write_coco(tmp_path / "b", counts=(1, 3), category_ids=(7, 40, 900), seed=1)
    second.change(lambda c: c["categories"].reverse())
    assert data("merge", *first, *second, tmp_path / "all.json") == 0
    assert f"all.json: 4 images, 7 objects; images in {tmp_path}" in capsys.readouterr().out
    content = json.loads((tmp_path / "all.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert list(names.values()) == ["red", "green", "blue"]
    assert [i["file_name"] for i in content["images"]] == [
        *("a/images/image_1.png", "a/images/image_2.png", "b/image_1.png", "b/image_2.png")
    ]
    known = {7: "red", 40: "green", 900: "blue", 1: "red", 2: "green"}
    before = [*first.read()["annotations"], *second.read()["annotations"]]
    assert [(names[a["category_id"]], a["bbox"]) for a in content["annotations"]] == [
        (known[a["category_id"]], a["bbox"]) for a in before
    ]
    assert cli.main(["check", str(tmp_path / "all.json"), str(tmp_path)]) == 0
    capsys.readouterr()
    assert data("merge", *first, *first, tmp_path / "twice.json") == 1
    assert "both data sets list image_1.png: keep it in one of them" in capsys.readouterr().err


def test_split(tmp_path, capsys):
    files = write_coco(tmp_path / "all", counts=(2,) * 10)
    assert data("split", *files, tmp_path / "train.json", tmp_path / "val.json", "--val-fraction", "0.3") == 0
    assert "7 images to train on, 3 for validation" in capsys.readouterr().out
    assert data("split", *files, tmp_path / "again.json", tmp_path / "val2.json", "--val-fraction", "0.3") == 0
    assert (tmp_path / "again.json").read_text() == (tmp_path / "train.json").read_text()
    words = ["check", tmp_path / "train.json", files.images, "--val", tmp_path / "val.json", files.images]
    assert cli.main(list(map(str, words))) == 0
    one = write_coco(tmp_path / "one", counts=(2,))
    assert data("split", *one, tmp_path / "c.json", tmp_path / "d.json") == 1
    assert "one image can't be split" in capsys.readouterr().err


def test_the_first_images_are_held_out_and_the_rest_joins_the_training_data(tmp_path, capsys):
    """The split of Objects365 in the paper's appendix D.2: some validation images are kept, all others trained on."""
    train = write_coco(tmp_path / "train", counts=(2, 1))
    val = write_coco(tmp_path / "val", counts=(1, 2, 3, 0), seed=1)
    val.change(lambda content: content["images"].reverse())
    rest, held_out = tmp_path / "rest.json", tmp_path / "held_out.json"
    assert data("split", *val, rest, held_out, "--val-first", "3") == 0
    names = [[i["file_name"] for i in json.loads(path.read_text())["images"]] for path in (held_out, rest)]
    assert names == [["image_4.png", "image_3.png", "image_2.png"], ["image_1.png"]]
    assert len(json.loads(held_out.read_text())["annotations"]) == 5
    assert data("merge", *train, rest, val.images, tmp_path / "all.json") == 0
    assert "all.json: 3 images, 4 objects" in capsys.readouterr().out
    words = ["check", tmp_path / "all.json", tmp_path, "--val", held_out, val.images]
    assert cli.main(list(map(str, words))) == 0
    assert data("split", *val, tmp_path / "a.json", tmp_path / "b.json", "--val-first", "4") == 1
    assert "--val-first 4 leaves nothing to train on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        data("split", *val, tmp_path / "a.json", tmp_path / "b.json", "--val-first", "0")
    assert "--val-first must be at least 1" in capsys.readouterr().err


def test_merge_of_links_to_images(tmp_path, capsys):
    """Images that are links to files elsewhere keep the names of the links."""
    first, second = write_coco(tmp_path / "a", counts=(1,)), write_coco(tmp_path / "b", counts=(1,))
    for files, name in ((first, "x.png"), (second, "y.png")):
        image = Path(files.images, "image_1.png")
        image.rename(tmp_path / name)
        image.symlink_to(tmp_path / name)
    assert data("merge", *first, *second, tmp_path / "all.json") == 0
    names = [image["file_name"] for image in json.loads((tmp_path / "all.json").read_text())["images"]]
    assert names == ["a/image_1.png", "b/image_1.png"]


def test_hints(tmp_path, capsys):
    """Paths with spaces are quoted; validation data that were not asked for are named."""
    yolo(tmp_path / "my export")
    assert data("import", tmp_path / "my export", tmp_path / "train.json") == 0
    out = capsys.readouterr().out
    assert "not imported: val (--val VAL.json writes val)" in out
    assert f"next: dino data split {tmp_path}/train.json '{tmp_path}/my export/train/images' TRAIN.json" in out
    with pytest.raises(SystemExit):
        data("import", tmp_path / "my export", tmp_path / "a.json", "--val", tmp_path / "a.json")
    assert "training and validation data need files of their own" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["yolo", "cvat", "label_studio"])
def test_two_commands_from_an_export_to_a_trained_model(tmp_path, form):
    pytest.importorskip("detectron2")
    if form == "yolo":
        yolo(tmp_path / "export")
    else:
        EXPORTS[form][0](tmp_path / "export")
    name = {"yolo": "", "cvat": "annotations.xml", "label_studio": "export.json"}[form]
    run = [sys.executable, "-m", "dino"]
    files = [tmp_path / "train.json", "--val", tmp_path / "val.json"]
    imported = subprocess.run(
        [*run, "data", "import", tmp_path / "export" / name, *files], capture_output=True, text=True
    )
    assert imported.returncode == 0, imported.stderr
    words = imported.stdout.splitlines()[-1].removeprefix("next: dino ").split()
    words += [
        "train.max_iter=2",
        "train.eval_period=0",
        "dataloader.train.num_workers=0",
        f"train.output_dir={tmp_path}/out",
    ]
    trained = subprocess.run([*run, *words], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert (tmp_path / "out/model_final.pth").exists()
