"""The table of recipes and seeds: order of the trainings, kills, messages, tables and pictures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dino.utils.files import DataError

from ..tools.programs import ROOT, load_program

TRAINER = """
import json, pathlib, sys, time
folder = pathlib.Path(next(x for x in sys.argv if x.startswith("train.output_dir=")).partition("=")[2])
if "broken" in folder.name:
    print("error: no memory"); sys.exit(1)
if "waits" in folder.name:
    for number in range(600):
        (folder.parent / "pulse").write_text(str(number)); time.sleep(0.05)
sum(range(10**7))
folder.mkdir(parents=True)
(folder / "config.yaml").write_text("total_batch_size: 2")
values = {"bbox/AP": 30 + len(folder.name), "bbox/AP50": 50.0, "bbox/APs": None}
(folder / "evaluations.json").write_text(json.dumps([{"iteration": i, **values} for i in (5, 10)]))
(folder / "model_final.pth").write_text("large")
"""
RUNNER = """
import sys
from tests.benchmarks.test_ablation import prepared
prepared(sys.argv[1]).main(sys.argv[2:])
"""


def prepared(folder):
    """The program with a trainer, recipes and data that cost nothing."""
    folder, program = Path(folder), load_program("ablation", "benchmarks")
    (folder / "trainer.py").write_text(TRAINER)
    for name in ("good", "better", "broken", "waits"):
        (folder / "recipes").mkdir(exist_ok=True)
        (folder / f"recipes/{name}.py").touch()
    shapes = folder / "runs/data/shapes"
    for split in ("train", "val"):
        (shapes / split).mkdir(parents=True, exist_ok=True)
        (shapes / f"{split}.json").write_text(json.dumps({"images": [{}] * 10}))
    command = program.training_command
    program.training_command = lambda *a: ["python", str(folder / "trainer.py"), *command(*a)[2:]]
    program.RECIPES = folder / "recipes"
    program.ablation_report = SimpleNamespace(**{**vars(program.ablation_report), "write": lambda results: None})
    return program


@pytest.fixture
def program(tmp_path):
    return prepared(tmp_path)


def options(folder):
    return ["--runs", str(folder / "runs"), "--results", str(folder / "results"), "--data", "shapes"]


def test_cells_run_once_and_in_order(program, tmp_path, capsys):
    arguments = [*options(tmp_path), "--recipes", "good", "better", "--seeds", "2", "--iterations", "10"]
    program.main([*arguments, "--plan"])
    out = capsys.readouterr().out
    names = ["good_0", "better_0", "good_1", "better_1"]
    assert [line.split("/")[1] for line in out.splitlines() if "shapes/" in line] == names
    assert not (tmp_path / "results").exists()
    program.main(arguments)
    files = {path.stem: path for path in (tmp_path / "results/shapes").glob("*.json")}
    assert set(files) == set(names)
    order = sorted(names, key=lambda name: files[name].stat().st_mtime_ns)
    assert order == names
    result = json.loads(files["better_1"].read_text())
    assert (result["recipe"], result["seed"], result["data"], result["AP"]) == ("better", 1, "shapes", 38)
    assert result["budget"] == {"iterations": 10, "batch": 2, "epochs": 2, "evaluations": 2}
    assert result["curve"] == [{"iteration": 5, "AP": 38}, {"iteration": 10, "AP": 38}]
    assert result["processor_seconds"] > 0
    assert result["wall_seconds"] > 0
    assert len(result["commit"]) == 40
    assert "train.seed=1 train.max_iter=10 train.eval_period=2" in result["command"]
    assert not list((tmp_path / "runs").rglob("*.pth"))
    before = {path: path.stat().st_mtime_ns for path in files.values()}
    capsys.readouterr()
    program.main([*arguments, "--jobs", "2"])
    assert "4 cells, 4 of them done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in files.values()}
    with pytest.raises(SystemExit, match=r"--iterations 20, but .* holds cells of 10: give the same number"):
        program.main([*arguments[:-1], "20"])


def test_the_plan_begins_with_what_matters_most():
    plan = load_program("ablation", "benchmarks").whole_plan(3)
    names = [cell.name for cell in plan]
    chain = ["chain_1_static", "chain_2_denoising", "chain_3_contrastive", "chain_4_mixed", "chain_5_twice"]
    assert names[:6] == [*(f"shapes/{name}_0" for name in chain), "shapes/chain_1_static_1"]
    assert names[15:20] == [f"bccd/{name}_0" for name in chain]
    assert names[-3:] == [
        f"shapes/{name}_0" for name in ("deformable_detr", "faster_rcnn_r18_fpn", "retinanet_r18_fpn")
    ]
    assert len(set(names)) == len(names) == 30 + 16 + 3


def test_a_broken_cell_is_named_and_the_others_continue(program, tmp_path):
    with pytest.raises(SystemExit, match=r"error: 1 cells failed: shapes/broken_0 failed: error: no memory"):
        program.main([*options(tmp_path), "--recipes", "broken", "good", "--seeds", "1"])
    assert [path.name for path in (tmp_path / "results/shapes").iterdir()] == ["good_0.json"]


def test_a_killed_runner_takes_its_training_with_it(tmp_path):
    """And the cell begins again; one that another program has is left to it."""
    arguments = [sys.executable, "-c", RUNNER, str(tmp_path), *options(tmp_path), "--recipes", "waits", "--seeds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runner = subprocess.Popen(
        arguments, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    pulse = tmp_path / "runs/shapes/pulse"
    wait_for(pulse.exists)
    program = load_program("ablation", "benchmarks")
    locked = tmp_path / "runs/shapes/waits_0.lock"
    assert program.lock(locked) is None
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    wait_for(lambda: (held := program.lock(locked)) and not held.close())
    stopped = pulse.read_text()
    time.sleep(0.3)
    assert pulse.read_text() == stopped
    assert not (tmp_path / "results").exists()


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_unusable_words_are_one_sentence(tmp_path):
    program = load_program("ablation", "benchmarks")
    with pytest.raises(SystemExit, match=r"^error: no recipe chain_9 in .*; there are .*base, "):
        program.main(["--recipes", "chain_9", "--plan"])
    with pytest.raises(SystemExit, match=r"^error: --seeds, .* must be 1 or more$"):
        program.main(["--jobs", "0"])


def planted(folder):
    """Results of a chain that was begun, and of two ancestors."""
    cells = [("shapes", "chain_1_static", 0, 10.0), ("shapes", "chain_1_static", 1, 14.0)]
    cells += [("shapes", "chain_5_twice", 0, 40.0), ("shapes", "retinanet_r18_fpn", 0, 30.0)]
    for data, recipe, seed, ap in cells:
        result = {
            "data": data,
            "recipe": recipe,
            "seed": seed,
            "AP": ap,
            "AP50": 2 * ap,
            "APs": None,
            "fingerprint": "ab12",
            "budget": {"iterations": 20, "batch": 2, "epochs": 4, "evaluations": 2},
            "curve": [{"iteration": 10, "AP": ap / 2}, {"iteration": 20, "AP": ap}],
            "processor_seconds": 100.0,
            "commit": "0123456789abcdef",
            "changed_since_commit": False,
            "hardware": {"cpu": f"Maker(R) {seed}"},
        }
        path = folder / data / f"{recipe}_{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))


def test_table_and_pictures_from_planted_results(tmp_path, monkeypatch):
    report = load_program("ablation", "benchmarks").ablation_report
    planted(tmp_path / "results")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nolder\n{report.END}\nafter\n")
    report.write(tmp_path / "results", page)
    text = page.read_text()
    monkeypatch.setattr(report, "draw", lambda *_: None)
    report.write(tmp_path / "results", page)
    assert page.read_text() == text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "older" not in text
    assert "commit 0123456789, one thread of Maker 0 or Maker 1. BCCD: not run." in text
    assert "All cells took 0.1 processor hours." in text
    row = next(line for line in text.splitlines() if "chain_1_static" in line)
    assert row.split(" | ")[1:5] == ["12.0 ± 2.8 (2)", "", "24.0 ± 5.7 (2)", "no such objects"]
    assert next(line for line in text.splitlines() if "chain_2" in line).count("not run") == 8
    assert "| 40.0 (1) |" in text
    assert "a reader's note | 43.4 -> 46.8 -> 48.2 -> 49.4" in text
    assert "the paper's table as recalled from memory; COCO, R50, 12 epochs | 43.4 DN-DETR" in text
    for name in ("chain", "variants", "ancestors"):
        picture = (tmp_path / f"ablation_{name}.svg").read_text()
        assert picture.rstrip().endswith("</svg>")
    shapes = report.load(tmp_path / "results", "shapes")
    assert report.gains(shapes, "chain_5_twice", "chain_1_static") == [{"AP": 30.0}]
    assert report.points(shapes, "chain_1_static", "epochs") == ([2, 4], [6, 12], [5, 10], [7, 14])
    assert report.points(shapes, "chain_1_static", "processor_seconds")[0] == [50, 100]


def test_results_of_another_budget_are_refused(tmp_path):
    report = load_program("ablation", "benchmarks").ablation_report
    planted(tmp_path)
    path = tmp_path / "shapes/chain_5_twice_0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "other"}))
    with pytest.raises(
        DataError, match=r"chain_5_twice_0\.json: fingerprint other, but .* such cells can't share a table"
    ):
        report.load(tmp_path, "shapes")
    path.write_text("{")
    with pytest.raises(DataError, match="is no result of a cell"):
        report.load(tmp_path, "shapes")
