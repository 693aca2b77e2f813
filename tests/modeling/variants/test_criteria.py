from itertools import pairwise

import numpy as np
import pytest
import torch

from dino.layers import (
    FocalLoss,
    HungarianMatcher,
    IoUAwareLoss,
    LayerOutputs,
    LossScaling,
    MatchabilityLoss,
    SetCriterion,
)
from dino.layers.criterion import global_loss_normalizer
from dino.modeling import QuerySelection
from dino.modeling.variants import (
    CombinedCriterion,
    MixedMatchingCriterion,
    ObjectnessCriterion,
    OneToManyCriterion,
    PatternSelection,
    SeparateCriterion,
)
from dino.modeling.variants.criteria import _rank, check_criterion
from dino.structures import DenoisingOutputs, Outputs, Target
from dino.utils.files import UserError

from ...descendants.recorded import pairs_of
from ...tiny import random_boxes, random_targets, tiny_network
from .published import check_losses, check_pairs, iou_of_detrex, wide_inputs


def align_detr(copies=2, **options):
    """With the published weights, which are the defaults."""
    return MixedMatchingCriterion(
        matcher=HungarianMatcher(copies_share=0.5), class_loss=IoUAwareLoss(), copies=copies, **options
    )


def random_predictions(layers, images, queries, dtype=torch.float32):
    logits, boxes = torch.randn(layers, images, queries, 3), random_boxes(layers, images, queries)
    return LayerOutputs(logits.to(dtype).requires_grad_(), boxes.to(dtype).requires_grad_())


def random_outputs(targets, *, layers=3, queries=12, groups=2):
    """With denoising, of one slot where nobody has an object."""
    longest = max(len(t.labels) for t in targets)
    denoised = random_predictions(layers, len(targets), 2 * groups * longest or 1)
    return Outputs(
        random_predictions(layers, len(targets), queries),
        random_predictions(1, len(targets), queries),
        DenoisingOutputs(denoised, targets, groups if longest else 0),
    )


def leaves(outputs):
    return [*outputs.decoder, *outputs.proposals, *outputs.denoising.predictions]


def parts_of(outputs, targets, stops):
    """(outputs, targets) of the images before each stop."""
    for start, stop in pairwise([0, *stops]):
        decoder, proposals, denoised = (
            LayerOutputs(*(x[:, start:stop] for x in predictions))
            for predictions in (outputs.decoder, outputs.proposals, outputs.denoising.predictions)
        )
        own = targets[start:stop]
        yield Outputs(decoder, proposals, outputs.denoising._replace(predictions=denoised, targets=own)), own


# Mixed matching


@pytest.mark.parametrize("case", ["k2", "k1", "empty", "crowded_apart"])
@pytest.mark.parametrize(("iou", "tolerance"), [("own", 1e-5), ("published", 1e-6)])
def test_published_mixed_matching(monkeypatch, case, iou, tolerance):
    """Pairs, each loss, gradients. The published IoU adds 1e-6 to the union; with it even less differs."""
    arrays, outputs, targets, matched = wide_inputs(f"align_detr/{case}")
    if iou == "published":
        monkeypatch.setattr("dino.layers.class_loss.box_iou", iou_of_detrex)
    criterion = align_detr(copies=1 if case == "k1" else 2)
    copies = criterion.copies(len(outputs.decoder.logits), len(outputs.proposals.logits))
    check_pairs(criterion.matcher(matched, targets, copies=copies), pairs_of(arrays, len(copies)))
    check_losses(criterion, arrays, outputs, targets, tolerance)


