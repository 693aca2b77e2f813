"""The page, and `dino eval` on detections that are there already."""

import errno
import json
import os
import re
from pathlib import Path

import pytest

from dino import cli
from dino.evaluation.report import report
from dino.evaluation.report.error_analysis import analyse, confusion
from dino.evaluation.report.report import _cells_of, image_paths, write_report
from dino.utils.printable import _columns as columns_of

from ...coco_files import write_coco
from ...tools.programs import contents
from .detections import imperfect
from .test_error_analysis import grid, perfect


@pytest.fixture
def files(tmp_path):
    return write_coco(tmp_path / "bilder mit ä", counts=(4, 3, 0, 5), category_ids=(7, 40, 900))


@pytest.fixture
def results(files, tmp_path):
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(imperfect(files.read(), seed=2)[0]))
    return path


def evaluate(files, results, output, *more):
    words = ["--results", results, "--val-json", files.annotations, "--val-images", files.images, "--output", output]
    return cli.main(["eval", *map(str, (*words, *more))])


def outside(page):
    """What a browser would fetch from elsewhere."""
    links = re.findall(r"""(?:src|href)=["']([^"']+)|url\(([^)]+)\)""", page)
    return [link for pair in links for link in pair if link and not link.startswith(("data:", "#"))]


def test_the_page_and_the_figures(files, results, tmp_path, capsys):
    assert evaluate(files, results, tmp_path / "out") == 0
    page = (tmp_path / "out/report.html").read_text()
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert f"AP {100 * metrics['AP']:.1f} on 4 images" in page
    assert [row["name"] for row in metrics["classes"]] == ["red", "green", "blue"]
    assert outside(page) == ["images.html"]  # a link
    assert page.count("<svg") == 2
    assert "data:image/jpeg;base64," in page
    out = capsys.readouterr().out
    assert f"AP {100 * metrics['AP']:.1f}  AP50" in out
    assert {cost["kind"] for cost in metrics["error_costs"]} == {"false", "duplicate", "misplaced", "confused"}
    assert page.count('<span class="key') == 6 + 4  # of the slider, and of the table of errors
    for cost in metrics["error_costs"]:
        assert f'<td class="number">{100 * cost["ap50"]:.1f}</td>' in page
        assert f"{100 * cost['ap50']:.1f}{100 * cost['gain']:+8.1f}\n" in out
    assert f"Recall: {100 * metrics['recall']:.1f} %" in page
    assert f"differ by {100 * metrics['calibration_error']:.1f} points" in page
    assert f"calibration error {100 * metrics['calibration_error']:.1f}" in out
    assert "report written to" in out


def test_names_can_not_become_markup(files, results, tmp_path):
    names = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "$x^2$_\ud800\u732b"]

    def rename(content):
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name

    files.change(rename)
    assert evaluate(files, results, tmp_path / "out") == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert outside(page) == ["images.html"]  # a link


@pytest.mark.parametrize("change", [lambda c: c.pop("annotations"), lambda c: c.update(annotations=[])])
def test_without_annotations_there_are_predictions(files, results, tmp_path, capsys, change):
    files.change(change)
    assert evaluate(files, results, tmp_path / "out") == 0
    assert "has no annotations: the page shows" in capsys.readouterr().out
    page = (tmp_path / "out/report.html").read_text()
    assert "4 images without annotations" in page
    assert "data:image/jpeg;base64," in page
    assert outside(page) == []
    assert not (tmp_path / "out/metrics.json").exists()


def test_no_detections(files, tmp_path):
    path = tmp_path / "none.json"
    path.write_text("[]")
    assert evaluate(files, path, tmp_path / "out") == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "AP 0.0 on 4 images" in page
    assert "no detection reaches 0.05" in page
    files.change(lambda c: c.update(annotations=[]))
    assert evaluate(files, path, tmp_path / "out2") == 0


def test_images_that_can_not_be_read_are_left_out(files, results, tmp_path):
    (Path(files.images) / "image_1.png").write_text("no image")
    (Path(files.images) / "image_2.png").unlink()
    assert evaluate(files, results, tmp_path / "out") == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "image_1.png" not in page
    assert "image_4.png" in page


def test_no_pictures_are_drawn_if_none_are_wanted(files, results, tmp_path):
    assert evaluate(files, results, tmp_path / "out", "--shown", 0) == 0
    assert "data:image" not in (tmp_path / "out/report.html").read_text()


