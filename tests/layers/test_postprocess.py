import pytest
import torch

from dino.layers import detections

LOGITS = torch.tensor([[0.3, -2.0], [1.5, 0.2], [-4.6, -4.6]])
BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4], [0.7, 0.6, 0.3, 0.3]])


def test_published_example():
    """An image of 100 rows and 200 columns; the best box appears with both of its classes."""
    found = detections(LOGITS, BOXES, (100, 200), 3)
    torch.testing.assert_close(found.scores, torch.tensor([0.817574, 0.574443, 0.549834]), rtol=0, atol=1e-6)
    assert found.labels.tolist() == [0, 0, 1]
    boxes = torch.tensor([[50.0, 10, 70, 50], [80, 40, 120, 60], [50, 10, 70, 50]])
    torch.testing.assert_close(found.boxes, boxes)


def test_fewer_pairs_than_asked_for():
    found = detections(LOGITS, BOXES, (100, 200), 300)
    assert len(found.scores) == len(found.labels) == len(found.boxes) == 6
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_boxes_are_not_clipped():
    found = detections(LOGITS[:1], torch.tensor([[0.0, 1.0, 0.5, 0.5]]), (100, 200), 1)
    torch.testing.assert_close(found.boxes, torch.tensor([[-50.0, 75, 50, 125]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_predictions_are_widened(dtype):
    found = detections(LOGITS.to(dtype), BOXES.to(dtype), (100, 200), 3)
    assert found.scores.dtype == found.boxes.dtype == torch.float32
    assert found.labels.dtype == torch.int64


def test_no_queries():
    found = detections(LOGITS[:0], BOXES[:0], (100, 200), 3)
    assert found.boxes.shape == (0, 4)
    assert len(found.scores) == len(found.labels) == 0
