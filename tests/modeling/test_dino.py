import pytest
import torch

from dino.layers import ContrastiveDenoising, SinePositionEncoding
from dino.modeling import DINO, ChannelMapper, Decoder, Encoder, QuerySelection, TorchvisionBackbone, share_heads
from dino.modeling.dino import _downsample

from ..tiny import default_criterion, random_batch, random_targets, tiny_network


def train_step(model, counts, num_classes=3):
    images, padding = random_batch(len(counts))
    targets = random_targets(*counts, num_classes=num_classes)
    outputs = model(images, padding, targets)
    losses = default_criterion()(outputs, targets)
    sum(losses.values()).backward()
    return outputs, losses


@pytest.mark.parametrize("num_denoising", [6, 0])
@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (2, 0), (0, 0), (15, 1)])
def test_every_parameter_has_a_gradient(counts, num_denoising):
    """15 objects are more than the 12 queries, and more than the denoising budget."""
    model = tiny_network(num_denoising=num_denoising)
    outputs, losses = train_step(model, counts)
    assert all(loss.isfinite() for loss in losses.values())
    assert len(losses) == 15
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert outputs.denoising.predictions.logits.shape[2] <= max(1, 2 * num_denoising)


def test_training_moves_every_parameter():
    """Where there are objects, no gradient is zero once the matrices that start with zeros have left them."""
    model = tiny_network()
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    train_step(model, (3, 2))
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not idle


@torch.no_grad()
def test_no_padding_is_padding_without_a_cell():
    """To the bit, and no operation is spent on it."""
    network = tiny_network()
    images, _ = random_batch(2)
    nowhere = torch.zeros(images[:, 0].shape, dtype=torch.bool)
    for left, right in zip(network(images, None)[:2], network(images, nowhere)[:2], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))
    assert network.tokenize(network.neck(images), None).padding_mask is None


def test_shapes():
    outputs, _ = train_step(tiny_network(num_layers=3), (2, 3))
    assert outputs.decoder.logits.shape == (3, 2, 12, 3)
    assert outputs.decoder.boxes.shape == (3, 2, 12, 4)
    assert outputs.proposals.logits.shape == (1, 2, 12, 3)
    # 6 // 3 groups of 3 positives and 3 negatives.
    assert outputs.denoising.num_groups == 2
    assert outputs.denoising.predictions.boxes.shape == (3, 2, 12, 4)


@torch.no_grad()
@pytest.mark.parametrize("counts", [(2, 3), (0, 0)])
def test_denoising_does_not_disturb_detection(counts):
    model = tiny_network().eval()
    images, padding = random_batch(2)
    with_noise, without = model(images, padding, random_targets(*counts)), model(images, padding)
    assert without.denoising is None
    for trained, plain in ((with_noise.decoder, without.decoder), (with_noise.proposals, without.proposals)):
        torch.testing.assert_close(trained.logits, plain.logits)
        torch.testing.assert_close(trained.boxes, plain.boxes)


@torch.no_grad()
def test_denoising_queries_come_first():
    """In front of the matching queries: in the decoder's input, in its mask, and in what every layer predicts."""
    model, seen = tiny_network(num_layers=3), {}
    model.decoder.register_forward_hook(lambda module, args, output: seen.update(queries=args[0], output=output))
    images, padding = random_batch(2)
    outputs = model(images, padding, random_targets(2, 3))
    slots = outputs.denoising.predictions.boxes.shape[2]
    content, attn_mask = seen["queries"].content, seen["queries"].attn_mask
    assert content.shape[1] == slots + model.query_selection.num_queries
    assert torch.equal(content[0, slots:], model.query_selection.content.weight)
    labels = model.denoising.label_embed.weight
    assert all((labels == row).all(1).any() or not row.any() for row in content[0, :slots])
    assert attn_mask[slots:, :slots].all()  # no matching query attends to them
    assert not attn_mask[:slots, slots:].any()
    assert torch.equal(seen["output"].boxes[:, :, :slots], outputs.denoising.predictions.boxes)
    assert torch.equal(seen["output"].boxes[:, :, slots:], outputs.decoder.boxes)


