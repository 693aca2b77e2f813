import itertools
import math
import threading

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dino.layers import HungarianMatcher, LayerOutputs, NonFiniteCostError, Target, cxcywh_to_xyxy
from dino.layers.matcher import finite_costs, start_matching

from ..tiny import random_boxes, random_targets
from .test_boxes import giou_by_hand


def random_predictions(layers, images, queries, classes=3):
    return LayerOutputs(2 * torch.randn(layers, images, queries, classes), random_boxes(layers, images, queries))


def cost_by_hand(logits, box, label, true_box):
    """One query and one object, in floats."""
    p = 1 / (1 + math.exp(-logits[label]))
    positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    negative = 0.75 * p**2 * -math.log(1 - p + 1e-8)
    l1 = sum(abs(a - b) for a, b in zip(box, true_box, strict=True))
    corners = [cxcywh_to_xyxy(torch.tensor(x, dtype=torch.float64)).tolist() for x in (box, true_box)]
    return 2 * (positive - negative) + 5 * l1 - 2 * giou_by_hand(*corners)


def costs_by_hand(predictions, layer, image, target):
    """(Q, G) as nested lists."""
    queries = zip(predictions.logits[layer, image].tolist(), predictions.boxes[layer, image].tolist(), strict=True)
    objects = list(zip(target.labels.tolist(), target.boxes.tolist(), strict=True))
    return [[cost_by_hand(logits, box, *true) for true in objects] for logits, box in queries]


def best_by_trying(cost):
    """All ways to give each object a query of its own, or each query an object if there are fewer queries."""
    queries, objects = len(cost), len(cost[0])
    if queries >= objects:
        ways = [list(zip(way, range(objects), strict=True)) for way in itertools.permutations(range(queries), objects)]
    else:
        ways = [list(zip(range(queries), way, strict=True)) for way in itertools.permutations(range(objects), queries)]
    return sorted(min(ways, key=lambda way: sum(cost[q][g] for q, g in way)))


def test_cost_against_loops():
    predictions, targets = random_predictions(2, 3, 4), random_targets(2, 0, 3)
    cost = HungarianMatcher().cost(predictions, targets)
    assert cost.shape == (2, 3, 4, 3)
    for layer in range(2):
        for image in (0, 2):
            expected = torch.tensor(costs_by_hand(predictions, layer, image, targets[image]))
            torch.testing.assert_close(cost[layer, image, :, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [2, 3, 5])
def test_assignment_by_trying_all(queries):
    """Also with fewer queries than objects."""
    predictions, targets = random_predictions(2, 2, queries), random_targets(3, 2)
    matches = HungarianMatcher()(predictions, targets)
    for layer, image in itertools.product(range(2), range(2)):
        query, target = matches[layer][image]
        best = best_by_trying(costs_by_hand(predictions, layer, image, targets[image]))
        assert list(zip(query.tolist(), target.tolist(), strict=True)) == best


def test_published_example():
    logits = torch.tensor([[0.3, -2.0], [1.5, 0.2], [-4.6, -4.6]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4], [0.7, 0.6, 0.3, 0.3]])
    target = Target(torch.tensor([0, 1]), torch.tensor([[0.52, 0.5, 0.2, 0.25], [0.7, 0.62, 0.28, 0.3]]))
    predictions = LayerOutputs(logits[None, None], boxes[None, None])
    expected = torch.tensor([[-1.319635, 3.775330], [2.720797, 6.071294], [4.633071, 0.827533]])
    torch.testing.assert_close(HungarianMatcher().cost(predictions, [target])[0, 0], expected, rtol=0, atol=2e-6)
    query, found = HungarianMatcher()(predictions, [target])[0][0]
    assert (query.tolist(), found.tolist()) == ([0, 2], [0, 1])


@pytest.mark.parametrize("counts", [(0, 2), (0, 0)])
def test_images_without_objects(counts):
    matches = HungarianMatcher()(random_predictions(2, 2, 4), random_targets(*counts))
    assert [[len(query) for query, _ in layer] for layer in matches] == [list(counts)] * 2


@pytest.mark.parametrize(("part", "broken"), [("logits", math.nan), ("boxes", math.nan), ("boxes", math.inf)])
def test_non_finite_predictions_name_the_image(part, broken):
    predictions, targets = random_predictions(2, 3, 4), random_targets(2, 1, 2)
    getattr(predictions, part)[1, 2, 3] = broken
    with pytest.raises(NonFiniteCostError, match="image 2") as error:
        HungarianMatcher()(predictions, targets)
    assert error.value.image == 2
    assert isinstance(error.value, FloatingPointError)


def test_non_finite_ground_truth_names_the_image():
    targets = random_targets(2, 1)
    targets[1].boxes[0, 2] = math.nan
    with pytest.raises(NonFiniteCostError, match="image 1"):
        HungarianMatcher()(random_predictions(1, 2, 4), targets)


