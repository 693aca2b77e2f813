import pytest
import torch
from torch import nn

from dino.layers import ContrastiveDenoising, HungarianMatcher, SetCriterion, cxcywh_to_xyxy, denoising_mask
from dino.modeling import QuerySelection
from dino.modeling.variants import (
    AllTokenSelection,
    DeepFusionEncoder,
    DenseFusionEncoder,
    DistinctSelection,
    DropoutDecoder,
    DropoutEncoder,
    FinalCriterion,
    LearnedAnchors,
    LearnedPositionEncoding,
    LearnedQueries,
    LearnedSizeSelection,
    LookForwardOnce,
    ObjectnessCriterion,
    PatternSelection,
    PlacedEncoder,
    PositiveDenoising,
    PureSelection,
    RelationDecoder,
    SeparateCriterion,
    SharedHeadsDropoutDecoder,
    ShiftDenoising,
)
from dino.structures import LayerOutputs, Outputs, Target

from ..tiny import default_criterion, random_batch, random_targets, stirred, tiny_network

SIZES = {"embed_dim": 32, "num_heads": 4, "num_levels": 4, "num_points": 2, "hidden_dim": 16}
SELECTION = {"num_queries": 12, "num_classes": 3, "embed_dim": 32}
DENOISING = {"num_classes": 3, "embed_dim": 32, "num_denoising": 6}
MATCHER = HungarianMatcher()
ADJUSTED = {  # how a variant differs from the tiny network: parts, and the criterion that it wants
    "static": lambda: ({"query_selection": LearnedQueries(**SELECTION)}, SetCriterion),
    "zero contents": lambda: ({"query_selection": LearnedAnchors(**SELECTION)}, SetCriterion),
    "learned sizes": lambda: ({"query_selection": LearnedSizeSelection(**SELECTION)}, SetCriterion),
    "all tokens": lambda: ({"query_selection": AllTokenSelection(**SELECTION)}, SeparateCriterion),
    "all tokens, objectness": lambda: (
        {"query_selection": AllTokenSelection(**{**SELECTION, "num_classes": 1})},
        ObjectnessCriterion,
    ),
    "pure": lambda: ({"query_selection": PureSelection(**SELECTION)}, SetCriterion),
    "distinct": lambda: ({"query_selection": DistinctSelection(**SELECTION, max_iou=0.3)}, SetCriterion),
    "objectness": lambda: (
        {"query_selection": QuerySelection(**{**SELECTION, "num_classes": 1})},
        ObjectnessCriterion,
    ),
    "patterns": lambda: (
        {"query_selection": PatternSelection(**{**SELECTION, "num_queries": 4})},
        SeparateCriterion,
    ),
    "positives": lambda: ({"denoising": PositiveDenoising(**DENOISING)}, SetCriterion),
    "shift": lambda: ({"denoising": ShiftDenoising(**DENOISING)}, SetCriterion),
    "once": lambda: ({"decoder": LookForwardOnce(num_classes=3, num_layers=2, **SIZES)}, SetCriterion),
    "position": lambda: ({"position_encoding": LearnedPositionEncoding(32)}, SetCriterion),
    "relation": lambda: ({"decoder": RelationDecoder(num_classes=3, num_layers=2, **SIZES)}, SetCriterion),
    "dense fusion": lambda: ({"encoder": DenseFusionEncoder(num_layers=2, **SIZES)}, SetCriterion),
    "deep fusion": lambda: ({"encoder": DeepFusionEncoder(num_layers=2, **SIZES)}, SetCriterion),
    "dropout": lambda: (
        {
            "encoder": DropoutEncoder(num_layers=2, **SIZES),
            "decoder": DropoutDecoder(num_classes=3, num_layers=2, **SIZES),
        },
        SetCriterion,
    ),
    "gelu": lambda: (
        {
            "encoder": DropoutEncoder(num_layers=2, dropout=0.0, activation="gelu", **SIZES),
            "decoder": SharedHeadsDropoutDecoder(num_classes=3, num_layers=2, dropout=0.0, activation="gelu", **SIZES),
        },
        SetCriterion,
    ),
    "no encoder": lambda: ({"encoder": PlacedEncoder(num_layers=0, **SIZES)}, SetCriterion),
    "no auxiliary losses": lambda: ({}, FinalCriterion),
}


def variant(name):
    """The tiny network with the parts of a variant, and its criterion."""
    parts, criterion = ADJUSTED[name]()
    network = tiny_network()
    for part, module in parts.items():
        setattr(network, part, module)
    return network, criterion(matcher=MATCHER)


