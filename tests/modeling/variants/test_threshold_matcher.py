import numpy as np
import pytest
import torch

from dino.layers import NonFiniteCostError, Target
from dino.layers.matcher import start_matching
from dino.modeling.variants import ThresholdMatcher
from dino.structures import LayerOutputs
from dino.utils.files import UserError

from ...descendants.branches import load, pairs_of, targets_of
from ...tiny import random_boxes, random_targets


def as_lists(pairs):
    """Pairs of one layer -> for each image, sorted (query, object)."""
    return [list(zip(*map(np.ndarray.tolist, image), strict=True)) for image in pairs]


@pytest.fixture(scope="module")
def recorded():
    values = load("dac/assigner")
    return values, targets_of(values), LayerOutputs(values["logits"][None], values["boxes"][None])


def test_scores_of_the_public_program(recorded):
    values, targets, predictions = recorded
    scores = ThresholdMatcher().score(predictions, targets)[0]
    for image, target in enumerate(targets):
        expected = values[f"targets/image_{image}/scores"].T
        torch.testing.assert_close(scores[image, :, : len(target.labels)], expected, rtol=0, atol=1e-6)


def test_assignment_of_the_public_program(recorded):
    """The same, but for the prediction that it gives to both objects of image 1: the best of object 0 stays there.

    Object 1 keeps the one prediction that prefers it, instead of the best of all.
    """
    values, targets, predictions = recorded
    (found,) = ThresholdMatcher()(predictions, targets)
    found, expected = as_lists(found), pairs_of(values["assignments"], 4)
    assert [len(image) for image in found] == [9, 7, 0, 1]
    assert [found[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    scores = values["targets/image_1/scores"]
    (own,) = ((scores[1] > scores[0]) & (scores[1] >= 0.4)).nonzero().flatten().tolist()
    assert sorted({*expected[1]} - {(8, 1)} | {(own, 1)}) == found[1]
    assert {(8, 0), (8, 1)} < {*expected[1]}


def assign(score, **options):
    (found,) = ThresholdMatcher(**options).assign(np.array(score)[None, None], [len(score[0])])
    return as_lists(found)[0]


def test_assignment_by_hand():
    """Predictions x objects: above the threshold, the best of an object, too many, and an object that gets nothing."""
    assert assign([[0.5, 0.1], [0.39, 0.1], [0.1, 0.2], [0.4, 0.45]]) == [(0, 0), (3, 1)]
    assert assign([[0.1, 0.2], [0.3, 0.1], [0.2, 0.15]]) == [(0, 1), (1, 0)]
    assert assign([[0.9, 0.8], [0.1, 0.2]]) == [(0, 0)]  # the best one of both belongs to the first
    assert assign([[x] for x in (0.5, 0.9, 0.6, 0.8)], most=2) == [(1, 0), (3, 0)]
    assert assign([[0.5], [0.5], [0.5]], most=2) == [(0, 0), (1, 0)]
    assert assign([[0.3], [0.25]], threshold=0.2) == [(0, 0), (1, 0)]


def test_a_prediction_has_one_object_and_the_result_repeats():
    """However many are good enough: the public program draws 75 of them."""
    targets = [Target(torch.zeros(2, dtype=torch.int64), torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.3, 0.3]]))]
    boxes = targets[0].boxes[torch.arange(200) % 2] + 0.02 * torch.rand(200, 4)
    predictions = LayerOutputs(torch.randn(1, 1, 200, 3), boxes[None, None])
    matcher = ThresholdMatcher(most=100)
    query, target = matcher(predictions, targets)[0][0]
    assert len(query) > 75
    assert np.bincount(query).max() == 1
    assert (np.diff(query) > 0).all()
    for _ in range(3):
        assert all(map(np.array_equal, (query, target), matcher(predictions, targets)[0][0]))


def test_boxes_are_those_of_the_predictions():
    """The boxes alone decide here; the public program takes them from the other pass."""
    targets = random_targets(1)
    logits = torch.zeros(1, 1, 2, 3)
    far, near = torch.tensor([0.9, 0.9, 0.01, 0.01]), targets[0].boxes[0]
    for boxes, best in ((torch.stack([far, near]), 1), (torch.stack([near, far]), 0)):
        (found,) = ThresholdMatcher()(LayerOutputs(logits, boxes[None, None]), targets)
        assert as_lists(found) == [[(best, 0)]]


def test_every_layer_and_image_is_matched_alone():
    targets, boxes = random_targets(3, 0, 1), random_boxes(2, 3, 15)
    boxes[0, 0, :3], boxes[1, 2, 4] = targets[0].boxes, targets[2].boxes[0]
    predictions = LayerOutputs(torch.randn(2, 3, 15, 3), boxes)
    together = ThresholdMatcher()(predictions, targets)
    for n, layer in enumerate(together):
        for b, pairs in enumerate(layer):
            alone = ThresholdMatcher()(LayerOutputs(*(x[n : n + 1, b : b + 1] for x in predictions)), [targets[b]])
            assert all(map(np.array_equal, pairs, alone[0][0]))
    assert as_lists(together[0])[1] == []


@pytest.mark.parametrize(
    ("part", "value"), [("logits", float("nan")), ("boxes", float("nan")), ("boxes", float("inf"))]
)
def test_non_finite_predictions(part, value):
    """An error that names the image, or pairs with those predictions."""
    targets = random_targets(2, 1)
    predictions = LayerOutputs(torch.randn(1, 2, 9, 3), random_boxes(1, 2, 9))
    getattr(predictions, part)[0, 1, 5] = value
    with pytest.raises(NonFiniteCostError) as error:
        ThresholdMatcher()(predictions, targets)
    assert error.value.image == 1
    (found,) = start_matching(ThresholdMatcher(), predictions, targets, "match")()
    assert (5, 0) in as_lists(found)[1]


def test_no_queries_and_no_objects():
    (found,) = ThresholdMatcher()(LayerOutputs(torch.zeros(1, 2, 0, 3), torch.zeros(1, 2, 0, 4)), random_targets(2, 0))
    assert as_lists(found) == [[], []]
    (found,) = ThresholdMatcher()(LayerOutputs(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 4)), random_targets(0))
    assert as_lists(found) == [[]]


def test_copies_are_refused():
    """It decides how many predictions an object gets."""
    predictions = LayerOutputs(torch.randn(1, 1, 9, 3), random_boxes(1, 1, 9))
    with pytest.raises(UserError, match=r"ThresholdMatcher .* takes no `copies`"):
        start_matching(ThresholdMatcher(), predictions, random_targets(1), copies=[2])
