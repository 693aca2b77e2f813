"""The meta-architecture: Detectron2's lists of dicts in, losses or `Instances` out, around a `Detector`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from dino.data.images import check_input_range
from dino.modeling.detector import IMAGENET_MEAN, IMAGENET_STD, Detector, Preprocessing, to_target
from dino.modeling.dino import DINO
from dino.structures import Detections, Target
from dino.utils.device import to_device
from dino.utils.files import UserError

from .config import parts_from_config
from .instances import ClippedInstances, UnclippedInstances

_SET_CLASSES = (
    "set the number before the model is built, cfg.model.num_classes of a recipe or cfg.MODEL.DINO.NUM_CLASSES"
)


_CLIPPED = ClippedInstances()


@META_ARCH_REGISTRY.register()
class DINODetector(Detector):
    """A `Detector` with Detectron2's contract.

    Args:
        network: the `DINO`.
        criterion: (Outputs, targets) -> dict of losses, see `SetCriterion`.
        num_classes: C, number of classes; the network's parts must have been built for the same number.
        pixel_mean, pixel_std: of the channels, for pixel values 0 to 255 in the order of the input.
        max_detections: detections per image.
        score_thresh: lowest score of a returned detection, in [0, 1]; 0 for everything (AP is computed so).
        input_range: values [low, high] of grey images of more than 8 bits that become 0 and 255, in training and
            wherever the checkpoint is used; None for the rule by type, see `dino.data.images.read_image`.
        instances: (Detections of each picture, their sizes) -> `Instances`: `ClippedInstances`, which is Detectron2's
            convention, or `UnclippedInstances`.
    """

    @configurable
    def __init__(
        self,
        *,
        network: DINO,
        criterion: nn.Module,
        num_classes: int,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        max_detections: int = 300,
        score_thresh: float = 0.0,
        input_range: Sequence[float] | None = None,
        instances: Callable[[Sequence[Detections], Sequence[tuple[int, int]]], list[Instances]] = _CLIPPED,
    ):
        preprocessing = Preprocessing(
            tuple(pixel_mean),
            tuple(pixel_std),
            max_detections=max_detections,
            input_range=check_input_range(input_range),
        )
        super().__init__(network, preprocessing, criterion=criterion)
        self.num_classes = num_classes
        self.score_thresh = score_thresh
        self.instances = instances

    def __prepare_scriptable__(self) -> None:
        """Called by `torch.jit.script`, whose compiler does not know what this class is written in."""
        raise UserError(
            f"{type(self).__name__} can be traced, not scripted: `dino export`, or TracingAdapter and torch.jit.trace "
            "in place of scripting_with_instances"
        )

    @property
    def max_detections(self) -> int:
        """Detections per image; can be set."""
        return self.preprocessing.max_detections

    @max_detections.setter
    def max_detections(self, number: int) -> None:
        self.preprocessing = self.preprocessing._replace(max_detections=number)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Arguments of the constructor from a yacs config, see `dino.d2.config`."""
        return parts_from_config(cfg)

    def forward(self, batched_inputs: list[dict], **loss_options: Any) -> dict[str, Tensor] | list[dict]:
        """Compute losses in training, detections in evaluation.

        Args:
            batched_inputs: for each image a dict with `image` (3, H, W), uint8 or float, 0 to 255; for training
                `instances` with `gt_boxes` (xyxy in pixels of `image`) and `gt_classes`; for evaluation, optionally,
                `height` and `width` of the picture that the boxes refer to. `num_classes`, which `dataset` adds, is
                that of the data.
            loss_options: see `Detector.losses`.

        Returns:
            training: a dict of scalars to be summed. Evaluation: for each image {"instances": Instances} with
            `pred_boxes` (xyxy in pixels, clipped to the picture unless `instances` is another part), `scores` and
            `pred_classes`, best first.

        Raises:
            ValueError: the data has another number of classes, or a label is outside [0, C); names the image.
            FloatingPointError: a prediction is NaN or infinite; names the image.
        """
        images = [x["image"] for x in batched_inputs]
        sources = [_describe(x) for x in batched_inputs]
        self._check_classes(batched_inputs)
        if self.training:
            targets = [self.to_target(x) for x in batched_inputs]
            return self.losses(images, targets, sources=sources, **loss_options)
        sizes = [(x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])) for x in batched_inputs]
        found = self.detect(images, sizes, sources=sources)
        instances = self.instances(found, sizes)
        if self.score_thresh > 0:
            instances = [x[x.scores >= self.score_thresh] for x in instances]
        return [{"instances": x} for x in instances]

    @contextmanager
    def unclipped(self) -> Iterator[None]:
        """Return `UnclippedInstances` within the block, unless the part is another one than `ClippedInstances`."""
        before = self.instances
        if type(before) is ClippedInstances:
            self.instances = UnclippedInstances()
        try:
            yield
        finally:
            self.instances = before

    def _check_classes(self, batched_inputs: list[dict]) -> None:
        """Raise a ValueError if the data, as far as it states its number of classes, has another one than the model."""
        for x in batched_inputs:
            number = x.get("num_classes", self.num_classes)
            if number != self.num_classes:
                raise ValueError(
                    f"{_describe(x)}: the data has {number} classes, the model {self.num_classes}: {_SET_CLASSES}"
                )

    def to_target(self, x: dict) -> Target:
        """`Instances` in pixels -> labels and boxes as fractions of the image, on the device of the network."""
        instances: Instances = x["instances"]
        labels = instances.gt_classes
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(
                f"{_describe(x)}: label {wrong[0].item()} is not in [0, {self.num_classes}): {_SET_CLASSES}"
            )
        target = to_target(labels, instances.gt_boxes.tensor, instances.image_size)
        return Target(*(to_device(values, self.device) for values in target))


def unclipped(model: nn.Module) -> AbstractContextManager[None]:
    """Context where a `DINODetector` does not clip, as the official program computes AP; other detectors stay."""
    return model.unclipped() if isinstance(model, DINODetector) else nullcontext()


def _describe(x: dict) -> str:
    """Name an image in an error message."""
    return str(x.get("file_name") or f"image {x.get('image_id', 'without a name')}")
