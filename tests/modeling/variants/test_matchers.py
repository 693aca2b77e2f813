import math

import pytest
import torch

from dino.layers import HungarianMatcher, LayerOutputs, LossScaling, NonFiniteCostError, SetCriterion, SquaredIoULoss
from dino.modeling.variants import PositionModulatedMatcher
from dino.structures import Target

from ...descendants.recorded import pairs_of
from ...tiny import random_boxes, random_targets
from .published import check_losses, check_pairs, iou_of_detrex, wide_inputs

UNAMBIGUOUS = ["apart", "distinct", "empty_apart"]  # each pair has a GIoU of its own in the published program, too


def stable_dino():
    """Criterion with the published weights: 6 for classes, but 1 for those of denoising."""
    criterion = SetCriterion(matcher=PositionModulatedMatcher(), class_loss=SquaredIoULoss(), class_weight=6.0)
    return LossScaling(criterion=criterion, factors={"loss_ce_dn": 1 / 6})


def own_columns(cost, counts):
    """(N, B, Q, G) -> (N, Q, objects of all images)."""
    return torch.cat([cost[:, image, :, :count] for image, count in enumerate(counts)], -1)


@pytest.mark.parametrize("case", UNAMBIGUOUS)
def test_published_costs_and_pairs(case):
    """The published costs have 1 - GIoU, these -GIoU: 2 less, after the weight."""
    arrays, _, targets, matched = wide_inputs(f"stable_dino/{case}")
    matcher, counts = PositionModulatedMatcher(), arrays["counts"].tolist()
    cost = own_columns(matcher.cost(matched, targets), counts) + 2
    torch.testing.assert_close(cost, arrays["costs"], rtol=0, atol=1e-6)
    plain = own_columns(HungarianMatcher().cost(matched, targets), counts) + 2
    assert (plain - arrays["costs"]).abs().max() > 0.1
    check_pairs(matcher(matched, targets), pairs_of(arrays, len(matched.logits)))


@pytest.mark.parametrize("case", UNAMBIGUOUS)
@pytest.mark.parametrize(("iou", "tolerance"), [("own", 1e-5), ("published", 1e-6)])
def test_published_losses(monkeypatch, case, iou, tolerance):
    """The published IoU adds 1e-6 to the union; with it even less differs."""
    arrays, outputs, targets, _ = wide_inputs(f"stable_dino/{case}")
    if iou == "published":
        monkeypatch.setattr("dino.layers.class_loss.box_iou", iou_of_detrex)
    check_losses(stable_dino(), arrays, outputs, targets, tolerance)


def test_objects_of_one_class_keep_their_own_positions():
    """The published program gives all objects of a class in the batch the GIoU with the last of them."""
    arrays, _, targets, matched = wide_inputs("stable_dino/batch")
    counts = arrays["counts"].tolist()
    found = own_columns(PositionModulatedMatcher().cost(matched, targets), counts) + 2
    same = [
        torch.allclose(*columns, atol=1e-6) for columns in zip(found.unbind(2), arrays["costs"].unbind(2), strict=True)
    ]
    assert same.count(True) == 1
    labels, last = arrays["true_labels"].tolist(), same.index(True)
    assert labels[last] not in labels[last + 1 :]


def test_the_costs_of_an_image_are_the_same_in_every_batch():
    """Also in other places of the batch, and beside an image with more objects or none."""
    targets = random_targets(2, 5, 0)
    predictions = LayerOutputs(torch.randn(2, 3, 6, 3), random_boxes(2, 3, 6))
    matcher = PositionModulatedMatcher()
    for order in ([0], [1, 0], [2, 0, 1], [0, 2]):
        cost = matcher.cost(LayerOutputs(*(x[:, order] for x in predictions)), [targets[image] for image in order])
        if order == [0]:
            alone = cost[:, 0]
        assert torch.equal(cost[:, order.index(0), :, :2], alone)


def by_hand(logit, giou, best, power):
    position = (giou + 1) / 2 * max(1, 1 / ((best + 1) / 2))
    p = position**power / (1 + math.exp(-logit))
    return 0.25 * (1 - p) ** 2 * -math.log(p) + 0.75 * p**2 * math.log(1 - p)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_the_class_term(power):
    """Two queries, two objects; the padding column of the second image has the highest GIoU, but isn't its own."""
    logits, giou = [[0.3, -1.2], [2.0, 0.7]], [[[0.6, -0.8], [0.1, 0.4]], [[-0.2, 0.9], [0.5, 0.8]]]
    matcher, targets = PositionModulatedMatcher(power=power), random_targets(2, 1)
    scores = torch.tensor(logits).sigmoid().expand(1, 2, 2, 2)
    found = matcher.class_term(scores, torch.tensor(giou)[None], targets)
    for image, (best, columns) in enumerate(((0.6, 2), (0.5, 1))):
        for query in range(2):
            for column in range(columns):
                expected = by_hand(logits[query][column], giou[image][query][column], best, power)
                assert found[0, image, query, column].item() == pytest.approx(expected, abs=1e-6)


def test_without_power_it_is_the_plain_matcher():
    targets = random_targets(3, 0, 1)
    predictions = LayerOutputs(torch.randn(2, 3, 6, 3), random_boxes(2, 3, 6))
    costs = [m.cost(predictions, targets) for m in (PositionModulatedMatcher(power=0.0), HungarianMatcher())]
    assert torch.equal(*costs)


def test_no_objects_at_all():
    nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    pairs = PositionModulatedMatcher()(LayerOutputs(torch.randn(2, 2, 6, 3), random_boxes(2, 2, 6)), [nothing] * 2)
    assert [[len(query) for query, _ in layer] for layer in pairs] == [[0, 0], [0, 0]]


def test_boxes_that_miss_and_boxes_of_no_area():
    """Costs are finite where no box comes near an object, and where all areas are 0."""
    predictions = LayerOutputs(torch.randn(1, 1, 3, 2), torch.tensor([0.0, 0.0, 0.0, 0.0]).expand(1, 1, 3, 4))
    for box in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]):
        cost = PositionModulatedMatcher().cost(predictions, [Target(torch.tensor([1]), torch.tensor([box]))])
        assert cost.isfinite().all()


def test_a_nan_box_spoils_its_own_costs_only():
    """So that it is matched where the step is to be skipped, and elsewhere its image is named."""
    targets = random_targets(2, 2)
    predictions = LayerOutputs(torch.randn(1, 2, 5, 3), random_boxes(1, 2, 5))
    predictions.boxes[0, 1, 4, 2] = math.nan
    matcher = PositionModulatedMatcher()
    broken = matcher.cost(predictions, targets).isnan()
    assert broken[0, 1, 4].all()
    assert broken.sum() == 2
    with pytest.raises(NonFiniteCostError, match="image 1"):
        matcher(predictions, targets)
    assert 4 in matcher(predictions, targets, non_finite="match")[0][1][0]
