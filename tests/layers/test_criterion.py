import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from dino.layers import (
    DenoisingOutputs,
    HungarianMatcher,
    LayerOutputs,
    LossScaling,
    NonFiniteCostError,
    Outputs,
    SetCriterion,
    Target,
    cxcywh_to_xyxy,
)
from dino.layers.class_loss import FocalLoss, _focal_loss
from dino.layers.criterion import call_criterion, global_loss_normalizer
from dino.utils.files import UserError

from ..tiny import default_criterion, random_boxes, random_targets
from .test_boxes import giou_by_hand
from .test_matcher import TwoArguments as MatcherOfTwoArguments

UNWEIGHTED = {"class_weight": 1, "l1_weight": 1, "giou_weight": 1}


def leaf_predictions(layers, images, queries, classes=3):
    logits, boxes = torch.randn(layers, images, queries, classes), random_boxes(layers, images, queries)
    return LayerOutputs(logits.requires_grad_(), boxes.requires_grad_())


def random_outputs(targets, *, layers=2, queries=5, num_groups=None, classes=3):
    """With `num_groups`, also denoising predictions for `targets`; 0 groups make the free slot."""
    images, denoising = len(targets), None
    if num_groups is not None:
        slots = 2 * num_groups * max(len(t.labels) for t in targets) if num_groups else 1
        denoising = DenoisingOutputs(leaf_predictions(layers, images, slots, classes), targets, num_groups)
    decoder = leaf_predictions(layers, images, queries, classes)
    return Outputs(decoder, leaf_predictions(1, images, queries, classes), denoising)


def focal_by_hand(logit, positive):
    p = 1 / (1 + math.exp(-logit))
    if positive:
        return 0.25 * (1 - p) ** 2 * -math.log(p)
    return 0.75 * p**2 * -math.log(1 - p)


def losses_by_hand(logits, boxes, pairs_per_image, targets, num_boxes):
    """One layer: (B, Q, C), (B, Q, 4) and (query, object) pairs -> the three losses without weights."""
    ce = l1 = overlap = 0.0
    for image, pairs in enumerate(pairs_per_image):
        label_of = {query: targets[image].labels[g].item() for query, g in pairs}
        for query, row in enumerate(logits[image].tolist()):
            ce += sum(focal_by_hand(x, label_of.get(query) == c) for c, x in enumerate(row))
        for query, g in pairs:
            box, true_box = boxes[image, query].double(), targets[image].boxes[g].double()
            l1 += sum(abs(a - b) for a, b in zip(box.tolist(), true_box.tolist(), strict=True))
            overlap += 1 - giou_by_hand(cxcywh_to_xyxy(box).tolist(), cxcywh_to_xyxy(true_box).tolist())
    return {"loss_ce": ce / num_boxes, "loss_bbox": l1 / num_boxes, "loss_giou": overlap / num_boxes}


def known_pairs_by_hand(target, num_groups, longest):
    return [(group * 2 * longest + g, g) for group in range(num_groups) for g in range(len(target.labels))]


def all_losses_by_hand(outputs, targets, matcher):
    objects = max(1, sum(len(t.labels) for t in targets))
    last = len(outputs.decoder.logits) - 1
    named = {}
    for predictions, is_decoder in ((outputs.decoder, True), (outputs.proposals, False)):
        for layer, images in enumerate(matcher(predictions, targets)):
            pairs = [list(zip(query.tolist(), g.tolist(), strict=True)) for query, g in images]
            suffix = "_interm" if not is_decoder else "" if layer == last else f"_{layer}"
            losses = losses_by_hand(predictions.logits[layer], predictions.boxes[layer], pairs, targets, objects)
            named |= {f"{key}{suffix}": value for key, value in losses.items()}
    if outputs.denoising:
        predictions, denoised, num_groups = outputs.denoising
        longest = max(len(t.labels) for t in denoised)
        pairs = [known_pairs_by_hand(t, num_groups, longest) for t in denoised]
        scale = num_groups * max(1, sum(len(t.labels) for t in denoised))
        for layer in range(last + 1):
            suffix = "_dn" if layer == last else f"_dn_{layer}"
            losses = losses_by_hand(predictions.logits[layer], predictions.boxes[layer], pairs, denoised, scale)
            named |= {f"{key}{suffix}": value for key, value in losses.items()}
    return named


