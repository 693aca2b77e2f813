"""Every planted issue is found, nothing else is found, and a repaired copy is clean."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.data.check import KINDS, check_dataset, repair
from dino.data.check.issues import count_errors
from dino.data.check.object_sizes import Resize
from dino.data.coco import read_annotations
from dino.utils.files import DataError, counted

from ...coco_files import write_coco
from .planted import IMAGES, OBJECTS, PLANTERS, plant

STEADY = settings(derandomize=True, deadline=None, max_examples=60, database=None)
STAY = {"rotated", "wide", "score", "same_image", "unused", "crowd"}  # warnings that a cleaned copy may have
ISSUES = st.lists(st.sampled_from(sorted(PLANTERS)), min_size=1, max_size=3, unique=True).filter(
    lambda names: sum("sideways" in name for name in names) < 2  # orientations are decided together
)
SEEDS = st.integers(0, 10**6)


def check(files, open_images=True):
    return check_dataset._check(Path(files.annotations), Path(files.images), Resize(), open_images=open_images)


def fix(checked, max_loss=1):
    return repair(checked.original, checked.data, checked.split.contents, checked.issues, max_loss)


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
        if any(KINDS[p.kind].level == "error" and KINDS[p.kind].cure is None for p in planted):
            with pytest.raises(DataError, match="can't fix without you"):
                fix(checked)
            return
        result = fix(checked)
        assert_kept(clean["annotations"], checked.original["annotations"], result.data)
        assert result.kept == len(result.data["annotations"])
        assert result.total == result.kept + sum(result.dropped.values())
        files.write(result.data)
        rest = check(files).issues
        assert not count_errors(rest)
        assert {f.kind for f in rest} <= STAY
        fixed_again = fix(check(files))
        assert fixed_again.data == result.data
        read_annotations(*files)  # as training does


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
        result = fix(checked, max_loss=0.1)
        assert result.data == files.read()
        assert result.describe() == [f"{sum(counts)} of {counted(sum(counts), 'object')} kept, 0 of them changed"]


def test_every_kind_of_issue_is_planted_somewhere(tmp_path):
    """Here, or in test_check_dataset.py, where single cases and pairs of files are."""
    elsewhere = {"category", "classes_differ", "ids_differ", "shared", "fractions", "tiny", "crowded", "unused"}
    elsewhere |= {"no_objects", "no_val_objects", "crowd_objects", "image"}
    elsewhere |= {"centres", "fraction_corners", "fraction_centres", "unclear"}
    planted = {plant(tmp_path / name, [name], 0)[2][0].kind for name in PLANTERS}
    assert planted | elsewhere == set(KINDS)


def to_corners(x, y, w, h):
    return [x, y, x + w, y + h]


def to_centre(x, y, w, h):
    return [x + w / 2, y + h / 2, w, h]


def as_it_is(*box):
    return list(box)


NOTATIONS = {
    "xyxy": (to_corners, False),
    "centres": (to_centre, False),
    "fractions": (as_it_is, True),
    "fraction_corners": (to_corners, True),
    "fraction_centres": (to_centre, True),
}


def write_notation(files, change, fractions):
    def rewrite(content):
        for a in content["annotations"]:
            a["bbox"] = [n / s if fractions else n for n, s in zip(change(*a["bbox"]), (72, 64, 72, 64), strict=True)]

    files.change(rewrite)


@pytest.mark.parametrize(("kind", "notation"), NOTATIONS.items())
def test_the_notation_of_a_file_is_recognised_as_a_whole(tmp_path, kind, notation):
    """Corners of a small box in the upper left look like a sound box: the notation of the whole file decides."""
    files = write_coco(tmp_path, counts=(5,) * 12)
    clean = files.read()
    write_notation(files, *notation)
    checked = check(files, open_images=False)
    assert {f.kind for f in checked.issues} - {"tiny"} == {kind}
    assert sum(f.kind == kind for f in checked.issues) == 60
    found = [a["bbox"] for a in fix(checked).data["annotations"]]
    assert found == [pytest.approx(a["bbox"]) for a in clean["annotations"]]


def test_fractions_that_may_mean_either_are_left_to_a_person(tmp_path):
    """Boxes in the middle stay inside their image as corners as well as with a centre."""
    files = write_coco(tmp_path, counts=(1,) * 10)
    files.change(lambda c: [a.update(bbox=[0.4, 0.4, 0.5, 0.5]) for a in c["annotations"]])
    checked = check(files, open_images=False)
    assert {f.kind for f in checked.issues} - {"tiny", "unused"} == {"unclear"}
    with pytest.raises(DataError, match="can't fix without you: boxes in fractions"):
        fix(checked)


def test_sloppy_boxes_are_not_taken_for_another_notation(tmp_path):
    """A fifth of the boxes cross the right border, by a few pixels."""
    files = write_coco(tmp_path, counts=(5,) * 12)

    def widen(content):
        for a in content["annotations"][::5]:
            a["bbox"] = [72 - 40, a["bbox"][1], 41.5, 10]

    files.change(widen)
    assert {f.kind for f in check(files, open_images=False).issues} == {"beyond"}


def test_the_area_separates_a_sloppy_box_from_corners(tmp_path):
    files = write_coco(tmp_path, counts=(1, 1))
    files.change(lambda c: c["annotations"][0].update(bbox=[10, 5, 66, 60], area=3960))
    assert [f.kind for f in check(files).issues if f.kind != "unused"] == ["beyond"]
