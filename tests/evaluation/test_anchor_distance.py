"""ATD(k): which anchor belongs to which object, and the mean of the largest distances."""

import math

import pytest
import torch

from dino.data.coco import CocoImages, collate
from dino.evaluation.anchor_distance import anchor_distances, average_topk_distance
from dino.layers import HungarianMatcher, LayerOutputs
from dino.modeling.detector import Detector, Preprocessing

from ..coco_files import write_coco
from ..tiny import random_targets, stirred, tiny_network


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(1)
    preprocessing = Preprocessing(short_side=48, max_size=96)
    return Detector(stirred(tiny_network()), preprocessing, ["red", "green", "blue"]).eval()


def by_hand(detector, image, target):
    """From the parts of the network, object by object."""
    network, (images, padding) = detector.network, detector.batch([image])
    with torch.no_grad():
        memory = network.encoder(network.tokenize(network.neck(images), padding))
        queries, _ = network.query_selection(memory)
        predictions = network.decoder(queries, memory)
    last = LayerOutputs(*(x[-1:] for x in predictions))
    query, objects = HungarianMatcher()(last, [target])[0][0]
    anchors = queries.box_logits[0].sigmoid().tolist()
    return [
        sum(abs(a - b) for a, b in zip(anchors[q], target.boxes[g].tolist(), strict=True))
        for q, g in zip(query, objects, strict=True)
    ]


def test_distances_are_those_of_the_initial_anchors(detector):
    """Images of several sizes run apart: one of them is smaller, one has no object, one more than 12 queries."""
    sizes, targets = ((64, 64), (48, 32), (64, 64), (40, 64)), random_targets(3, 2, 0, 15)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    expected = [x for image, target in zip(images, targets, strict=True) for x in by_hand(detector, image, target)]
    found = anchor_distances(detector, images, targets)
    assert len(found) == 3 + 2 + 0 + 12
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert not detector.network.query_selection._forward_hooks


def test_another_matcher(detector):
    class Last(torch.nn.Module):
        def forward(self, predictions, targets):
            assert predictions.boxes.shape == (1, 1, 12, 4)
            return [[(torch.tensor([11]), torch.tensor([0]))]]

    image, targets = torch.zeros(3, 64, 64), random_targets(2)
    starts = []
    handle = detector.network.query_selection.register_forward_hook(lambda *a: starts.append(a[2][0].box_logits))
    found = anchor_distances(detector, [image], targets, Last())
    handle.remove()
    expected = (starts[0][0, 11].sigmoid() - targets[0].boxes[0]).abs().sum()
    torch.testing.assert_close(found, expected[None])


def test_the_mean_of_the_largest(detector, tmp_path):
    data = CocoImages.for_detector(*write_coco(tmp_path, counts=(2, 0, 3, 1)), detector)
    samples = [collate([data[i]])[:2] for i in range(len(data))]
    parts = [x for (image,), (target,) in samples for x in by_hand(detector, image, target)]
    assert len(parts) == 6
    parts.sort(reverse=True)
    for k in (1, 4, 6, 100):
        assert average_topk_distance(detector, data, k) == pytest.approx(sum(parts[:k]) / min(k, 6), rel=1e-5)


def test_without_objects_there_is_no_distance(detector, tmp_path):
    data = CocoImages.for_detector(*write_coco(tmp_path, counts=(0,)), detector)
    assert math.isnan(average_topk_distance(detector, data))
