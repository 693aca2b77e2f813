import pytest
import torch
from torch import nn

from dino.modeling import Encoder
from dino.modeling.variants import DeepFusionEncoder, DenseFusionEncoder, LearnedPositionEncoding, PlacedEncoder
from dino.structures import Tokens
from dino.weights import load_weights

from ...descendants.branches import load
from ...tiny import default_criterion, random_batch, random_targets, tiny_network

SIZES = {"embed_dim": 32, "num_heads": 4, "num_levels": 4, "num_points": 2, "hidden_dim": 16}
FUSIONS = [DenseFusionEncoder, DeepFusionEncoder]


# Positions


@torch.no_grad()
def test_learned_positions():
    """Cells lie at their centres within the unpadded part; between codes it is linear."""
    encoding = LearnedPositionEncoding(4, num_codes=3)
    encoding.rows.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 10.0], [4.0, 40.0]]))
    encoding.columns.weight.copy_(-encoding.rows.weight)
    code = encoding(torch.zeros(1, 2, 4, dtype=torch.bool))[0]  # (4, 2, 4)
    # Rows at 1/4 and 3/4 of the way: codes 0.5 and 1.5. Columns at 1/8, 3/8, 5/8, 7/8: codes 0.25, 0.75, 1.25, 1.75.
    torch.testing.assert_close(code[0], torch.tensor([[0.5], [2.5]]).expand(2, 4))
    torch.testing.assert_close(code[2], -torch.tensor([0.25, 0.75, 1.75, 3.25]).expand(2, 4))
    torch.testing.assert_close(code[3], 10 * code[2])
    padding = torch.zeros(1, 3, 5, dtype=torch.bool)
    padding[:, 2:] = padding[:, :, 4:] = True
    padded = encoding(padding)[0]
    torch.testing.assert_close(padded[:, :2, :4], code)
    assert padded.isfinite().all()


def test_positions_reach_the_decoder_without_an_encoder():
    network = tiny_network()
    network.encoder = PlacedEncoder(num_layers=0, **SIZES)
    tokens = network.tokenize(network.neck(random_batch(2)[0]), random_batch(2)[1])
    assert network.encoder(tokens).features.shape == tokens.features.shape
    plain = tokens._replace(features=torch.zeros_like(tokens.features))
    assert torch.equal(network.encoder(plain).features, plain.position)


# Fusion