def test_degenerate_boxes_are_matched():
    predictions, targets = random_predictions(1, 1, 3), random_targets(2)
    predictions.boxes[0, 0, 0] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    targets[0].boxes[0, 2:] = 0
    assert len(HungarianMatcher()(predictions, targets)[0][0][0]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_predictions_are_widened(dtype):
    predictions, targets = random_predictions(1, 1, 4), random_targets(2)
    half = LayerOutputs(*(x.to(dtype) for x in predictions))
    wide = LayerOutputs(*(x.float() for x in half))
    assert torch.equal(HungarianMatcher().cost(half, targets), HungarianMatcher().cost(wide, targets))


def test_one_class():
    matches = HungarianMatcher()(random_predictions(1, 1, 4, classes=1), random_targets(3, num_classes=1))
    assert len(matches[0][0][0]) == 3


def test_many_objects_are_matched_as_few_are(monkeypatch):
    """In threads, the results in their order; errors name the image as ever, and no thread stays."""
    cost, counts = np.random.default_rng(0).random((3, 4, 30, 20)), [20, 0, 7, 20]
    expected = [[linear_sum_assignment(layer[i, :, :n]) for i, n in enumerate(counts)] for layer in cost]
    before = threading.active_count()
    used = set()

    def note(problem):
        used.add(threading.current_thread())
        return linear_sum_assignment(problem)

    monkeypatch.setattr("dino.layers.matcher.linear_sum_assignment", note)
    few = HungarianMatcher().assign(cost, counts)
    assert used == {threading.current_thread()}
    used.clear()
    monkeypatch.setattr("dino.layers.matcher._MANY", 3 * sum(counts))
    many = HungarianMatcher().assign(cost, counts)
    assert threading.current_thread() not in used
    assert str(few) == str(many) == str(expected)
    cost[1, 2, 3, 4] = np.inf
    with pytest.raises(NonFiniteCostError, match="image 2"):
        finite_costs(cost, counts, "raise")
    assert threading.active_count() == before


def test_a_started_matching_is_that_of_its_start():
    """Its error comes at the end, when the device has other work."""
    predictions, targets = random_predictions(2, 2, 5), random_targets(2, 3)
    expected = HungarianMatcher()(predictions, targets)
    matching = HungarianMatcher().start(predictions, targets)
    broken = LayerOutputs(predictions.logits, predictions.boxes * math.nan)
    failing = HungarianMatcher().start(broken, targets)
    predictions.boxes.zero_()
    assert str(matching()) == str(expected)
    with pytest.raises(NonFiniteCostError, match="image 0"):
        failing()


def test_a_matcher_without_a_start_is_called():
    """With the option where it differs from the default."""

    def matcher(*arguments, **options):
        return arguments, options

    arguments = ("predictions", "targets")
    assert start_matching(matcher, *arguments)() == (arguments, {})
    assert start_matching(matcher, *arguments, "match")() == (arguments, {"non_finite": "match"})


def test_nonfinite_costs_are_matched_on_demand():
    """As many pairs as ever, those predictions first; other images and layers as without them."""
    predictions, targets = random_predictions(2, 2, 5), random_targets(2, 1)
    matcher = HungarianMatcher()
    expected = matcher(predictions, targets)
    assert str(matcher(predictions, targets, non_finite="match")) == str(expected)
    predictions.boxes[1, 0, 4] = math.nan
    found = matcher(predictions, targets, non_finite="match")
    assert str(found[0]) == str(expected[0])
    assert str(found[1][1]) == str(expected[1][1])
    query, target = found[1][0]
    assert 4 in query
    assert sorted(target) == [0, 1]
    predictions.boxes.fill_(math.nan)
    found = matcher(predictions, targets, non_finite="match")
    assert [[len(query) for query, _ in layer] for layer in found] == [[2, 1]] * 2


class TwoArguments(torch.nn.Module):
    """A person's own matcher."""

    def forward(self, predictions, targets):
        return HungarianMatcher()(predictions, targets)


def test_matchers_of_two_arguments_can_skip_nonfinite_costs():
    predictions, targets = random_predictions(2, 1, 5), random_targets(3)
    finite = start_matching(TwoArguments(), predictions, targets, "match")()
    assert all(
        (a == b).all() for a, b in zip(finite[0][0], HungarianMatcher()(predictions, targets)[0][0], strict=True)
    )
    predictions.logits[0, 0, 0] = math.nan
    pairs = start_matching(TwoArguments(), predictions, targets, "match")()
    assert [[query.tolist() for query, _ in layer] for layer in pairs] == [[[0, 1, 2]]] * 2
    with pytest.raises(NonFiniteCostError):
        start_matching(TwoArguments(), predictions, targets)()


@pytest.mark.parametrize(("copies", "sizes"), [(1, [2, 1, 0, 5]), (3, [6, 3, 0, 5]), (4, [6, 4, 0, 5])])
def test_copies(copies, sizes):
    """Half of 12 queries is 6: three predictions for each of 2 objects, one for 5; a lone object has its cheapest ones.

    Copies of an object are interchangeable: it is one object that returns, and no query has two.
    """
    targets, matcher = random_targets(2, 1, 0, 5), HungarianMatcher(copies_share=0.5)
    predictions = LayerOutputs(torch.randn(2, 4, 12, 3), random_boxes(2, 4, 12))
    found = matcher(predictions, targets, copies=[copies, 1])
    assert str(found[1]) == str(matcher(predictions, targets)[1])
    for (query, target), size, count in zip(found[0], sizes, (2, 1, 0, 5), strict=True):
        assert len(query) == len(set(query)) == size
        assert sorted(target) == sorted([*range(count)] * (size // max(count, 1)))
        assert (np.diff(query) > 0).all()
    cheapest = matcher.cost(predictions, targets)[0, 1, :, 0].topk(sizes[1], largest=False).indices
    assert found[0][1][0].tolist() == cheapest.sort().values.tolist()
