"""The benchmarks and their report, on small work."""

import importlib.util
import json
import re
import subprocess
from argparse import Namespace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dino.layers import Target
from dino.layers.ops import operator

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
    monkeypatch.setattr("sys.argv", ["report.py"])
    monkeypatch.setattr(report, "PAGE_CUDA", tmp_path / "performance_cuda.md")
    report.PAGE_CUDA.write_text(f"before\n{report.BEGIN_CUDA}\nolder\n{report.END_CUDA}\nafter\n")
    for _ in range(2):
        report.main()
    text = report.PAGE.read_text()
    assert re.match(r"before\n.*after\n$", text, re.DOTALL)
    assert "older" not in text
    assert text.count("| encoder, batch 1, float32 | forward |") == 3
    assert (tmp_path / "deform_attn_cpu_1threads.svg").read_text().endswith("</svg>\n")
    assert re.fullmatch(r"before\n.*No GPU has been measured yet.*after\n", report.PAGE_CUDA.read_text(), re.DOTALL)


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
    monkeypatch.setattr(benchmark, "start_worker", Worker)
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


EARLIER = """import json
import sys
from typing import NamedTuple


class Case(NamedTuple):
    work: str
    height: int
    width: int
    batch: int
    boxes: int
    dtype: str


def main():
    for line in sys.stdin:
        print(json.dumps([line.strip(), CPU_CASES, sys.argv[1:]]), flush=True)
"""