@torch.no_grad()
def test_noise_is_drawn_once_and_the_decoder_runs_once(monkeypatch):
    """Looking forward twice is a matter of gradients: it needs no second draw and no second pass."""
    model, calls = tiny_network(num_layers=3), []
    draw = model.denoising.draw
    monkeypatch.setattr(model.denoising, "draw", lambda *args: calls.append("draw") or draw(*args))
    model.decoder.register_forward_hook(lambda *args: calls.append("decoder"))
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda *args: calls.append("layer"))
    model(*random_batch(2), random_targets(2, 3))
    assert calls == ["draw", "layer", "layer", "layer", "decoder"]


@torch.no_grad()
def test_images_do_not_disturb_each_other():
    model = tiny_network().eval()
    images, padding = random_batch(3)
    together = model(images, padding).decoder.boxes
    alone = model(images[1:2], padding[1:2]).decoder.boxes
    torch.testing.assert_close(together[:, 1:2], alone)


@torch.no_grad()
def test_an_image_of_fewer_tokens_than_queries():
    """32 x 24 pixels make 4*3 + 2*2 + 1 + 1 tokens."""
    model = tiny_network(num_queries=50)
    targets = random_targets(20)
    outputs = model(torch.randn(1, 3, 32, 24), torch.zeros(1, 32, 24, dtype=torch.bool), targets)
    assert outputs.decoder.boxes.shape == (2, 1, 18, 4)
    assert all(loss.isfinite() for loss in default_criterion()(outputs, targets).values())


