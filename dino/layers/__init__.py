"""The parts of DINO that know tensors only: torch, and scipy for the assignment."""

from dino.structures import (
    DenoisingOutputs,
    DenoisingQueries,
    Detections,
    LayerOutputs,
    Outputs,
    Queries,
    Target,
    Tokens,
)

from .boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, refine, xyxy_to_cxcywh
from .class_loss import FocalLoss, IoUAwareLoss, MatchabilityLoss, SquaredIoULoss, VarifocalLoss
from .criterion import SetCriterion, global_loss_normalizer
from .deform_attn import MultiScaleDeformableAttention
from .denoising import ContrastiveDenoising, denoising_mask
from .loss_scaling import LossScaling, Reweighting
from .matcher import HungarianMatcher, NonFiniteCostError
from .ops.operator import deform_attn, deform_attn_implementation  # takes the name of the module `.deform_attn`
from .ops.reference import deform_attn_gather, deform_attn_reference
from .position_encoding import SinePositionEncoding
from .postprocess import detections, one_label_detections

__all__ = [
    "ContrastiveDenoising",
    "DenoisingOutputs",
    "DenoisingQueries",
    "Detections",
    "FocalLoss",
    "HungarianMatcher",
    "IoUAwareLoss",
    "LayerOutputs",
    "LossScaling",
    "MatchabilityLoss",
    "MultiScaleDeformableAttention",
    "NonFiniteCostError",
    "Outputs",
    "Queries",
    "Reweighting",
    "SetCriterion",
    "SinePositionEncoding",
    "SquaredIoULoss",
    "Target",
    "Tokens",
    "VarifocalLoss",
    "cxcywh_to_xyxy",
    "deform_attn",
    "deform_attn_gather",
    "deform_attn_implementation",
    "deform_attn_reference",
    "denoising_mask",
    "detections",
    "generalized_iou",
    "global_loss_normalizer",
    "inverse_sigmoid",
    "one_label_detections",
    "refine",
    "xyxy_to_cxcywh",
]
