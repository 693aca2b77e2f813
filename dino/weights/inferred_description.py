"""The description of a model, inferred from a file of another program: its tensors show most of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino.modeling.detector import Preprocessing
from dino.utils.files import DataError

from .addresses import locate
from .coco_classes import coco_ids, coco_names
from .detectron2_run import describe_run
from .file_facts import find_position, has_shared_heads
from .file_weights import read_weights
from .levels import count_projections
from .load_report import reason_of
from .mmdetection import classes_of
from .names import StateDict, count_parts, resnet_to_detectron2
from .other_detectors import refuse_missing_backbone
from .published import find, find_source
from .reading import read_content

# Numbers of blocks in the stages, and of convolutions in a block.
_RESNETS = {
    (2, 2, 2, 2, 2): "resnet18",
    (3, 4, 6, 3, 2): "resnet34",
    (3, 4, 6, 3, 3): "resnet50",
    (3, 4, 23, 3, 3): "resnet101",
    (3, 8, 36, 3, 3): "resnet152",
}
_BACKBONE = "neck.backbone."
# Arguments of the official program with which it builds another network than DINO -> the values of DINO.
_DINO_ARGUMENTS = {
    "two_stage_type": ("standard",),
    "position_embedding": ("sine", "v2"),
    "transformer_activation": ("relu", "gelu", "selu"),
    "decoder_sa_type": ("sa",),
    "decoder_module_seq": (["sa", "ca", "ffn"],),
    "num_patterns": (0,),
    "embed_init_tgt": (True,),
    **dict.fromkeys(
        ("pre_norm", "dilation", "masks", "add_channel_attention", "use_detached_boxes_dec_out"),
        (False,),
    ),
}
_RES = ["res2", "res3", "res4", "res5"]  # maps of a backbone, finest first
_NONE = torch.zeros(())  # stands for an absent tensor
_Node = dict[str, Any]


def _of_library(library: str, name: str) -> _Node:
    return {"_target_": f"dino.modeling.{library}Backbone", "name": name, "out_features": _RES, "map_norm": "LN"}


_VIT = {"_target_": "dino.d2.detectron2_backbones.vitdet"}
# Start of a recipe's name -> the backbone of its published weights, which tensors do not show; all maps that it has.
BACKBONES: dict[str, _Node] = {
    "dino_convnext_t": _of_library("Torchvision", "convnext_tiny"),
    "dino_convnext_s": _of_library("Torchvision", "convnext_small"),
    "dino_convnext_b": _of_library("Torchvision", "convnext_base"),
    "dino_convnext_l": _of_library("Torchvision", "convnext_large"),
    "dino_focalnet_l_fl3": _of_library("Timm", "focalnet_large_fl3"),
    "dino_focalnet_l_fl4": _of_library("Timm", "focalnet_large_fl4"),
    "dino_vitdet_b": {**_VIT, "embed_dim": 768, "depth": 12, "num_heads": 12, "global_blocks": [2, 5, 8, 11]},
    "dino_vitdet_l": {**_VIT, "embed_dim": 1024, "depth": 24, "num_heads": 16, "global_blocks": [5, 11, 17, 23]},
}


class Unshown(NamedTuple):
    """What no tensor shows of a network; the defaults are the official program's.

    Args:
        temperatures: of the position encoding, for y and for x.
        offset: of the position encoding.
        num_heads: of the attention.
        max_detections: per image.
        activation: of the feed-forward networks.
    """

    temperatures: tuple[float, float] = (20.0, 20.0)
    offset: float = 0.0
    num_heads: int = 8
    max_detections: int = 300
    activation: str = "relu"


def open_checkpoint(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Fetch and read a checkpoint of this or another program, and describe its model -> its file, its content.

    Args:
        source: a file, an address or the name of published weights, see `locate`.

    Raises:
        DataError: the file is missing, broken or unsafe, or its model can't be described.
        UserError: it can't be fetched.
    """
    path = locate(str(source))
    content = read_content(path)
    try:
        return path, describe_content(content, str(source) if find(str(source)) else path)
    except Exception as error:  # names and shapes that no program writes can raise anything
        raise DataError(f"can't use the weights {path}: {reason_of(error)}") from error