def gradients(network, criterion, counts, dtype=None):
    """The losses of a random batch, after their backward pass."""
    images, padding = random_batch(len(counts))
    targets = random_targets(*counts)
    network.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = network(images, padding, targets)
        losses = criterion(outputs, targets)
    sum(losses.values()).backward()
    return outputs, losses


@pytest.mark.parametrize("name", ADJUSTED)
def test_every_parameter_has_a_gradient(name):
    """With objects, without, and in half precision; an SGD step then moves the network."""
    network, criterion = variant(name)
    for counts, dtype in (((2, 3), None), ((0, 0), None), ((15, 0), torch.bfloat16)):
        outputs, losses = gradients(network, criterion, counts, dtype)
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        assert outputs.decoder.boxes.dtype == torch.float32
        idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not idle
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    assert all(loss.isfinite() for loss in gradients(network, criterion, (1, 2))[1].values())


@pytest.mark.parametrize("name", [name for name in ADJUSTED if name != "no auxiliary losses"])
def test_training_moves_every_parameter(name):
    """No part of a variant is there for nothing, once the matrices that start with zeros have left them."""
    network, criterion = variant(name)
    for parameter in network.parameters():
        if parameter.dim() == 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    gradients(network, criterion, (3, 2))
    assert not [name for name, parameter in network.named_parameters() if not parameter.grad.any()]


# Queries


def test_static_queries_ask_no_image():
    """The same boxes and contents for every image, no proposals, hence no losses for them."""
    network, criterion = variant("static")
    outputs, losses = gradients(network, criterion, (1, 2))
    assert outputs.proposals.boxes.shape == (0, 2, 12, 4)
    assert set(losses) == {f"loss_{kind}{s}" for kind in ("ce", "bbox", "giou") for s in ("", "_0", "_dn", "_dn_0")}
    selection = network.query_selection
    queries, _ = selection(network.tokenize(network.neck(random_batch(2)[0]), random_batch(2)[1]))
    assert torch.equal(queries.box_logits[1], selection.anchors.weight)
    assert torch.equal(queries.content[0], selection.content.weight)
    # Fresh box heads move nothing: all layers predict the anchors.
    fresh, _ = variant("static")
    boxes = fresh(*random_batch(1)).decoder.boxes[:, 0]
    torch.testing.assert_close(boxes, fresh.query_selection.anchors.weight.sigmoid().expand(2, -1, -1))


def test_anchors_have_no_contents():
    """Contents are zeros, boxes those of the anchors, which alone are in the state dict; nothing is proposed."""
    network, criterion = variant("zero contents")
    outputs, losses = gradients(network, criterion, (1, 2))
    assert outputs.proposals.boxes.shape == (0, 2, 12, 4)
    assert len(losses) == 12
    selection = network.query_selection
    queries, _ = selection(network.tokenize(network.neck(random_batch(2)[0]), random_batch(2)[1]))
    assert queries.content.shape == (2, 12, 32)
    assert not queries.content.any()
    assert torch.equal(queries.box_logits[1], selection.anchors.weight)
    assert selection.state_dict().keys() == {"anchors.weight"}


def selected(network, images, padding):
    """Memory and the selection's answer to it."""
    memory = network.encoder(network.tokenize(network.neck(images), padding))
    return memory, *network.query_selection(memory)


def test_pure_selection_takes_contents_from_its_tokens():
    """The boxes are those of mixed selection; contents are the tokens' features, without gradient."""
    network, _ = variant("pure")
    memory, queries, proposals = selected(network, *random_batch(2))
    selection = network.query_selection
    torch.testing.assert_close(selection.class_head(queries.content), proposals.logits[0])
    assert not queries.content.requires_grad
    mixed = QuerySelection(**SELECTION)
    mixed.load_state_dict(selection.state_dict(), strict=False)
    assert torch.equal(mixed(memory)[0].box_logits, queries.box_logits)


def test_objectness_is_charged_without_classes():
    """One number for each token. The proposals' losses are those of a data set of a single class, the others DINO's."""
    network, criterion = variant("objectness")
    outputs, losses = gradients(network, criterion, (2, 3))
    assert network.query_selection.class_head.out_features == 1
    torch.manual_seed(5)
    targets = random_targets(2, 3)
    losses = criterion(outputs, targets)
    nothing = LayerOutputs(*(x[:0] for x in outputs.proposals))
    blind = [Target(torch.zeros_like(t.labels), t.boxes) for t in targets]
    alone = default_criterion()(Outputs(outputs.proposals, nothing), blind)
    for kind in ("ce", "bbox", "giou"):
        assert losses[f"loss_{kind}_interm"] == alone[f"loss_{kind}"]
    assert len(losses) == 15


