"""Torchvision's detectors with the interface of `DINODetector`: same recipes, data, engine and evaluation.

Images come augmented and resized by the recipe's mapper, so torchvision's transform only normalises and pads.
"""

from __future__ import annotations

from functools import partial

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from dino.modeling.backbones import extract, padding_of
from dino.utils.files import DataError
from dino.weights import locate, read_content, weights_of
from dino.weights.imagenet import check_network, fit_backbone

CHANNELS = 256  # of the pyramid's maps
SCORE_THRESHOLD = 0.01  # below torchvision's 0.05 (FCOS: 0.2), because AP counts weak detections too
THREE_SIZES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # of RetinaNet's anchors at one place
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class PyramidBackbone(nn.Module):
    """A backbone with torchvision's feature pyramid.

    Args:
        body: images -> maps by name, with `output_shape()`.
        extra_blocks: torchvision's module that adds the coarsest maps.
    """

    def __init__(self, body: nn.Module, extra_blocks: nn.Module):
        super().__init__()
        self.body = body
        shapes = body.output_shape().values()
        self.fpn = FeaturePyramidNetwork([shape.channels for shape in shapes], CHANNELS, extra_blocks)
        self.out_channels = CHANNELS  # read by torchvision

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name, finest first, each (B, CHANNELS, h, w)."""
        return self.fpn(extract(self.body, images, padding_of(self.body)))


class NormaliseAndPad(GeneralizedRCNNTransform):
    """Torchvision's transform without its resize."""

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        """Leave an image as it is."""
        return image, target


class TorchvisionDetector(nn.Module):
    """Faster R-CNN, RetinaNet or FCOS of torchvision: lists of Detectron2's dicts -> losses or `Instances`.

    Args:
        kind: a key of BUILDERS.
        backbone: images -> maps by name, finest first, with `output_shape()`.
        num_classes: number of classes.
        pixel_mean, pixel_std: of RGB in [0, 255].
        max_detections: per image.
        anchor_scale: side of the smallest anchor of a map, in units of the map's stride.
        weights: file or address of the backbone's weights; "" to keep the initial ones.
        options: more arguments of torchvision's class.

    Raises:
        DataError: the file is missing, or lacks a tensor of the backbone.
    """

    def __init__(
        self,
        kind: str,
        backbone: nn.Module,
        num_classes: int,
        *,
        pixel_mean: list[float],
        pixel_std: list[float],
        max_detections: int,
        anchor_scale: float,
        weights: str = "",
        options: dict | None = None,
    ):
        super().__init__()
        if weights:
            load_backbone(backbone, weights)
        self.detector = BUILDERS[kind](backbone, num_classes, anchor_scale, max_detections, dict(options or {}))
        mean, deviation = ([value / 255 for value in values] for values in (pixel_mean, pixel_std))
        self.detector.transform = NormaliseAndPad(0, 0, mean, deviation)
        self.first_label = 1 if kind == "faster_rcnn" else 0  # its label 0 is the background

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, batch: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses in training; else, for each image, {"instances": detections in pixels of the original image}."""
        images = [x["image"].to(self.device).float() / 255 for x in batch]
        if self.training:
            return self.detector(images, [self.to_target(x["instances"]) for x in batch])
        found = self.detector(images)
        return [{"instances": self.to_instances(y, x)} for x, y in zip(batch, found, strict=True)]

    def to_target(self, instances: Instances) -> dict[str, Tensor]:
        """Objects of an image, boxes xyxy in its pixels -> torchvision's target."""
        boxes = instances.gt_boxes.tensor.to(self.device)
        return {"boxes": boxes, "labels": instances.gt_classes.to(self.device) + self.first_label}

    def to_instances(self, found: dict[str, Tensor], x: dict) -> Instances:
        """Torchvision's detections in an image as mapped -> in pixels of the original image."""
        instances = Instances(x["image"].shape[-2:])
        instances.pred_boxes = Boxes(found["boxes"])
        instances.scores = found["scores"]
        instances.pred_classes = found["labels"] - self.first_label
        return detector_postprocess(instances, x["height"], x["width"])


def load_backbone(backbone: nn.Module, path: str) -> None:
    """Load ImageNet weights from a file or an address, in any form that this project knows.

    Raises:
        DataError: the file is missing, broken or of another network, or lacks a tensor of the backbone.
        UserError: see `dino.weights.locate`.
    """
    target = backbone.state_dict()
    state = weights_of(read_content(locate(path)))
    found = fit_backbone(state, backbone)
    check_network(state, found, backbone)
    chosen = {key: value for key, value in found.items() if key in target and value.shape == target[key].shape}
    missing = [key for key in target if key not in chosen and not key.endswith("num_batches_tracked")]
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} of {len(target)} tensors of the backbone, the first is {missing[0]}"
        )
    backbone.load_state_dict(chosen, strict=False)


def anchors_of(backbone: PyramidBackbone, scale: float, sizes: tuple, ratios: tuple) -> AnchorGenerator:
    """Anchors of each map, in proportion to its stride.

    Args:
        sizes: of one place, relative to the smallest.
        ratios: of height to width.
    """
    side = 256  # pixels; every stride of a pyramid divides it
    strides = [side // shape for shape in map_heights(backbone, side)]
    each = tuple(tuple(scale * stride * size for size in sizes) for stride in strides)
    return AnchorGenerator(each, (ratios,) * len(strides))


@torch.no_grad()
def map_heights(backbone: PyramidBackbone, side: int) -> list[int]:
    """Heights of a pyramid's maps for a square image of `side` pixels."""
    training = backbone.training
    maps = backbone.eval()(torch.zeros(1, 3, side, side))
    backbone.train(training)
    return [m.shape[-2] for m in maps.values()]


def build_faster_rcnn(body, num_classes, anchor_scale, max_detections, options) -> FasterRCNN:
    """Faster R-CNN with a pyramid; regions are read from all maps but the coarsest, as usual."""
    backbone = PyramidBackbone(body, LastLevelMaxPool())
    return FasterRCNN(
        backbone,
        num_classes + 1,
        rpn_anchor_generator=anchors_of(backbone, anchor_scale, (1.0,), ASPECT_RATIOS),
        box_roi_pool=MultiScaleRoIAlign(list(body.output_shape()), output_size=7, sampling_ratio=2),
        box_detections_per_img=max_detections,
        box_score_thresh=SCORE_THRESHOLD,
        **options,
    )


def build_one_stage(kind, sizes, ratios, body, num_classes, anchor_scale, max_detections, options) -> nn.Module:
    """RetinaNet or FCOS (`kind`) with two more maps than the backbone's, and anchors as of `anchors_of`."""
    backbone = PyramidBackbone(body, LastLevelP6P7(CHANNELS, CHANNELS))
    return kind(
        backbone,
        num_classes,
        anchor_generator=anchors_of(backbone, anchor_scale, sizes, ratios),
        detections_per_img=max_detections,
        score_thresh=SCORE_THRESHOLD,
        **options,
    )


BUILDERS = {
    "faster_rcnn": build_faster_rcnn,
    "retinanet": partial(build_one_stage, RetinaNet, THREE_SIZES, ASPECT_RATIOS),
    "fcos": partial(build_one_stage, FCOS, (1.0,), (1.0,)),  # its "anchors" set the sizes that each map finds
}