class Given(nn.Module):
    """A layer that returns one state, whatever it reads."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, x, tokens, reference):
        return self.state


@pytest.mark.parametrize(
    ("kind", "place", "names"),
    [
        (DenseFusionEncoder, "stable_dino/fusion", {"0": "fusion", "1": "fusion_norm"}),
        (DeepFusionEncoder, "relation/fusion", {"0": "fusion", "2": "fusion_output", "3": "fusion_norm"}),
    ],
)
def test_the_public_fusions(kind, place, names):
    """Outputs and gradients of the public programs, for given states."""
    recorded = load(place)
    states = recorded["states"].requires_grad_()
    encoder = kind(num_layers=0, embed_dim=16, num_heads=2, num_levels=1, num_points=1, hidden_dim=8)
    encoder.fusion = nn.Linear(64, 16)
    encoder.double().layers = nn.ModuleList(map(Given, states[1:]))
    weights = {name[8:]: x for name, x in recorded.items() if name.startswith("weights/")}
    own = {f"{names[name.partition('.')[0]]}.{name.partition('.')[2]}": x for name, x in weights.items()}
    encoder.load_state_dict(own)
    tokens = Tokens(states[0], states[0].detach(), None, [(1, 5)], torch.tensor([[[5.0, 1.0]]] * 2))
    output = encoder(tokens).features
    (output.flatten() * torch.arange(output.numel()).cos()).sum().backward()
    found = {"output": output, "gradients/states": states.grad}
    parameters = dict(encoder.named_parameters())
    found |= {f"gradients/weights/{theirs}": parameters[ours].grad for theirs, ours in zip(weights, own, strict=True)}
    assert found.keys() == {name for name in recorded if name.startswith(("output", "gradients"))}
    for name, x in found.items():
        torch.testing.assert_close(x, recorded[name], rtol=0, atol=1e-6 * recorded[name].abs().max().item())


def encoders(kind, num_layers=2):
    """An `Encoder` whose last norm has learned something, a fusion with its weights, and the report of loading."""
    plain, network = tiny_network(), tiny_network()
    plain.encoder, network.encoder = Encoder(num_layers=num_layers, **SIZES), kind(num_layers=num_layers, **SIZES)
    nn.init.uniform_(plain.encoder.layers[-1].feed_forward.norm.weight, 0.5, 1.5)
    nn.init.normal_(plain.encoder.layers[-1].feed_forward.norm.bias)
    report = load_weights(network, {"model": plain.state_dict()}, name="dino.pth")
    return plain, network, report


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_checkpoint_of_dino_starts_at_the_last_state(kind):
    """The names of the layers are DINO's, the fusion is reported as missing; its start is a norm of the last state."""
    plain, network, report = encoders(kind)
    own = {name for name, _ in network.encoder.named_parameters() if name.startswith("fusion")}
    assert set(report.missing) == {f"encoder.{name}" for name in own}
    assert not report.reinitialised
    assert not report.unexpected
    tokens = plain.tokenize(plain.neck(random_batch(2)[0]), random_batch(2)[1])
    expected = plain.encoder(tokens).features
    found = network.encoder(tokens).features
    torch.testing.assert_close(found, nn.functional.layer_norm(expected, expected.shape[-1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_parameter_of_a_fusion_is_trained(kind, dtype):
    network = tiny_network()
    network.encoder = kind(num_layers=2, **SIZES)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    targets = random_targets(2, 3)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        losses = default_criterion()(network(*random_batch(2), targets), targets)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert not [name for name, p in network.named_parameters() if not p.grad.any()]


@pytest.mark.parametrize("kind", FUSIONS)
def test_the_first_step_trains_the_whole_fusion(kind):
    """Zeros in the weight are no trap: every state's part of it has a gradient."""
    network = tiny_network()
    network.encoder = kind(num_layers=2, **SIZES)
    targets = random_targets(2, 3)
    sum(default_criterion()(network(*random_batch(2), targets), targets).values()).backward()
    assert all(part.any() for part in network.encoder.fusion.weight.grad.split(32, 1))


@pytest.mark.parametrize("kind", FUSIONS)
def test_padded_cells_stay_apart(kind):
    """What padded cells hold changes no other cell."""
    _, network, _ = encoders(kind)
    nn.init.normal_(network.encoder.fusion.weight)
    tokens = network.tokenize(network.neck(random_batch(2)[0]), random_batch(2)[1])
    assert tokens.padding_mask.any()
    noise = torch.randn_like(tokens.features).masked_fill(~tokens.padding_mask[..., None], 0)
    expected = network.encoder(tokens).features
    found = network.encoder(tokens.with_features(tokens.features + 100 * noise)).features
    assert torch.equal(found[~tokens.padding_mask], expected[~tokens.padding_mask])
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_fusion_is_one_graph(kind):
    """For images of any size."""
    network, graphs = tiny_network().eval(), []
    encoder = kind(num_layers=2, **SIZES)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=keep)
    for height, width in ((136, 200), (200, 136)):
        images, padding = random_batch(2, height, width)
        tokens = network.tokenize(network.neck(images), padding)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens).features, encoder(tokens).features)
    assert len(graphs) == 1


def test_states_are_not_joined():
    """In inference, no tensor of all states exists: the largest one is the hidden layer of a feed-forward network."""
    encoder = DenseFusionEncoder(num_layers=6, **SIZES)
    network = tiny_network()
    tokens = network.tokenize(network.neck(random_batch(1)[0]), random_batch(1)[1])
    largest = 7 * tokens.features.numel()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                assert result.numel() < largest, function
            return result

    with torch.no_grad(), Watch():
        encoder(tokens)
