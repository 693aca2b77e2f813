"""Losses, their gradients and the matches against the official program."""

import pytest
import torch

from dino.layers import DenoisingOutputs, HungarianMatcher, Outputs, SetCriterion
from dino.layers.matching_metrics import MatchingMetrics
from dino.structures import LayerOutputs

from .golden import GoldenFile
from .network import check_losses, check_matches, layer_parts

golden = GoldenFile("06")
CASES = golden.config["cases"]
WEIGHTS = golden.config["weight_dict"]


def criterion():
    alpha = golden.config["focal_alpha"]
    weights = {"class": WEIGHTS["loss_ce"], "l1": WEIGHTS["loss_bbox"], "giou": WEIGHTS["loss_giou"]}
    return SetCriterion(
        matcher=HungarianMatcher(alpha=alpha),
        **{f"{key}_weight": value for key, value in weights.items()},
        alpha=alpha,
    )


def leaves_of(case):
    """{part: (logits, boxes)} that collect gradients."""
    leaves = {name: x.clone().requires_grad_() for name, x in golden.below(f"{case}/out/").items()}
    parts = sorted({name.split("/")[0] for name in leaves})
    return {part: (leaves[f"{part}/pred_logits"], leaves[f"{part}/pred_boxes"]) for part in parts}


def stacked(leaves, parts):
    return LayerOutputs(*(torch.stack(layers) for layers in zip(*(leaves[part] for part in parts), strict=True)))


def outputs_of(case, leaves):
    layers = golden.config["dec_layers"]
    decoder, proposals = stacked(leaves, layer_parts("", layers)), stacked(leaves, ["interm"])
    if CASES[case]["dn_groups"]:
        noised = stacked(leaves, layer_parts("dn_", layers))
        denoising = DenoisingOutputs(noised, golden.targets(case), CASES[case]["dn_groups"])
    elif CASES[case]["training"]:
        slot, _ = decoder.split(1)  # the free slot of a batch without objects: any prediction will do
        denoising = DenoisingOutputs(slot, golden.targets(case), 0)
    else:
        denoising = None
    return Outputs(decoder, proposals, denoising)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case):
    leaves = leaves_of(case)
    outputs = outputs_of(case, leaves)
    losses = criterion()(outputs, golden.targets(case))
    check_losses(golden, case, losses, WEIGHTS)
    total = sum(losses.values())
    golden.check(f"{case}/total", total)
    total.backward()
    for part, (logits, boxes) in leaves.items():
        golden.check(f"{case}/grad/{part}/pred_logits", logits.grad)
        golden.check(f"{case}/grad/{part}/pred_boxes", boxes.grad)


@pytest.mark.parametrize("case", CASES)
def test_matches(case):
    outputs = outputs_of(case, leaves_of(case))
    check_matches(golden, case, outputs, criterion().matcher, golden.targets(case))


@pytest.mark.parametrize("case", CASES)
def test_logged_metrics(case):
    """The official program has six numbers for each set of predictions, and one more for the last layer."""
    metrics = MatchingMetrics()
    losses = criterion()(outputs_of(case, leaves_of(case)), golden.targets(case), metrics=metrics)
    for name in ("class_error", "cardinality_error"):
        golden.check(f"{case}/loss/{name}", metrics.values()[name])
    official = golden.below(f"{case}/loss/")
    sets = 2 * golden.config["dec_layers"] + 1
    assert len(official) == 6 * sets + 1
    assert len(set(official) & set(WEIGHTS)) == 3 * sets
    assert "class_error" not in losses
