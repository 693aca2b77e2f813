"""Training with transformers' Trainer: batches of COCO data, DINO's learning rates, AP in any number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, Trainer

from dino.data.coco import CocoImages, collate, to_results
from dino.evaluation.average_precision import evaluate
from dino.structures import Detections
from dino.training.parameter_groups import parameter_groups, tenth_for_backbone
from dino.utils.files import UserError

from .image_processing_dino_detr import DinoDetrImageProcessor

_FILL = -100.0  # of rows that a picture lacks; Trainer fills with the same number


class CocoCollator:
    """A data collator for `CocoImages`.

    Args:
        processor: normalises and pads the images, and resizes them by default.
        options: of each call of the processor: `do_resize=False` where the data set resizes its images.
    """

    def __init__(self, processor: DinoDetrImageProcessor, **options: Any):
        self.processor = processor
        self.options = options

    def __call__(self, samples: list[tuple]) -> dict[str, Any]:
        """Samples of `CocoImages` -> `pixel_values`, `pixel_mask` and `labels` of a model, see the image processor."""
        images, targets, entries = collate(samples)
        batch = dict(self.processor(images=images, return_tensors="pt", **self.options))
        batch["labels"] = [
            {
                "class_labels": target.labels,
                "boxes": target.boxes,
                "image_id": torch.tensor([entry["id"]]),
                "orig_size": torch.tensor([entry["height"], entry["width"]]),
            }
            for target, entry in zip(targets, entries, strict=True)
        ]
        return batch


class DetectionTrainer(Trainer):
    """Trainer with the published learning rates, whose predictions are detections.

    Detections have one shape in all processes, unlike labels, and are small: 300 rows of 6 numbers an image. Needs
    `processing_class`: the image processor. `compute_metrics`: `CocoMetrics`, or any that reads what
    `prediction_step` returns.

    Raises:
        UserError: there are metrics to compute, but no image processor.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        if self.compute_metrics is not None and not hasattr(self.processing_class, "post_process_object_detection"):
            raise UserError("DetectionTrainer needs processing_class, the image processor: it makes the detections")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments; the backbone learns at a tenth of `learning_rate`."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            rates = {"base_lr": self.args.learning_rate, "lr_factor_func": tenth_for_backbone}
            groups = parameter_groups(model or self.model, **rates, weight_decay=self.args.weight_decay)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Evaluate a batch.

        Args:
            model: perhaps wrapped.
            inputs: as `CocoCollator` makes them.
            prediction_loss_only: whether to return the loss alone.
            ignore_keys: has no effect.

        Returns:
            the loss; (B, K, 6) float32, score, label and box (xyxy in pixels of the file) of each detection, rows of
            -100 where an image has fewer; (B,) ids of the images.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        sizes = [label["orig_size"] for label in inputs["labels"]]
        found = self.processing_class.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        rows = [torch.cat([f["scores"][:, None], f["labels"][:, None], f["boxes"]], 1) for f in found]
        ids = torch.cat([label["image_id"].flatten() for label in inputs["labels"]])
        return loss.detach(), pad_sequence(rows, batch_first=True, padding_value=_FILL), ids


class CocoMetrics:
    """Average precision by pycocotools, as `compute_metrics` of a `DetectionTrainer`.

    Args:
        data: what is evaluated: the `eval_dataset`.
    """

    def __init__(self, data: CocoImages):
        self.data = data

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """`AP`, `AP50`, …, `AP-<class>` in [0, 1], see `dino.evaluation.average_precision.evaluate`."""
        results = []
        tables = torch.as_tensor(prediction.predictions)
        for table, number in zip(tables, prediction.label_ids.tolist(), strict=True):
            scores, labels, boxes = table[table[:, 0] >= 0].split([1, 1, 4], 1)
            found = Detections(boxes, scores[:, 0], labels[:, 0].long())
            results += to_results(found, number, self.data.category_ids)
        return evaluate(self.data.data, results)
