import math

import pytest
import torch

from dino.layers import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, refine, xyxy_to_cxcywh

from ..tiny import random_boxes


def test_conversions():
    boxes = torch.tensor([0.5, 0.4, 0.2, 0.6])
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), torch.tensor([0.4, 0.1, 0.6, 0.7]))
    boxes = random_boxes(3, 5)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)


def test_inverse_sigmoid():
    x = torch.tensor([-0.3, 0.0, 1e-4, 0.25, 0.5, 0.9, 1.0, 1.2])
    edge = math.log(1e-3)
    expected = [edge, edge, edge - math.log(1 - 1e-4), math.log(1 / 3), 0, math.log(9), -edge, -edge]
    torch.testing.assert_close(inverse_sigmoid(x), torch.tensor(expected))


def test_inverse_sigmoid_has_no_gradient_outside_the_image():
    x = torch.tensor([-0.3, 1.2], requires_grad=True)
    inverse_sigmoid(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2))


def test_refine():
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.0]])
    moved = refine(boxes, torch.tensor([[math.log(3), 0.0, 0.0, 0.0]], dtype=torch.bfloat16))
    assert moved.dtype == torch.float32
    # log(1/3) + log(3) = 0; a side of 0 comes back as the least one: sigmoid(log(0.001)) = 0.001 / 1.001
    torch.testing.assert_close(moved, torch.tensor([[0.5, 0.5, 0.5, 0.001 / 1.001]]), rtol=0, atol=2e-3)
    torch.testing.assert_close(moved[0, 3], torch.tensor(0.001 / 1.001))


def giou_by_hand(a, b):
    """One pair of xyxy boxes, in floats."""
    area_a, area_b = ((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = area_a + area_b - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def test_giou_against_loops():
    a, b = (cxcywh_to_xyxy(random_boxes(n)).double() for n in (6, 5))
    expected = [[giou_by_hand(x.tolist(), y.tolist()) for y in b] for x in a]
    torch.testing.assert_close(generalized_iou(a[:, None], b), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("side", "expected"), [(0.001, 0.5), (0.01, 0.9901), (0.1, 0.9999)])
def test_giou_of_a_perfect_match(side, expected):
    """The published program's 1e-6 in the denominators keeps small boxes away from 1."""
    box = cxcywh_to_xyxy(torch.tensor([0.5, 0.5, side, side], dtype=torch.float64))
    assert generalized_iou(box, box).item() == pytest.approx(expected, abs=1e-5)


def test_giou_of_degenerate_boxes_is_finite():
    boxes = torch.tensor(
        [
            [0.5, 0.5, 0.5, 0.5],  # a point
            [0.2, 0.5, 0.8, 0.5],  # a line
            [0.7, 0.7, 0.3, 0.3],  # corners in the wrong order
            [0.0, 0.0, 1.0, 1.0],
        ],
        requires_grad=True,
    )
    giou = generalized_iou(boxes[:, None], boxes.detach())
    giou.sum().backward()
    assert giou.isfinite().all()
    assert boxes.grad.isfinite().all()
