"""The self-test of the compiled operator: nothing around its first use matters, and nothing is changed by it."""

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dino.layers import deform_attn_implementation
from dino.layers.ops import operator, self_test

from . import compiled

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def unknown(tmp_path_factory, monkeypatch):
    """The compiled operator is there, nothing is chosen, and nothing is known about any device."""
    monkeypatch.setattr(operator, "FOLDER", compiled.folder_of_operator(tmp_path_factory.mktemp("operator")))
    monkeypatch.setattr(operator, "_verdicts", {})
    monkeypatch.setattr(operator, "_warned", set())
    monkeypatch.delenv(operator.VARIABLE, raising=False)
    operator.load("cpu")


@contextlib.contextmanager
def changed(getter, setter, *values):
    before = getter()
    setter(*values)
    try:
        yield
    finally:
        setter(before)


class NoFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:  # torch.get_default_device asks for one
            return function(*args, **(kwargs or {}))
        raise AssertionError(f"{function} ran under the caller's mode")


class NoDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} ran under the caller's mode")


@contextlib.contextmanager
def warn_only():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "deterministic, warn only": warn_only,
    "default dtype": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly mode": torch.autograd.detect_anomaly,
    "matmul precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "function mode": NoFunctions,
    "dispatch mode": NoDispatch,
    "fake tensors": FakeTensorMode,
    "saved tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: None),
    "reference chosen": lambda: deform_attn_implementation("gather"),
}


def state():
    """All that a self-test might leave changed."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_anomaly_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        operator.requested(),
    )


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(name):
    self_test._example_of.cache_clear()
    generator = torch.get_rng_state()
    with SURROUNDINGS[name]():
        before = state()
        found = operator.verdict(CPU)
        assert state() == before
    assert found.usable, found.reason
    assert torch.equal(torch.get_rng_state(), generator)


def test_inside_function_transforms():
    """Where gradients are taken, or a dimension mapped, at the first use."""
    self_test._example_of.cache_clear()
    seen = []

    def function(x):
        seen.append(operator.verdict(CPU))
        return (x * x).sum()

    torch.func.vmap(torch.func.grad(function))(torch.ones(2, 3))
    assert seen[0].usable, seen[0].reason


def test_examples_lie_where_they_should():
    """Samples lie inside, half outside and outside; off the lines where gradients jump; all inputs fit every type."""
    for name, layout in self_test._LAYOUTS.items():
        example = self_test._example_of(name, 32)
        extent = torch.tensor([(w, h) for h, w in layout.shapes], dtype=torch.float64)[:, None]
        places = example.inputs["locations"] * extent - 0.5  # in cells
        assert 0 < places.isnan().float().mean() < 0.2
        places = places[~places.isnan().any(-1)]
        assert (places - places.round()).abs().min() > 0.05
        inside = ((places > 0) & (places < 1)).all(-1)
        assert inside.any()
        assert ((places > -1) & (places < 0)).any()
        assert (places < -1).any()
        for argument in ("value", "offsets", "cells", "logits", "grad"):
            x = example.inputs[argument]
            assert all(torch.equal(x, x.to(dtype).double()) for dtype in (torch.bfloat16, torch.float16))
        assert all(x.any() for x in example.expected.values())


def test_layouts_take_all_ways_backward():
    """By the rules of deform_attn_cuda.cu: tiles where queries are cells; several lists for a cell of many samples."""
    tiled, copied = [], []
    for layout in self_test._LAYOUTS.values():
        tokens = sum(h * w for h, w in layout.shapes)
        queries = layout.queries or tokens
        tiled.append(queries == tokens)
        copied += [queries * layout.points >= 2 * 4 * (h + 1) * (w + 1) for h, w in layout.shapes]
        assert len(layout.shapes) * layout.points > 8  # forward and backward_packets prepare that many at a time
    assert tiled == [True, False]
    assert {*copied} == {True, False}
    shapes, _, points = self_test._LAYOUTS["queries are cells"]
    assert len(shapes) * points > 16  # a lane has several samples of a query
    assert any(h > 8 for h, _ in shapes)  # a tile ends within a level
    assert any(w > 16 for _, w in shapes)


class Wrong:
    """The operators, with `change` applied to one result."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def __getattr__(self, name):
        real = getattr(torch.ops.dino, name)
        return (lambda *arguments: self.change(real(*arguments))) if name == self.name else real


def spoil(x):
    x.view(-1)[-1] += 0.1 * x.abs().max()
    return x


@pytest.mark.parametrize("form", ["deform_attn", "deform_attn_fused"])
@pytest.mark.parametrize("result", [0, 1, 2])
def test_one_wrong_number_is_named(form, result):
    def change(results):
        spoil(results[result])
        return results

    for suffix in ("backward", "backward_deterministic"):
        with pytest.raises(AssertionError, match=rf"form, {suffix}: .* differs from the reference by .*head width 32"):
            self_test.run(Wrong(f"{form}_{suffix}", change), CPU)
    with pytest.raises(AssertionError, match="form: output differs"):
        self_test.run(Wrong(f"{form}_forward", spoil), CPU)


def test_a_result_that_is_no_number_is_wrong():
    with pytest.raises(AssertionError, match="by inf"):
        self_test.run(Wrong("deform_attn_forward", lambda x: x * torch.nan), CPU)