def test_separate_criterion_agrees_with_the_common_one():
    """Where both can be used."""
    network = tiny_network()
    outputs, expected = gradients(network, default_criterion(), (2, 3))
    targets = random_targets(2, 3)
    expected = default_criterion()(outputs, targets)
    found = SeparateCriterion(matcher=MATCHER)(outputs, targets)
    assert set(found) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss)


def test_losses_of_all_tokens():
    """Queries are those of mixed selection; proposals those of each token, in the order of the memory."""
    network, criterion = variant("all tokens")
    memory, queries, proposals = selected(stirred(network), *random_batch(2))
    mixed = QuerySelection(**SELECTION)
    mixed.load_state_dict(network.query_selection.state_dict())
    expected, chosen = mixed(memory)
    for found, wanted in zip(queries[:2], expected[:2], strict=True):
        torch.testing.assert_close(found, wanted)
    assert not queries.box_logits.requires_grad
    features = mixed.project(memory.features.masked_fill(~mixed.anchors(memory)[1][..., None], 0))
    torch.testing.assert_close(proposals.logits[0], mixed.class_head(features))
    distances = torch.cdist(chosen.boxes[0], proposals.boxes[0], p=1)  # each selected box is among them
    assert distances.amin(2).max() < 1e-5
    unusable = ~mixed.anchors(memory)[1]
    assert unusable.any()
    assert (proposals.boxes[0][unusable] == 1).all()
    outputs, losses = gradients(network, criterion, (2, 3))
    assert len(losses) == 15
    assert outputs.proposals.boxes.shape[2] == memory.features.shape[1] > 12


def test_learned_sizes_start_at_the_usual_ones():
    """As mixed selection at first; then a wide anchor, which doubles with each level; too large ones are unusable."""
    network, _ = variant("learned sizes")
    memory, queries, _ = selected(network, *random_batch(2))
    selection, mixed = network.query_selection, QuerySelection(**SELECTION)
    mixed.load_state_dict(selection.state_dict(), strict=False)
    torch.testing.assert_close(queries.box_logits, mixed(memory)[0].box_logits)
    with torch.no_grad():
        selection.size.weight.copy_(torch.tensor([[0.2, 0.1]]).logit())
    anchors, usable = selection.anchors(memory)
    centers, _ = mixed.anchors(memory)
    levels = [height * width for height, width in memory.shapes]
    for level, (found, old, use) in enumerate(
        zip(*(x.split(levels, 1) for x in (anchors, centers, usable)), strict=True)
    ):
        if level == 3:  # 1.6 of the image
            assert not use.any()
            continue
        torch.testing.assert_close(found[use][:, :2], old[use][:, :2])
        sides = torch.tensor([0.2, 0.1]) * 2**level
        torch.testing.assert_close(found[use][:, 2:].sigmoid(), sides.expand(int(use.sum()), 2))


def test_box_losses_of_the_proposals_train_the_sizes():
    """Even where a side is exactly that of the image, at which the logit of an anchor has no gradient."""
    network, criterion = variant("learned sizes")
    with torch.no_grad():
        network.query_selection.size.weight.copy_(torch.tensor([[0.5, 0.25]]).logit())  # 1 in levels 1 and 2
    targets = random_targets(2, 3)
    losses = criterion(network(*random_batch(2), targets), targets)
    size = network.query_selection.size.weight
    for name, trains in {"loss_bbox_interm": True, "loss_giou_interm": True, "loss_ce_interm": False}.items():
        (gradient,) = torch.autograd.grad(losses[name], size, retain_graph=True, allow_unused=True)
        assert (gradient is not None and gradient.isfinite().all() and gradient.any()) == trains, name


def test_patterns_share_their_boxes():
    """4 boxes x 3 patterns: 12 queries, the second pattern's at indices 4 to 7; 4 proposals."""
    network, criterion = variant("patterns")
    _, queries, proposals = selected(network, *random_batch(2))
    assert proposals.boxes.shape == (1, 2, 4, 4)
    boxes, contents = queries.box_logits.view(2, 3, 4, 4), queries.content.view(2, 3, 4, 32)
    torch.testing.assert_close(boxes.sigmoid(), proposals.boxes[0][:, None].expand(2, 3, 4, 4))
    for pattern in range(3):
        row = network.query_selection.patterns.weight[pattern]
        assert torch.equal(contents[:, pattern], row.expand(2, 4, 32))
    _, losses = gradients(network, criterion, (2, 3))
    assert len(losses) == 15


