"""Pictures whose objects are all annotated: what is kept, what is refused, and the list of BCCD."""

import json
import re
from pathlib import Path

import pytest

from ..coco_files import write_coco
from ..tools.programs import ROOT, load_program

COUNTS = {"image_1.png": 0, "image_2.png": 2, "image_3.png": 0, "image_4.png": 5}


@pytest.fixture
def program():
    return load_program("complete_pictures", "benchmarks")


@pytest.fixture
def files(tmp_path):
    """Four pictures with 2, 0, 3 and 1 objects."""
    return write_coco(tmp_path / "data")


def run(program, files, folder, *options, content=None):
    """Run the program with a list of these counts -> the file that it was to write."""
    (folder / "list.json").write_text(json.dumps({"missing": {"test": COUNTS}} if content is None else content))
    output = folder / "few.json"
    program.main([files.annotations, str(folder / "list.json"), str(output), *options])
    return output


@pytest.mark.parametrize(("options", "kept", "objects"), [((), [1, 3], 5), (("--most", "2"), [1, 2, 3], 5)])
def test_kept_pictures_and_their_objects(program, files, tmp_path, options, kept, objects):
    found, all_of_them = json.loads(run(program, files, tmp_path, *options).read_text()), files.read()
    assert [image["id"] for image in found["images"]] == kept
    assert found["annotations"] == [a for a in all_of_them["annotations"] if a["image_id"] in kept]
    assert len(found["annotations"]) == objects
    assert found["categories"] == all_of_them["categories"]


def test_another_split(program, files, tmp_path, capsys):
    content = {"missing": {"test": {}, "val": {**COUNTS, "image_1.png": 1}}}
    found = json.loads(run(program, files, tmp_path, "--split", "val", content=content).read_text())
    assert [image["file_name"] for image in found["images"]] == ["image_3.png"]
    assert "1 picture with 3 objects of 4 with 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"missing": {"val": COUNTS}}, "no split 'test'; it has: val"),
        ({"missing": {"test": {**COUNTS, "other.png": 0}}}, "other.png is not in the annotations"),
        ({"missing": {"test": {"image_1.png": 0}}}, "image_2.png is not in the list"),
        ({"missing": {"test": {**COUNTS, "image_2.png": -1}}}, "the count of image_2.png must be a whole number"),
        ({"missing": {"test": dict.fromkeys(COUNTS, True)}}, "the count of image_1.png must be a whole number"),
        ({"missing": {"test": dict.fromkeys(COUNTS, 3)}}, "give --most 3 or more"),
        ({"missing": ["test"]}, "no split 'test'"),
        ({"missing": 7}, "can't read the list"),
        ([], "can't read the list"),
    ],
)
def test_what_does_not_fit_is_refused(program, files, tmp_path, content, message):
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}"):
        run(program, files, tmp_path, content=content)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "list.json"}


def test_files_that_are_missing_or_inputs(program, files, tmp_path):
    for words, message in (
        ((files.annotations, "none.json", "few.json"), "list not found"),
        ((str(tmp_path / "none.json"), "none.json", "few.json"), "annotations not found"),
        ((files.annotations, "none.json", files.annotations), "is an input"),
    ):
        with pytest.raises(SystemExit, match=message):
            program.main(list(words))
    assert len(files.read()["images"]) == 4


def test_the_list_of_bccd(program):
    path = Path(ROOT, "benchmarks/bccd_complete.json")
    splits = {split: program.read_counts(path, split) for split in ("val", "test")}
    assert [len(counts) for counts in splits.values()] == [87, 72]
    assert not splits["val"].keys() & splits["test"].keys()
    assert all(re.fullmatch(r"BloodImage_\d{5}\.jpg", name) for counts in splits.values() for name in counts)
    content = json.loads(path.read_text())
    assert set(content["second"]["test"]) < set(splits["test"])
    assert "box" in " ".join(content["rule"])
