"""The parts of DINO that know tensors only: torch, and scipy for the assignment."""

from .boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, refine, xyxy_to_cxcywh
from .criterion import SetCriterion
from .deform_attn import MultiScaleDeformableAttention, deform_attn, deform_attn_gather, deform_attn_reference
from .denoising import ContrastiveDenoising, denoising_mask
from .matcher import HungarianMatcher, NonFiniteCostError
from .operator import deform_attn_implementation
from .position_encoding import SinePositionEncoding
from .postprocess import Detections, batch_detections, detections, one_label_detections
from .reweighting import Reweighting
from .structures import Denoised, NoisedQueries, Outputs, Predictions, Queries, Target, Tokens

__all__ = [
    "ContrastiveDenoising",
    "Denoised",
    "Detections",
    "HungarianMatcher",
    "MultiScaleDeformableAttention",
    "NoisedQueries",
    "NonFiniteCostError",
    "Outputs",
    "Predictions",
    "Queries",
    "Reweighting",
    "SetCriterion",
    "SinePositionEncoding",
    "Target",
    "Tokens",
    "batch_detections",
    "cxcywh_to_xyxy",
    "deform_attn",
    "deform_attn_gather",
    "deform_attn_implementation",
    "deform_attn_reference",
    "denoising_mask",
    "detections",
    "generalized_iou",
    "inverse_sigmoid",
    "one_label_detections",
    "refine",
    "xyxy_to_cxcywh",
]
