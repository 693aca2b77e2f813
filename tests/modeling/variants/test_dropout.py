"""Dropout and activations of encoder and decoder."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dino.inference.cpu import prepare_for_cpu
from dino.modeling import Decoder, Encoder, SharedHeadsDecoder
from dino.modeling.detector import Detector
from dino.modeling.variants import DropoutDecoder, DropoutEncoder, SharedHeadsDropoutDecoder
from dino.training.memory_saving import checkpoint_activations

from ...tiny import default_criterion, random_batch, random_targets, stirred, tiny_network

SIZES = {"embed_dim": 32, "num_heads": 4, "num_levels": 4, "num_points": 2, "hidden_dim": 16}
PAIRS = [(Encoder, DropoutEncoder), (Decoder, DropoutDecoder), (SharedHeadsDecoder, SharedHeadsDropoutDecoder)]


def made(kind, **options):
    """A part of two layers, of always the same initial weights."""
    torch.manual_seed(1)
    classes = {} if issubclass(kind, Encoder) else {"num_classes": 3}
    return kind(num_layers=2, **classes, **SIZES, **options)


def network_of(encoder, decoder, **options):
    torch.manual_seed(0)
    network = tiny_network()
    network.encoder, network.decoder = made(encoder, **options), made(decoder, **options)
    return stirred(network)


def step(network, seed=3):
    """Losses and gradients of one batch."""
    torch.manual_seed(seed)
    batch, targets = random_batch(2), random_targets(2, 3)
    network.zero_grad()
    losses = default_criterion()(network(*batch, targets), targets)
    sum(losses.values()).backward()
    named = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in network.named_parameters()}
    return {**losses, **named}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5 * x.abs().max().item(), msg=name)


@pytest.mark.parametrize(("plain", "kind"), PAIRS)
def test_weights_are_those_of_the_plain_part(plain, kind):
    """Names and initial values, hence a checkpoint of either loads into the other."""
    expected, found = made(plain).state_dict(), made(kind, activation="gelu").state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    shared = made(kind).state_dict(keep_vars=True)
    assert len({id(x) for x in shared.values()}) == len(
        {id(x) for x in made(plain).state_dict(keep_vars=True).values()}
    )


@pytest.mark.parametrize("decoders", [PAIRS[1], PAIRS[2]])
def test_without_dropout_it_is_the_plain_network(decoders):
    """With a chance of 0 in training too, with any chance in evaluation."""
    plain, variant = decoders
    expected = network_of(Encoder, plain)
    assert_same(step(network_of(DropoutEncoder, variant, dropout=0.0)), step(expected))
    images = random_batch(2)
    likely = network_of(DropoutEncoder, variant, dropout=0.5)
    with torch.no_grad():
        outputs = likely.eval()(*images).decoder, expected.eval()(*images).decoder
    for found, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(found, wanted)


def test_dropout_is_drawn_anew_in_training():
    network = network_of(DropoutEncoder, DropoutDecoder, dropout=0.5)
    first, again, other = step(network), step(network), step(network, seed=4)
    assert_same(again, first)  # of one seed
    torch.manual_seed(3)
    batch, targets = random_batch(2), random_targets(2, 3)
    torch.manual_seed(5)
    assert default_criterion()(network(*batch, targets), targets)["loss_ce"] != first["loss_ce"]
    assert other["loss_ce"].isfinite()


@pytest.fixture
def places(monkeypatch):
    """Shape and chance of each dropout, in the order of the calls; -1 for the weights of an attention."""
    found, drop, attend = [], F.dropout, F.scaled_dot_product_attention

    def noting(x, p=0.5, training=True, inplace=False):
        found.append((x.shape[-1], p) if training else None)
        return drop(x, 0.0, training)

    def attending(q, k, v, attn_mask=None, dropout_p=0.0):
        found.append((-1, dropout_p))
        return attend(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "dropout", noting)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attending)
    return found


def test_places_are_those_of_the_official_layers(places):
    """Result of each attention, hidden state, result of the feed-forward network; weights of the self-attention."""
    network = network_of(DropoutEncoder, DropoutDecoder, dropout=0.25)
    network(*random_batch(2), random_targets(2, 3))
    encoder = [(32, 0.25), (16, 0.25), (32, 0.25)]
    decoder = [(-1, 0.25), (32, 0.25), *encoder]
    assert places == 2 * encoder + 2 * decoder
    places.clear()
    network.eval()(*random_batch(2))
    assert [place for place in places if place] == 2 * [(-1, 0.0)]


def feed_forward_by_loops(module, x, activate):
    """(N, E) -> the same, number by number."""
    rows = []
    for row in x.tolist():
        hidden = [
            activate(sum(w * n for w, n in zip(weights, row, strict=True)) + bias)
            for weights, bias in zip(module.linear1.weight.tolist(), module.linear1.bias.tolist(), strict=True)
        ]
        result = [
            old + bias + sum(w * n for w, n in zip(weights, hidden, strict=True))
            for old, weights, bias in zip(
                row, module.linear2.weight.tolist(), module.linear2.bias.tolist(), strict=True
            )
        ]
        mean = sum(result) / len(result)
        deviation = math.sqrt(sum((n - mean) ** 2 for n in result) / len(result) + module.norm.eps)
        rows.append([(n - mean) / deviation for n in result])
    return torch.tensor(rows)


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kind", [DropoutEncoder, DropoutDecoder])
def test_activations(name, kind):
    module = made(kind, dropout=0.0, activation=name).layers[1].feed_forward
    x = torch.randn(3, 32)
    torch.testing.assert_close(module(x[None])[0], feed_forward_by_loops(module, x, ACTIVATIONS[name]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "glu"}, "unknown activation 'glu'; there are relu, gelu, selu"),
        ({"dropout": 1.0}, "dropout is 1.0, but a number from 0 to below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
@pytest.mark.parametrize("kind", [kind for _, kind in PAIRS])
def test_what_makes_no_sense_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        made(kind, **options)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_cpu_predicts_the_same(activation):
    """Its faster modules know ReLU alone and do not replace these."""
    network = network_of(DropoutEncoder, DropoutDecoder, dropout=0.3, activation=activation).eval()
    detector = Detector(network, names=["red", "green", "blue"])
    batch = random_batch(2, 192, 256)  # more tokens than a part of the faster network
    with torch.no_grad():
        expected = network(*batch).decoder
        prepare_for_cpu(detector.eval())
        for found, wanted in zip(detector.network(*batch).decoder, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_draws_the_same_numbers():
    network = network_of(DropoutEncoder, DropoutDecoder, dropout=0.3, activation="gelu")
    saved = Detector(copy.deepcopy(network), names=["red", "green", "blue"])
    checkpoint_activations(saved, ["encoder", "decoder"])
    assert_same(step(saved.network), step(network))


def test_parts_are_one_graph_in_training():
    """`fullgraph` refuses a break."""
    network = network_of(DropoutEncoder, DropoutDecoder, dropout=0.3, activation="gelu")
    encoder, decoder = (
        torch.compile(part, fullgraph=True, dynamic=True, backend="eager")
        for part in (network.encoder, network.decoder)
    )
    images, padding = random_batch(2)
    tokens = network.tokenize(network.neck(images), padding)
    torch.manual_seed(5)
    memory = network.encoder(tokens)
    expected = network.decoder(network.query_selection(memory)[0], memory)
    torch.manual_seed(5)
    memory = encoder(tokens)
    for found, wanted in zip(decoder(network.query_selection(memory)[0], memory), expected, strict=True):
        torch.testing.assert_close(found, wanted)
