import math

import pytest
import torch
import torch.nn.functional as F

from dino.layers import (
    FocalLoss,
    IoUAwareLoss,
    LayerOutputs,
    MatchabilityLoss,
    Outputs,
    SetCriterion,
    SquaredIoULoss,
    Target,
    VarifocalLoss,
)
from dino.layers.class_loss import Positives

from ..descendants.recorded import inputs_of, load_wide, pairs_of
from ..tiny import random_boxes

LOSSES = [FocalLoss, IoUAwareLoss, SquaredIoULoss, VarifocalLoss, MatchabilityLoss]
QUALITY = LOSSES[1:]


class FixedMatcher(torch.nn.Module):
    """Returns the same pairs for every layer."""

    def __init__(self, pairs):
        super().__init__()
        self.pairs = pairs

    def forward(self, predictions, targets):
        return [self.pairs] * len(predictions.logits)


def class_losses(loss, logits, boxes, targets, pairs):
    """(N, B, Q, C), (N, B, Q, 4) -> the loss of each layer, through the criterion, divided by the number of objects."""
    decoder = LayerOutputs(logits, boxes)
    criterion = SetCriterion(matcher=FixedMatcher(pairs), class_loss=loss)
    found = criterion(Outputs(decoder, decoder.without_layers()), targets, non_finite="match")
    return [found[f"loss_ce{suffix}"] for suffix in [*(f"_{n}" for n in range(len(logits) - 1)), ""]]


def first_queries(targets):
    """Object g belongs to query g."""
    return [(torch.arange(len(t.labels)).numpy(),) * 2 for t in targets]


# Published programs


class Detached(IoUAwareLoss):
    """IA-BCE as in Relation-DETR: the weights of negatives have no gradient."""

    negative = VarifocalLoss.negative


RECORDED = {
    "align_detr/ia_bce": IoUAwareLoss(),
    "stable_dino/class_loss": SquaredIoULoss(),
    "relation_detr/vari_sigmoid_focal_loss": VarifocalLoss(),
    "relation_detr/hybrid": VarifocalLoss(),
    "relation_detr/ia_bce_loss": Detached(),
    "deim/mal": MatchabilityLoss(),
    "deim/mal_alpha": MatchabilityLoss(alpha=0.5),
    "deim/vfl": VarifocalLoss(),
}


def recorded_inputs(case):
    """In float64, of the last layer."""
    arrays = load_wide(case)
    outputs, targets = inputs_of(arrays)
    logits, boxes = (x.detach()[-1:].requires_grad_() for x in outputs.decoder)
    return arrays, logits, boxes, targets


