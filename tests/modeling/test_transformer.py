import math

import pytest
import torch

from dino.layers import Queries, Tokens, refine
from dino.layers.position_encoding import encode_boxes
from dino.modeling import Decoder, Encoder, QuerySelection, SharedHeadsDecoder, share_heads, transformer
from dino.modeling.transformer import MLP, _token_centers, full_attention

SHAPES = [(4, 6), (2, 3)]
TOKENS = sum(h * w for h, w in SHAPES)
SIZES = {"embed_dim": 16, "num_heads": 2, "num_levels": 2, "num_points": 2, "hidden_dim": 8}


def random_tokens(images=2, padded_columns=0, embed_dim=16):
    """The finer level of all images is padded by some columns, the coarser one is not."""
    padding = torch.zeros(images, 4, 6, dtype=torch.bool)
    padding[:, :, 6 - padded_columns :] = True
    return Tokens(
        features=torch.randn(images, TOKENS, embed_dim),
        position=torch.randn(images, TOKENS, embed_dim),
        padding_mask=torch.cat([padding.flatten(1), torch.zeros(images, 6, dtype=torch.bool)], 1),
        shapes=SHAPES,
        valid_sizes=torch.tensor([[[6.0 - padded_columns, 4.0], [3.0, 2.0]]]).expand(images, -1, -1),
    )


def random_queries(images=2, count=5, embed_dim=16):
    return Queries(torch.randn(images, count, embed_dim), torch.randn(images, count, 4))


def moving_decoder(num_layers):
    """A decoder whose box heads move the boxes, and whose norm matters: fresh heads return zeros, fresh norms repeat
    what the layer's own norm did.
    """
    decoder = Decoder(num_classes=3, num_layers=num_layers, **SIZES)
    torch.nn.init.normal_(decoder.norm.weight)
    for head in decoder.box_heads:
        torch.nn.init.normal_(head[-1].weight, std=0.1)
    return decoder


def test_centers_published_example():
    """Levels of 4 x 6 and 2 x 3 cells, the last column of the first one padded."""
    tokens = random_tokens(padded_columns=1)
    reference = _token_centers(tokens)[0, 0] * tokens.valid_ratios[0]
    torch.testing.assert_close(reference, torch.tensor([[0.083333, 0.125], [0.1, 0.125]]), rtol=0, atol=1e-6)


def test_encoder_changes_features_only():
    tokens = random_tokens(padded_columns=1)
    memory = Encoder(num_layers=2, **SIZES)(tokens)
    assert memory.features.shape == tokens.features.shape
    assert not torch.equal(memory.features, tokens.features)
    assert memory[1:] == tokens[1:]


def test_anchors_published_example():
    selection = QuerySelection(num_queries=1, num_classes=1, embed_dim=16)
    anchors, usable = selection.anchors(random_tokens(padded_columns=1))
    boxes = anchors.sigmoid()
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.1, 0.125, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, 24], torch.tensor([1 / 6, 0.25, 0.1, 0.1]))
    padded = random_tokens(padded_columns=1).padding_mask
    assert torch.equal(usable, ~padded)
    assert (anchors[padded] == math.inf).all()


def test_anchors_must_lie_inside():
    """The finest cells of a wide image are less than 0.01 from its border."""
    tokens = random_tokens(1)._replace(
        features=torch.zeros(1, 60, 16),
        padding_mask=torch.zeros(1, 60, dtype=torch.bool),
        shapes=[(1, 60)],
        valid_sizes=torch.tensor([[[60.0, 1.0]]]),
    )
    _, usable = QuerySelection(num_queries=1, num_classes=1, embed_dim=16).anchors(tokens)
    assert usable[0].nonzero().flatten().tolist() == list(range(1, 59))


def test_selection_takes_the_best_over_all_classes():
    selection = QuerySelection(num_queries=3, num_classes=2, embed_dim=16)
    logits = torch.zeros(1, 5, 2)
    logits[0, :, 0] = torch.tensor([0.1, 0.5, -1, -1, -1])
    logits[0, :, 1] = torch.tensor([-1, -1, -1, 0.3, 0.7])
    everything, nothing = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.bool)
    assert selection.select(logits, everything, nothing).tolist() == [[4, 1, 3]]


