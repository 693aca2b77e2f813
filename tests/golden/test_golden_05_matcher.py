"""Costs and assignment against the official program."""

import pytest

from dino.layers import HungarianMatcher
from dino.structures import LayerOutputs

from .golden import GoldenFile

golden = GoldenFile("05")
CASES = golden.config["cases"]
WEIGHTS = {
    "class": {"class_cost": golden.config["cost_class"], "l1_cost": 0, "giou_cost": 0},
    "bbox": {"class_cost": 0, "l1_cost": golden.config["cost_bbox"], "giou_cost": 0},
    "giou": {"class_cost": 0, "l1_cost": 0, "giou_cost": golden.config["cost_giou"]},
}


def matcher(weights):
    return HungarianMatcher(**weights, alpha=golden.config["focal_alpha"], gamma=golden.config["gamma"])


def full_matcher():
    return matcher({key: value for weights in WEIGHTS.values() for key, value in weights.items() if value})


def predictions_of(case):
    return LayerOutputs(golden[f"{case}/pred_logits"][None], golden[f"{case}/pred_boxes"][None])


def check_cost(name, case, cost):
    for image, target in enumerate(golden.targets(case)):
        golden.check(f"{case}/{name}{image}", cost[0, image, :, : len(target.labels)])


@pytest.mark.parametrize("term", WEIGHTS)
@pytest.mark.parametrize("case", CASES)
def test_cost_term(case, term):
    cost = matcher(WEIGHTS[term]).cost(predictions_of(case), golden.targets(case))
    check_cost(f"cost_{term}", case, cost / golden.config[f"cost_{term}"])


@pytest.mark.parametrize("case", CASES)
def test_cost(case):
    check_cost("cost", case, full_matcher().cost(predictions_of(case), golden.targets(case)))


@pytest.mark.parametrize("case", CASES)
def test_assignment(case):
    pairs = full_matcher()(predictions_of(case), golden.targets(case))[0]
    for image, (query, target) in enumerate(pairs):
        # Where rounding alone decides the official assignment, there is nothing to compare.
        if CASES[case]["assignment_same_in_f64"][image]:
            golden.check(f"{case}/src{image}", query)
            golden.check(f"{case}/tgt{image}", target)
