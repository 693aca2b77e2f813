"""One `Predictor` for several threads: each finds what one thread alone finds, to the last bit."""

import inspect
import queue
import threading
from functools import partial

import numpy as np
import pytest
import torch

from dino.inference.predictor import Predictor
from dino.modeling import CudaGraphs
from dino.modeling.compile import PARTS
from dino.utils.files import DataError

from ..modeling.test_compile import Counted
from ..modeling.test_cuda_graphs import FakeRecorder
from ..tiny import tiny_network
from .test_predictor import equal, picture, tiny, write_checkpoint

THREADS = 8
SIZES = [(40, 50), (64, 64), (72, 130), (90, 50), (33, 97), (128, 64)]
LITTLE = partial(tiny_network, num_layers=1, num_levels=2)
PICTURES = [picture(*size, seed=number) for number, size in enumerate(SIZES * 2)]


def in_threads(work, count=THREADS):
    """Call `work(number)` in threads that begin together -> what each returned; the first error is raised."""
    results, errors, start = {}, queue.Queue(), threading.Barrier(count)

    def run(number):
        try:
            start.wait()
            results[number] = work(number)
        except BaseException as error:
            errors.put(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not errors.empty():
        raise errors.get()
    return [results[number] for number in range(count)]


def assert_equal_in_threads(predictor, expected, count=THREADS, pictures=PICTURES):
    def work(number):
        order = np.random.default_rng(number).permutation(len(pictures))
        return [(index, predictor(pictures[index])) for index in order]

    for found in in_threads(work, count):
        assert all(equal(one, expected[index]) for index, one in found)


@pytest.mark.parametrize(
    "options", [{}, {"tile": 48}, {"nms": 0.5, "score_thresh": 0.3}], ids=["whole", "tiles", "nms"]
)
def test_changing_sizes(options):
    predictor = tiny(**options)
    assert_equal_in_threads(predictor, [predictor(x) for x in PICTURES])


def test_fused_operations_of_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    write_checkpoint(tmp_path / "model.pth")
    predictor = Predictor.from_checkpoint(tmp_path / "model.pth", device="cpu", score_thresh=0)
    pictures = [picture(*size) for size in ((64, 96), (96, 64), (70, 90), (90, 61))]
    assert_equal_in_threads(predictor, [predictor(x) for x in pictures], pictures=pictures)


def test_batches_and_streams():
    """Each thread has its own iterator; batches are those of one thread."""
    predictor = tiny(batch_size=4)

    def stream(number):
        order = np.random.default_rng(number).permutation(len(PICTURES))
        return list(predictor.stream(PICTURES[index] for index in order))

    expected = [stream(number) for number in range(THREADS)]
    for found, alone in zip(in_threads(stream), expected, strict=True):
        assert all(equal(one, other) for one, other in zip(found, alone, strict=True))


def test_cuda_graphs_of_a_stand_in():
    """Its graphs of two sizes are recorded and dropped all the time."""
    predictor = tiny()
    expected = [predictor(x) for x in PICTURES]
    graphs = CudaGraphs(predictor.network, most=2, recorder=FakeRecorder())
    predictor.detector.graphs = graphs
    assert_equal_in_threads(predictor, expected)
    assert graphs.recorder.replayed > THREADS
    assert len(graphs.graphs) == 2


def count_graphs(pictures, threads):
    """How often code is compiled for these pictures in so many threads; their results must be those without."""
    torch._dynamo.reset()
    backend, plain = Counted("eager"), tiny(LITTLE)
    assert_equal_in_threads(tiny(LITTLE).compile(backend=backend), [plain(x) for x in pictures], threads, pictures)
    torch._dynamo.reset()
    return backend.graphs


def test_compiled_as_often_as_by_one_thread():
    """Threads that meet the same size at once do not compile their own code for it."""
    assert count_graphs(PICTURES[:1], 4) == count_graphs(PICTURES[:1], 1)


@pytest.mark.slow
def test_compiled_for_changing_sizes():
    """Which sizes come first decides what is special in a graph: the number differs by a few."""
    assert count_graphs(PICTURES, 8) <= count_graphs(PICTURES, 1) + 4


def test_the_limit_of_graphs_holds_in_every_thread(monkeypatch):
    """PyTorch's own setting holds for the thread that makes it."""
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **options: given.append(options))
    tiny(LITTLE).compile()
    assert len(given) == len(PARTS)
    argument = "recompile_limit" in inspect.signature(torch.compile).parameters  # else the setting is the process's
    assert {options.get("recompile_limit") for options in given} == {64 if argument else None}


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    predictor = tiny().compile()
    expected = [predictor(x) for x in PICTURES]
    assert_equal_in_threads(predictor, expected)
    for one, other in zip(expected, map(tiny(), PICTURES), strict=True):
        assert torch.allclose(one.scores, other.scores, atol=1e-4)


def test_an_error_stays_in_its_thread():
    predictor = tiny()
    expected = [predictor(x) for x in PICTURES]

    def work(number):
        if number % 2:
            with pytest.raises(DataError, match="uint8"):
                predictor(PICTURES[0].astype(np.float64))
        return [predictor(x) for x in PICTURES]

    for found in in_threads(work):
        assert all(equal(one, other) for one, other in zip(found, expected, strict=True))


def test_modes_of_a_thread_are_its_own():
    """Autocast, gradients and inference mode hold for one thread: others compute as before."""
    predictor = tiny()
    expected = [predictor(x) for x in PICTURES]

    def work(number):
        if number % 2:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
                found = [predictor(x) for x in PICTURES]
                assert torch.is_grad_enabled()
                assert not found[0].scores.requires_grad
            return None
        with torch.inference_mode(number % 4 == 0):
            return [predictor(x) for x in PICTURES]

    for found in in_threads(work)[::2]:
        assert all(equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_iterator_of_pictures_is_shared_with_a_lock_only():
    """Threads that take from one queue share the work; a generator of Python refuses two threads at once."""
    predictor, todo = tiny(), queue.SimpleQueue()
    expected = [predictor(x) for x in PICTURES]
    for index in range(len(PICTURES)):
        todo.put(index)

    def work(number):
        found = {}
        while True:
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return found
            found[index] = predictor(PICTURES[index])

    found = {index: one for part in in_threads(work) for index, one in part.items()}
    assert sorted(found) == list(range(len(PICTURES)))
    assert all(equal(found[index], expected[index]) for index in found)


def test_shared_inputs_are_not_changed():
    predictor, before = tiny(), [x.copy() for x in PICTURES]
    in_threads(lambda number: predictor(PICTURES))
    assert all(np.array_equal(one, other) for one, other in zip(PICTURES, before, strict=True))