def test_selection_takes_padding_last():
    """First the usable tokens, then those without an anchor, then padding; whatever their logits."""
    selection = QuerySelection(num_queries=6, num_classes=1, embed_dim=16)
    logits = torch.tensor([[9.0, 8, 7, -60, -50, 6]])[..., None]
    padding = torch.tensor([[True, False, False, False, False, True]])
    usable = torch.tensor([[False, False, False, True, True, False]])
    chosen = selection.select(logits, usable, padding)[0].tolist()
    assert chosen[:2] == [4, 3]
    assert set(chosen[2:4]) == {1, 2}
    assert set(chosen[4:]) == {0, 5}


@torch.no_grad()
def test_padded_tokens_are_not_selected_before_real_ones():
    """Padding is made to carry the highest logits."""
    tokens = random_tokens(padded_columns=3)
    selection = QuerySelection(num_queries=TOKENS - 12, num_classes=3, embed_dim=16)
    selection.class_head.bias.zero_()
    _, usable = selection.anchors(tokens)
    features = torch.full_like(tokens.features, -1)
    features[tokens.padding_mask] = 100.0
    queries, _ = selection(tokens._replace(features=features))
    assert queries.box_logits.isfinite().all(), "an unusable token has an infinite anchor"
    # One query more than real tokens: only this one is padding, and its box is the whole corner.
    selection = QuerySelection(num_queries=TOKENS - 11, num_classes=3, embed_dim=16)
    queries, _ = selection(tokens._replace(features=features))
    assert usable.sum(1).tolist() == [TOKENS - 12] * 2
    assert queries.box_logits[:, :-1].isfinite().all()
    assert (queries.box_logits[:, -1] == math.inf).all()


def test_fewer_tokens_than_queries():
    selection = QuerySelection(num_queries=100, num_classes=3, embed_dim=16)
    queries, proposals = selection(random_tokens())
    assert queries.content.shape == (2, TOKENS, 16)
    assert proposals.logits.shape == (1, 2, TOKENS, 3)
    assert torch.equal(queries.content[0], selection.content.weight[:TOKENS])


def test_selection_separates_gradients():
    """The decoder's boxes carry none; the encoder's own predictions do; contents are the same for all images."""
    selection, tokens = QuerySelection(num_queries=4, num_classes=3, embed_dim=16), random_tokens(padded_columns=2)
    tokens.features.requires_grad_()
    queries, proposals = selection(tokens)
    assert not queries.box_logits.requires_grad
    assert torch.equal(queries.content[0], queries.content[1])
    torch.testing.assert_close(queries.box_logits.sigmoid(), proposals.boxes[0])
    (proposals.boxes.sum() + proposals.logits.sum()).backward()
    assert tokens.features.grad.isfinite().all()
    assert not tokens.features.grad[tokens.padding_mask].any()
    assert selection.box_head[-1].weight.grad.any()


def test_gradients_at_padding_are_finite():
    """More queries than usable tokens, so infinite anchors are selected."""
    selection, tokens = QuerySelection(num_queries=TOKENS, num_classes=3, embed_dim=16), random_tokens(padded_columns=3)
    _, proposals = selection(tokens)
    (proposals.boxes.sum() + proposals.logits.sum()).backward()
    assert proposals.boxes.isfinite().all()
    assert all(p.grad.isfinite().all() for name, p in selection.named_parameters() if name != "content.weight")