@pytest.mark.parametrize("num_groups", [None, 1, 3])
@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (7, 1)])
def test_against_loops(counts, num_groups):
    """7 objects are more than the 5 queries."""
    targets = random_targets(*counts)
    outputs = random_outputs(targets, num_groups=num_groups)
    criterion = SetCriterion(matcher=HungarianMatcher(), **UNWEIGHTED)
    losses, expected = criterion(outputs, targets), all_losses_by_hand(outputs, targets, criterion.matcher)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-4), name


def test_weights_are_applied_once():
    targets = random_targets(2, 1)
    outputs = random_outputs(targets, num_groups=1)
    plain = SetCriterion(matcher=HungarianMatcher(), **UNWEIGHTED)(outputs, targets)
    weights = {"loss_ce": 3, "loss_bbox": 0.5, "loss_giou": 7}
    weighted = SetCriterion(matcher=HungarianMatcher(), class_weight=3, l1_weight=0.5, giou_weight=7)(outputs, targets)
    for name, loss in weighted.items():
        kind = "_".join(name.split("_")[:2])
        torch.testing.assert_close(loss, weights[kind] * plain[name])


def test_published_example():
    logits = torch.tensor([[0.3, -2.0], [1.5, 0.2], [-4.6, -4.6]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4], [0.7, 0.6, 0.3, 0.3]])
    target = Target(torch.tensor([0, 1]), torch.tensor([[0.52, 0.5, 0.2, 0.25], [0.7, 0.62, 0.28, 0.3]]))
    predictions = LayerOutputs(logits[None, None], boxes[None, None])
    losses = SetCriterion(matcher=HungarianMatcher(), **UNWEIGHTED)(Outputs(predictions, predictions), [target])
    for name, expected in {"loss_ce": 1.095025, "loss_bbox": 0.055, "loss_giou": 0.267809}.items():
        assert losses[name].item() == pytest.approx(expected, abs=2e-6)
        assert losses[f"{name}_interm"].item() == pytest.approx(expected, abs=2e-6)


def test_focal_loss_published_example():
    positive, negatives = torch.tensor([0.3]), torch.tensor([-2.0, 1.5, 0.2, -4.6, -4.6])
    loss = 0.25 * _focal_loss(-positive, 2.0).sum() + 0.75 * _focal_loss(negatives, 2.0).sum()
    assert loss.item() == pytest.approx(1.060375, abs=2e-6)