@pytest.mark.parametrize("case", RECORDED)
@pytest.mark.parametrize(("iou", "tolerance"), [("own", 1e-5), ("recorded", 1e-6)])
def test_published_losses(monkeypatch, case, iou, tolerance):
    """Loss and gradient. Align-DETR and Stable-DINO add 1e-6 to the union; with their IoU even less differs."""
    arrays, logits, boxes, targets = recorded_inputs(case)
    if iou == "recorded":
        monkeypatch.setattr(Positives, "iou", lambda pairs: arrays["iou"])
    (loss,) = class_losses(RECORDED[case], logits, boxes, targets, pairs_of(arrays, 1)[0])
    loss.backward()
    torch.testing.assert_close(loss, arrays["loss"], rtol=tolerance, atol=0)
    largest = arrays["logits_grad"].abs().max().item()
    torch.testing.assert_close(logits.grad[0], arrays["logits_grad"], rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_class_loss_trains_no_boxes(loss):
    """IoUs are targets."""
    targets = [Target(torch.tensor([1, 0]), random_boxes(2))]
    logits, boxes = torch.randn(1, 1, 4, 3, requires_grad=True), random_boxes(1, 1, 4).requires_grad_()
    (value,) = class_losses(loss(), logits, boxes, targets, first_queries(targets))
    assert torch.autograd.grad(value, boxes, allow_unused=True)[0] is None


# Formulas


def perfect(loss, **options):
    """Loss (of focal loss: the same objects) of 2 objects in each of 2 images, whose boxes are predicted exactly."""
    targets = [Target(torch.tensor([1, 0]), random_boxes(2).double()) for _ in range(2)]
    boxes = torch.stack([torch.cat([t.boxes, random_boxes(3).double()]) for t in targets])[None]
    logits = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for each in (loss, FocalLoss(**options)):
        (value,) = class_losses(each, logits, boxes, targets, first_queries(targets))
        found.append((value, *torch.autograd.grad(value, logits)))
    positives = torch.stack([logits[0, image, query, label] for image in (0, 1) for query, label in ((0, 1), (1, 0))])
    return *found, positives


def test_the_squared_iou_loss_of_perfect_boxes_is_the_focal_loss():
    found, focal, _ = perfect(SquaredIoULoss(positive_alpha=0.3, alpha=0.7, gamma=1.5), alpha=0.3, gamma=1.5)
    torch.testing.assert_close(found, focal)
    other, focal, _ = perfect(SquaredIoULoss(), alpha=0.3)
    assert (other[0] - focal[0]).abs() > 0.01


@pytest.mark.parametrize("loss", [IoUAwareLoss(score_power=0.0, alpha=0.8, gamma=1.5), MatchabilityLoss(alpha=0.8)])
def test_positives_of_perfect_boxes_have_plain_cross_entropy(loss):
    """Target 1, weight 1: -log p. What remains of the focal loss is that of negatives."""
    found, focal, positives = perfect(loss, alpha=0.2, gamma=1.5)
    score = positives.sigmoid()
    of_positives = 0.2 * (1 - score) ** 1.5 * -score.log()
    expected = focal[0] + (-score.log() - of_positives).sum() / 4
    torch.testing.assert_close(found[0], expected)


def moved_pairs(count=50):
    boxes = random_boxes(count).double()
    shifted = boxes + torch.rand(count, 4, dtype=torch.float64) * 0.05
    index = torch.arange(count)
    return Positives(torch.randn(count, dtype=torch.float64), boxes, shifted, index, index, (1, 5, count // 5), count)


def test_targets():
    """As the papers write them, from IoU u and score p."""
    pairs = moved_pairs()
    u, p = pairs.iou(), pairs.logits.sigmoid()
    assert 0.05 < u.min() < u.max() < 0.99
    assert FocalLoss().targets(pairs) is None
    torch.testing.assert_close(IoUAwareLoss(score_power=0.3).targets(pairs), p**0.3 * u**0.7)
    torch.testing.assert_close(VarifocalLoss().targets(pairs), u)
    torch.testing.assert_close(MatchabilityLoss(gamma=1.2).targets(pairs), u**1.2)
    squared = SquaredIoULoss(iou_power=2.0).targets(pairs).view(5, 10)
    torch.testing.assert_close(squared, u.view(5, 10) ** 2 / u.view(5, 10).max(1, keepdim=True).values ** 2)


def test_the_best_box_of_each_image_and_layer_counts():
    """Of two layers and two images, the second of which has no pair in the first layer."""
    query = torch.tensor([0, 1, 6, 7, 9])  # Q = 3: image 0; then the images 0 and 1 of layer 1
    values = torch.tensor([0.2, 0.5, 0.1, 0.0, 0.7])
    pairs = Positives(values, values, values, query, torch.tensor([0, 1, 1, 0, 2]), (2, 2, 3), 3)
    assert pairs.best_of_image(values).tolist() == pytest.approx([0.5, 0.5, 0.1, 0.1, 0.7])
    assert pairs.object_of_layer().tolist() == [0, 1, 4, 3, 5]


def test_the_target_has_a_floor():
    """IA-BCE of a box that misses its object: 0.01 remains."""
    pairs = moved_pairs()._replace(true_boxes=torch.full((50, 4), 5.0, dtype=torch.float64))
    assert (IoUAwareLoss().targets(pairs) == 0.01).all()


# Edges


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("size", "dtype"), [(100, torch.float32), (1e4, torch.float32), (1e4, torch.float16), (1e4, torch.bfloat16)]
)
def test_extreme_logits(loss, size, dtype):
    """Loss and gradient are finite, of positives and negatives of either sign, with good and bad boxes.

    (The published IA-BCE takes the logarithm of scores; it is NaN as soon as one is 0, below -104 in float32.)
    """
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).view(1, 1, 6, 1)
    logits = (size * signs * torch.tensor([1.0, -1.0])).to(dtype).requires_grad_()  # (1, 1, 6, 2)
    targets = [Target(torch.tensor([0, 0, 1, 0]), random_boxes(4))]
    boxes = torch.cat([targets[0].boxes[:2], random_boxes(4)])[None, None].to(dtype)
    (value,) = class_losses(loss(), logits, boxes, targets, first_queries(targets))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert value > size / 100
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_half_logits_are_widened(loss):
    targets = [Target(torch.tensor([0, 1]), random_boxes(2))]
    logits, boxes = torch.randn(2, 1, 5, 3).half(), random_boxes(2, 1, 5).half()
    half = class_losses(loss(), logits, boxes, targets, first_queries(targets))
    assert half == class_losses(loss(), logits.float(), boxes.float(), targets, first_queries(targets))


@pytest.mark.parametrize("loss", LOSSES)
def test_without_positives(loss):
    """The loss is that of negatives; logits have a gradient."""
    targets = [Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))] * 2
    logits = torch.randn(3, 2, 4, 3, requires_grad=True)
    found = torch.stack(class_losses(loss(), logits, random_boxes(3, 2, 4), targets, first_queries(targets)))
    torch.testing.assert_close(found, loss().negatives(logits))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert (gradient > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("empty", ["predicted", "true", "both", "equal"])
def test_boxes_of_no_area(loss, empty):
    targets = [Target(torch.tensor([0, 1]), random_boxes(2))]
    logits, boxes = torch.randn(1, 1, 4, 3, requires_grad=True), random_boxes(1, 1, 4)
    if empty != "true":
        boxes[..., 2:] = 0
    if empty != "predicted":
        targets[0].boxes[:, 2:] = 0
    if empty == "equal":
        boxes[0, 0, :2] = targets[0].boxes
    (value,) = class_losses(loss(), logits, boxes, targets, first_queries(targets))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("query", [0, 3])
def test_nan_logits_have_a_nan_loss(loss, query):
    """Of a positive and of a negative; the other layer keeps its loss."""
    targets = [Target(torch.tensor([0, 1]), random_boxes(2))]
    logits, boxes = torch.randn(2, 1, 4, 3), random_boxes(2, 1, 4)
    logits[0, 0, query, 0] = math.nan
    broken, whole = class_losses(loss(), logits, boxes, targets, first_queries(targets))
    assert broken.isnan()
    assert whole.isfinite()


@pytest.mark.parametrize("loss", QUALITY)
def test_nan_boxes_have_a_nan_loss(loss):
    """A positive without a quality is not counted as a bad one."""
    targets = [Target(torch.tensor([0, 1]), random_boxes(2))]
    logits, boxes = torch.randn(2, 1, 4, 3), random_boxes(2, 1, 4)
    boxes[0, 0, 1, 2] = math.nan
    broken, whole = class_losses(loss(), logits, boxes, targets, first_queries(targets))
    assert broken.isnan()
    assert whole.isfinite()


def test_varifocal_weights_have_no_gradient():
    """A negative is pulled by p ** gamma * p alone."""
    logits = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(VarifocalLoss(alpha=0.6, gamma=1.5).negatives(logits).sum(), logits)
    torch.testing.assert_close(gradient, 0.6 * logits.detach().sigmoid() ** 2.5)


def test_positives_leave_nothing_of_their_share_of_negatives():
    """The sum is the loss of each logit in its own part, written with binary cross-entropy."""
    targets = [Target(torch.tensor([2, 0]), random_boxes(2).double())]
    logits, boxes = torch.randn(1, 1, 4, 3).double(), random_boxes(1, 1, 4).double()
    (value,) = class_losses(VarifocalLoss(), logits, boxes, targets, first_queries(targets))
    pairs = Positives(*(logits[0, 0, [0, 1], [2, 0]], boxes[0, 0, :2], targets[0].boxes), None, None, (1, 1, 4), 2)
    target, weight = torch.zeros(4, 3).double(), 0.75 * logits[0, 0].sigmoid() ** 2
    target[[0, 1], [2, 0]] = weight[[0, 1], [2, 0]] = pairs.iou()
    expected = F.binary_cross_entropy_with_logits(logits[0, 0], target, weight, reduction="sum") / 2
    torch.testing.assert_close(value, expected)
