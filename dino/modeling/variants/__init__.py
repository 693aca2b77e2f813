"""Variants of DINO's parts, from its ancestors and descendants. Each class replaces the part of the same signature.

In a recipe, `model.network.decoder._target_ = LookForwardOnce` is enough; projects/dino/configs/ablation uses those of
the ancestors, projects/dino/configs/descendants those that were published after DINO. Two variants need no class:
`num_denoising=0` switches denoising off, and `num_classes=1` makes `QuerySelection` score whether a token holds any
object at all (with the losses of `ObjectnessCriterion`).
"""

from .branches import HybridBranch, SecondPass, SharedHybridBranch
from .criteria import (
    CombinedCriterion,
    FinalCriterion,
    MixedMatchingCriterion,
    ObjectnessCriterion,
    OneToManyCriterion,
    SeparateCriterion,
)
from .decoders import LookForwardOnce, RelationDecoder
from .encoders import DeepFusionEncoder, DenseFusionEncoder, LearnedPositionEncoding, PlacedEncoder
from .noise import PositiveDenoising, ShiftDenoising
from .query_selection import LearnedQueries, PatternSelection, PureSelection

__all__ = [
    "CombinedCriterion",
    "DeepFusionEncoder",
    "DenseFusionEncoder",
    "FinalCriterion",
    "HybridBranch",
    "LearnedPositionEncoding",
    "LearnedQueries",
    "LookForwardOnce",
    "MixedMatchingCriterion",
    "ObjectnessCriterion",
    "OneToManyCriterion",
    "PatternSelection",
    "PlacedEncoder",
    "PositiveDenoising",
    "PureSelection",
    "RelationDecoder",
    "SecondPass",
    "SeparateCriterion",
    "SharedHybridBranch",
    "ShiftDenoising",
]