def describe_content(content: dict[str, Any], source: str) -> dict[str, Any]:
    """Describe the model in the content of a file of another program, see `with_description`.

    A bare state dict of this project's own names is described by the run of Detectron2's programs around it, if there
    is one. The content of any other file, such as that of a backbone, stays as it is.

    Raises:
        DataError: its model can't be described, or has a backbone that this project lacks.
    """
    if isinstance(content.get("about"), Mapping) or not any(isinstance(v, Mapping | Tensor) for v in content.values()):
        return content
    found = read_weights(content)
    if found.format == "own":
        return {**content, **_describe_own(content, found.state, source)}
    if found.format == "backbone":
        return content
    refuse_missing_backbone(found.state)
    return with_description(content, found.state, find_unshown(content, found.format, source), source)


def _describe_own(content: Mapping, own: StateDict, source: str) -> dict[str, Any]:
    """The description in the folder of a file, and the names of classes as far as something says them."""
    described = describe_run(Path(source))
    if not described or "names" in described:
        return described
    return {**described, **name_classes(content, len(own["decoder.class_heads.0.bias"]))}


def with_description(content: Mapping, own: StateDict, unshown: Unshown, source: str) -> dict[str, Any]:
    """Add `names`, `category_ids` and `about` to the content of a file, see `dino.weights.description`.

    Args:
        content: of the file. own: its weights, in own format.
        unshown: what no tensor shows.
        source: the file, or the name of published weights.

    Raises:
        DataError: the backbone is of no known kind.
    """
    backbone = _describe_resnet(own) or _describe_swin(own) or _describe_published(source)
    if backbone is None:
        raise DataError(
            "its backbone is neither a ResNet nor a Swin, and the file does not describe it. Use it with a "
            "recipe of this backbone: dino eval --config-file RECIPE, or train.init_checkpoint"
        )
    network = describe_network(own, backbone, unshown)
    about = {"config": json.dumps({"network": network}), "preprocessing": _preprocessing(unshown)}
    return {**content, **name_classes(content, len(own["decoder.class_heads.0.bias"])), "about": about}


def find_unshown(content: Mapping, format_: str, source: str) -> Unshown:
    """Find what no tensor shows in the official program's `args`, and elsewhere as `find_position`.

    Raises:
        DataError: nothing says the position encoding, or the network is not DINO's.
    """
    args = getattr(content.get("args"), "__dict__", None)  # an argparse.Namespace
    if args is not None and format_ == "official":
        return _read_arguments(args)
    position = find_position(content, format_, source)
    if position is None and format_ == "detrex":
        raise DataError(
            "it is detrex', which does not store the constants of its position encoding: give --temperature and "
            "--offset to `dino convert IN OUT --to own`, 10000 -0.5 for most of detrex' 12-epoch models, 20 0 for its "
            "24-epoch ones"
        )
    return Unshown(*position or ())


def _read_arguments(args: Mapping[str, Any]) -> Unshown:
    """The arguments with which the official program was run; its defaults where they are absent.

    Raises:
        DataError: the network is not DINO's, or a value makes no sense.
    """
    for name, values in _DINO_ARGUMENTS.items():
        if args.get(name, values[0]) not in values:
            raise DataError(f"its network is not DINO's: {name} is {args[name]!r:.100}, not {values[0]!r}")
    default = Unshown()
    values = {
        "pe_temperatureH": default.temperatures[0],
        "pe_temperatureW": default.temperatures[1],
        "nheads": default.num_heads,
        "num_select": default.max_detections,
    }
    for name, usual in values.items():
        values[name] = value = args.get(name, usual)
        if type(value) not in {int, type(usual)} or not 0 < value < 1e9:
            raise DataError(f"args.{name} is {value!r:.100}, a number such as {usual} was expected")
    high, wide, heads, number = values.values()
    activation = args.get("transformer_activation", default.activation)
    return Unshown((float(high), float(wide)), default.offset, heads, number, activation)


def _preprocessing(unshown: Unshown) -> _Node:
    return Preprocessing(max_detections=unshown.max_detections)._asdict()


def name_classes(content: Mapping, number: int) -> _Node:
    """Name the classes of a file -> `names` and `category_ids`: the file's own names, COCO's, or numbers."""
    coco, stated = coco_names(number), content.get("names") or classes_of(content)
    if coco and stated in (None, coco):
        return {"names": coco, "category_ids": coco_ids(number)}
    if stated and len(stated) == number:
        return {"names": list(stated), "category_ids": list(range(1, number + 1))}
    return {"names": [f"class {label}" for label in range(number)], "category_ids": list(range(number))}


def _describe_published(source: str) -> _Node | None:
    """The backbone of published weights that tensors do not show; None for all others."""
    published = find_source(source)
    return published and next((node for start, node in BACKBONES.items() if published.recipe.startswith(start)), None)