def test_one_class():
    _, losses = train_step(tiny_network(num_classes=1), (2, 1), num_classes=1)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Boxes and losses stay in float32, and the loss stays near that of full precision."""
    model = tiny_network()
    images, padding = random_batch(2)
    targets, criterion = random_targets(2, 3), default_criterion()
    totals = []
    for enabled in (False, True):
        torch.manual_seed(1)  # the same denoising queries
        with torch.autocast("cpu", dtype, enabled=enabled):
            outputs = model(images, padding, targets)
            losses = criterion(outputs, targets)
        assert outputs.decoder.boxes.dtype == outputs.proposals.boxes.dtype == torch.float32
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        totals.append(sum(losses.values()))
    assert totals[1].item() == pytest.approx(totals[0].item(), rel=0.02)
    totals[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_a_model_in_bfloat16_detects():
    model = tiny_network(num_queries=85).eval()  # all tokens, so that rounding can't change the selection
    images, padding = random_batch(2)
    full = model(images, padding).proposals
    half = model.bfloat16()(images.bfloat16(), padding)
    assert half.decoder.boxes.dtype == torch.float32
    assert half.decoder.logits.isfinite().all()
    # Rounding changes their order, so compare what was selected as a set.
    torch.testing.assert_close(
        half.proposals.logits.float().flatten(2).sort().values, full.logits.flatten(2).sort().values, rtol=0, atol=0.1
    )
    torch.testing.assert_close(half.proposals.boxes.sort(2).values, full.boxes.sort(2).values, rtol=0, atol=1e-4)


@torch.no_grad()
def test_padding_of_tokens():
    """A token is padding where the nearest pixel is; the valid sizes count whole columns and rows, as (w, h)."""
    model = tiny_network()
    padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    padding[1, 48:] = True
    padding[1, :, 32:] = True
    tokens = model.tokenize(model.neck(torch.zeros(2, 3, 64, 64)), padding)
    assert tokens.shapes == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert tokens.valid_sizes[0].tolist() == [[8, 8], [4, 4], [2, 2], [1, 1]]
    assert tokens.valid_sizes[1].tolist() == [[4, 6], [2, 3], [1, 2], [1, 1]]
    finest = tokens.padding_mask[1, :64].view(8, 8)
    assert not finest[:6, :4].any()
    assert finest[6:].all()
    assert finest[:, 4:].all()
    assert not tokens.padding_mask[0].any()


@torch.no_grad()
def test_tokens_know_their_level():
    """The sine code is the same at the same location of all levels; the level embedding differs."""
    model = tiny_network()
    images, padding = random_batch(1)
    tokens = model.tokenize(model.neck(images), padding)
    code = model.position_encoding(torch.zeros(1, 1, 1, dtype=torch.bool))[0, :, 0, 0]
    torch.testing.assert_close(tokens.position[0, -1], code + model.level_embed[3])
    code = model.position_encoding(torch.zeros(1, 8, 8, dtype=torch.bool))[0, :, 2, 5]
    torch.testing.assert_close(tokens.position[0, 2 * 8 + 5], code + model.level_embed[0])
    torch.testing.assert_close(tokens.features[0, 2 * 8 + 5], model.neck(images)[0][0, :, 2, 5])


def resnet50_network(num_classes, in_features, num_levels):
    return DINO(
        neck=ChannelMapper(
            backbone=TorchvisionBackbone("resnet50", out_features=in_features),
            in_features=in_features,
            num_levels=num_levels,
        ),
        position_encoding=SinePositionEncoding(256),
        encoder=Encoder(num_levels=num_levels),
        query_selection=QuerySelection(num_queries=900, num_classes=num_classes),
        denoising=ContrastiveDenoising(num_classes=num_classes, embed_dim=256),
        decoder=Decoder(num_classes=num_classes, num_levels=num_levels),
    )


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_published_parameter_counts():
    """The official table of label embeddings has one more row, which nothing reads."""
    finest = ["res2", "res3", "res4", "res5"]
    with torch.device("meta"):  # shapes without memory
        assert count_parameters(resnet50_network(80, finest[1:], 4)) == 47_650_316
        shared = resnet50_network(91, finest[1:], 4)
        share_heads(shared.decoder)
        assert count_parameters(shared) == 46_893_182 - 256
        shared = resnet50_network(91, finest, 5)
        share_heads(shared.decoder)
        assert count_parameters(shared) == 47_255_806 - 256


def masks_of(height, width, ends, cells):
    """The mask of a picture of size `ends` in a batch, at the size of a level."""
    padding = torch.zeros(1, height, width, dtype=torch.bool)
    padding[:, ends[0] :] = True
    padding[:, :, ends[1] :] = True
    return padding, _downsample(padding, torch.zeros(1, 1, *cells))[0]


@pytest.mark.parametrize(("side", "cells"), [(240, 15), (480, 30), (600, 19), (750, 47), (454, 14), (97, 97), (5, 1)])
def test_a_cell_is_padding_where_its_first_pixel_is(side, cells):
    """By Python's integers, for pictures that end at the first pixel of a cell, one before, and one after."""
    for cell in range(cells):
        first = cell * side // cells
        for end in {max(1, first - 1), max(1, first), first + 1}:
            _, mask = masks_of(side, 33, (end, 17), (cells, 2))
            assert mask[:, 0].tolist() == [i * side // cells >= end for i in range(cells)]
            assert mask[0].tolist() == [False, False]


def test_masks_of_maps_that_round_up_equal_the_official_resize():
    """The official program's nearest-neighbour resize, for every side up to 1,400 pixels: as exact as integers."""
    for side in range(1, 1401):
        pixels = torch.arange(side, dtype=torch.float32)[None, None]
        for stride in (4, 8, 16, 32, 64, 128):
            cells = -(-side // stride)
            official = torch.nn.functional.interpolate(pixels, size=cells)[0, 0].long()
            assert torch.equal(official, torch.arange(cells) * side // cells), (side, stride)


def test_masks_equal_the_official_resize_in_two_dimensions():
    padding, mask = masks_of(240, 333, (231, 300), (30, 42))
    official = torch.nn.functional.interpolate(padding[None].float(), size=(30, 42))[0, 0].bool()
    assert torch.equal(mask, official)