def test_an_earlier_checkout_serves_by_its_own_program(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/model.py").write_text(EARLIER)
    benchmark = program("model")
    name, case = benchmark.contender_in(tmp_path), benchmark.CPU_CASES[0]
    options = Namespace(against=str(tmp_path), device="cpu", threads=1, dtypes="float32")
    worker = benchmark.start_worker(case, name, options)
    request, cases, arguments = worker.ask("time")
    worker.close()
    assert (name, request, cases) == ("earlier", "time", [list(case)])
    assert arguments[:2] == ["--serve", "dino"]
    assert re.fullmatch(arguments[arguments.index("--cases") + 1], str(case))


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
    assert report["combined"]["mosaic"] > report["combined"]["plain"] > 0
    assert "one core: " in capsys.readouterr().out


SMALL = {"SHAPES": [(6, 7), (3, 4)], "FLAT": [6, 7, 3, 4], "TOKENS": 54}


@pytest.fixture
def kernels(monkeypatch):
    """The program that times the operator on a GPU, with a small image, on the CPU."""
    verdict = operator.verdict(torch.device("cpu"))
    if not verdict.usable:
        pytest.skip(f"nothing to measure: {verdict.reason}")
    found = program("kernels")
    for name, value in SMALL.items():
        monkeypatch.setattr(found.deform_attn, name, value)
    cases = [found.Case("encoder", 54, 2, "float32"), found.Case("decoder 900", 9, 1, "bfloat16")]
    monkeypatch.setattr(found, "CASES", cases)
    return found


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
    module.main()


def test_times_of_the_operator(kernels, monkeypatch, tmp_path, capsys):
    output = tmp_path / "kernels.json"
    run(kernels, monkeypatch, "--device", "cpu", "--repeats", "2", "--output", output)
    report = json.loads(output.read_text())
    rows = report["rows"]
    assert len(rows) == 2 * 3 * 2  # cases, contenders, passes
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert all(row["seconds"] >= row["best_seconds"] > 0 and row["repeats"] == 2 for row in rows)
    (compiled,) = [r for r in rows if (r["contender"], r["pass"], r["dtype"]) == ("compiled", "forward", "float32")]
    assert set(compiled["errors"]) == {"output", "value", "locations", "weights"}
    assert max(compiled["errors"].values()) < 5e-6
    (fused,) = [r for r in rows if (r["contender"], r["pass"], r["dtype"]) == ("fused", "forward", "bfloat16")]
    assert set(fused["errors"]) == {"output", "value", "logits"}
    assert max(fused["errors"].values()) < 1e-2
    assert "commit" in report
    assert "encoder batch 2 float32 fused backward" in capsys.readouterr().out


def test_wrong_numbers_are_a_failure(kernels, monkeypatch, tmp_path):
    """They are written down all the same."""
    good = kernels.own

    def bad(form, arguments):
        found = good(form, arguments)
        return found._replace(forward=lambda *inputs: found.forward(*inputs) * 1.01)

    monkeypatch.setattr(kernels, "own", bad)
    output = tmp_path / "kernels.json"
    with pytest.raises(SystemExit, match="encoder batch 2 float32 compiled"):
        run(kernels, monkeypatch, "--device", "cpu", "--repeats", "1", "--output", output, "--cases", "encoder")
    assert len(json.loads(output.read_text())["rows"]) == 6


def test_names_of_kernels(kernels):
    assert kernels.short("void dino::forward_packets<float, 32, true>(float const*, int)") == (
        "forward_packets<float, 32, true>"
    )
    assert kernels.short("Memset (Device)").startswith("Memset")
    runs = [{"a": [1.0, 2.0], "b": [1.0]}, {"a": [2.0, 3.0], "b": [3.0]}, {"a": [9.0, 9.0], "b": [2.0]}]
    assert kernels.medians(runs) == [
        {"kernel": "a", "launches": 2, "seconds": 5.0},
        {"kernel": "b", "launches": 1, "seconds": 2.0},
    ]


def test_triton_kernel_is_found_by_path(kernels, tmp_path):
    folder = tmp_path / "src/msda_triton"
    folder.mkdir(parents=True)
    (folder / "frontend.py").write_text(
        "def triton_multiscale_deformable_attention(value, shapes, locations, weights, padding, align):\n"
        "    assert (padding, align) == ('zeros', False)\n"
        "    weights = weights + locations.sum(-1)\n"
        "    return (weights.sum((-1, -2))[..., None] * value.mean(1, keepdim=True)).contiguous()\n"
    )
    contender = kernels.triton_contender(tmp_path, torch.device("cpu"))
    inputs = kernels.make_inputs(kernels.CASES[0], torch.device("cpu"))
    arguments = [getattr(inputs, name) for name in contender.arguments]
    assert contender.forward(*arguments).shape == (2, 54, 256)
    assert [x.shape for x in contender.backward(*arguments)(inputs.grad)[:1]] == [inputs.value.shape]


ORIGINAL = """#include <cstdint>
#include <ATen/ATen.h>
#include <THC/THCAtomics.cuh>
template <typename T> void ms_deformable_im2col_cuda(cudaStream_t, const T*, const int64_t*, const int64_t*,
  const T*, const T*, int, int, int, int, int, int, int, T*) {}
template <typename T> void ms_deformable_col2im_cuda(cudaStream_t, const T*, const T*, const int64_t*, const int64_t*,
  const T*, const T*, int, int, int, int, int, int, int, T*, T*, T*) { KERNEL }
"""


def test_original_kernels_are_built_from_a_checkout(tmp_path):
    """Headers that are not there are left out, of a copy; a fault is told in one line."""
    original = program("original")
    with pytest.raises(FileNotFoundError, match="is no checkout with the original kernels"):
        original.find(tmp_path)
    file = tmp_path / "models/ops/src/cuda" / original.FILE
    file.parent.mkdir(parents=True)
    file.write_text(ORIGINAL.replace("KERNEL", ""))
    try:
        original.find_nvcc()
    except FileNotFoundError:
        pytest.skip("no nvcc")
    assert original.compile_kernels(tmp_path, "90", tmp_path / "original.so").exists()
    assert file.read_text() == ORIGINAL.replace("KERNEL", "")
    file.write_text(ORIGINAL.replace("KERNEL", "no_such_thing();"))
    with pytest.raises(RuntimeError, match=r"don't compile: .*no_such_thing"):
        original.compile_kernels(tmp_path, "90", tmp_path / "other.so")


def test_original_kernels_get_what_they_need(tmp_path, monkeypatch):
    original = program("original")
    monkeypatch.setattr(original.ctypes, "CDLL", lambda path: None)
    shapes = torch.tensor(SMALL["SHAPES"])
    kernels, calls = original.Original("x.so", shapes, torch.tensor([0, 42])), []
    monkeypatch.setattr(kernels, "call", lambda name, sizes, *tensors: calls.append((name, sizes, tensors)))
    value, locations, weights = torch.rand(2, 54, 8, 32), torch.rand(2, 9, 8, 2, 4, 2), torch.rand(2, 9, 8, 2, 4)
    assert kernels.forward(value, locations, weights).shape == (2, 9, 256)
    gradients = kernels.backward(torch.rand(2, 9, 256), value, locations, weights)
    assert [x.shape for x in gradients] == [x.shape for x in (value, locations, weights)]
    sizes = {name: getattr(calls[0][1], name) for name, _ in original.Sizes._fields_}
    assert sizes == {"batch": 2, "tokens": 54, "heads": 8, "channels": 32, "levels": 2, "queries": 9, "points": 4}
    assert [len(tensors) for _, _, tensors in calls] == [6, 9]
    with pytest.raises(ValueError, match="contiguous float32"):
        kernels.forward(value.bfloat16(), locations, weights)


def test_extension_of_another_program(tmp_path, monkeypatch):
    """Its own where it is built, else one of the same functions from the kernels in its checkout."""
    original, others = program("original"), program("others")
    built = type("Extension", (), {"ms_deform_attn_forward": None})
    assert others.extension_of(tmp_path, torch.device("cpu"), built) is built
    monkeypatch.setattr(original, "build", lambda folder, device: "x.so")
    monkeypatch.setattr(original.ctypes, "CDLL", lambda path: None)
    monkeypatch.setattr(original.Original, "call", lambda self, name, sizes, *tensors: tensors[-1].fill_(3))
    monkeypatch.setattr(others, "as_extension", original.as_extension)
    made = others.extension_of(tmp_path, torch.device("cpu"), object())
    value, locations, weights = torch.rand(1, 54, 8, 32), torch.rand(1, 9, 8, 2, 4, 2), torch.rand(1, 9, 8, 2, 4)
    inputs = (value, torch.tensor(SMALL["SHAPES"]), torch.tensor([0, 42]), locations, weights)
    output = made.ms_deform_attn_forward(*inputs, 64)
    assert (output.shape, output.unique().tolist()) == ((1, 9, 256), [3.0])
    gradients = made.ms_deform_attn_backward(*inputs, torch.rand(1, 9, 256), 64)
    assert [x.shape for x in gradients] == [value.shape, locations.shape, weights.shape]
    assert gradients[2].unique().tolist() == [3.0]


def test_the_network_on_a_gpu(monkeypatch, tmp_path):
    """Its program, on the CPU, with a tiny network."""
    if not operator.verdict(torch.device("cpu")).usable:
        pytest.skip("the compiled operator is asked for, and there is none")
    cuda, base = program("model_cuda"), program("model")
    network = tiny_network()

    def ours(device):
        def losses(images, targets):
            return network(images, torch.zeros(images[:, 0].shape, dtype=torch.bool)).decoder.logits.sum()

        def detect(images):
            return network(images, torch.zeros(images[:, 0].shape, dtype=torch.bool)).decoder

        return base.Contender(network, detect, losses, None, {"encoder": network.encoder})

    monkeypatch.setattr(cuda.model, "ours", ours)
    compiled = []
    monkeypatch.setattr(cuda.model, "prepare", lambda model, case: model.eval())
    monkeypatch.setattr(cuda, "compile_network", compiled.append)
    for name, value in {"HEIGHT": 64, "WIDTH": 96, "CASES": [
        cuda.Case("inference", 1, "float32", "reference"), cuda.Case("training", 2, "tf32", "dino"),
        cuda.Case("inference", 1, "bfloat16", "compiled-graphs"), cuda.Case("training", 2, "bfloat16", "compiled"),
    ]}.items():  # fmt: skip
        monkeypatch.setattr(cuda, name, value)
    output = tmp_path / "training.json"
    run(cuda, monkeypatch, "--device", "cpu", "--repeats", "2", "--output", output)
    rows = json.loads(output.read_text())["rows"]
    contenders = ["reference", "dino", "compiled-graphs", "compiled"]
    assert [(row["work"], row["contender"]) for row in rows] == list(
        zip(["inference", "training"] * 2, contenders, strict=True)
    )
    assert all(row["seconds"] > 0 and row["host_seconds"] > 0 for row in rows)
    assert all(row["stages"]["encoder"] > 0 for row in rows[:2])
    assert ["loss" in row for row in rows] == [False, True] * 2
    assert compiled == [network, network]


def test_a_contender_that_fails_hides_no_other(monkeypatch, tmp_path):
    cuda = program("model_cuda")

    def measure(case, repeats, device):
        if case.batch == 16:
            raise torch.cuda.OutOfMemoryError("much")
        if case.contender == "compiled":
            raise RuntimeError("no graph\nat all")
        return {**case._asdict(), "seconds": 1.0}

    monkeypatch.setattr(cuda, "measure", measure)
    monkeypatch.setattr(cuda, "say", lambda case, row: None)
    output = tmp_path / "batches.json"
    monkeypatch.setattr(cuda, "CASES", [cuda.Case("training", *rest) for rest in (
        (2, "tf32", "compiled"), (16, "tf32", "dino"), (8, "tf32", "dino"),
    )])  # fmt: skip
    with pytest.raises(SystemExit, match=r"1 cases failed: RuntimeError: no graph at all$"):
        run(cuda, monkeypatch, "--device", "cpu", "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 3
    assert {row.get("error") for row in rows} == {None, "out of memory", "RuntimeError: no graph at all"}


NCU = '''==PROF== Connected
"ID","Kernel Name","thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg","gpu__time_duration.sum","l1tex__t_sector_hit_rate.pct"
"","","","ns","%"
"0","void dino::forward_packets<float, 32, 0>(int)","""<default domain>:encoder batch 2 float32 compiled forward:none""","212,352","81.5"
'''  # noqa: E501


def test_hardware_counters(monkeypatch):
    """Counters that this ncu does not know are left out, at most a few times."""
    counters = program("counters")
    (row,) = counters.parse(NCU)
    assert row["kernel"] == "forward_packets<float, 32, 0>"
    assert row["range"] == "encoder batch 2 float32 compiled forward"
    assert (row["microseconds"], row["L1 hits %"]) == (212.352, 81.5)
    asked = []

    def start(command, **_):
        asked.append(command[command.index("--metrics") + 1].split(","))
        known = "lts__t_sectors_op_red.sum" not in asked[-1]
        text = NCU if known else "==ERROR== Failed to find metric lts__t_sectors_op_red.sum"
        return subprocess.CompletedProcess(command, 0 if known else 1, text, "")

    monkeypatch.setattr(counters.subprocess, "run", start)
    text, missing = counters.read_counters("ncu", ["program"])
    assert text == NCU
    assert missing == ["sectors added (RED)"]
    assert len(asked) == 2
    monkeypatch.setattr(
        counters.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "no permission")
    )
    with pytest.raises(SystemExit, match="no permission"):
        counters.read_counters("ncu", ["program"])


def write_results(folder):
    """A folder as the GPU suite leaves it, with one step of each kind."""
    (folder / "data").mkdir()
    hardware = {"gpu": "NVIDIA H100", "capability": "9.0", "cores": 16, "cpu": "Xeon", "driver_version": "580.1"}
    device = {"hardware": hardware, "versions": {"torch": "2.11.0", "triton": None}, "commit": "c" * 40}
    case = {"name": "encoder", "queries": 54, "batch": 2, "dtype": "float32", "pass": "forward"}
    errors, kernel = {"output": 2e-7}, {"kernel": "forward_packets<float>", "launches": 4, "seconds": 0.0002}
    times = [("compiled", 0.0002), ("reference", 0.006), ("original", 0.0009)]
    timed = [{**case, "contender": c, "seconds": t, "extra_bytes": 2**20, "errors": errors} for c, t in times]
    traced = [{**case, "contender": c, "kernels": [kernel]} for c in ("fused", "reference")]
    counted = [{"range": "encoder batch 2", "kernel": "forward_packets<float>", "L1 hits %": 81.234, "blocks": 7.0}]
    step = {"work": "training", "batch": 2, "host_seconds": 0.05, "busy_seconds": 0.06, "kernels": 2000, "waits": 3}
    step |= {"peak_bytes": 2**30, "precision": "float32"}
    networks = [
        {**step, "contender": c, "seconds": t, "seconds_in_a_row": t} for c, t in [("dino", 0.1), ("reference", 0.4)]
    ]
    networks.append(
        {"work": "training", "batch": 16, "precision": "tf32", "contender": "dino", "error": "out of memory"}
    )
    found = {"kernels": timed, "trace": traced, "counters": counted, "training": networks}
    for name, rows in found.items():
        (folder / f"data/{name}.json").write_text(json.dumps({"rows": rows}))
    (folder / "data/device.json").write_text(json.dumps({**device, "date": "2026-11-27"}))
    record = {"step": "kernels", "what": "times", "state": "passed", "seconds": 41.2, "text": "a | b", "when": "2026"}
    (folder / "kernels.json").write_text(json.dumps(record))


def test_page_of_a_gpu(tmp_path, monkeypatch, capsys):
    write_results(tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    program("report").main()
    text = capsys.readouterr().out
    assert (
        "### NVIDIA H100\n\n2026-11-27, compute capability 9.0, driver 580.1; torch 2.11.0; commit cccccccccc; " in text
    )
    row = "| encoder, batch 2, float32 | forward | compiled | 200.0 us | 30.00 | 4.50 | 1 MiB | output 2e-07 |"
    assert row in text
    assert "| encoder, batch 2, float32 | fused | forward | `forward_packets<float>` | 4 | 200.0 us |" in text
    assert "| reference | forward | `forward_packets" not in text
    assert (
        "| pass | kernel | L1 hits % |\n| --- | --- | --- |\n| encoder batch 2 | `forward_packets<float>` | 81.23 |"
        in text
    )
    assert (
        "| training, batch 2 | float32 | dino | 100.0 ms | 4.00 | 20.0 | 100.0 ms | 50.0 ms | 60.0 ms | 2000 |" in text
    )
    assert "| training, batch 16 | tf32 | dino | out of memory |" in text
    assert "| kernels | times | passed | 41 s | a / b |" in text
    widths = {block.count("|") for block in text.splitlines() if block.startswith("| training")}
    assert len(widths) == 1


def test_picture_of_a_gpu(tmp_path, monkeypatch):
    report = program("report")
    monkeypatch.setattr(report, "PAGE_CUDA", tmp_path / "page.md")
    folder = tmp_path / "cuda_h100"
    folder.mkdir()
    assert report.gpu_picture(folder) == ""
    write_results(folder)
    assert "](cuda_h100.svg)" in report.gpu_picture(folder)
    shown = ["".join(x.itertext()) for x in ElementTree.parse(tmp_path / "cuda_h100.svg").iter() if "text" in x.tag]
    assert [text for text in shown if "original" in text] == ["6.7 original"]


def test_page_of_a_gpu_without_results(tmp_path):
    assert "No GPU has been measured yet" in program("report_cuda").page(tmp_path)
