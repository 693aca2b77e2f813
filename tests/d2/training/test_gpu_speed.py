import logging

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from omegaconf import OmegaConf
from torch import nn

from dino.d2.training import engine
from dino.layers.ops.operator import use_compiled
from dino.modeling import CudaGraphs, detector, float32_precision
from dino.training import gpu_speed
from dino.training.memory_saving import checkpoint_activations
from dino.utils.files import DataError

from ...modeling.test_cuda_graphs import FakeRecorder
from ..recipes import tiny_recipe
from ..tiny import random_input, tiny_detector


@pytest.fixture(autouse=True)
def kept():
    """What the process has is what it had."""
    torch._dynamo.reset()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    handlers = list(logging.getLogger("torch._dynamo").handlers)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    logging.getLogger("torch._dynamo").handlers[:] = handlers
    torch._dynamo.reset()


def config(**train):
    return OmegaConf.create({"train": {"compile": False, "float32_precision": "high", **train}})


@pytest.mark.parametrize(("word", "told"), [("high", "TensorFloat-32"), ("highest", "float32")])
def test_the_log_says_which_precision_the_recipe_wants(tmp_path, caplog, word, told):
    cfg = tiny_recipe(tmp_path, "train.max_iter=1", "train.eval_period=0", f"train.float32_precision={word}")
    with caplog.at_level(logging.INFO):
        engine.train(cfg, resume=False)
    assert f"precision: float32; float32 on a GPU: {told}\n  compile: off" in caplog.text
    assert float32_precision() == told


def test_an_evaluation_has_the_precision_too(tmp_path):
    cfg = tiny_recipe(tmp_path, "train.max_iter=1", "train.eval_period=0")
    engine.train(cfg, resume=False)
    cfg.train.float32_precision, cfg.train.init_checkpoint = "highest", str(tmp_path / "run/model_final.pth")
    assert float32_precision() == "TensorFloat-32"
    engine.evaluate_checkpoint(cfg)
    assert float32_precision() == "float32"


def test_an_unknown_precision_is_refused():
    with pytest.raises(DataError, match=r"train.float32_precision: .* not 'tf32'"):
        gpu_speed.use_precision(config(float32_precision="tf32"))


def test_other_detectors_are_not_compiled():
    gpu_speed.compile_if_wanted(config(), nn.Linear(1, 1))
    with pytest.raises(DataError, match="only DINODetector can be compiled, not Linear"):
        gpu_speed.compile_if_wanted(config(compile=True), nn.Linear(1, 1))


def test_warnings_of_the_compiler_reach_the_log_of_the_run(monkeypatch):
    """As that of a function which has too many graphs and goes on uncompiled."""
    seen, logger = [], logging.getLogger("detectron2")
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    for _ in range(2):
        gpu_speed.compile_if_wanted(config(compile=True), tiny_detector())
    logging.getLogger("torch._dynamo.convert_frame").warning("torch._dynamo hit config.recompile_limit (64)")
    assert seen == ["torch._dynamo hit config.recompile_limit (64)"]


def test_compiled_with_activation_checkpointing(monkeypatch):
    """Losses and gradients of a detector whose activations are computed twice, compiled and not."""
    monkeypatch.setattr(
        gpu_speed, "compile_network", lambda net: net.encoder.compile(backend="aot_eager", dynamic=True)
    )
    use_compiled(torch.device("cpu"))  # the operator is tried before the first step, as for the log of a run
    inputs, results = [random_input("a.png"), random_input("b.png", 3, 72, 64)], []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = tiny_detector(num_levels=2, num_layers=1).train()
        checkpoint_activations(model, ["encoder"])
        gpu_speed.compile_if_wanted(config(compile=wanted), model)
        torch.manual_seed(1)
        losses = model(inputs)
        sum(losses.values()).backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    for theirs, ours in zip(*results, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_replays_graphs(monkeypatch):
    """Images of one size that come again: the same detections; no graphs outside the block."""
    recorder = FakeRecorder()
    monkeypatch.setattr(detector, "CudaGraphs", lambda network, most: CudaGraphs(network, most=most, recorder=recorder))
    model, inputs = tiny_detector().eval(), [random_input(f"{n}.png") for n in range(3)]
    expected = [model([x])[0]["instances"] for x in inputs]
    with gpu_speed.replayed(model, 2):
        found = [model([x])[0]["instances"] for x in inputs]
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    assert torch.equal(model([inputs[0]])[0]["instances"].scores, expected[0].scores)
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


def test_no_graphs_where_none_are_wanted(monkeypatch):
    made = []
    monkeypatch.setattr(detector, "CudaGraphs", lambda *args, **options: made.append(args))
    with gpu_speed.replayed(tiny_detector(), 0), gpu_speed.replayed(nn.Linear(1, 1), 3):
        pass
    assert not made
