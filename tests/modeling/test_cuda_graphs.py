"""Inference by CUDA graphs: when one is recorded, replayed, dropped; on a CPU with a recorder that only pretends.

On a GPU, `pytest -k cuda_graph` shows that replayed results are those of the network, bit for bit.
"""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dino.layers import deform_attn_implementation
from dino.modeling import CudaGraphs
from dino.modeling.cuda_graphs import _CudaRecorder, _key_of, _Storage
from dino.utils import device

from ..tiny import random_batch, tiny_network

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZES = ((64, 96), (96, 64), (128, 72))


class FakeRecorder:
    """Replays by calling the function again; what it returns is written into the first result."""

    def __init__(self, error=None):
        self.recorded, self.replayed, self.ordered = 0, 0, 0
        self.error = error
        self.open = True

    def ready(self, images):
        return self.open

    def record(self, function):
        if self.error:
            raise self.error
        self.recorded += 1
        result = function()

        def replay():
            self.replayed += 1
            for static, new in zip(tensors(result), tensors(function()), strict=True):
                static.copy_(new)

        return replay, result

    def order(self):
        self.ordered += 1


@pytest.fixture
def network():
    return stirred(tiny_network(num_layers=1))


@torch.no_grad()
def stirred(model):
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def run(graphs, *batch):
    """Results of graphs and of the network itself must be the same."""
    with torch.no_grad():
        assert_same(graphs(*batch), graphs.network(*batch))


def assert_same(ours, theirs):
    ours, theirs = tensors(ours), tensors(theirs)
    assert len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def tensors(results):
    return [x for x in tree_leaves(results) if x is not None]


def counts(graphs):
    return graphs.recorder.recorded, graphs.recorder.replayed


def test_the_second_batch_of_a_size_is_recorded_and_replayed_from_then_on(network):
    graphs = CudaGraphs(network, recorder=FakeRecorder())
    for expected in ((0, 0), (1, 1), (1, 2)):
        run(graphs, *random_batch(1))
        assert counts(graphs) == expected
    run(graphs, *random_batch(1, 96, 64))
    run(graphs, *random_batch(2))
    assert counts(graphs) == (1, 2)


def test_results_stay_when_the_next_batch_comes(network):
    graphs = CudaGraphs(network, recorder=FakeRecorder())
    first, second = random_batch(2), random_batch(2)
    with torch.no_grad():
        graphs(*first)
        kept = graphs(*first)
        graphs(*second)
        assert_same(kept, network(*first))


def test_padding_is_an_input(network):
    """Batches of one size whose images are padded differently share a graph, and differ in their results."""
    graphs = CudaGraphs(network, recorder=FakeRecorder())
    images, padding = random_batch(2)
    for mask in (padding, torch.zeros_like(padding), padding):
        run(graphs, images, mask)
    assert counts(graphs) == (1, 2)


def test_the_least_recently_used_goes(network):
    graphs = CudaGraphs(network, most=2, recorder=FakeRecorder())
    a, b, c = (random_batch(1, *size) for size in SIZES)
    for batch in (a, a, b, b, a, c, c):  # b is the one that was not used for longest
        run(graphs, *batch)
    assert counts(graphs)[0] == 3
    assert list(graphs.graphs) == [_key_of(*a), _key_of(*c)]
    run(graphs, *a)
    assert counts(graphs)[0] == 3
    run(graphs, *b)  # has been seen: recorded at once
    assert counts(graphs)[0] == 4
    assert list(graphs.graphs) == [_key_of(*a), _key_of(*b)]


def test_sizes_that_never_come_again_are_forgotten(network, monkeypatch):
    monkeypatch.setattr("dino.modeling.cuda_graphs._REMEMBERED", 2)
    graphs = CudaGraphs(network, recorder=FakeRecorder())
    for size in (*SIZES, SIZES[0]):
        run(graphs, *random_batch(1, *size))
    assert counts(graphs) == (0, 0)
    assert len(graphs.seen) == 2


