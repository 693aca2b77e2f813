"""Feature extractors of other libraries with the same face as Detectron2's backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

NORMS = {"FrozenBN": torchvision.ops.FrozenBatchNorm2d, "BN": nn.BatchNorm2d}
RESNET_NODES = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}


class FeatureShape(NamedTuple):
    """What a neck must know of a feature map."""

    channels: int
    stride: int


class TorchvisionBackbone(nn.Module):
    """A torchvision ResNet that returns its stages under Detectron2's names, from random weights.

    Args:
        name: resnet18, resnet34, resnet50, resnet101 or resnet152 (or any other ResNet of torchvision).
        out_features: some of res2, res3, res4, res5.
        norm: `FrozenBN`, for fine-tuning pre-trained weights as DINO does, or `BN` to train from random ones.
        freeze: prefixes of parameter names (`conv1`, `bn1`, `layer1`, …) that are not trained.

    Raises:
        ValueError: an unknown name, feature, norm or prefix.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        norm: str = "FrozenBN",
        freeze: Sequence[str] = (),
    ):
        super().__init__()
        known = torchvision.models.list_models(include="*resn*t*", module=torchvision.models)
        if name not in known:
            raise ValueError(f"unknown ResNet {name!r}; torchvision has {', '.join(known)}")
        unknown = sorted(set(out_features) - set(RESNET_NODES.values()))
        if unknown:
            raise ValueError(f"unknown out_features {unknown}; there are {list(RESNET_NODES.values())}")
        nodes = {node: feature for node, feature in RESNET_NODES.items() if feature in out_features}
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; there are {', '.join(NORMS)}")
        model = torchvision.models.get_model(name, weights=None, norm_layer=NORMS[norm])
        self.body = create_feature_extractor(model, nodes)
        freeze_parameters(self.body, freeze)
        self._shapes = measure_shapes(self.body)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name, each (B, channels, ceil(H / stride), ceil(W / stride))."""
        return self.body(images)

    def output_shape(self) -> dict[str, FeatureShape]:
        """Channels and stride of each map."""
        return self._shapes


def freeze_parameters(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Stop the training of all parameters whose name begins with one of `prefixes`."""
    for prefix in prefixes:
        chosen = [p for name, p in module.named_parameters() if name.startswith(prefix)]
        if not chosen and not any(name.startswith(prefix) for name, _ in module.named_buffers()):
            raise ValueError(f"nothing to freeze: no parameter begins with {prefix!r}")
        for parameter in chosen:
            parameter.requires_grad_(False)


@torch.no_grad()
def measure_shapes(body: nn.Module, size: int = 64) -> dict[str, FeatureShape]:
    """Run a small black image through `body` and read channels and strides off its maps."""
    training = body.training
    maps = body.eval()(torch.zeros(1, 3, size, size))
    body.train(training)
    return {name: FeatureShape(m.shape[1], size // m.shape[2]) for name, m in maps.items()}
