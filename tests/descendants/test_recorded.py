"""What the recorded numbers must agree with, whoever reads them: DINO itself where a descendant changes nothing."""

import numpy as np
import pytest
import torch

from dino.layers import HungarianMatcher, SetCriterion

from .recorded import FOLDER, gradients_of, inputs_of, load, losses_of, pairs_of

MOST_BYTES = 400_000


def same_pairs(found, expected):
    flat = [[np.stack(pair) for layer in pairs for pair in layer] for pairs in (found, expected)]
    return all(np.array_equal(*both) for both in zip(*flat, strict=True))


def test_files_are_small():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.npz")) < MOST_BYTES


@pytest.mark.parametrize(
    "case", ["align_detr/k1", "stable_dino/batch", "stable_dino/distinct", "stable_dino/empty_apart"]
)
def test_denoising_boxes_are_those_of_dino(case):
    arrays = load(case)
    outputs, targets = inputs_of(arrays)
    found = SetCriterion(matcher=HungarianMatcher())(outputs, targets)
    assert found.keys() == losses_of(arrays).keys()
    for name in (name for name in found if "_dn" in name and "ce" not in name):
        torch.testing.assert_close(found[name].double(), arrays[name], rtol=1e-5, atol=0)


def test_one_query_per_object_has_the_pairs_and_the_boxes_of_dino():
    arrays = load("align_detr/k1")
    outputs, targets = inputs_of(arrays)
    criterion = SetCriterion(matcher=HungarianMatcher(), class_weight=0.0)
    found = criterion(outputs, targets)
    sum(found.values()).backward()
    expected = pairs_of(arrays, 7)
    for layers, pairs in ((outputs.decoder, expected[:6]), (outputs.proposals, expected[6:])):
        assert same_pairs(criterion.matcher(layers, targets), pairs)
    for name in (name for name in found if "ce" not in name):
        torch.testing.assert_close(found[name].double(), arrays[name], rtol=1e-5, atol=0)
    for name, value in gradients_of(outputs).items():
        if "boxes" in name and "dn" not in name:
            torch.testing.assert_close(value, arrays[name], rtol=1e-5, atol=1e-6 * arrays[name].abs().max().item())