# Denoising


def test_positives_alone():
    """As many groups as contrastive denoising has, of half the slots; all within the noise; the mask between groups."""
    denoising, targets = PositiveDenoising(**DENOISING), random_targets(3, 1)
    dn = denoising(targets, 5)
    assert dn.num_groups == ContrastiveDenoising(**DENOISING)(targets, 5).num_groups == 2
    assert dn.queries.content.shape[1] == 2 * 3
    assert torch.equal(dn.queries.attn_mask, denoising_mask(2, 3, 5, torch.device("cpu")))
    labels, boxes = torch.zeros(500, dtype=torch.int64), torch.tensor([[0.5, 0.5, 0.2, 0.3]]).expand(500, -1)
    moved = cxcywh_to_xyxy(denoising.noise_boxes(boxes, denoising.draw(2, labels))) - cxcywh_to_xyxy(boxes)
    assert moved.abs().amax((0, 1)).tolist() == pytest.approx([0.1, 0.15, 0.1, 0.15], abs=2e-3)
    assert (moved.abs().amax((0, 1)) <= torch.tensor([0.1, 0.15, 0.1, 0.15]) + 1e-6).all()


def test_every_group_of_positives_is_charged_for_its_objects():
    """Slots that give back their object exactly have no box loss; each slot moved away has one."""
    network, criterion = variant("positives")
    targets = random_targets(3, 1)
    images, padding = random_batch(2)
    outputs = network(images, padding, targets)
    perfect = outputs.denoising.predictions.boxes.detach().clone()
    for image, target in enumerate(targets):
        for group in range(2):
            perfect[:, image, 3 * group : 3 * group + len(target.labels)] = target.boxes
    for moved in (None, 0, 5):
        boxes = perfect.clone()
        if moved is not None:
            boxes[-1, 0, moved, 0] += 0.2
        denoised = outputs.denoising._replace(predictions=outputs.denoising.predictions._replace(boxes=boxes))
        loss = criterion(outputs._replace(denoising=denoised), targets)["loss_bbox_dn"]
        assert loss.item() == pytest.approx(0 if moved is None else 5 * 0.2 / (4 * 2), abs=1e-6)


def test_shifted_negatives():
    """The centre leaves by one to two half sides along both axes; the size stays; the IoU is at most 1/7."""
    denoising = ShiftDenoising(num_classes=3, embed_dim=4)
    labels, boxes = torch.zeros(2000, dtype=torch.int64), torch.tensor([[0.5, 0.5, 0.1, 0.2]]).expand(2000, -1)
    noise = denoising.draw(2, labels)
    positive, negative = denoising.noise_boxes(boxes, noise)
    assert torch.equal(positive, ContrastiveDenoising(num_classes=3, embed_dim=4).noise_boxes(boxes, noise)[0])
    torch.testing.assert_close(negative[:, 2:], boxes[:, 2:])
    away = (negative[:, :2] - 0.5) / torch.tensor([0.05, 0.1])
    signs, parts = noise.box_signs[1, :, :2], noise.box_parts[1, :, :2]
    torch.testing.assert_close(away, torch.where(signs == 1, 1.0, -1.0) * (1 + parts), rtol=0, atol=1e-5)
    overlap = (1 - away.abs() / 2).prod(1)  # of the box's area
    assert (overlap / (2 - overlap)).max() <= 1 / 7 + 1e-6
    at_border = torch.tensor([[0.05, 0.05, 0.1, 0.1]]).expand(2000, -1)
    cut = cxcywh_to_xyxy(denoising.noise_boxes(at_border, noise)[1])
    assert cut.min() >= -1e-6
    assert (cut[:, 2:] >= cut[:, :2] - 1e-6).all()


# Losses


def test_only_the_last_layer_is_charged():
    network, criterion = variant("no auxiliary losses")
    outputs, _ = gradients(network, criterion, (2, 3))
    targets = random_targets(2, 3)
    full, found = default_criterion()(outputs, targets), criterion(outputs, targets)
    for name, loss in full.items():
        assert found[name] == (0 if name.endswith("_0") else loss)
