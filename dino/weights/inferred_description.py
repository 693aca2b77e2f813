"""The description of a model, inferred from its tensors: files of other programs have none."""

from __future__ import annotations

import re
from typing import Any

from .levels import count_projections
from .names import StateDict, resnet_to_detectron2

_NUM_HEADS = 8  # of every published model; no tensor shows it
_RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
_Node = dict[str, Any]


def describe_network(own: StateDict, temperature: float, offset: float) -> _Node | None:
    """Describe the network of a state dict in own format; None unless its backbone is a ResNet.

    Args:
        own: the state dict.
        temperature, offset: of the position encoding, which no tensor shows.
    """
    backbone = _describe_backbone(own)
    if backbone is None:
        return None
    levels, embed_dim = own["level_embed"].shape
    classes, queries = len(own["decoder.class_heads.0.bias"]), len(own["query_selection.content.weight"])
    attention = {
        "embed_dim": embed_dim,
        "num_heads": _NUM_HEADS,
        "num_levels": levels,
        "num_points": len(own["encoder.layers.0.attention.attention_weights.bias"]) // (_NUM_HEADS * levels),
        "hidden_dim": len(own["encoder.layers.0.feed_forward.linear1.bias"]),
    }
    encoder, decoder = (
        {**attention, "num_layers": _count(own, rf"{part}\.layers\.")} for part in ("encoder", "decoder")
    )
    features = backbone["out_features"]
    neck = {"backbone": backbone, "in_features": features, "out_channels": embed_dim, "num_levels": levels}
    position = {"embed_dim": embed_dim, "temperatures": [temperature] * 2, "offset": offset}
    selection = {"num_queries": queries, "num_classes": classes, "embed_dim": embed_dim}
    return {
        "_target_": "dino.modeling.DINO",
        "neck": {"_target_": "dino.modeling.ChannelMapper", **neck},
        "position_encoding": {"_target_": "dino.layers.SinePositionEncoding", **position},
        "encoder": {"_target_": "dino.modeling.Encoder", **encoder},
        "query_selection": {"_target_": "dino.modeling.QuerySelection", **selection},
        "denoising": {"_target_": "dino.layers.ContrastiveDenoising", "num_classes": classes, "embed_dim": embed_dim},
        "decoder": {"_target_": "dino.modeling.Decoder", "num_classes": classes, **decoder},
    }


def _describe_backbone(own: StateDict) -> _Node | None:
    """Describe a ResNet by the number of its blocks; None for any other backbone."""
    named = resnet_to_detectron2({k: v for k, v in own.items() if k.startswith("neck.backbone.")})
    name = _RESNETS.get(tuple(_count(named, rf"neck\.backbone\.res{stage}\.") for stage in range(2, 6)))
    if name is None or "neck.backbone.stem.conv1.weight" not in named:
        return None
    features = ["res2", "res3", "res4", "res5"][-count_projections(own)["lateral"] :]
    return {"_target_": "dino.modeling.TorchvisionBackbone", "name": name, "out_features": features, "norm": "FrozenBN"}


def _count(state_dict: StateDict, front: str) -> int:
    """Count the different numbers that follow the regular expression `front` at the beginning of keys."""
    return len({match[1] for match in (re.match(rf"{front}(\d+)\.", key) for key in state_dict) if match})