def describe_network(own: StateDict, backbone: _Node, unshown: Unshown) -> _Node:
    """Describe the network of a state dict in own format with a described backbone.

    Raises:
        DataError: the number of heads does not fit.
    """
    levels, embed_dim = own["level_embed"].shape
    classes, queries = len(own["decoder.class_heads.0.bias"]), len(own["query_selection.content.weight"])
    samples = len(own["encoder.layers.0.attention.attention_weights.bias"])  # of each query, over heads and levels
    if samples % (unshown.num_heads * levels) or embed_dim % unshown.num_heads:
        raise DataError(f"an attention with {samples} samples in {levels} levels has no {unshown.num_heads} heads")
    attention = {
        "embed_dim": embed_dim,
        "num_heads": unshown.num_heads,
        "num_levels": levels,
        "num_points": samples // (unshown.num_heads * levels),
        "hidden_dim": len(own["encoder.layers.0.feed_forward.linear1.bias"]),
    }
    encoder, decoder = (
        {**attention, "num_layers": count_parts(own, f"{part}.layers.")} for part in ("encoder", "decoder")
    )
    shared = "SharedHeads" if has_shared_heads(own) else ""
    selects = "variants.LearnedSizeSelection" if "query_selection.size.weight" in own else "QuerySelection"
    neck = {**_read_maps(backbone, own), "out_channels": embed_dim, "num_levels": levels}
    position = {"embed_dim": embed_dim, "temperatures": list(unshown.temperatures), "offset": unshown.offset}
    selection = {"num_queries": queries, "num_classes": classes, "embed_dim": embed_dim}
    return {
        "_target_": "dino.modeling.DINO",
        "neck": {"_target_": "dino.modeling.ChannelMapper", **neck},
        "position_encoding": {"_target_": "dino.layers.SinePositionEncoding", **position},
        "encoder": {**_activated("", "Encoder", unshown.activation), **encoder},
        "query_selection": {"_target_": f"dino.modeling.{selects}", **selection},
        "denoising": {"_target_": "dino.layers.ContrastiveDenoising", "num_classes": classes, "embed_dim": embed_dim},
        "decoder": {**_activated(shared, "Decoder", unshown.activation), "num_classes": classes, **decoder},
    }


def _activated(front: str, part: str, activation: str) -> _Node:
    """The class of encoder or decoder for an activation, without dropout."""
    if activation == "relu":
        return {"_target_": f"dino.modeling.{front}{part}"}
    return {"_target_": f"dino.modeling.variants.{front}Dropout{part}", "dropout": 0.0, "activation": activation}


def _describe_resnet(own: StateDict) -> _Node | None:
    """Describe a ResNet by the number of its blocks; None for any other backbone."""
    named = resnet_to_detectron2({k: v for k, v in own.items() if k.startswith(_BACKBONE)})
    blocks = [count_parts(named, f"neck.backbone.res{stage}.") for stage in range(2, 6)]
    name = _RESNETS.get((*blocks, count_parts(named, "neck.backbone.res2.0.conv")))
    if name is None or "neck.backbone.stem.conv1.weight" not in named:
        return None
    return {"_target_": "dino.modeling.TorchvisionBackbone", "name": name, "out_features": _RES, "norm": "FrozenBN"}


def _describe_swin(own: StateDict) -> _Node | None:
    """Describe Detectron2's Swin, whose names are those of Swin's authors; None for any other backbone."""
    stages = range(count_parts(own, "neck.backbone.layers."))
    tables = [own.get(f"neck.backbone.layers.{i}.blocks.0.attn.relative_position_bias_table", _NONE) for i in stages]
    stem = own.get("neck.backbone.patch_embed.proj.weight")
    if stem is None or {table.ndim for table in tables} != {2}:
        return None
    return {
        "_target_": "detectron2.modeling.SwinTransformer",
        "embed_dim": len(stem),
        "depths": [count_parts(own, f"neck.backbone.layers.{i}.blocks.") for i in stages],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (isqrt(len(tables[0])) + 1) // 2,
        "out_indices": [index for index in stages if f"neck.backbone.norm{index}.weight" in own],
    }


def _read_maps(backbone: _Node, own: StateDict) -> _Node:
    """`backbone` and `in_features` of the neck: as many of the coarsest maps as the state dict has projections."""
    number = count_projections(own)["lateral"]
    if "out_features" in backbone:
        features = backbone["out_features"][-number:]
        return {"backbone": {**backbone, "out_features": features}, "in_features": features}
    maps = [f"p{index}" for index in backbone.get("out_indices", range(2, 7))]  # of a Swin; of a ViT with a pyramid
    return {"backbone": backbone, "in_features": maps[-number:]}