def test_a_perfect_detector_has_nothing_to_draw(tmp_path):
    data = grid(images=1)
    write_report(
        tmp_path / "r.html", data=data, results=perfect(data), files=image_paths(data, tmp_path), details={"Data": "x"}
    )
    page = (tmp_path / "r.html").read_text()
    assert "AP 100.0 on 1 images" in page
    assert "There are no errors to draw." in page
    assert "No class is taken for another." in page


def test_many_classes_are_cut_to_the_most_confused_ones(tmp_path):
    data = grid(columns=6, rows=5, images=4)
    data["categories"] = [{"id": n, "name": f"class {n}"} for n in range(60)]
    for number, a in enumerate(data["annotations"]):
        a["category_id"] = number % 60
    results = perfect(data)
    results[59]["category_id"] = 3
    analysis = analyse(data, results)
    matrix = _cells_of(confusion(analysis), analysis.names)
    assert len(matrix["heads"]) == 25
    assert matrix["left_out"] == 35
    assert {"class 3", "class 59"} <= set(matrix["heads"])
    write_report(tmp_path / "r.html", data=data, results=results, files=image_paths(data, tmp_path), details={})
    assert "35 others are left out" in (tmp_path / "r.html").read_text()


def test_a_report_that_exists_is_not_replaced(files, results, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("precious")
    assert evaluate(files, results, tmp_path / "out") == 1
    assert "report.html exists: choose another --output" in capsys.readouterr().err
    assert (tmp_path / "out/report.html").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_a_refused_write_leaves_nothing(files, results, tmp_path, capsys, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    assert evaluate(files, results, tmp_path / "out") == 1
    assert f"report.html: [Errno {number}]" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_folder_that_can_not_be_made_is_named(files, results, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert evaluate(files, results, tmp_path / "file/out") == 1
    assert "error: can't make the folder" in capsys.readouterr().err


GOOD = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}
BROKEN = {
    "empty": ("", "can't read detections"),
    "no list": ("{}", "detections must be a list of entries"),
    "no entry": ("[3]", "detection 0 must be an object with image_id"),
    "unknown image": ([GOOD, {**GOOD, "image_id": 99}], "detection 1: no image has the id 99. Do annotations"),
    "list as image": ([{**GOOD, "image_id": [1]}], r"no image has the id \[1\]"),
    "unknown class": ([{**GOOD, "category_id": 1}], r"no category has the id 1; known: \[7, 40, 900\]"),
    "short box": ([{**GOOD, "bbox": [1, 2, 3]}], "bbox must be four finite numbers"),
    "endless box": ([{**GOOD, "bbox": [1, 2, 3, float("inf")]}], "bbox must be four finite numbers"),
    "no score": ([{k: v for k, v in GOOD.items() if k != "score"}], "score must be a finite number, but is None"),
    "score that is no number": ([{**GOOD, "score": float("nan")}], "score must be a finite number, but is nan"),
    "huge score": ([{**GOOD, "score": 10**400}], "score must be a finite number"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_detections_are_named(files, tmp_path, capsys, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert evaluate(files, path, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "broken.json" in error
    assert not (tmp_path / "out").exists()


def test_absurd_boxes_and_scores_do_no_harm(files, tmp_path):
    odd = [{**GOOD, "bbox": box, "score": score} for box in ([-1e30, 5, 1e30, 3], [1, 2, -3, 0]) for score in (-5, 1e9)]
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(odd))
    assert evaluate(files, path, tmp_path / "out") == 0


def test_a_crowded_image_gets_a_part_of_its_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_MOST_OBJECTS", 3)
    files = write_coco(tmp_path / "data", counts=(5, 2))
    data = files.read()
    paths = image_paths(data, files.images)
    results = [{**perfect(data)[0], "score": 0.9}]
    write_report(tmp_path / "report.html", data=data, results=results, files=paths, details={})
    page = (tmp_path / "report.html").read_text()
    assert page.count("; 3 of 5 objects drawn, the missed ones first</figcaption>") == 1
    assert page.count('class="mark missed') == 3 + 2


def test_names_from_files_do_no_harm_to_a_terminal(files, results, tmp_path, capsys):
    names = ["\x1b[2Jred\x07", "g" * 5000, "蓝色"]
    files.change(lambda content: [c.update(name=name) for c, name in zip(content["categories"], names, strict=True)])
    assert evaluate(files, results, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    table = out[out.index("class ") : out.index("\n\nerror")].splitlines()
    assert [row.split()[0] for row in table[1:]] == [r"\x1b[2Jred\x07", f"{'g' * 19}…{'g' * 20}", "蓝色"]
    assert len({columns_of(row) for row in table}) == 1  # the columns stand below each other
    assert columns_of(table[0]) < 160
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [row["name"] for row in metrics["classes"]] == names