def test_new_values_are_seen_and_new_places_drop_the_graphs(network):
    graphs = CudaGraphs(network, recorder=FakeRecorder())
    batch = random_batch(1)
    run(graphs, *batch)
    run(graphs, *batch)
    stirred(network)
    run(graphs, *batch)
    assert counts(graphs) == (1, 2)
    network.to(torch.float64).to(torch.float32)
    for expected in ((1, 2), (2, 3)):
        run(graphs, *batch)
        assert counts(graphs) == expected


@pytest.mark.parametrize("change", ["parameter", "module", "buffer", "data"])
def test_what_is_replaced_is_noticed(network, change):
    network.register_buffer("extra", torch.zeros(2))
    places = _Storage(network)
    assert places.unchanged()
    if change == "parameter":
        network.level_embed = nn.Parameter(network.level_embed.detach().clone())
    elif change == "module":
        network.decoder.norm = copy.deepcopy(network.decoder.norm)
    elif change == "buffer":
        network.extra = torch.zeros(2)
    else:
        network.level_embed.data = network.level_embed.detach().clone()
    assert not places.unchanged()


def test_hooks_are_called(network):
    graphs, calls = CudaGraphs(network, recorder=FakeRecorder()), []
    batch = random_batch(1)
    run(graphs, *batch)
    handle = network.decoder.register_forward_hook(lambda *_: calls.append(1))
    run(graphs, *batch)
    run(graphs, *batch)
    assert counts(graphs) == (0, 0)
    assert len(calls) == 4
    handle.remove()
    run(graphs, *batch)
    assert counts(graphs) == (1, 1)


def test_training_gradients_and_other_recordings_run_the_network(network):
    graphs = CudaGraphs(network, recorder=FakeRecorder())
    batch = random_batch(1)
    for _ in range(3):
        assert graphs(*batch).decoder.logits.requires_grad
    with torch.no_grad():
        network.train()
        for _ in range(3):
            graphs(*batch)
        network.eval()
        graphs.recorder.open = False
        for _ in range(3):
            graphs(*batch)
    assert counts(graphs) == (0, 0)


def test_what_chooses_other_kernels_makes_other_graphs(network):
    batch = random_batch(1)
    keys = {_key_of(*batch), _key_of(batch[0].to(torch.bfloat16), batch[1]), _key_of(*random_batch(2))}
    keys.add(_key_of(batch[0].contiguous(memory_format=torch.channels_last), batch[1]))
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(_key_of(*batch))
    with deform_attn_implementation("reference"):
        keys.add(_key_of(*batch))
    torch.use_deterministic_algorithms(True)
    keys.add(_key_of(*batch))
    torch.use_deterministic_algorithms(False)
    assert len(keys) == 7


