"""`Instances` that leave a `DINODetector` are clipped, as those of Detectron2's own detectors."""

import copy

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyCall, instantiate
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from dino.d2 import DINODetector
from dino.d2.augmented_detector import AugmentedDetector
from dino.d2.instances import ClippedInstances, UnclippedInstances
from dino.d2.meta_arch import unclipped
from dino.d2.tiled_detector import TiledDetector
from dino.structures import Detections

from ..tiny import default_criterion, tiny_network
from .tiny import random_input, stirred

SIZE = (40, 50)
BOXES = torch.tensor(  # of a picture of 40 rows and 50 columns
    [
        [5.0, 5, 20, 30],
        [-3, -4, 20, 60],
        [10, 8, 10, 20],  # no width
        [-9, -9, 90, 90],
        [-9, 3, 0, 9],  # outside: on the left, below, on the right
        [3, 40, 9, 44],
        [55, 3, 60, 9],
    ]
)
FOUND = Detections(BOXES, torch.linspace(0.9, 0.3, 7), torch.arange(7))
PARTS = {"criterion": default_criterion(), "num_classes": 3, "max_detections": 20}


def of_detectron2():
    """The same objects after Detectron2's own post-processing."""
    raw = Instances(SIZE, pred_boxes=Boxes(BOXES.clone()), scores=FOUND.scores, pred_classes=FOUND.labels)
    return detector_postprocess(raw, *SIZE)


def large_boxes(network):
    """A network whose boxes cross the borders: all are nearly as large as the picture."""
    stirred(network)
    for head in network.decoder.box_heads:
        with torch.no_grad():
            [m for m in head.modules() if isinstance(m, nn.Linear)][-1].bias[2:] += 6
    return network.eval()


def tensors(instances):
    return instances.pred_boxes.tensor, instances.scores, instances.pred_classes


def assert_same(found, expected):
    assert found.image_size == expected.image_size
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(one, other)


def test_as_detectron2_does_it():
    (found,) = ClippedInstances()([FOUND], [SIZE])
    assert found.pred_classes.tolist() == [0, 1, 3]
    assert_same(found, of_detectron2())


def test_an_image_of_a_batch_loses_only_its_own_boxes():
    good = Detections(*(x[:2] for x in FOUND))
    found = ClippedInstances()([good, FOUND, good], [SIZE, SIZE, (20, 20)])
    assert [len(x) for x in found] == [2, 3, 2]
    assert [x.image_size for x in found] == [SIZE, SIZE, (20, 20)]
    assert found[2].pred_boxes.tensor.tolist() == [[5, 5, 20, 20], [0, 0, 20, 20]]


def test_no_detections_and_no_pictures():
    empty = Detections(*(x[:0] for x in FOUND))
    assert [len(x) for x in ClippedInstances()([empty], [SIZE])] == [0]
    assert ClippedInstances()([], []) == UnclippedInstances()([], []) == []


def test_the_input_is_not_changed():
    before = BOXES.clone()
    ClippedInstances()([FOUND], [SIZE])
    assert torch.equal(FOUND.boxes, before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DINODetector, {}),
        (TiledDetector, {"short_side": 64, "max_size": 128, "tile": 48}),
        (AugmentedDetector, {"sizes": [64, 48], "overlap": 0.2}),
    ],
)
def test_every_detector_clips_unless_the_part_is_another(kind, options):
    network = large_boxes(tiny_network())
    batch = [random_input("a.png", height=64, width=80)]
    clipped = kind(network=network, **PARTS, **options).eval()
    plain = kind(network=network, **PARTS, **options, instances=UnclippedInstances()).eval()
    (found,), (raw,) = ([x["instances"] for x in model(batch)] for model in (clipped, plain))
    limits = torch.tensor([80.0, 64, 80, 64])
    assert (raw.pred_boxes.tensor < 0).any()
    assert (raw.pred_boxes.tensor > limits).any()
    assert (found.pred_boxes.tensor >= 0).all()
    assert (found.pred_boxes.tensor <= limits).all()
    assert_same(found, detector_postprocess(copy.deepcopy(raw), 64, 80))
    with unclipped(clipped):
        assert_same(clipped(batch)[0]["instances"], raw)
    assert_same(clipped(batch)[0]["instances"], found)


def test_scores_below_the_threshold_still_go():
    network = large_boxes(tiny_network())
    model, batch = DINODetector(network=network, **PARTS).eval(), [random_input("a.png", height=64, width=80)]
    (every,) = [x["instances"] for x in model(batch)]
    model.score_thresh = every.scores.median().item()
    assert_same(model(batch)[0]["instances"], every[every.scores >= model.score_thresh])


def test_the_block_ends_after_an_error_and_leaves_others_alone():
    model = DINODetector(network=tiny_network(), **PARTS)

    def fail():
        with unclipped(model):
            assert type(model.instances) is UnclippedInstances
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert type(model.instances) is ClippedInstances

    class Mine(ClippedInstances):
        pass

    model.instances = Mine()
    with unclipped(model), unclipped(nn.Linear(2, 2)):
        assert type(model.instances) is Mine


def test_a_recipe_names_the_part():
    node = LazyCall(DINODetector)(network=LazyCall(tiny_network)(), **{**PARTS, "criterion": None})
    assert type(instantiate(node).instances) is ClippedInstances
    node.instances = {"_target_": "dino.d2.instances.UnclippedInstances"}
    assert type(instantiate(node).instances) is UnclippedInstances


def test_a_copy_keeps_the_part():
    model = DINODetector(network=tiny_network(), **PARTS, instances=UnclippedInstances())
    assert type(copy.deepcopy(model).instances) is UnclippedInstances


def test_a_trace_drops_empty_boxes_of_later_pictures():
    """The number of objects is not fixed by the picture that was traced."""

    def boxes_of(boxes):
        (found,) = ClippedInstances()([Detections(boxes, FOUND.scores, FOUND.labels)], [SIZE])
        return found.pred_boxes.tensor, found.scores

    full = torch.tensor([[5.0, 5, 20, 30]]).expand(7, 4).clone()
    traced = torch.jit.trace(boxes_of, (full,))
    for boxes in (full, BOXES):
        for one, other in zip(traced(boxes), boxes_of(boxes), strict=True):
            assert torch.equal(one, other)
