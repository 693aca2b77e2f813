"""The table of recipes and seeds: order of the trainings, kills, messages, tables and pictures."""

import json
import os
import re
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
values = {"bbox/AP": 20.0, "ema/bbox/AP": 30 + len(folder.name), "ema/bbox/AP50": 50.0, "ema/bbox/APs": None}
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
    program.anchor_distances = lambda path, files: {"ATD100": len(path.read_text()) / 10, "last_ATD100": 1.0}
    program.ablation_report = SimpleNamespace(**{**vars(program.ablation_report), "write": lambda *_: None})
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
    assert (result["last_AP"], result["APs"]) == (20.0, None)
    assert (result["ATD100"], result["last_ATD100"]) == (0.5, 1.0)  # of the checkpoint, which is removed afterwards
    assert result["curve"] == [{"iteration": i, "AP": 38, "last_AP": 20.0} for i in (5, 10)]
    assert result["processor_seconds"] > 0
    assert result["wall_seconds"] > 0
    assert len(result["commit"]) == 40
    assert "train.seed=1 train.max_iter=10 train.eval_period=3" in result["command"]
    assert not list((tmp_path / "runs").rglob("*.pth"))
    before = {path: path.stat().st_mtime_ns for path in files.values()}
    capsys.readouterr()
    program.main([*arguments, "--jobs", "2"])
    assert "4 cells, 4 of them done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in files.values()}
    with pytest.raises(SystemExit, match=r"--iterations 20, but .* holds cells of 10: give the same number"):
        program.main([*arguments[:-1], "20"])


def test_the_plan_begins_with_the_chain():
    program = load_program("ablation", "benchmarks")
    names = [cell.name for cell in program.whole_plan(3)]
    chain = [f"chain_{i}" for i in ("1_denoising", "2_pure", "3_mixed", "4_twice", "5_contrastive")]
    assert names[:6] == [*(f"shapes/{name}_0" for name in chain), "shapes/chain_1_denoising_1"]
    assert names[15:20] == [f"bccd/{name}_0" for name in chain]
    assert len(set(names)) == len(names) == 15 + 15 + 3 * 9 + 7 + 7
    assert {cell.recipe for cell in program.whole_plan(1)} <= {path.stem for path in program.RECIPES.glob("*.py")}


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


def plant(folder, recipe, *values, data="shapes"):
    """Results of a recipe with these AP, of seeds 0, 1, …"""
    for seed, ap in enumerate(values):
        result = {
            "data": data,
            "recipe": recipe,
            "seed": seed,
            "AP": ap,
            "AP50": 2 * ap,
            "last_AP": ap - 1,
            "fingerprint": "ab12",
            "budget": {"iterations": 20, "batch": 2, "epochs": 4, "evaluations": 2},
            "curve": [{"iteration": 10, "AP": ap / 2}, {"iteration": 20, "AP": ap}],
            "processor_seconds": 100.0,
            "commit": "0123456789abcdef",
            "changed_since_commit": False,
            "hardware": {"cpu": f"Maker(R) {min(seed, 1)}"},
        }
        path = folder / f"{data}/{recipe}_{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))


def planted(folder):
    """Results of a chain that was begun, and of a variant."""
    plant(folder, "chain_4_twice", 10.0, 14.0)
    plant(folder, "chain_5_contrastive", 40.0, 46.0, 50.0)
    plant(folder, "encoder_6", 30.0)


def rows_of(text):
    """Name of a row, without its link -> its other cells."""
    lines = [line.removesuffix(" |").split(" | ") for line in text.splitlines() if line.startswith("| [")]
    return {first.removeprefix("| [").split("]")[0]: cells for first, *cells in lines}


def test_table_and_picture_from_planted_results(tmp_path):
    report = load_program("ablation", "benchmarks").ablation_report
    planted(tmp_path / "results")
    page = tmp_path / "README.md"
    page.write_text("\n".join(["before", report.MARKS[0], "older", report.MARKS[1], "after\n"]))
    report.write(tmp_path / "results", page)
    text = page.read_text()
    report.write(tmp_path / "results", page)
    assert page.read_text() == text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "older" not in text
    assert "6 trainings, commit 0123456789, one thread of Maker 0 or Maker 1. All took 0.2 processor hours." in text
    rows = rows_of(text.split("**Layers**")[0])
    metrics = ["12.0 ± 2.8 (2)", "24.0 ± 5.7 (2)", "11.0 ± 2.8 (2)"]
    assert rows["+ look forward twice"] == [*metrics, "no common seed", "47.4"]
    assert rows["+ contrastive denoising (DINO)"][0] == "45.3 ± 5.0 (3)"
    assert rows["+ contrastive denoising (DINO)"][3] == "+31.0 ± 1.0 (2)"  # of the two seeds that both have
    layers, denoising = text.split("**Layers**")[1].split("**Denoising**")
    assert rows_of(layers)["6 encoder layers"] == ["30.0 (1)", "60.0 (1)", "29.0 (1)", "-10.0 (1)"]
    assert list(rows_of(layers)) == ["6 encoder layers", "DINO: 3 + 3 layers"]
    assert list(rows_of(denoising)) == ["100 positives, no negatives", "DINO: 100 pairs"]
    assert not any(words in text for words in ("chain_1", "BCCD", "**Other variants**"))  # have not run
    picture = (tmp_path / report.PICTURE).read_text()
    assert "+ look forward twice" in picture
    assert "+ pure query selection" not in picture
    shapes = report.load(tmp_path / "results", "shapes")
    assert report.points(shapes, "chain_4_twice") == ([10, 20], [6, 12], [5, 10], [7, 14])


