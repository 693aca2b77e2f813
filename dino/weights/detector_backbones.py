"""Files of other detectors: recognised by the names of their tensors, and their backbone taken out."""

from __future__ import annotations

import re

from torch import nn

from .imagenet import fit_backbone
from .names import StateDict
from .other_detectors import name_detector

# Words in the names of parts that only detectors have.
_OF_DETECTORS = re.compile(
    r"(?:^|[._])(?:bbox|roi_heads?|rpn|proposal_generator|box_heads?|class_heads|class_embed|cls_(?:score|subnet|preds)"
    r"|regression_head|anchors)(?:[._]|$)"
)
# Where detectors keep their backbone: of Detectron2, DETR and its descendants, torchvision, transformers, mmdetection.
_FRONTS = (
    "backbone.bottom_up.",
    "backbone.0.body.",
    "backbone.0.",
    "backbone.body.",
    "model.backbone.conv_encoder.model.",
    "model.backbone.model.",
    "backbone.",
)


def name_any_detector(state: StateDict) -> str | None:
    """Say which detector wrote a state dict, as far as its names show it; None for a backbone or a classifier."""
    return name_detector(state) or ("a detector" if any(map(_OF_DETECTORS.search, state)) else None)


def cut_backbone(state: StateDict, backbone: nn.Module) -> tuple[StateDict, list[str]]:
    """Take the backbone out of another detector's file.

    Args:
        state: the file's tensors.
        backbone: of the model.

    Returns:
        the tensors under the names of `backbone`, from the place where most fit; and the names of all others.
    """
    target = {key: value.shape for key, value in backbone.state_dict().items()}
    best: tuple[int, StateDict, str] = (0, {}, "")
    for front in _FRONTS:
        part = {key.removeprefix(front): value for key, value in state.items() if key.startswith(front)}
        fitted = fit_backbone(part, backbone) if part else {}
        count = sum(target.get(key) == value.shape for key, value in fitted.items())
        best = max(best, (count, fitted, front), key=lambda found: found[0])
    _, fitted, front = best
    return fitted, [key for key in state if not (front and key.startswith(front))]
