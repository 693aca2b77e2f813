"""mmdetection's DINO: names, the Swin of mmdetection, and what its files tell beside tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .names import StateDict, count_parts, rename, renumber, resnet_to_detectron2, resnet_to_torchvision, rules

# own · mmdetection (of version 3). The last branches of the head are the encoder's ("last" here).
_NAMES = (
    ("neck.backbone.*", "backbone.*"),
    ("neck.lateral.{i}.0.*", "neck.convs.{i}.conv.*"),
    ("neck.lateral.{i}.1.*", "neck.convs.{i}.gn.*"),
    ("neck.extra_levels.{i}.0.*", "neck.extra_convs.{i}.conv.*"),
    ("neck.extra_levels.{i}.1.*", "neck.extra_convs.{i}.gn.*"),
    ("encoder.layers.{i}.attention.*", "encoder.layers.{i}.self_attn.*"),
    ("encoder.layers.{i}.norm.*", "encoder.layers.{i}.norms.0.*"),
    ("encoder.layers.{i}.feed_forward.norm.*", "encoder.layers.{i}.norms.1.*"),
    ("decoder.layers.{i}.self_attention.*", "decoder.layers.{i}.self_attn.attn.*"),
    ("decoder.layers.{i}.cross_attention.*", "decoder.layers.{i}.cross_attn.*"),
    ("decoder.layers.{i}.self_norm.*", "decoder.layers.{i}.norms.0.*"),
    ("decoder.layers.{i}.cross_norm.*", "decoder.layers.{i}.norms.1.*"),
    ("decoder.layers.{i}.feed_forward.norm.*", "decoder.layers.{i}.norms.2.*"),
    *(
        (f"{part}.layers.{{i}}.feed_forward.{own}.*", f"{part}.layers.{{i}}.ffn.layers.{theirs}.*")
        for part in ("encoder", "decoder")
        for own, theirs in (("linear1", "0.0"), ("linear2", "1"))
    ),
    ("decoder.position.0.*", "decoder.ref_point_head.layers.0.*"),
    ("decoder.position.2.*", "decoder.ref_point_head.layers.1.*"),
    ("query_selection.content.*", "query_embedding.*"),
    ("query_selection.project.0.*", "memory_trans_fc.*"),
    ("query_selection.project.1.*", "memory_trans_norm.*"),
    ("query_selection.class_head.*", "bbox_head.cls_branches.last.*"),
    ("query_selection.box_head.*", "bbox_head.reg_branches.last.*"),
    ("decoder.class_heads.{i}.*", "bbox_head.cls_branches.{i}.*"),
    ("decoder.box_heads.{i}.*", "bbox_head.reg_branches.{i}.*"),
    ("denoising.label_embed.*", "dn_query_generator.label_embedding.*"),
)
# Swin, as in its own program and in Detectron2 · mmdetection.
_SWIN_NAMES = (
    ("neck.backbone.patch_embed.proj.*", "neck.backbone.patch_embed.projection.*"),
    ("neck.backbone.layers.{i}.blocks.{i}.attn.*", "neck.backbone.stages.{i}.blocks.{i}.attn.w_msa.*"),
    ("neck.backbone.layers.{i}.blocks.{i}.mlp.fc1.*", "neck.backbone.stages.{i}.blocks.{i}.ffn.layers.0.0.*"),
    ("neck.backbone.layers.{i}.blocks.{i}.mlp.fc2.*", "neck.backbone.stages.{i}.blocks.{i}.ffn.layers.1.*"),
    ("neck.backbone.layers.{i}.*", "neck.backbone.stages.{i}.*"),
)
_FROM = rules((theirs, own) for own, theirs in _NAMES)
_TO = rules(_NAMES)
_SWIN_FROM = rules((theirs, own) for own, theirs in _SWIN_NAMES)
_SWIN_TO = rules(_SWIN_NAMES)
_BRANCHES = ("bbox_head.cls_branches.", "bbox_head.reg_branches.")
_MERGING = re.compile(r"neck\.backbone\.(layers|stages)\.\d+\.downsample\.(norm|reduction)\.(weight|bias)")
NECK_BIAS = re.compile(r"neck\.(?:lateral|extra_levels)\.\d+\.0\.bias")  # own names
_PROJECTION = re.compile(r"(neck\.(?:lateral|extra_levels)\.\d+\.0\.)weight")
# The four pixels that a patch merging joins: (row, column) = 00, 10, 01, 11 in Swin's own program; 00, 01, 10, 11 here.
_PIXELS = [0, 2, 1, 3]
MMDETECTION_POSITION = (20.0, 0.0)  # temperature and offset of most of its configs for DINO
_CLASS_POSITION = (10000.0, 0.0)  # of its class, where a config leaves them out
_ENCODING = re.compile(r"positional_encoding=dict\(([^()]{0,1000})\)")
_NUMBER = r"=\s*(-?\d{1,9}(?:\.\d{0,9})?)\s*(?:,|$)"


def from_mmdetection(state_dict: StateDict) -> StateDict:
    """mmdetection -> own. A ResNet gets torchvision's names, a Swin those of its own program.

    The convolutions of its neck have no bias, as far as its configs say: ours get zeros.
    """
    last = count_parts(state_dict, "decoder.layers.")
    for front in _BRANCHES:
        state_dict = renumber(state_dict, front, lambda n: "last" if n == last else f"{n}")
    own = resnet_to_torchvision(resnet_to_detectron2(rename(state_dict, _FROM)))
    own = rename(_map_merging(own, _merging_from), _SWIN_FROM)
    weights = {match[1]: own[match[0]] for match in map(_PROJECTION.fullmatch, own) if match}
    return {f"{front}bias": value.new_zeros(value.shape[:1]) for front, value in weights.items()} | own


def to_mmdetection(own: StateDict) -> StateDict:
    """Own -> mmdetection. Biases of the neck's convolutions are kept where they are not all zero.

    With biases, the model of mmdetection needs `neck=dict(bias=True)`.
    """
    last = count_parts(own, "decoder.layers.")
    biases = [key for key in own if NECK_BIAS.fullmatch(key)]
    if not any(own[key].any() for key in biases):
        own = {key: value for key, value in own.items() if key not in biases}
    own = _map_merging(rename(resnet_to_torchvision(own), _SWIN_TO), _merging_to)
    own = {re.sub(r"^neck\.backbone\.body\.", "neck.backbone.", key): value for key, value in own.items()}
    return {key.replace("_branches.last.", f"_branches.{last}."): value for key, value in rename(own, _TO).items()}


def _map_merging(state_dict: StateDict, change: Callable[[Tensor], Tensor]) -> StateDict:
    """Apply `change` to the tensors whose last dimension is the input of a Swin's patch merging."""
    swin = any(key.endswith("relative_position_bias_table") for key in state_dict)
    fits = {k for k, v in state_dict.items() if swin and _MERGING.fullmatch(k) and v.dim() and v.shape[-1] % 4 == 0}
    return {key: change(value) if key in fits else value for key, value in state_dict.items()}