def test_distances_of_anchors_are_beside_ap_where_they_were_measured(tmp_path):
    """Not in earlier results, nor in tables without any; the paper's figures of other numbers are below a table."""
    report = load_program("ablation", "benchmarks").ablation_report
    planted(tmp_path)
    page = tmp_path / "ablation.md"
    report.write(tmp_path, page)
    assert ": ATD(100) |" not in page.read_text()
    for seed, value in enumerate((0.25, 0.35)):
        path = tmp_path / f"shapes/chain_5_contrastive_{seed}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), report.ATD: value}))
    report.write(tmp_path, page)
    text = page.read_text()
    chain, layers = text.split("**Layers**")
    layers, denoising = layers.split("**Denoising**")
    assert rows_of(chain)["+ contrastive denoising (DINO)"][3] == "0.300 ± 0.071 (2)"
    assert rows_of(chain)["+ look forward twice"][3] == ""
    assert text.count("hard shapes: ATD(100) | hard shapes: gain") == 3
    assert "table 6" in layers
    assert "table 7" in denoising
    plant(tmp_path, "encoder_6", 31.0, data="bccd")
    report.write(tmp_path, page)
    assert "BCCD: ATD(100)" not in page.read_text()


def test_a_table_has_the_data_sets_on_which_it_ran(tmp_path):
    """A recipe that no table names is under the other variants; nothing is drawn without a chain."""
    report = load_program("ablation", "benchmarks").ablation_report
    plant(tmp_path, "encoder_6", 30.0)
    plant(tmp_path, "own_idea", 20.0, data="bccd")
    page = tmp_path / "ablation.md"
    report.write(tmp_path, page)
    layers, others = page.read_text().split("**Layers**")[1].split("**Other variants**")
    assert rows_of(layers) == {"6 encoder layers": ["30.0 (1)", "60.0 (1)", "29.0 (1)", "no common seed"]}
    assert "BCCD" not in layers
    assert rows_of(others) == {"own_idea": ["20.0 (1)", "40.0 (1)", "19.0 (1)", "no common seed"]}
    assert "shapes" not in others
    assert not (tmp_path / report.PICTURE).exists()


def test_a_page_without_results_or_marks(tmp_path):
    report = load_program("ablation", "benchmarks").ablation_report
    page = tmp_path / "ablation.md"
    report.write(tmp_path, page)
    assert "Not run yet." in page.read_text()
    page.write_text("other text\n")
    with pytest.raises(DataError, match=r"ablation\.md has lost the marks <!-- begin"):
        report.write(tmp_path, page)
    assert page.read_text() == "other text\n"


def test_other_results_have_a_page_of_their_own(tmp_path):
    program = load_program("ablation", "benchmarks")
    planted(tmp_path)
    before = program.ablation_report.PAGE.read_text()
    program.main(["--report", "--results", str(tmp_path)])
    link = re.search(r"\[6 encoder layers\]\(([^)]*)\)", (tmp_path / "ablation.md").read_text()).group(1)
    assert (tmp_path / link).resolve() == program.RECIPES / "encoder_6.py"
    assert program.ablation_report.PAGE.read_text() == before
    assert program.ablation_report.page_of(program.RESULTS) == program.ablation_report.PAGE


def test_results_of_another_budget_are_refused(tmp_path):
    report = load_program("ablation", "benchmarks").ablation_report
    planted(tmp_path)
    path = tmp_path / "shapes/encoder_6_0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "other"}))
    with pytest.raises(DataError, match=r"encoder_6_0\.json: fingerprint other, but .* such cells can't share a table"):
        report.load(tmp_path, "shapes")
    path.write_text("{")
    with pytest.raises(DataError, match="is no result of a cell"):
        report.load(tmp_path, "shapes")
