"""Variants of DINO's parts, from its ancestors and descendants. Each class replaces the part of the same signature.

In a recipe, `model.network.decoder._target_ = LookForwardOnce` is enough. projects/dino/configs/ablation uses all but
`DistinctSelection`, `LearnedSizeSelection` and those with dropout; projects/dino/configs has recipes at full size for
those of descendants, and recipes for small data with distinct queries. Two variants need no class: `num_denoising=0`
switches denoising off, and `num_classes=1` makes `QuerySelection` score whether a token holds any object at all (with
the losses of `ObjectnessCriterion`).
docs/descendants.md lists what does not fit together.
"""

from .branches import Branches, HybridBranch, SecondPass, SharedHybridBranch
from .criteria import (
    CombinedCriterion,
    FinalCriterion,
    MixedMatchingCriterion,
    ObjectnessCriterion,
    OneToManyCriterion,
    RankedCriterion,
    SeparateCriterion,
)
from .decoders import LookForwardOnce, RelationDecoder
from .dropout import DropoutDecoder, DropoutEncoder, SharedHeadsDropoutDecoder
from .encoders import DeepFusionEncoder, DenseFusionEncoder, LearnedPositionEncoding, PlacedEncoder
from .matchers import PositionModulatedMatcher, ThresholdMatcher
from .noise import PositiveDenoising, ShiftDenoising
from .query_selection import (
    AllTokenSelection,
    DistinctSelection,
    LearnedAnchors,
    LearnedQueries,
    LearnedSizeSelection,
    PatternSelection,
    PureSelection,
)

__all__ = [
    "AllTokenSelection",
    "Branches",
    "CombinedCriterion",
    "DeepFusionEncoder",
    "DenseFusionEncoder",
    "DistinctSelection",
    "DropoutDecoder",
    "DropoutEncoder",
    "FinalCriterion",
    "HybridBranch",
    "LearnedAnchors",
    "LearnedPositionEncoding",
    "LearnedQueries",
    "LearnedSizeSelection",
    "LookForwardOnce",
    "MixedMatchingCriterion",
    "ObjectnessCriterion",
    "OneToManyCriterion",
    "PatternSelection",
    "PlacedEncoder",
    "PositionModulatedMatcher",
    "PositiveDenoising",
    "PureSelection",
    "RankedCriterion",
    "RelationDecoder",
    "SecondPass",
    "SeparateCriterion",
    "SharedHeadsDropoutDecoder",
    "SharedHybridBranch",
    "ShiftDenoising",
    "ThresholdMatcher",
]