def test_a_crowded_image_takes_no_copies_from_the_next():
    """The published program does: there the second image has 1 prediction for each object instead of 2."""
    arrays, _, targets, matched = wide_inputs("align_detr/crowded")
    published = pairs_of(arrays, 3)
    found = align_detr().matcher(matched, targets, copies=[2, 1, 2])
    check_pairs([layer[:1] for layer in found], [layer[:1] for layer in published])
    assert [len(layer[1][0]) for layer in published] == [2, 2, 2]
    assert [len(layer[1][0]) for layer in found] == [4, 2, 4]
    for part in ([0], [1]):
        alone = align_detr().matcher(LayerOutputs(*(x[:, part] for x in matched)), [targets[part[0]]], copies=[2, 1, 2])
        check_pairs([[layer[part[0]]] for layer in found], alone)


def test_an_image_with_more_objects_than_half_of_the_queries_is_matched():
    """The published program gives it no pair at all. The next image is as published where that is called alone."""
    arrays, outputs, targets, matched = wide_inputs("align_detr/overfull_apart")
    published = pairs_of(arrays, 3)
    assert [len(layer[0][0]) for layer in published] == [0, 0, 0]
    found = align_detr().matcher(matched, targets, copies=[2, 1, 2])
    check_pairs([layer[:1] for layer in found], [layer[:1] for layer in HungarianMatcher()(matched, targets)])
    check_pairs([layer[1:] for layer in found], [layer[1:] for layer in published])
    _, (second, own) = parts_of(outputs, targets, (1, 2))
    losses = align_detr()(second, own, normalizer=torch.tensor([13.0, 13.0]))  # of the batch
    for name in (name for name in losses if "ce" not in name and "dn" not in name):
        torch.testing.assert_close(losses[name], arrays[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("copies", [1, 2, 6])
def test_the_matcher_of_relation_detr(copies):
    """Its last layer: it gives an image fewer copies by the same rule."""
    arrays, outputs, targets, _ = wide_inputs(f"relation_detr/matcher_k{copies}")
    last = LayerOutputs(*(x.detach()[-1:] for x in outputs.decoder))
    check_pairs(HungarianMatcher(copies_share=0.5)(last, targets, copies=[copies]), pairs_of(arrays, 1))


@pytest.mark.parametrize("class_loss", [IoUAwareLoss(), MatchabilityLoss()])
@pytest.mark.parametrize("counts", [(2, 3), (0, 9), (0, 0), (15, 1)])
def test_with_one_copy_it_is_the_set_criterion(class_loss, counts):
    """To the bit, with gradients."""
    targets = random_targets(*counts)
    outputs, found = random_outputs(targets), []
    for kind, options in ((SetCriterion, {}), (MixedMatchingCriterion, {"copies": 1})):
        losses = kind(matcher=HungarianMatcher(), class_loss=class_loss, **options)(outputs, targets)
        found.append((losses, torch.autograd.grad(sum(losses.values()), leaves(outputs))))
    (expected, expected_gradients), (losses, gradients) = found
    assert losses == expected
    assert all(torch.equal(*both) for both in zip(gradients, expected_gradients, strict=True))


def test_copies_of_few_queries():
    """7 objects, 5 queries: each query has one object. 3 objects: 2 copies need 6 queries, so there is 1."""
    targets = random_targets(7, 3, 1)
    predictions = random_predictions(2, 3, 5)
    pairs = HungarianMatcher()(predictions, targets, copies=[2, 1])
    for layer, sizes in zip(pairs, ([5, 3, 2], [5, 3, 1]), strict=True):
        assert [len(query) for query, _ in layer] == sizes
        assert all(len(set(query)) == len(query) and (np.diff(query) > 0).all() for query, _ in layer)
        assert sorted(layer[1][1]) == [0, 1, 2]
    losses = align_detr()(random_outputs(targets, queries=5), targets)
    assert all(loss.isfinite() for loss in losses.values())


def rank_by_hand(values, group):
    """How many of the group are better, or as good and earlier."""
    pairs = list(enumerate(zip(values, group, strict=True)))
    return [sum(h == g and (-w, j) < (-v, i) for j, (w, h) in pairs) for i, (v, g) in pairs]


def test_ranks():
    """Ties keep their order, so that a run repeats; groups need not lie together."""
    values, group = torch.randint(5, (200,)) / 5, torch.randint(30, (200,))
    assert _rank(values, group).tolist() == rank_by_hand(values.tolist(), group.tolist())
    nothing = torch.zeros(0, dtype=torch.int64)
    assert _rank(torch.zeros(0), nothing).tolist() == []


def test_all_three_losses_are_weighed_by_rank():
    """One object with 3 of 8 queries, by hand: the second best box weighs exp(-1 / 2), the third exp(-2 / 2)."""
    target = Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))
    boxes = torch.cat([torch.full((8, 2), 0.5), torch.linspace(0.38, 0.8, 8)[:, None].expand(8, 2)], 1)[None, None]
    logits = torch.randn(1, 1, 8, 2)
    predictions = LayerOutputs(logits, boxes)
    criterion = align_detr(copies=3, temperature=2.0, l1_weight=1.0, class_weight=1.0)
    criterion.class_loss.score_power = 0.0
    losses = criterion(Outputs(predictions, predictions), [target])
    (((query, _),),) = criterion.matcher(predictions, [target], copies=[3])
    off = (boxes[0, 0, query] - target.boxes).abs().sum(1)
    weight = torch.exp(-off.argsort().argsort() / 2)  # the nearest size has the highest IoU here
    sides = boxes[0, 0, query, 2]
    iou = torch.minimum(sides, torch.tensor(0.4)) ** 2 / torch.maximum(sides, torch.tensor(0.4)) ** 2
    assert losses["loss_bbox_interm"].item() == pytest.approx((weight * off).sum().item(), rel=1e-5)
    assert losses["loss_giou_interm"].item() == pytest.approx(2 * (weight * (1 - iou)).sum().item(), rel=1e-3)
    goal, factor = torch.zeros(8, 2), logits[0, 0].sigmoid() ** 2
    goal[query, 1], factor[query, 1] = iou**1.0 * weight, 1.0
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, 0], goal, factor, reduction="sum")
    assert losses["loss_ce_interm"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert losses["loss_bbox"].item() == pytest.approx(off.min().item(), rel=1e-5)  # one pair in the last layer


@pytest.mark.parametrize("counts", [(2, 2, 2, 2), (3, 0, 1, 0), (0, 0, 0, 4), (7, 1, 0, 2), (0, 0, 0, 0)])
@pytest.mark.parametrize("stops", [(2, 4), (1, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("kind", [MixedMatchingCriterion, OneToManyCriterion])
def test_parts_with_a_common_normalizer_add_up_to_the_whole(kind, counts, stops):
    """Losses and gradients, with images of 7 objects, which get fewer copies, and parts without objects."""
    targets = random_targets(*counts)
    outputs = random_outputs(targets)
    criterion = kind(matcher=HungarianMatcher(), class_loss=IoUAwareLoss(), copies=2)
    whole = criterion(outputs, targets)
    normalizer = global_loss_normalizer(sum(counts), sum(counts), torch.device("cpu"))
    parts = [criterion(*part, normalizer=normalizer) for part in parts_of(outputs, targets, stops)]
    for name, loss in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), loss, rtol=1e-5, atol=1e-7)
    found = torch.autograd.grad(sum(sum(part.values()) for part in parts), leaves(outputs))
    expected = torch.autograd.grad(sum(whole.values()), leaves(outputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_without_quality_is_refused():
    with pytest.raises(UserError, match="FocalLoss has no quality to rank"):
        MixedMatchingCriterion(matcher=HungarianMatcher(), class_loss=FocalLoss())


class OneToOne(torch.nn.Module):
    """A person's own matcher."""

    def forward(self, predictions, targets):
        return HungarianMatcher()(predictions, targets)


def test_a_matcher_without_copies_is_refused():
    """When the criterion is built."""
    with pytest.raises(UserError, match="OneToOne decides how many predictions an object gets"):
        MixedMatchingCriterion(matcher=OneToOne(), class_loss=IoUAwareLoss())
    with pytest.raises(UserError, match="OneToOne decides how many predictions an object gets"):
        OneToManyCriterion(matcher=OneToOne())


@pytest.mark.parametrize("part", ["logits", "boxes"])
def test_non_finite_predictions_have_non_finite_losses(part):
    targets = random_targets(1, 2)
    outputs = random_outputs(targets)
    with torch.no_grad():
        getattr(outputs.decoder, part)[0, 1, 8, 0] = torch.nan
    losses = align_detr()(outputs, targets, non_finite="match")
    assert losses["loss_ce_0"].isnan()
    assert losses["loss_ce"].isfinite()


# One to many


def test_one_to_many_losses_are_those_of_repeated_objects():
    """Each object as often as it has copies; the divisor counts them."""
    targets = random_targets(2, 1)
    outputs = random_outputs(targets)
    repeated = [Target(t.labels.repeat(3), t.boxes.repeat(3, 1)) for t in targets]
    expected = SetCriterion(matcher=HungarianMatcher())(outputs, repeated)
    found = OneToManyCriterion(matcher=HungarianMatcher(), copies=3)(outputs, targets)
    for name, loss in found.items():
        if "_dn" not in name:
            torch.testing.assert_close(loss, expected[name])


# Branches


def test_combined_losses():
    """Those of the main predictions keep their names; those of a branch have its name and its weight."""
    targets = random_targets(2, 1)
    main, branch = random_outputs(targets), random_outputs(targets)
    criterion = CombinedCriterion(
        criterion=SetCriterion(matcher=HungarianMatcher()),
        branches={"hybrid": OneToManyCriterion(matcher=HungarianMatcher(), copies=3)},
        weights={"hybrid": 0.5},
    )
    losses = criterion(main._replace(extra={"hybrid": branch}), targets)
    own, further = criterion.criterion(main, targets), criterion.branches["hybrid"](branch, targets)
    assert losses == own | {f"{name}_hybrid": 0.5 * loss for name, loss in further.items()}


def test_branches_and_criteria_must_agree():
    targets = random_targets(1)
    main, criterion = random_outputs(targets), SetCriterion(matcher=HungarianMatcher())
    for extra, branches in (({"a": main}, {}), (None, {"b": criterion})):
        with pytest.raises(UserError, match="the network has the branches"):
            CombinedCriterion(criterion=criterion, branches=branches)(main._replace(extra=extra), targets)


@pytest.mark.parametrize(
    ("selection", "needed"),
    [
        (lambda: PatternSelection(num_queries=4, num_classes=3, embed_dim=32), "use SeparateCriterion"),
        (lambda: QuerySelection(num_queries=12, num_classes=1, embed_dim=32), "use ObjectnessCriterion"),
    ],
)
def test_proposals_of_another_kind_need_their_criterion(selection, needed):
    network, criterion = tiny_network(), SetCriterion(matcher=HungarianMatcher())
    check_criterion(criterion, network)
    network.query_selection = selection()
    with pytest.raises(UserError, match=needed):
        check_criterion(LossScaling(criterion=criterion, factors={}), network)
    check_criterion(ObjectnessCriterion(matcher=HungarianMatcher()), network)

    class Own(SetCriterion):
        """A person's, which may match them in its own way."""

        def forward(self, outputs, targets, **options):
            return {}

    check_criterion(Own(matcher=HungarianMatcher()), network)


def test_no_proposals_to_match_apart():
    """Of learned queries, or of a branch."""
    targets = random_targets(2, 1)
    outputs = random_outputs(targets)
    outputs = outputs._replace(proposals=outputs.proposals.without_layers())
    found = SeparateCriterion(matcher=HungarianMatcher())(outputs, targets)
    assert found == SetCriterion(matcher=HungarianMatcher())(outputs, targets)
