"""Metrics beside the losses: against loops, in parts, and of criteria in other criteria."""

import pytest
import torch

from dino.layers import HungarianMatcher, LayerOutputs, LossScaling, Outputs, SetCriterion
from dino.layers.matching_metrics import MatchingMetrics
from dino.modeling.variants import CombinedCriterion, OneToManyCriterion
from dino.modeling.variants.criteria import ObjectnessCriterion
from dino.structures import SCORE_THRESH
from dino.utils.files import UserError

from ..tiny import default_criterion, random_boxes, random_targets
from .test_criterion import random_outputs


def metrics_of(criterion, outputs, targets):
    metrics = MatchingMetrics()
    criterion(outputs, targets, metrics=metrics)
    return {name: value.item() for name, value in metrics.values().items()}


def by_hand(outputs, targets, matcher):
    """Of the last layer alone."""
    last = LayerOutputs(*(x[-1:] for x in outputs.decoder))
    wrong = pairs = not_last = shown = 0
    for image, (queries, objects) in enumerate(matcher(last, targets)[0]):
        rows, labels = last.logits[0, image].tolist(), targets[image].labels.tolist()
        best = [row.index(max(row)) for row in rows]
        wrong += sum(best[q] != labels[g] for q, g in zip(queries, objects, strict=True))
        pairs += len(queries)
        not_last += abs(sum(c != len(rows[0]) - 1 for c in best) - len(labels))
        scores = [torch.tensor(max(row)).sigmoid().item() for row in rows]
        shown += abs(sum(score >= SCORE_THRESH for score in scores) - len(labels))
    values = (100 * wrong / pairs if pairs else 100, not_last / len(targets), shown / len(targets))
    return dict(zip(MatchingMetrics.NAMES, values, strict=True))


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (7, 1), (0, 0)])
def test_against_loops(counts):
    """7 objects are more than the 5 queries."""
    targets = random_targets(*counts)
    outputs = random_outputs(targets, layers=3)
    expected = by_hand(outputs, targets, HungarianMatcher())
    assert metrics_of(default_criterion(), outputs, targets) == pytest.approx(expected)
    if sum(counts) == 0:
        assert expected["class_error"] == 100


def test_a_perfect_and_an_absurd_detector():
    (target,) = targets = random_targets(3)
    boxes = torch.cat([target.boxes, torch.tensor([[0.5, 0.5, 0.9, 0.9]])])[None, None]
    logits = torch.full((1, 1, 4, 3), -5.0)
    logits[0, 0, range(3), target.labels] = 5.0
    perfect = Outputs(LayerOutputs(logits, boxes), LayerOutputs(logits, boxes))
    found = metrics_of(default_criterion(), perfect, targets)
    assert (found["class_error"], found["count_error"]) == (0, 0)
    absurd = Outputs(LayerOutputs(logits.roll(1, -1), boxes), LayerOutputs(logits, boxes))
    matcher = HungarianMatcher(class_cost=0)
    assert metrics_of(SetCriterion(matcher=matcher), absurd, targets)["class_error"] == 100


def test_the_sum_over_parts_is_that_of_the_whole_batch():
    targets = random_targets(4, 0, 1)
    outputs = random_outputs(targets)
    metrics = MatchingMetrics()
    for part in (slice(0, 1), slice(1, 3)):
        own = [LayerOutputs(*(x[:, part] for x in predictions)) for predictions in outputs[:2]]
        default_criterion()(Outputs(*own), targets[part], metrics=metrics)
    found = {name: value.item() for name, value in metrics.values().items()}
    assert found == pytest.approx(metrics_of(default_criterion(), outputs, targets))


def test_losses_are_the_same_and_nothing_has_a_gradient():
    targets = random_targets(2, 1)
    outputs, metrics = random_outputs(targets, num_groups=1), MatchingMetrics()
    losses = default_criterion()(outputs, targets, metrics=metrics)
    alone = default_criterion()(outputs, targets)
    assert losses.keys() == alone.keys()
    assert all(torch.equal(losses[name], alone[name]) for name in losses)
    assert not any(value.requires_grad for value in metrics.values().values())


def test_wrappers_pass_the_main_matching():
    """Neither the proposals, matched apart with one class, nor a branch count."""
    targets = random_targets(2, 3)
    outputs = random_outputs(targets)
    expected = metrics_of(default_criterion(), outputs, targets)
    objectness = random_outputs(targets, classes=1).proposals
    criterion = ObjectnessCriterion(matcher=HungarianMatcher())
    assert metrics_of(criterion, outputs._replace(proposals=objectness), targets) == expected
    branch = OneToManyCriterion(matcher=HungarianMatcher(), copies=2)
    scaled = LossScaling(criterion=default_criterion(), factors={"loss_ce": 2.0})
    combined = CombinedCriterion(criterion=scaled, branches={"hybrid": branch})
    extra = random_outputs(targets)
    extra = extra._replace(proposals=extra.proposals.without_layers())
    assert metrics_of(combined, outputs._replace(extra={"hybrid": extra}), targets) == expected


def test_half_precision():
    """A score of bfloat16 is compared in float32."""
    targets = random_targets(1)
    logits = torch.full((1, 1, 2, 3), -9.0, dtype=torch.bfloat16)
    logits[..., 1] = torch.tensor([-0.4, -0.41])  # sigmoid 0.401, 0.399
    predictions = LayerOutputs(logits, random_boxes(1, 1, 2))
    metrics = MatchingMetrics()
    default_criterion()(Outputs(predictions, predictions), targets, metrics=metrics)
    found = {name: value.item() for name, value in metrics.values().items()}
    assert found == {"class_error": 100 * (targets[0].labels != 1).item(), "cardinality_error": 1, "count_error": 0}
    assert all(x.dtype == torch.float32 for x in metrics.values().values())


def test_a_criterion_that_adds_nothing_is_an_error():
    with pytest.raises(UserError, match=r"train\.log_matching=True, but the criterion takes no `metrics`: let its"):
        MatchingMetrics().values()
