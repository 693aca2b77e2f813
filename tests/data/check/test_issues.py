"""Every planted issue is found, nothing else is found, and a repaired copy is clean."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.data.check import KINDS, check_dataset, repair
from dino.data.check.issues import count_errors
from dino.data.check.object_sizes import Resize

from ...coco_files import write_coco
from .planted import IMAGES, OBJECTS, PLANTERS, plant

STEADY = settings(derandomize=True, deadline=None, max_examples=60, database=None)
ISSUES = st.lists(st.sampled_from(sorted(PLANTERS)), min_size=1, max_size=3, unique=True)
SEEDS = st.integers(0, 10**6)


def check(files, open_images=True):
    return check_dataset._check(Path(files.annotations), Path(files.images), Resize(), open_images=open_images)


def assert_found(planted, issues):
    for p in planted:
        assert any(f.kind == p.kind and p.name in f.text for f in issues), (p, issues)
    allowed = {p.kind for p in planted}.union(*(p.consequences for p in planted))
    assert {f.kind for f in issues} <= allowed


def assert_kept(clean, changed, fixed):
    """Objects that no planter touched are all there, with their box."""
    boxes = [(a["image_id"], a["category_id"], a["bbox"]) for a in fixed["annotations"]]
    for before, after in zip(clean[: IMAGES * OBJECTS // 2], changed, strict=False):
        assert before != after or (before["image_id"], before["category_id"], before["bbox"]) in boxes


def assert_found_and_repaired(names, seed):
    with tempfile.TemporaryDirectory() as folder:
        files, clean, planted = plant(Path(folder), names, seed)
        checked = check(files)
        assert_found(planted, checked.issues)
        fixed, _ = repair(checked.data, checked.split.contents, checked.issues)
        assert_kept(clean["annotations"], checked.data["annotations"], fixed)
        files.write(fixed)
        rest = check(files).issues
        assert not count_errors(rest)
        assert "supercategory" not in {f.kind for f in rest}


@pytest.mark.parametrize("name", PLANTERS)
def test_a_planted_issue_is_found_and_repaired(name):
    assert_found_and_repaired([name], 0)


@given(names=ISSUES, seed=SEEDS)
@STEADY
def test_planted_issues_are_found_and_repaired(names, seed):
    assert_found_and_repaired(names, seed)


@given(seed=SEEDS, counts=st.lists(st.integers(0, 5), min_size=3, max_size=6))
@settings(STEADY, max_examples=20)
def test_a_clean_set_has_no_issues(seed, counts):
    with tempfile.TemporaryDirectory() as folder:
        files = write_coco(Path(folder), counts=counts, seed=seed)
        checked = check(files)
        assert {f.kind for f in checked.issues} <= {"unused"}
        fixed, changes = repair(checked.data, checked.split.contents, checked.issues)
        assert fixed == files.read()
        assert changes == []


def test_every_kind_of_issue_is_planted_somewhere(tmp_path):
    """Here, or in test_check_dataset.py, where single cases and pairs of files are."""
    elsewhere = {"category", "classes_differ", "ids_differ", "shared", "fractions", "tiny", "crowded", "unused"}
    elsewhere |= {"no_objects", "no_val_objects"}
    planted = {plant(tmp_path / name, [name], 0)[2][0].kind for name in PLANTERS}
    assert planted | elsewhere == set(KINDS)


def test_a_file_of_corners_is_recognised_as_a_whole(tmp_path):
    """Corners of a small box in the upper left look like a sound box: the notation of the whole file decides."""
    files = write_coco(tmp_path, counts=(3,) * 6)
    clean = files.read()

    def to_corners(content):
        for a in content["annotations"]:
            x, y, w, h = a["bbox"]
            a["bbox"] = [x, y, x + w, y + h]

    files.change(to_corners)
    checked = check(files, open_images=False)
    assert [f.kind for f in checked.issues] == ["xyxy"] * 18
    fixed, _ = repair(checked.data, checked.split.contents, checked.issues)
    assert [a["bbox"] for a in fixed["annotations"]] == [a["bbox"] for a in clean["annotations"]]


def test_the_area_separates_a_sloppy_box_from_corners(tmp_path):
    files = write_coco(tmp_path, counts=(1, 1))
    files.change(lambda c: c["annotations"][0].update(bbox=[10, 5, 66, 60], area=3960))
    assert [f.kind for f in check(files).issues if f.kind != "unused"] == ["beyond"]


def test_fractions(tmp_path):
    files = write_coco(tmp_path, counts=(3,) * 6)

    def to_fractions(content):
        for a in content["annotations"]:
            a["bbox"] = [x / size for x, size in zip(a["bbox"], (72, 64, 72, 64), strict=True)]

    files.change(to_fractions)
    assert [f.kind for f in check(files).issues if f.kind != "tiny"] == ["fractions"] * 18