def test_runs_that_differ_are_noticed():
    calls = []

    def change(results):
        calls.append(None)
        results[0].add_(1e-7 * len(calls))
        return results

    with pytest.raises(AssertionError, match="two deterministic runs differ"):
        self_test.run(Wrong("deform_attn_backward_deterministic", change), CPU)


# ---- what is remembered


def failing(monkeypatch, error):
    """The self-test raises `error`, until the result is set to None; the list counts its runs."""
    runs, current = [], [error]
    real = self_test._check

    def check(operators, device):
        runs.append(device)
        if current[0] is not None:
            raise current[0]
        real(operators, device)

    monkeypatch.setattr(self_test, "_check", check)
    return runs, current


PASSING = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    RuntimeError(
        "CUDA error: operation failed due to a previous error during capture (cudaErrorStreamCaptureInvalidated)"
    ),
    MemoryError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: str(error)[:40])
def test_what_may_pass_is_tried_again(monkeypatch, error):
    runs, current = failing(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match="plain PyTorch this time: its self-test on cpu can't run now"):
        assert not operator.use_compiled(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not operator.use_compiled(CPU)
    with deform_attn_implementation("compiled"), pytest.raises(RuntimeError, match="the next call tries again"):
        operator.use_compiled(CPU)
    assert len(runs) == 3
    current[0] = None
    assert operator.use_compiled(CPU)
    assert operator.use_compiled(CPU)
    assert len(runs) == 4


def test_an_interrupt_is_not_remembered(monkeypatch):
    runs, current = failing(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        operator.use_compiled(CPU)
    current[0] = None
    assert operator.use_compiled(CPU)
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError("plain form: output differs from the reference by 7"), "self-test on cpu failed .* by 7"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "not built for cpu"),
    ],
    ids=["wrong", "unfit"],
)
def test_what_will_not_pass_is_remembered(monkeypatch, error, message):
    runs, current = failing(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=message):
        assert not operator.use_compiled(CPU)
    current[0] = None
    assert not operator.use_compiled(CPU)
    assert len(runs) == 1


def test_nothing_runs_while_a_graph_is_captured(monkeypatch):
    runs, _ = failing(monkeypatch, None)
    capturing = [True]
    monkeypatch.setattr(operator, "_is_capturing", lambda device: capturing[0])
    with deform_attn_implementation("compiled"), pytest.raises(RuntimeError, match="use the operator once before"):
        operator.use_compiled(CPU)
    with pytest.warns(RuntimeWarning, match="this time: its self-test on cpu has not run yet, .* a CUDA graph"):
        assert not operator.use_compiled(CPU)
    assert runs == []
    capturing[0] = False
    assert operator.use_compiled(CPU)
    capturing[0] = True
    assert operator.use_compiled(CPU)  # known from before


def test_asking_for_a_capture_does_not_initialize_cuda():
    assert not operator._is_capturing(CPU)
    before = torch.cuda.is_initialized()
    operator._is_capturing(GPU)
    assert torch.cuda.is_initialized() == before


# ---- threads


def first_uses(threads):
    """The verdicts of threads that ask at the same moment."""
    together = threading.Barrier(threads)

    def ask():
        together.wait()
        return operator.verdict(CPU)

    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(ask) for _ in range(threads)]]


def race(monkeypatch, threads, rounds):
    runs, _ = failing(monkeypatch, None)
    for number in range(1, rounds + 1):
        operator._verdicts.clear()
        found = set(first_uses(threads))
        assert len(found) == 1
        assert found.pop().usable
        assert len(runs) == number


def test_threads_at_first_use(monkeypatch):
    race(monkeypatch, threads=64, rounds=3)


@pytest.mark.slow
def test_many_threads_at_first_use(monkeypatch):
    race(monkeypatch, threads=64, rounds=50)


def test_threads_that_meet_an_error_that_passes(monkeypatch):
    """Each tries for itself; none of them leaves anything behind."""
    runs, current = failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert {found.final for found in first_uses(8)} == {False}
    assert len(runs) == 8
    current[0] = None
    assert {found.usable for found in first_uses(8)} == {True}
    assert len(runs) == 9


def test_the_thread_that_finds_out_may_ask_again(monkeypatch):
    """As a finalizer does that happens to run meanwhile."""
    real, depth = operator._self_test, []

    def again(device):
        depth.append(device)
        if len(depth) == 1:
            assert operator.verdict(device).usable
        real(device)

    monkeypatch.setattr(operator, "_self_test", again)
    assert operator.verdict(CPU).usable
    assert len(depth) == 2


# ---- time

PROGRAM = """
import sys, time
from pathlib import Path
import torch
from dino.layers.ops import operator, self_test
operator.FOLDER = Path(sys.argv[1])
operator.load("cpu")
start = time.process_time()
self_test.run(torch.ops.dino, torch.device("cpu"))
print(time.process_time() - start)
"""


@pytest.mark.slow
def test_it_takes_little_time():
    """50 ms on a quiet machine (median of new processes); room for a busy one is left."""
    times = []
    for _ in range(7):
        command = [sys.executable, "-c", PROGRAM, str(operator.FOLDER)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=compiled.ROOT, env=environment, capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    assert statistics.median(times) < 0.15, times
