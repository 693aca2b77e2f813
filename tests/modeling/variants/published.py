"""Compares parts with what the published descendants computed, see `tests/descendants/README.md`."""

import numpy as np
import torch

from dino.layers import LayerOutputs
from dino.layers.boxes import box_iou

from ...descendants.recorded import gradients_of, inputs_of, load_wide, losses_of


def iou_of_detrex(a, b):
    """With 1e-6 added to the union, as Align-DETR and Stable-DINO compute it."""
    iou = box_iou(a, b)
    areas = sum((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    union = areas / (1 + iou)
    return iou * union / (union + 1e-6)


def wide_inputs(case):
    """-> arrays, outputs and targets in float64, and all layers that are matched together."""
    arrays = load_wide(case)
    outputs, targets = inputs_of(arrays)
    matched = LayerOutputs(*(torch.cat(pair).detach() for pair in zip(outputs.decoder, outputs.proposals, strict=True)))
    return arrays, outputs, targets, matched


def check_pairs(found, expected):
    """Both as a matcher returns them."""
    flat = [[np.stack(pair).tolist() for layer in pairs for pair in layer] for pairs in (found, expected)]
    assert flat[0] == flat[1]


def check_losses(criterion, arrays, outputs, targets, tolerance):
    """Each weighted loss, then gradients of their sum relative to the largest of each array, where recorded."""
    found, expected = criterion(outputs, targets), losses_of(arrays)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(
            loss, expected[name], rtol=tolerance, atol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    sum(found.values()).backward()
    for name, gradient in gradients_of(outputs).items():
        if name in arrays:
            largest = arrays[name].abs().max().item()
            torch.testing.assert_close(gradient, arrays[name], rtol=0, atol=tolerance * largest)
