"""The meta-architecture: the one place where Detectron2's structures enter and leave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from dino.layers.boxes import xyxy_to_cxcywh
from dino.layers.criterion import global_loss_normalizer
from dino.layers.matcher import NonFiniteCostError
from dino.layers.postprocess import batch_detections
from dino.modeling.cuda_graphs import CudaGraphs
from dino.modeling.dino import DINO
from dino.structures import LayerOutputs, Target
from dino.utils.device import to_device

from .config import parts_from_config


@META_ARCH_REGISTRY.register()
class DINODetector(nn.Module):
    """Detectron2's contract around a `DINO` network.

    Args:
        network: the `DINO`.
        criterion: (Outputs, targets) -> dict of losses, see `SetCriterion`.
        num_classes: C, number of classes; the network's parts must have been built for the same number.
        pixel_mean, pixel_std: of the channels, for pixel values 0 to 255 in the order of the input.
        max_detections: detections per image.
    """

    @configurable
    def __init__(
        self,
        *,
        network: DINO,
        criterion: nn.Module,
        num_classes: int,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        max_detections: int = 300,
    ):
        super().__init__()
        self.network = network
        self.criterion = criterion
        self.num_classes = num_classes
        self.max_detections = max_detections
        self.graphs: CudaGraphs | None = None  # if set, they run the network in evaluation
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """The arguments of the constructor from a yacs config, see `dino.d2.config`."""
        return parts_from_config(cfg)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict], **loss_options: Any
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses in training, detections in evaluation.

        Args:
            batched_inputs: for each image a dict with `image` (3, H, W), uint8 or float, 0 to 255; for training
                `instances` with `gt_boxes` (xyxy in pixels of `image`) and `gt_classes`; for evaluation, optionally,
                `height` and `width` of the picture that the boxes shall refer to.
            loss_options: of the criterion, in training; see `SetCriterion.forward`.

        Returns:
            training: a dict of scalars to be summed. Evaluation: for each image {"instances": Instances} with
            `pred_boxes` (xyxy in pixels, not clipped), `scores` and `pred_classes`, best first.

        Raises:
            ValueError: a label outside [0, C); names the image.
            FloatingPointError: a prediction is NaN or infinite; names the image.
        """
        return self.losses(batched_inputs, **loss_options) if self.training else self.detect(batched_inputs)

    def loss_normalizer(self, counts: list[int]) -> Tensor:
        """The criterion's `normalizer` for images with `counts` objects, together with those of all processes."""
        return global_loss_normalizer(sum(counts), self.network.denoising.num_denoised(counts), self.device)

    def losses(self, batched_inputs: list[dict], **loss_options: Any) -> dict[str, Tensor]:
        """Training: the weighted losses of the batch."""
        targets = [self.to_target(x) for x in batched_inputs]
        outputs = self.network(*self.preprocess(batched_inputs), targets)
        try:
            return self.criterion(outputs, targets, **loss_options)
        except NonFiniteCostError as error:
            names = ", ".join(describe(x) for x in batched_inputs)
            culprit = describe(batched_inputs[error.image])
            raise FloatingPointError(f"non-finite predictions for {culprit} (batch: {names})") from error

    @torch.no_grad()
    def detect(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Evaluation: images of equal size run together.

        None is padded to another's size, because padding reaches GroupNorm and the borders of convolutions, which the
        padding mask can't undo: so an image's result does not depend on its neighbours.
        """
        groups = defaultdict(list)
        for index, x in enumerate(batched_inputs):
            groups[x["image"].shape].append(index)
        results: list[dict] = [{}] * len(batched_inputs)
        network = self.graphs or self.network
        for indices in groups.values():
            group = [batched_inputs[i] for i in indices]
            images, _ = self.preprocess(group)
            predictions = network(images, None).decoder
            for i, found in zip(indices, self.to_instances(group, predictions), strict=True):
                results[i] = {"instances": found}
        return results

    def preprocess(self, batched_inputs: list[dict]) -> tuple[Tensor, Tensor]:
        """-> images (B, 3, H, W), normalised, zero where padded; padding (B, H, W) bool, True where padded."""
        images = [(to_device(x["image"], self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        batch = ImageList.from_tensors([image.to(self.network.level_embed.dtype) for image in images])
        padding = torch.ones(batch.tensor[:, 0].shape, dtype=torch.bool, device=self.device)
        for mask, (height, width) in zip(padding, batch.image_sizes, strict=True):
            mask[:height, :width] = False
        return batch.tensor, padding

    def to_target(self, x: dict) -> Target:
        """`Instances` in pixels -> labels and boxes as fractions of the image."""
        instances: Instances = x["instances"]
        labels = instances.gt_classes
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"{describe(x)}: label {wrong[0].item()} is not in [0, {self.num_classes})")
        height, width = instances.image_size
        boxes = instances.gt_boxes.tensor
        boxes = xyxy_to_cxcywh(boxes) / boxes.new_tensor([width, height, width, height])
        return Target(to_device(labels, self.device), to_device(boxes, self.device))

    def to_instances(self, batched_inputs: list[dict], predictions: LayerOutputs) -> list[Instances]:
        """The last layer's predictions -> detections in pixels of the pictures that the images were made from.

        The host waits for the device once, to see whether they are finite.
        """
        sizes = [(x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])) for x in batched_inputs]
        logits, boxes = predictions.logits[-1], predictions.boxes[-1]  # (B, Q, C), (B, Q, 4)
        found = batch_detections(logits, boxes, to_device(sizes, self.device), self.max_detections)
        finite = (found.scores.isfinite() & found.boxes.isfinite().all(-1)).all(-1)  # (B,)
        for x, good in zip(batched_inputs, finite.tolist(), strict=True):
            if not good:
                raise FloatingPointError(
                    f"{describe(x)}: the predictions are NaN or infinite, probably so are the weights"
                )
        return [
            Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels)
            for size, boxes, scores, labels in zip(sizes, *found, strict=True)
        ]


def describe(x: dict) -> str:
    """How an error message calls an image."""
    return str(x.get("file_name") or f"image {x.get('image_id', 'without a name')}")