def test_class_loss_of_confident_logits():
    """No precision is lost where a positive counts as a negative first."""
    class_loss = FocalLoss()
    logits = torch.tensor([12.0, -12.0, 0.0, 30.0, -30.0, -3.0]).view(1, 1, 2, 3).requires_grad_()
    true_logits = logits[0, 0, [0, 1], [0, 1]]
    loss = class_loss.negatives(logits) + class_loss.positives(true_logits, None).sum()
    x, positive = logits.double(), torch.tensor([1.0, 0, 0, 0, 1, 0]).view(1, 1, 2, 3).double()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(x, positive, reduction="none")
    p = torch.where(positive > 0, x.sigmoid(), 1 - x.sigmoid())
    expected = (torch.where(positive > 0, 0.25, 0.75) * (1 - p) ** 2 * entropy).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (grad,), (expected_grad,) = torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_names_of_six_layers():
    """The 39 names of the published programs."""
    targets = random_targets(1, 2)
    losses = default_criterion()(random_outputs(targets, layers=6, num_groups=1), targets)
    layers = ["", "_0", "_1", "_2", "_3", "_4"]
    suffixes = [*layers, "_interm", *(f"_dn{layer}" for layer in layers)]
    assert set(losses) == {f"loss_{kind}{suffix}" for kind in ("ce", "bbox", "giou") for suffix in suffixes}
    assert len(losses) == 39


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 2)])
@pytest.mark.parametrize("num_groups", [None, 0])
def test_gradients_are_finite(counts, num_groups):
    """Every prediction has one, also in images without objects and where no object is denoised."""
    targets = random_targets(*counts)
    outputs = random_outputs(targets, num_groups=num_groups)
    losses = default_criterion()(outputs, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    leaves = [*outputs.decoder, *outputs.proposals, *(outputs.denoising.predictions if outputs.denoising else ())]
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_no_objects_at_all():
    """Background is still trained; boxes and the free denoising slot cost nothing."""
    targets = random_targets(0, 0)
    outputs = random_outputs(targets, num_groups=0)
    losses = default_criterion()(outputs, targets)
    for name, loss in losses.items():
        assert (loss > 0) == (name.startswith("loss_ce") and "_dn" not in name), name
    sum(losses.values()).backward()
    assert not any(leaf.grad.any() for leaf in outputs.denoising.predictions)


def test_negatives_have_no_box_loss():
    """Only their class is trained; the boxes of positives all are."""
    targets = random_targets(2, 2)
    outputs = random_outputs(targets, num_groups=3)
    sum(default_criterion()(outputs, targets).values()).backward()
    logits, boxes = (x.grad.unflatten(2, (3, 2, 2)) for x in outputs.denoising.predictions)  # group, half, object
    assert boxes[:, :, :, 0].any(-1).all()
    assert not boxes[:, :, :, 1].any()
    assert logits.all()


def test_degenerate_boxes():
    targets = random_targets(2)
    targets[0].boxes[0, 2:] = 0
    outputs = random_outputs(targets)
    with torch.no_grad():
        outputs.decoder.boxes[:, :, ::2, 2:] = 0
    losses = default_criterion()(outputs, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert outputs.decoder.boxes.grad.isfinite().all()


def test_one_class():
    targets = random_targets(2, 0, num_classes=1)
    losses = default_criterion()(random_outputs(targets, num_groups=1, classes=1), targets)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_predictions_are_widened(dtype):
    targets = random_targets(2, 1)
    outputs = random_outputs(targets)
    half = Outputs(*(LayerOutputs(*(x.to(dtype) for x in p)) for p in (outputs.decoder, outputs.proposals)))
    wide = Outputs(*(LayerOutputs(*(x.float() for x in p)) for p in (half.decoder, half.proposals)))
    losses, expected = default_criterion()(half, targets), default_criterion()(wide, targets)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert losses == expected


def test_non_finite_predictions():
    targets = random_targets(1, 2)
    outputs = random_outputs(targets)
    with torch.no_grad():
        outputs.proposals.boxes[0, 1, 0] = math.nan
    with pytest.raises(NonFiniteCostError, match="image 1"):
        default_criterion()(outputs, targets)


def parts_of(outputs, targets, stops):
    """(outputs, targets) of the images before each stop."""
    for start, stop in pairwise([0, *stops]):
        decoder, proposals, dn = (
            LayerOutputs(*(x[:, start:stop] for x in predictions))
            for predictions in (outputs.decoder, outputs.proposals, outputs.denoising.predictions)
        )
        part = outputs.denoising._replace(predictions=dn, targets=outputs.denoising.targets[start:stop])
        yield Outputs(decoder, proposals, part), targets[start:stop]


@pytest.mark.parametrize("counts", [(2, 2, 2, 2), (3, 0, 1, 0), (0, 0, 0, 4), (7, 1, 0, 2), (0, 0, 0, 0)])
@pytest.mark.parametrize("stops", [(4,), (2, 4), (1, 4), (1, 2, 3, 4)])
def test_parts_with_a_common_normalizer_add_up_to_the_whole(counts, stops):
    """Losses and gradients, also of parts without objects: of whatever predictions, which are slices of the whole's."""
    targets = random_targets(*counts)
    outputs = random_outputs(targets, num_groups=2 if any(counts) else 0)
    leaves = [*outputs.decoder, *outputs.proposals, *outputs.denoising.predictions]
    criterion = default_criterion()
    whole = criterion(outputs, targets)
    expected = torch.autograd.grad(sum(whole.values()), leaves)
    normalizer = global_loss_normalizer(sum(counts), sum(counts), torch.device("cpu"))
    parts = [criterion(*part, normalizer=normalizer) for part in parts_of(outputs, targets, stops)]
    for name, loss in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), loss, rtol=1e-5, atol=1e-7)
    found = torch.autograd.grad(sum(sum(part.values()) for part in parts), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_normalizer_divides_what_it_is_for():
    """Its first number the losses of objects, its second those of denoising; 1 gives the sums themselves."""
    targets = random_targets(2, 3)
    outputs = random_outputs(targets, num_groups=2)
    sums = default_criterion()(outputs, targets, normalizer=torch.ones(2))
    losses = default_criterion()(outputs, targets, normalizer=torch.tensor([5.0, 20.0]))
    for name, loss in losses.items():
        torch.testing.assert_close(loss, sums[name] / (20 if "_dn" in name else 5))


@pytest.mark.parametrize(("part", "loss"), [("logits", "loss_ce_0"), ("boxes", "loss_bbox_0")])
def test_non_finite_predictions_that_are_matched_have_non_finite_losses(part, loss):
    """So that the step is skipped, wherever they are: here in the last query alone."""
    targets = random_targets(1, 2)
    outputs = random_outputs(targets, queries=9)
    with torch.no_grad():
        getattr(outputs.decoder, part)[0, 1, 8, 0] = math.nan
    losses = default_criterion()(outputs, targets, non_finite="match")
    assert losses[loss].isnan()
    assert losses["loss_ce"].isfinite()


def test_a_matcher_of_two_arguments_needs_no_option():
    targets = random_targets(1, 2)
    outputs = random_outputs(targets)
    normalizer = torch.tensor([3.0, 1.0])
    criterion = SetCriterion(matcher=MatcherOfTwoArguments())
    assert criterion(outputs, targets, normalizer=normalizer) == default_criterion()(outputs, targets)


def test_counts_are_averaged_over_workers(monkeypatch):
    """Two processes, the other of which has 5 and 0 objects."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.add_(torch.tensor([5.0, 0.0])))
    normalizer = global_loss_normalizer(2, 1, torch.device("cpu"))
    assert normalizer.tolist() == [3.5, 1.0]


def test_counts_of_one_worker_are_at_least_one():
    assert global_loss_normalizer(0, 4, torch.device("cpu")).tolist() == [1.0, 4.0]


def test_the_device_has_the_losses_that_need_no_matches_before_the_host_matches():
    """Of a matcher that can start before it matches; results are those of one that can't."""
    targets, order = random_targets(2, 1), []
    outputs = random_outputs(targets, num_groups=2)

    class Noting(HungarianMatcher):
        def start(self, predictions, targets, **options):
            order.append("start")
            matching = super().start(predictions, targets, **options)
            return lambda: (order.append("match"), matching())[1]

    class NotingLoss(FocalLoss):
        def negatives(self, logits):
            order.append("negatives")
            return super().negatives(logits)

    class NotingCriterion(SetCriterion):
        def denoising_losses(self, denoising):
            order.append("denoising")
            return super().denoising_losses(denoising)

    losses = NotingCriterion(matcher=Noting(), class_loss=NotingLoss())(outputs, targets)
    assert order == ["start", "negatives", "denoising", "negatives", "match"]
    assert losses == SetCriterion(matcher=MatcherOfTwoArguments())(outputs, targets)


class TwoArguments(torch.nn.Module):
    """A person's own criterion."""

    def forward(self, outputs, targets):
        return default_criterion()(outputs, targets)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: LossScaling(criterion=c, factors={})])
def test_criteria_of_two_arguments(wrap):
    targets = random_targets(2, 1)
    outputs, criterion = random_outputs(targets), wrap(TwoArguments())
    expected = default_criterion()(outputs, targets)
    assert call_criterion(criterion, outputs, targets, normalizer=None, non_finite="match") == expected
    with pytest.raises(UserError, match="TwoArguments takes no `normalizer`, so a batch can't come in parts"):
        call_criterion(criterion, outputs, targets, normalizer=torch.ones(2))


def test_a_subclass_with_the_former_class_loss_is_refused():
    """Its method would be ignored without a word."""

    class Former(SetCriterion):
        def negative_focal_loss(self, logits):
            return 2 * logits.sum((1, 2, 3))

    with pytest.raises(UserError, match="negative_focal_loss is not used any more"):
        Former(matcher=HungarianMatcher())
