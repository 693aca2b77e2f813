"""Parameter groups and learning rates that recipes name, by their former paths."""

from dino.training.parameter_groups import layerwise_params, tenth_for_backbone, tenth_for_backbone_and_offsets

__all__ = ["layerwise_params", "tenth_for_backbone", "tenth_for_backbone_and_offsets"]
