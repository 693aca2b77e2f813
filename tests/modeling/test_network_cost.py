import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from dino.layers import MultiScaleDeformableAttention
from dino.layers.ops.operator import deform_attn_implementation, use_compiled
from dino.layers.relation import PositionRelation
from dino.modeling import TorchvisionBackbone, build_dino, network_cost
from dino.modeling.blocks import find_blocks
from dino.modeling.variants import RelationDecoder, SecondPass, SharedHybridBranch

from ..tiny import default_criterion, random_targets, tiny_network

COMPILED = pytest.param(
    "compiled", marks=pytest.mark.skipif(not use_compiled(torch.device("cpu")), reason="the operator is not built")
)


@pytest.fixture(scope="module")
def r50():
    """4 and 5 scales with frozen parts and 80 classes as in the recipes, without Detectron2."""
    networks = {}
    for features in (["res3", "res4", "res5"], ["res2", "res3", "res4", "res5"]):
        backbone = TorchvisionBackbone("resnet50", out_features=features)
        levels = len(features) + 1
        networks[levels] = build_dino(backbone=backbone, in_features=features, num_levels=levels, num_classes=80)
    return networks


def test_parameters_by_part():
    network = tiny_network()
    network.neck.backbone.res3.requires_grad_(False)
    counts = network_cost.count_parameters(network)
    assert counts["total"][0] == sum(p.numel() for p in network.parameters())
    parts = sum(counts[name][0] for name in network_cost._PARTS)
    assert counts["total"][0] - parts == network.level_embed.numel()
    frozen = sum(p.numel() for p in network.neck.backbone.res3.parameters())
    assert [a - b for a, b in counts.values()] == [frozen, 0, 0, 0, 0, 0, 0, frozen]


def test_costs_of_branches():
    """Their parameters count, their work in training alone, apart from that of the decoder."""
    plain = tiny_network()
    with_branches = tiny_network(branches={"a": SharedHybridBranch(num_queries=7, embed_dim=32), "b": SecondPass()})
    ours, theirs = (network_cost.count_parameters(network) for network in (with_branches, plain))
    assert theirs["branches"] == (0, 0)
    assert ours["branches"] == (7 * 32, 7 * 32)
    assert ours["total"][0] == theirs["total"][0] + 7 * 32
    targets = random_targets(2)
    for objects in (None, targets):
        ours, theirs = (
            network_cost.count_multiply_adds(network, 1, 64, 64, objects) for network in (with_branches, plain)
        )
        assert ours["total"] == theirs["total"] + ours["branches"]
        assert {k: v for k, v in ours.items() if k not in ("total", "branches")} == {
            k: v for k, v in theirs.items() if k not in ("total", "branches")
        }
        assert theirs["branches"] == 0
        assert bool(ours["branches"]) == (objects is not None)
    second = tiny_network(branches={"b": SecondPass()})
    costs = network_cost.count_multiply_adds(second, 1, 64, 64, targets)
    assert 0.5 * costs["decoder"] < costs["branches"] < costs["decoder"]  # the same queries, with less self-attention
    assert list(second.branches) == ["b"]


def test_multiply_adds_of_an_attention_by_hand():
    """Batch 2, 7 queries, 4 heads of 8 channels, 2 levels of 2 points on 15 + 4 cells."""
    module = MultiScaleDeformableAttention(32, 4, 2, 2)
    queries, cells, samples = 2 * 7, 2 * 19, 4 * 2 * 2
    linear = queries * 32 * (2 * samples + samples + 32) + cells * 32 * 32
    expected = linear + queries * samples * 8 * 5
    inputs = (torch.rand(2, 7, 32), torch.rand(2, 7, 2, 2), torch.rand(2, 19, 32), torch.zeros(2, 19) > 0)
    counter = network_cost.FlopCounterMode(display=False, custom_mapping=network_cost._operator_formulas())
    with counter:
        module(*inputs, [(3, 5), (2, 2)])
    assert counter.get_total_flops() == 2 * expected


