"""Weights trained with Detectron2's ResNet run with torchvision's, and the other way round."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem

from dino.d2 import DINODetector
from dino.modeling import TorchvisionBackbone, build_dino
from dino.weights import resnet_to_detectron2, resnet_to_torchvision

from ..tiny import default_criterion, random_batch
from .tiny import random_input, stirred


def with_detectron2(depth):
    stages = ResNet.make_default_stages(depth=depth, norm="BN", **({} if depth < 50 else {"stride_in_1x1": False}))
    return ResNet(BasicStem(norm="BN"), stages, out_features=["res3", "res4", "res5"])


def with_torchvision(depth):
    return TorchvisionBackbone(f"resnet{depth}", norm="BN")


def small_dino(backbone):
    sizes = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2}
    return stirred(build_dino(backbone=backbone, num_classes=3, num_queries=20, num_denoising=8, **sizes))


PAIRS = [
    (with_detectron2, with_torchvision, resnet_to_torchvision),
    (with_torchvision, with_detectron2, resnet_to_detectron2),
]


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(("source", "target", "rename"), PAIRS, ids=["to torchvision", "to detectron2"])
def test_equal_outputs(source, target, rename, depth):
    first, second = small_dino(source(depth)).eval(), small_dino(target(depth)).eval()
    state = rename(first.state_dict())
    assert state.keys() == second.state_dict().keys()
    second.load_state_dict(state)
    images, padding = random_batch(2, 64, 96)
    ours, theirs = first(images, padding), second(images, padding)
    torch.testing.assert_close(ours.decoder.boxes, theirs.decoder.boxes, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.decoder.logits, theirs.decoder.logits, rtol=1e-5, atol=1e-5)


def test_detections_of_a_checkpoint_in_the_other_form():
    """Through the detector, whose keys have a prefix."""
    first, second = (
        DINODetector(network=small_dino(backbone), criterion=default_criterion(), num_classes=3).eval()
        for backbone in (with_detectron2(18), with_torchvision(18))
    )
    second.load_state_dict(resnet_to_torchvision(first.state_dict()))
    image = random_input("a.png")
    ours, theirs = (model([image])[0]["instances"] for model in (first, second))
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=0, atol=1e-3)
