"""The benchmarks and their report, on small work."""

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dino.layers import Target, operator

from .tiny import tiny_network

ROOT = Path(__file__).parents[1]


def program(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_and_report(monkeypatch, tmp_path):
    verdict = operator.verdict(torch.device("cpu"))
    if not verdict.usable:
        pytest.skip(f"nothing to measure: {verdict.reason}")
    benchmark, report = program("deform_attn"), program("report")
    shapes = [(6, 7), (3, 4)]
    cases = [benchmark.Case("encoder", 54, 1, "float32"), benchmark.Case("decoder 900", 9, 2, "bfloat16")]
    for name, value in {"SHAPES": shapes, "FLAT": [6, 7, 3, 4], "TOKENS": 54, "CASES": cases}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr("sys.argv", ["deform_attn.py", "--results", str(tmp_path), "--threads", "1", "--rounds", "2"])
    benchmark.main()
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert len(results["rows"]) == 12
    errors = [row["errors"] for row in results["rows"] if row["contender"] == "compiled" and "errors" in row]
    assert max(errors[0].values()) < 5e-6
    assert set(errors[0]) == {"output", "value", "locations", "weights"}

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    marks = f"{report.BEGIN}\nolder\n{report.END}\nbetween\n{report.BEGIN_MODEL}\nolder\n{report.END_MODEL}"
    marks += f"\n{report.BEGIN_GROWTH}\nolder\n{report.END_GROWTH}"
    report.PAGE.write_text(f"before\n{marks}\nafter\n")
    for _ in range(2):
        report.main()
    text = report.PAGE.read_text()
    assert re.match(r"before\n.*after\n$", text, re.DOTALL)
    assert "older" not in text
    assert text.count("| encoder, batch 1, float32 | forward |") == 3
    assert "not measured against one" in text
    assert (tmp_path / "deform_attn_cpu_1threads.svg").read_text().endswith("</svg>\n")


def test_model_benchmark_and_report(monkeypatch, tmp_path):
    """One worker for each program; the network is the full one, the image small."""
    benchmark, report = program("model"), program("report")
    cases = [benchmark.Case("inference", 480, 640, 1, 0, "float32")]
    workers = []

    class Worker:
        """Serves in this process."""

        def __init__(self, case, name, options, weights=None):
            workers.append(name)
            self.name, self.case = name, case

        def ask(self, request):
            command, _, path = request.partition(" ")
            if command == "output":
                boxes = torch.full((1, 3, 4), 0.5 if self.name == "dino" else 0.25)
                torch.save(
                    [(torch.zeros(1, 3, 2), boxes), torch.tensor([[4, 5, 6 if self.name == "dino" else 7]])], path
                )
            given = {"logits": 0.0, "boxes": 0.125}
            answers = {"time": [2.0, 3.0], "stages": {"backbone": 1.0}, "peak": 2**30, "output_for_tokens_of": given}
            return answers.get(command)

        def close(self):
            pass

    monkeypatch.setattr(benchmark, "CPU_CASES", cases)
    monkeypatch.setattr(benchmark, "Worker", Worker)
    monkeypatch.setattr(benchmark, "matrix_product", lambda dtype, device: 1e9)
    monkeypatch.setattr("sys.argv", ["model.py", "--results", str(tmp_path), "--rounds", "2", "--threads", "1"])
    benchmark.main()
    rows = json.loads((tmp_path / "model_cpu_1threads_reference.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == sorted(workers) == ["dino", "reference"]
    differences = {"logits": 0.0, "boxes": 0.25, "same_tokens": pytest.approx(2 / 3)}
    assert rows[0]["difference"] == {**differences, "logits for their tokens": 0.0, "boxes for their tokens": 0.125}
    assert "| inference 480x640, batch 1, 0 boxes, float32 | dino | 2000 ms | 1.00 |" in report.model_section(
        tmp_path / "model_cpu_1threads_reference.json"
    )


def test_the_work_of_the_model_benchmark():
    benchmark = program("model")
    case, device = benchmark.Case("criterion", 480, 640, 1, 2, "float32"), torch.device("cpu")
    targets = benchmark.make_targets(case, device)
    outputs = benchmark.make_outputs(case, targets, device)
    assert [len(outputs.decoder.logits), outputs.denoising.predictions.boxes.shape[2]] == [6, 200]
    criterion = benchmark.SetCriterion(matcher=benchmark.HungarianMatcher())
    assert len(criterion(outputs, targets)) == 39
    with benchmark.Selections() as selections:
        torch.rand(1, 8).topk(3, dim=1)
        torch.rand(1, 8).topk(2, dim=1)
    assert selections.indices.shape == (1, 3)


def test_the_network_works_on_tokens_that_are_given():
    benchmark = program("model")
    network = tiny_network()
    images, padding = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    tokens = torch.tensor([[3, 1, 2]])
    found = benchmark.output_for_tokens(network, lambda: network(images, padding).decoder, tokens)
    assert found.boxes.shape[2] == 3
    assert network(images, padding).decoder.boxes.shape[2] != 3


@pytest.mark.parametrize("name", ["official", "detrex"])
def test_other_programs_are_told_by_their_files(name, tmp_path):
    others = program("others")
    file = tmp_path / others.PROGRAMS[name][1]
    file.parent.mkdir(parents=True)
    file.touch()
    assert others.recognise(tmp_path) == name
    with pytest.raises(SystemExit, match="is no checkout of"):
        others.recognise(tmp_path.parent)


def test_predictions_as_other_programs_have_them():
    benchmark, others = program("model"), program("others")
    case = benchmark.Case("criterion", 480, 640, 1, 2, "float32")
    outputs = benchmark.make_outputs(case, benchmark.make_targets(case, torch.device("cpu")), torch.device("cpu"))
    theirs = others.layers(outputs.decoder)
    assert len(theirs["aux_outputs"]) == 5
    assert theirs["pred_boxes"] is not theirs["aux_outputs"][-1]["pred_boxes"]
    assert torch.equal(theirs["pred_logits"], outputs.decoder.logits[-1])
    assert torch.equal(theirs["aux_outputs"][0]["pred_boxes"], outputs.decoder.boxes[0])
    entry = others.detrex_input(torch.zeros(3, 10, 20), Target(torch.tensor([4]), torch.tensor([[0.5, 0.5, 0.5, 0.2]])))
    torch.testing.assert_close(entry["instances"].gt_boxes.tensor, torch.tensor([[5.0, 4, 15, 6]]))


def test_growth_and_its_report(monkeypatch, tmp_path):
    growth, report = program("growth"), program("report")
    monkeypatch.setattr(growth, "build", lambda point, device: tiny_network(num_queries=point.queries))
    monkeypatch.setattr(growth, "CURVES", {"queries": [growth.Point(64, 64, n, 2) for n in (4, 8)]})
    monkeypatch.setattr("sys.argv", ["growth.py", "--results", str(tmp_path), "--rounds", "1", "--threads", "1"])
    growth.main()
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["value"], row["work"]) for row in rows] == [
        (n, work) for work in ("inference", "training") for n in ("4", "8")
    ]
    assert rows[0]["multiply_adds"] < rows[1]["multiply_adds"] < rows[3]["multiply_adds"]
    assert rows[0]["bytes_counted"] == rows[1]["bytes_counted"] == 4 * (64 + 16 + 4 + 1) * (6 * 32 + 3 * 4 * 4 * 2)
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    assert "| queries | training | 4, 8 | x " in report.growth_section(path)
    ElementTree.parse(tmp_path / "growth_cpu_1threads.svg")


def test_loader(monkeypatch, tmp_path, capsys):
    loader = program("loader")
    arguments = ["--results", str(tmp_path), "--count", "4", "--workers", "0", "--seconds", "0.1"]
    monkeypatch.setattr("sys.argv", ["loader.py", *arguments])
    loader.main()
    report = json.loads((tmp_path / "loader_0workers.json").read_text())
    assert list(report["steps"]) == list(loader.STEPS)
    assert all(seconds > 0 for seconds in report["steps"].values())
    assert report["images_per_second"] > 0
    assert "one core: " in capsys.readouterr().out