def test_the_first_count_of_a_process_has_the_operator_too():
    """Also where nothing has loaded it before."""
    program = (
        "from dino.modeling.network_cost import count_multiply_adds\n"
        "from tests.tiny import tiny_network\n"
        "network = tiny_network()\n"
        "print(*(count_multiply_adds(network, 1, 64, 64)['total'] for _ in range(2)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    first, second = done.stdout.split()
    assert first == second


def test_multiply_adds_of_the_relation_counted_by_hand():
    """Batch 2, 3 heads of 4 channels, 5 queries; 32 products for the code of distances, 33 for that of sizes."""
    q, boxes = torch.rand(2, 3, 5, 4), torch.rand(2, 5, 4)
    counter = network_cost.FlopCounterMode(display=False, custom_mapping=network_cost._operator_formulas())
    with counter:
        PositionRelation(3)(q, q, q, mask=None, source=boxes, target=boxes)
    assert counter.get_total_flops() == 2 * (2 * 3 * 5 * 5) * (4 + 32 + 33 + 4)


@pytest.mark.parametrize("choice", ["reference", COMPILED])
def test_both_forms_of_the_operator_count_alike(choice, r50):
    with deform_attn_implementation("reference"):
        expected = network_cost.count_multiply_adds(r50[4], 1, 200, 320)
    with deform_attn_implementation(choice):
        counts = network_cost.count_multiply_adds(r50[4], 1, 200, 320)
    assert counts == expected
    assert counts["total"] == sum(counts[name] for name in network_cost._PARTS)
    assert 0 < counts["neck"] < counts["neck.backbone"]


@pytest.mark.parametrize(("levels", "published", "tolerance"), [(4, 279e9, 0.03), (5, 860e9, 0.05)])
def test_multiply_adds_are_those_of_the_paper(r50, levels, published, tolerance):
    """At 5 scales the official program has 11 G more in the box head of its encoder, which it runs on every token."""
    assert network_cost.count_multiply_adds(r50[levels], 1, 800, 1280)["total"] == pytest.approx(
        published, rel=tolerance
    )


def test_multiply_adds_are_those_of_fvcore():
    """By kind of operator. fvcore knows no fused attention, counts 4 multiply-adds for a channel of a sample, and skips
    what no result needs: the last layer's boxes for a next layer."""
    analysis = pytest.importorskip("fvcore.nn")
    network = tiny_network().eval()
    images, _ = network_cost.empty_images(network, 1, 96, 128)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            outputs = self.network(images, None)
            return outputs.decoder, outputs.proposals

    with torch.no_grad():
        theirs = analysis.FlopCountAnalysis(Wrapper(), images).unsupported_ops_warnings(False).by_operator()
    counter = network_cost.FlopCounterMode(display=False, custom_mapping=network_cost._operator_formulas())
    with network_cost.nothing_computed(network, training=False), counter:
        network(*network_cost.empty_images(network, 1, 96, 128))
    ours = {str(name).split(".")[-1]: flops // 2 for name, flops in counter.get_flop_counts()["Global"].items()}
    samples = sum(flops for name, flops in ours.items() if "deform_attn" in name or "grid_sampler" in name)
    products = sum(ours.get(name, 0) for name in ("mm", "addmm", "bmm", "linear"))
    attention = sum(flops for name, flops in ours.items() if "dot_product" in name)
    unused = 12 * sum(p.numel() for p in network.decoder.box_heads[-1].parameters() if p.dim() == 2)
    assert ours["convolution"] == theirs["conv"]
    assert products == theirs["linear"] + unused
    assert attention == 2 * 2 * 12 * 12 * 32  # two layers, two products, 12 queries of 32 channels
    assert samples * 4 == theirs["grid_sampler"] * 5
    total = network_cost.count_multiply_adds(network, 1, 96, 128)["total"]
    assert total == theirs["conv"] + theirs["linear"] + unused + theirs["grid_sampler"] * 5 // 4 + attention


def test_multiply_adds_grow_with_the_batch_and_computing_is_not_needed(r50):
    one = network_cost.count_multiply_adds(r50[4], 1, 320, 320)["total"]
    assert network_cost.count_multiply_adds(r50[4], 64, 320, 320)["total"] == 64 * one


def kept_in_truth(network, height, width):
    """Bytes that autograd keeps in a real training forward."""
    own = {x.data_ptr() for x in (*network.parameters(), *network.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images, padding = network_cost.empty_images(network, 1, height, width)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = network.train()(images, padding)
    del outputs
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("choice", ["reference", COMPILED])
def test_activations_are_those_of_a_real_run(choice):
    network = tiny_network(num_layers=2)
    with deform_attn_implementation(choice):
        counted = network_cost.count_activations(network, 1, 64, 96)
        truth = kept_in_truth(network, 64, 96)
    assert counted == pytest.approx(truth, rel=0.01)


def test_activations_of_the_relation():
    """Its operator keeps in truth what the count says."""
    network = tiny_network(num_layers=2)
    network.decoder = RelationDecoder(
        num_classes=3, num_layers=2, embed_dim=32, num_heads=4, num_points=2, hidden_dim=16
    )
    counted = network_cost.count_activations(network, 1, 64, 96)
    assert counted == pytest.approx(kept_in_truth(network, 64, 96), rel=0.01)


def test_checkpointing_shows():
    backbone = TorchvisionBackbone("resnet50", norm="BN")
    network = build_dino(backbone=backbone, num_classes=3, encoder_layers=1, decoder_layers=1)
    before = network_cost.count_activations(network, 1, 320, 320)
    blocks = set(find_blocks(backbone).values())
    apply_activation_checkpointing(backbone, check_fn=blocks.__contains__)
    assert network_cost.count_activations(network, 1, 320, 320) < 0.7 * before


def test_networks_are_left_as_they_were():
    network = tiny_network()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    for training in (True, False):
        network.train(training)
        network_cost.count_multiply_adds(network, 1, 64, 64)
        network_cost.count_activations(network, 1, 64, 64)
        assert network.training is training
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_measured_runs():
    network = tiny_network()
    device = torch.device("cpu")
    calls = []
    assert len(network_cost.measure_seconds(lambda: calls.append(1), device, runs=3)) == 3
    assert len(calls) == 5
    outputs = network_cost.inference(network, 2, 64, 64)()
    assert outputs.decoder.logits.shape[1] == 2
    assert not outputs.decoder.logits.requires_grad
    network_cost.training_step(network, default_criterion(), 2, 64, 64, objects=3)()
    assert all(p.grad is not None for p in network.parameters())