def attend_by_hand(attention, query, key, value):
    """One image (Q, E), head by head."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    projected = [x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    heads = []
    for q, k, v in zip(*(x.chunk(attention.num_heads, 1) for x in projected), strict=True):
        heads.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v)
    return torch.cat(heads, 1) @ attention.out_proj.weight.T + attention.out_proj.bias


@torch.no_grad()
def test_decoder_layer():
    """Self-attention first, whose values carry no position; then cross-attention, which knows it; then feed-forward."""
    layer = Decoder(num_classes=1, num_layers=1, **SIZES).layers[0]
    for norm in (layer.self_norm, layer.cross_norm, layer.feed_forward.norm):
        torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(layer.cross_attention.attention_weights.weight)
    tokens, position, x = random_tokens(1, padded_columns=2), torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    reference = torch.rand(1, 5, 2, 4)
    output = layer(x, position, reference, tokens, full_attention(None, []))
    q = (x + position)[0]
    x = layer.self_norm(x + attend_by_hand(layer.self_attention, q, q, x[0]))
    read = layer.cross_attention(x + position, reference, tokens.features, tokens.padding_mask, SHAPES)
    x = layer.cross_norm(x + read)
    hidden = layer.feed_forward.linear1(x).clamp(min=0)
    torch.testing.assert_close(output, layer.feed_forward.norm(x + layer.feed_forward.linear2(hidden)))


@torch.no_grad()
def test_encoder_layer():
    """Positions steer the attention only; the values are the features alone."""
    encoder, tokens = Encoder(num_layers=1, **SIZES), random_tokens(padded_columns=2)
    layer = encoder.layers[0]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reference = _token_centers(tokens)[:, :, None] * tokens.valid_ratios[:, None]
    x, query = tokens.features, tokens.features + tokens.position
    x = layer.norm(x + layer.attention(query, reference, x, tokens.padding_mask, SHAPES))
    hidden = layer.feed_forward.linear1(x).clamp(min=0)
    expected = layer.feed_forward.norm(x + layer.feed_forward.linear2(hidden))
    torch.testing.assert_close(encoder(tokens).features, expected)


def test_decoder_looks_forward_twice():
    """The boxes of layer i train the box heads of layers i and i-1, and no others."""
    decoder = moving_decoder(4)
    boxes = decoder(random_queries(), random_tokens()).boxes
    weights = [head[-1].weight for head in decoder.box_heads]
    for i in range(4):
        gradients = torch.autograd.grad(boxes[i].sum(), weights, retain_graph=True, allow_unused=True)
        reached = [j for j, gradient in enumerate(gradients) if gradient is not None and gradient.any()]
        assert reached == [j for j in (i - 1, i) if j >= 0]


@torch.no_grad()
def test_decoder_steps():
    """The next layer's reference is a step from the state before the norm, the predicted box from that after it."""
    decoder, queries, tokens = moving_decoder(2), random_queries(), random_tokens(padded_columns=2)
    seen = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _, args, output: seen.append((*args[1:3], output)))
    boxes = decoder(queries, tokens).boxes
    start, first_step = queries.box_logits.sigmoid(), decoder.box_heads[0]
    (position, reference, x), (_, next_reference, _) = seen
    ratios = tokens.valid_ratios.repeat(1, 1, 2)[:, None]
    torch.testing.assert_close(reference, start[:, :, None] * ratios)
    torch.testing.assert_close(position, decoder.position(encode_boxes(reference[:, :, 0], 8)))
    torch.testing.assert_close(boxes[0], refine(start, first_step(decoder.norm(x))))
    torch.testing.assert_close(next_reference, refine(start, first_step(x))[:, :, None] * ratios)


def test_decoder_reads_boxes_without_gradient():
    """Logits do not train any box head, though attention follows the boxes."""
    decoder = moving_decoder(3)
    logits = decoder(random_queries(), random_tokens()).logits
    weights = [head[-1].weight for head in decoder.box_heads]
    assert torch.autograd.grad(logits.sum(), weights, allow_unused=True) == (None, None, None)


@torch.no_grad()
def test_decoder_follows_its_boxes():
    """With a first step to the other side of the image, the second layer answers differently."""
    decoder = moving_decoder(2)
    queries, tokens = random_queries(), random_tokens()
    before = decoder(queries, tokens).logits
    decoder.box_heads[0][-1].bias.copy_(torch.tensor([3.0, -3.0, 0.0, 0.0]))
    after = decoder(queries, tokens).logits
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


@torch.no_grad()
def test_decoder_mask():
    """A blocked query does not change the others."""
    decoder, tokens = moving_decoder(2), random_tokens()
    queries = random_queries()._replace(attn_mask=torch.zeros(5, 5, dtype=torch.bool))
    queries.attn_mask[1:, 0] = True
    changed = queries._replace(content=queries.content.clone())
    changed.content[:, 0] = 9
    for before, after in zip(decoder(queries, tokens), decoder(changed, tokens), strict=True):
        torch.testing.assert_close(after[:, :, 1:], before[:, :, 1:])
        assert not torch.allclose(after[:, :, 0], before[:, :, 0])


