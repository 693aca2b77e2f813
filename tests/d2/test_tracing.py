"""Detectron2's own tracing and counting of the detector, in processes that predict afterwards."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis, activation_count_operators, flop_count_operators

from dino.layers.ops import operator

from .tiny import tiny_detector


@pytest.fixture
def detector():
    return tiny_detector().eval()


def picture(height=64, width=80):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


def traced_by_adapter(detector, *inputs):
    adapter = TracingAdapter(detector, [dict(zip(("image", "height", "width"), inputs, strict=False))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about numbers that it takes for constants
        return torch.jit.trace(adapter, adapter.flattened_inputs), adapter


def test_tracing_adapter(detector):
    traced, adapter = traced_by_adapter(detector, picture())
    assert "dino::" not in str(traced.inlined_graph)
    other = picture()
    expected = detector([{"image": other}])[0]["instances"]
    boxes, labels, scores, _ = traced(other)
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores, expected.scores)
    assert torch.equal(labels, expected.pred_classes)
    rebuilt = adapter.outputs_schema(traced(other))[0]["instances"]
    torch.testing.assert_close(rebuilt.scores, expected.scores)


def test_counts_of_detectron2(detector):
    inputs = [{"image": picture()}]
    counts = FlopCountAnalysis(detector, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    operators = counts.by_operator()
    assert {"conv", "linear", "grid_sampler"} <= set(operators)
    assert flop_count_operators(detector, inputs)["linear"] * 1e9 == pytest.approx(operators["linear"])
    assert activation_count_operators(detector, inputs)["conv"] > 0


PROGRAM = """
import warnings
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from torch.profiler import profile
from tests.d2.tiny import tiny_detector
warnings.filterwarnings("error", message="deform_attn")
detector, inputs = tiny_detector().eval(), [{"image": torch.zeros(3, 64, 80)}]
FlopCountAnalysis(detector, inputs).total()
with profile() as seen:
    detector(inputs)
print("operator:", sum(event.count for event in seen.key_averages() if event.key.startswith("dino::")))
"""


def test_the_first_use_of_a_process_is_a_count():
    """The process has the compiled operator afterwards."""
    if not operator.verdict(torch.device("cpu")).usable:
        pytest.skip("the operator is not built")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "operator: 3" in done.stdout  # one for each attention over the pyramid