def _merging_from(x: Tensor) -> Tensor:
    """(..., 4C) with the pixels of each channel together -> (..., 4C) with the channels of each pixel together."""
    return x.unflatten(-1, (-1, 4)).mT[..., _PIXELS, :].flatten(-2)


def _merging_to(x: Tensor) -> Tensor:
    """Undo `_merging_from`."""
    return x.unflatten(-1, (4, -1))[..., _PIXELS, :].mT.flatten(-2)


def position_of(content: Mapping[str, Any]) -> tuple[float, float] | None:
    """Read temperature and offset of the position encoding from the config in a file's `meta`; None where it has none.

    The config is text: it is searched, never run.
    """
    meta = content.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    found = _ENCODING.search(text) if isinstance(text, str) else None
    if not found:
        return None
    values = []
    for word, usual in (("temperature", _CLASS_POSITION[0]), ("offset", _CLASS_POSITION[1])):
        number = re.search(word + _NUMBER, found[1])
        if word in found[1] and not number:
            return None
        values.append(float(number[1]) if number else usual)
    return values[0], values[1]


def classes_of(content: Mapping[str, Any]) -> list[str] | None:
    """Read the class names from a file's `meta`; None where it has none that are plain text."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    data = meta.get("dataset_meta")
    for place in (data if isinstance(data, Mapping) else {}, meta):
        for key in ("classes", "CLASSES"):
            names = place.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None