def test_decoder_starts_at_the_given_boxes():
    """Fresh box heads move nothing, and every class starts at 1 %."""
    queries = random_queries()
    predictions = Decoder(num_classes=3, num_layers=3, **SIZES)(queries, random_tokens())
    torch.testing.assert_close(predictions.boxes, queries.box_logits.sigmoid().expand(3, -1, -1, -1))
    decoder = Decoder(num_classes=3, num_layers=1, **SIZES)
    torch.testing.assert_close(decoder.class_heads[0].bias, torch.full((3,), -4.59512), rtol=0, atol=1e-5)


def test_share_heads():
    decoder = Decoder(num_classes=3, num_layers=3, **SIZES)
    separate = sum(p.numel() for p in decoder.parameters())
    heads = sum(p.numel() for p in (*decoder.class_heads[0].parameters(), *decoder.box_heads[0].parameters()))
    assert share_heads(decoder) is decoder
    assert sum(p.numel() for p in decoder.parameters()) == separate - 2 * heads
    assert decoder.box_heads[2] is decoder.box_heads[0]
    assert "box_heads.2.0.weight" in decoder.state_dict()


def test_a_decoder_with_shared_heads():
    """As `share_heads` makes it; the losses of all layers train the one pair."""
    torch.manual_seed(0)
    expected = share_heads(Decoder(num_classes=3, num_layers=3, **SIZES))
    torch.manual_seed(0)
    decoder = SharedHeadsDecoder(num_classes=3, num_layers=3, **SIZES)
    assert len(list(decoder.parameters())) == len(list(expected.parameters()))
    for (name, ours), (other, theirs) in zip(decoder.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    logits = decoder(random_queries(), random_tokens()).logits
    weight = decoder.class_heads[2].weight
    parts = [torch.autograd.grad(layer.square().sum(), weight, retain_graph=True)[0] for layer in logits]
    assert all(part.abs().max() > 0 for part in parts)
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), weight)[0], sum(parts))
    with pytest.raises(TypeError, match="num_lairs"):
        SharedHeadsDecoder(num_classes=3, num_lairs=3)


def test_published_initial_values():
    """Xavier bounds of the published width."""
    selection = QuerySelection(num_queries=900, num_classes=2)
    assert selection.content.weight.abs().max().item() == pytest.approx(0.07204, abs=1e-4)
    decoder = Decoder(num_classes=2, num_layers=1, hidden_dim=64)
    attention = decoder.layers[0].self_attention
    # One (768, 256) matrix: sqrt(6 / 1024).
    assert attention.in_proj_weight.abs().max().item() == pytest.approx(0.07655, abs=1e-4)
    assert attention.out_proj.weight.abs().max().item() == pytest.approx((6 / 512) ** 0.5, abs=1e-4)
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()
    assert decoder.position[0].weight.abs().max().item() == pytest.approx((6 / 768) ** 0.5, abs=1e-4)
    assert selection.project[0].weight.abs().max().item() == pytest.approx((6 / 512) ** 0.5, abs=1e-4)
    # Heads keep torch's default, within 1 / sqrt(256), except for the last layer of the box heads.
    assert selection.class_head.weight.abs().max().item() == pytest.approx(1 / 16, abs=2e-3)
    assert decoder.box_heads[0][0].weight.abs().max().item() == pytest.approx(1 / 16, abs=1e-4)
    assert not any(p.any() for head in (selection.box_head, decoder.box_heads[0]) for p in head[-1].parameters())


def test_mlp():
    mlp = MLP(2, 3, 4)
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "ReLU", "Linear"]
    assert mlp(torch.randn(5, 2)).shape == (5, 4)


@pytest.mark.parametrize("error", [-1.2e-7, 0.0, 1.2e-7])
def test_usable_anchors_do_not_hang_on_the_last_bit(monkeypatch, error):
    """Centres lie at 0.01 or 0.99 exactly where a level has 50 or 250 cells, and engines round their quotients."""
    centers = transformer._token_centers
    monkeypatch.setattr(transformer, "_token_centers", lambda tokens: centers(tokens) * (1 + error))
    selection = QuerySelection(num_queries=5, num_classes=3, embed_dim=8)
    for cells in (49, 50, 51, 150, 250, 850):
        features = torch.zeros(1, 4 * cells, 8)
        tokens = Tokens(features, features, None, [(4, cells)], torch.tensor([[[float(cells), 4.0]]]))
        _, usable = selection.anchors(tokens)
        exact = [cells < 50 * (2 * i + 1) < 99 * cells for i in range(cells)]
        assert usable.view(4, cells).tolist() == [exact] * 4
