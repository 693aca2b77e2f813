"""The benchmark of the operator and its report, on a pyramid of a few cells."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from dino.layers import operator

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
    report.PAGE.write_text(f"before\n{report.BEGIN}\nolder\n{report.END}\nafter\n")
    for _ in range(2):
        report.main()
    text = report.PAGE.read_text()
    assert re.match(r"before\n.*after\n$", text, re.DOTALL)
    assert "older" not in text
    assert text.count("| encoder, batch 1, float32 | forward |") == 3
    assert "not measured against one" in text
    assert (tmp_path / "deform_attn_cpu_1threads.svg").read_text().endswith("</svg>\n")
