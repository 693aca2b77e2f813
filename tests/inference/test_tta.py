import pytest
import torch

from dino.inference.tta import Augmentation, _mirror, join, make_view, views
from dino.layers import Detections


def found(boxes, scores, labels):
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def test_views_are_sizes_times_flips():
    assert views(100, 200, [50, 80], 120, [False, True]) == [
        Augmentation((50, 100), False),
        Augmentation((50, 100), True),
        Augmentation((60, 120), False),
        Augmentation((60, 120), True),
    ]


def test_making_views():
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, :20] = 200
    assert torch.equal(make_view(image, Augmentation((20, 40), False)), image)
    assert torch.equal(make_view(image, Augmentation((20, 40), True)), image.flip(-1))
    small = make_view(image, Augmentation((10, 20), True))
    assert small.shape == (3, 10, 20)
    assert small[:, :, 12:].unique().tolist() == [200]
    assert small[:, :, :8].unique().tolist() == [0]
    assert torch.equal(small, small.round())


def test_boxes_of_mirrored_views_come_back():
    plain = found([[10.0, 5, 30, 20]], [0.9], [1])
    assert _mirror(plain, 100).boxes.tolist() == [[70, 5, 90, 20]]
    assert torch.equal(_mirror(_mirror(plain, 100), 100).boxes, plain.boxes)


def test_joining():
    chosen = [Augmentation((9, 9), False), Augmentation((9, 9), True)]
    first = found([[10.0, 10, 30, 30], [50, 50, 60, 60]], [0.6, 0.5], [0, 1])
    second = found([[69.0, 10, 89, 30], [70, 10, 90, 30]], [0.8, 0.7], [0, 1])  # of a picture that is 100 wide
    joined = join([first, second], chosen, 100, 0.5, 10)
    assert joined.scores.tolist() == pytest.approx([0.8, 0.7, 0.5])
    assert joined.labels.tolist() == [0, 1, 1]
    assert joined.boxes[0].tolist() == [11, 10, 31, 30]
    assert len(join([first, second], chosen, 100, 0.5, 2).scores) == 2


def test_flips_with_true_among_them_add_mirrored_views():
    for flips in ((False, True), (True,)):
        assert [view.mirrored for view in views(50, 100, (50,), 1000, flips)] == [False, True]