def test_autocast_keeps_nothing_across_the_border_of_a_graph(network):
    graphs, cached = CudaGraphs(network, recorder=FakeRecorder()), []
    network.forward = lambda *batch: cached.append(torch.is_autocast_cache_enabled()) or batch[0] @ batch[0].mT
    batch = random_batch(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = [graphs(*batch) for _ in range(2)]
    assert [x.dtype for x in results] == [torch.bfloat16] * 2
    assert cached == [True, False, False]


def test_a_recording_that_fails_is_told_once(network):
    recorder = FakeRecorder(RuntimeError("operation not permitted when stream is capturing\nmore"))
    graphs, batch = CudaGraphs(network, recorder=recorder), random_batch(1)
    run(graphs, *batch)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: operation not permitted when stream is capturing$"):
        run(graphs, *batch)
    recorder.error = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            run(graphs, *batch)
    assert counts(graphs) == (0, 0)


def test_errors_of_the_network_are_its_own(network):
    """They are no reason to do without graphs: the same call fails without."""
    graphs = CudaGraphs(network, recorder=FakeRecorder())
    with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
        graphs(torch.zeros(1, 5, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    assert not graphs.failure


def test_inference_mode_leaves_nothing_that_cannot_be_used_outside(network):
    graphs, batch = CudaGraphs(network, recorder=FakeRecorder()), random_batch(1)
    with torch.inference_mode():
        for _ in range(2):
            graphs(*batch)
    for static in graphs.graphs[_key_of(*batch)].inputs:
        assert not static.is_inference()


def test_copies_record_for_themselves(network):
    graphs, batch = CudaGraphs(network, most=3, recorder=FakeRecorder()), random_batch(1)
    run(graphs, *batch)
    run(graphs, *batch)
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert not other.graphs
        assert other.most == 3
        assert other.network is not network
        run(other, *batch)


def test_threads_take_turns():
    """Each gets the result of its own input; the network here is a product that only one may work on at a time."""
    network = nn.Identity().eval()
    network.forward = lambda images, padding: images * 2
    graphs, wrong = CudaGraphs(network, recorder=FakeRecorder()), []
    padding = torch.zeros(1, 8, 8, dtype=torch.bool)

    def work(number):
        with torch.no_grad():
            for _ in range(50):
                result = graphs(torch.full((1, 3, 8, 8), float(number)), padding)
                wrong.extend([number] * (not bool((result == 2 * number).all())))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert graphs.recorder.replayed >= 4 * 50 - 4


def test_at_least_one_graph(network):
    with pytest.raises(ValueError, match="at least one graph"):
        CudaGraphs(network, most=0)


def test_a_cpu_has_none(network):
    graphs = CudaGraphs(network)
    for _ in range(3):
        run(graphs, *random_batch(1))
    assert not graphs.seen


def test_nothing_is_recorded_on_a_cpu():
    assert not device.recording(torch.device("cpu"))
    assert not _CudaRecorder().ready(torch.zeros(1))


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_graphs(network):
    return CudaGraphs(network.to("cuda"), most=2)


def gpu_batch(*arguments):
    return [x.to("cuda") for x in random_batch(*arguments)]


@on_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_cuda_graph_equals_the_network(gpu_graphs, dtype):
    """Three sizes for two graphs, so that one is always dropped; every batch holds other images."""
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        for _ in range(4):
            for height, width in SIZES:
                run(gpu_graphs, *gpu_batch(2, height, width))
        for _ in range(4):
            run(gpu_graphs, *gpu_batch(2, *SIZES[0]))
    assert len(gpu_graphs.graphs) == 2
    assert not gpu_graphs.failure


@on_gpu
def test_cuda_graph_sees_new_weights_and_new_places(gpu_graphs):
    for change in (lambda: None, lambda: stirred(gpu_graphs.network), lambda: gpu_graphs.network.cpu().to("cuda")):
        change()
        for _ in range(3):
            run(gpu_graphs, *gpu_batch(1))
    assert len(gpu_graphs.graphs) == 1
    assert not gpu_graphs.failure


@on_gpu
def test_cuda_graph_on_other_streams_and_in_inference_mode(gpu_graphs):
    for number in range(6):
        batch = gpu_batch(1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode(number % 2 == 0), torch.no_grad():
            ours = gpu_graphs(*batch)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            assert_same(ours, gpu_graphs.network(*batch))
    assert len(gpu_graphs.graphs) == 1


@on_gpu
def test_cuda_graph_of_a_network_that_waits_is_given_up(network):
    network.to("cuda")
    inner = network.forward

    def waits(images, padding):
        images.sum().item()
        return inner(images, padding)

    network.forward = waits
    graphs = CudaGraphs(network)
    run(graphs, *gpu_batch(1))
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        run(graphs, *gpu_batch(1))
    for _ in range(3):
        run(graphs, *gpu_batch(1))
    again = CudaGraphs(stirred(tiny_network(num_layers=1)).to("cuda"))  # the failure has spoilt nothing
    for _ in range(3):
        run(again, *gpu_batch(1))
    assert len(again.graphs) == 1


@on_gpu
def test_cuda_graph_gives_its_memory_back(network):
    network.to("cuda")
    run(CudaGraphs(network), *gpu_batch(1))
    before = torch.cuda.memory_allocated()
    graphs = CudaGraphs(network, most=1)
    for size in (*SIZES, *SIZES) * 2:
        run(graphs, *gpu_batch(1, *size))
    assert graphs.graphs
    graphs.clear()
    assert torch.cuda.memory_allocated() - before < 2**20
