"""Detectron2's own tracing and counting of the detector, in processes that predict afterwards."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis, activation_count_operators, flop_count_operators
from torch.utils.flop_counter import FlopCounterMode

from dino.inference.cpu import prepare_for_cpu
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


@pytest.mark.parametrize("prepared", [False, True], ids=["as trained", "prepared for a CPU"])
def test_one_trace_is_for_all_sizes(detector, prepared):
    """The sizes of levels and of the picture stay open."""
    sizes = [(256, 320), (320, 192), (96, 512), (8, 8)]  # the last has fewer tokens than queries
    expected = [detector([{"image": picture(*size).fill_(7)}])[0]["instances"] for size in sizes]
    if prepared:
        prepare_for_cpu(detector)
    traced, _ = traced_by_adapter(detector, picture(*sizes[0]))
    for size, instances in zip(sizes, expected, strict=True):
        boxes, _, scores, image_size = traced(picture(*size).fill_(7))
        assert tuple(image_size.tolist()) == instances.image_size == size
        torch.testing.assert_close(boxes, instances.pred_boxes.tensor, rtol=1e-4, atol=2e-3)
        torch.testing.assert_close(scores, instances.scores)


def test_the_counter_of_torch(detector):
    """Also without gradients, as `DINODetector` predicts."""
    with FlopCounterMode(display=False) as counter:
        detector([{"image": picture()}])
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("gradients", [True, False])
def test_traces_of_the_network(detector, gradients):
    """torch compares a second trace, which it makes without gradients, with the first."""

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = detector.network

        def forward(self, images):
            return self.network(images, None).decoder

    images = torch.rand(1, 3, 64, 80)
    with warnings.catch_warnings(), torch.set_grad_enabled(gradients):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Wrapper(), images)
    torch.testing.assert_close(tuple(traced(images)), tuple(detector.network(images, None).decoder))
