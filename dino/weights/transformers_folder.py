"""Fields of a transformers config (`config.json` of model type "dino_detr") and the description of the network.

Nothing here imports transformers: a folder of that library is one more form of a checkpoint.
"""

from __future__ import annotations

import inspect
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dino.modeling.transformer import HIDDEN_DIM, Decoder, SharedHeadsDecoder
from dino.utils.files import DataError

from .folder_json import CONFIG, PROCESSOR, read_json
from .folder_json import MODEL_TYPE as MODEL_TYPE  # for others
from .network_parts import PARTS, check_description, set_classes, without_detectron2
from .transformers_preprocessing import from_processor

_Node = dict[str, Any]
_Test = Callable[[Any], bool]

# Every field that describes a model, and its default. Names as in transformers' Deformable DETR and RT-DETR.
FIELDS: dict[str, Any] = {
    "backbone": "resnet50",
    "use_timm_backbone": False,  # False: torchvision's
    "use_pretrained_backbone": True,  # False: norms learn and nothing is frozen
    "backbone_checkpoint": None,
    "backbone_kwargs": None,
    "num_channels": 3,
    "d_model": 256,
    "num_feature_levels": 4,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": HIDDEN_DIM,
    "decoder_ffn_dim": HIDDEN_DIM,
    "encoder_n_points": 4,
    "decoder_n_points": 4,
    "num_queries": 900,
    "position_embedding_type": "sine",
    "pe_temperature_H": 20.0,
    "pe_temperature_W": 20.0,
    "pe_offset": 0.0,
    "shared_heads": True,
    "num_denoising": 100,
    "label_noise_ratio": 0.5,
    "box_noise_scale": 1.0,
    "auxiliary_loss": True,
    "class_cost": 2.0,
    "bbox_cost": 5.0,
    "giou_cost": 2.0,
    "cls_loss_coefficient": 1.0,
    "bbox_loss_coefficient": 5.0,
    "giou_loss_coefficient": 2.0,
    "focal_alpha": 0.25,
    "category_ids": None,
    "network": None,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "dilation": False,
    "two_stage": True,
    "with_box_refine": True,
    "return_intermediate": True,
    "is_encoder_decoder": True,
}
# Other programs' names of a field -> its name here.
ALIASES: dict[str, str] = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_encoder_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "dn_number": "num_denoising",
    "denoising_query_number": "num_denoising",
    "dn_label_noise_ratio": "label_noise_ratio",
    "denoising_label_noise_ratio": "label_noise_ratio",
    "dn_box_noise_scale": "box_noise_scale",
    "denoising_box_noise_scale": "box_noise_scale",
}
_BOTH = {"num_heads": "attention_heads", "d_ffn": "ffn_dim"}  # names that stand for the encoder's and the decoder's
_ONLY = tuple(FIELDS)[tuple(FIELDS).index("dropout") :]  # fields of which DINO has one value
_OWN_BACKBONE = ("norm", "map_norm", "freeze")  # of `backbone_kwargs`, arguments of the backbones of this project
_FROZEN = ("conv1", "bn1", "layer1")  # of a pre-trained ResNet of torchvision, as in the official program
_GROUPS = 32  # of the neck's GroupNorm
_MOST_LABELS = 100_000
_LABELS = 2  # transformers' default
_RES = re.compile(r"res\d")  # the map of stride 2^number


def describe_fields(fields: Mapping[str, Any]) -> _Node:
    """Describe the network of a transformers config.

    Args:
        fields: of `config.json`, or of the config's `to_dict()`; what is missing has the default of `FIELDS`. The
            number of classes is that of `id2label`, or `num_labels`; 2 without both, as in transformers.

    Returns:
        the network in the words of `dino.weights.description`: `build_network({"network": node})` builds it.

    Raises:
        DataError: a field has a value that no network has. The message names the field.
    """
    values = complete_fields(fields)
    classes = _count_labels(fields)
    if values["network"] is not None:
        return _with_classes(values["network"], classes)
    for name, (expected, fits) in _EXPECTED.items():
        if not fits(values[name]):
            raise _unexpected(name, values[name], expected)
    for name in _ONLY:
        if values[name] != FIELDS[name] or isinstance(values[name], bool) != isinstance(FIELDS[name], bool):
            raise DataError(f"{name} is {reprlib.repr(values[name])}: DINO has {FIELDS[name]!r} only")
    _check_widths(values)
    return _describe(values, classes)


def complete_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of `FIELDS`: those given, by their own or by other names, else the defaults."""
    given: dict[str, Any] = {name: fields[other] for other, name in ALIASES.items() if other in fields}
    for other, end in _BOTH.items():
        given |= {f"{part}_{end}": fields[other] for part in ("encoder", "decoder") if other in fields}
    if fields.get("use_dn") is False:
        given["num_denoising"] = 0
    return {name: fields.get(name, given.get(name, default)) for name, default in FIELDS.items()}


def _unexpected(name: str, value: Any, expected: str) -> DataError:
    return DataError(f"{name} is {reprlib.repr(value)}: {expected} was expected")


def _count_labels(fields: Mapping[str, Any]) -> int:
    """The number of classes.

    Raises:
        DataError: it is none, or `id2label` and `num_labels` differ.
    """
    labels = fields.get("id2label")
    if not isinstance(labels, Mapping | None):
        raise _unexpected("id2label", labels, "a dict of label -> name")
    counts = {name: fields[name] for name in ("num_labels", "num_classes") if fields.get(name) is not None}
    counts |= {} if labels is None else {"id2label": len(labels)}
    for name, count in counts.items():
        if not _is_whole(count, 1, _MOST_LABELS):
            raise _unexpected(name, count, f"a number of labels from 1 to {_MOST_LABELS:,}")
    if len(set(counts.values())) > 1:
        raise DataError(f"the numbers of labels differ: {', '.join(f'{n} has {count}' for n, count in counts.items())}")
    return next(iter(counts.values()), _LABELS)


def _with_classes(node: Any, classes: int) -> _Node:
    """A described network for this number of classes.

    Raises:
        DataError: the description asks for what is not allowed, or states no number of classes.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise _unexpected("network", node, "the description of a network")
    try:
        check_description(node, "network")
    except DataError as error:
        raise DataError(f"network: {error}") from error
    found = _find_classes(node.get("decoder")) or _find_classes(node)
    if found is None:
        raise DataError("network states no num_classes")
    return set_classes(node, found, classes)


def _find_classes(node: Any) -> int | None:
    """The first `num_classes` of a description."""
    if not isinstance(node, dict):
        return None
    if type(node.get("num_classes")) is int:
        return node["num_classes"]
    return next((found for child in node.values() if (found := _find_classes(child))), None)


def _describe(values: Mapping[str, Any], classes: int) -> _Node:
    """`describe_fields` for checked fields."""
    width, levels = values["d_model"], values["num_feature_levels"]
    encoder, decoder = (
        {
            "num_layers": values[f"{part}_layers"],
            "embed_dim": width,
            "num_heads": values[f"{part}_attention_heads"],
            "num_levels": levels,
            "num_points": values[f"{part}_n_points"],
            "hidden_dim": values[f"{part}_ffn_dim"],
        }
        for part in ("encoder", "decoder")
    )
    noise = {new: values[name] for name, new in _NOISE.items()}
    backbone = _describe_backbone(values)
    neck = {"in_features": backbone["out_features"], "out_channels": width, "num_levels": levels}
    kind = "SharedHeadsDecoder" if values["shared_heads"] else "Decoder"
    selection = {"num_queries": values["num_queries"], "num_classes": classes, "embed_dim": width}
    return {
        "_target_": "dino.modeling.DINO",
        "neck": {"_target_": "dino.modeling.ChannelMapper", "backbone": backbone, **neck},
        "position_encoding": _describe_position(values),
        "encoder": {"_target_": "dino.modeling.Encoder", **encoder},
        "query_selection": {"_target_": "dino.modeling.QuerySelection", **selection},
        "denoising": {
            "_target_": "dino.layers.ContrastiveDenoising",
            "num_classes": classes,
            "embed_dim": width,
            **noise,
        },
        "decoder": {"_target_": f"dino.modeling.{kind}", "num_classes": classes, **decoder},
    }


_NOISE = {"num_denoising": "num_denoising", "label_noise_ratio": "label_noise", "box_noise_scale": "box_noise"}


def _describe_position(values: Mapping[str, Any]) -> _Node:
    """The position encoding."""
    width = {"embed_dim": values["d_model"]}
    if values["position_embedding_type"] == "learned":
        return {"_target_": "dino.modeling.variants.LearnedPositionEncoding", **width}
    temperatures = [float(values["pe_temperature_H"]), float(values["pe_temperature_W"])]  # for y and for x
    constants = {"temperatures": temperatures, "offset": float(values["pe_offset"])}
    return {"_target_": "dino.layers.SinePositionEncoding", **width, **constants}


def _describe_backbone(values: Mapping[str, Any]) -> _Node:
    """The backbone.

    Raises:
        DataError: `backbone_kwargs` has what no backbone has.
    """
    given = _check_kwargs(values["backbone_kwargs"] or {})
    maps = _name_maps(given.pop("out_indices", None) or _out_indices(values["num_feature_levels"]))
    own = {name: given.pop(name) for name in _OWN_BACKBONE if name in given}
    own = _usual_norm(values) | own
    kind = "Timm" if values["use_timm_backbone"] else "Torchvision"
    if given and kind == "Torchvision":
        raise DataError(f"backbone_kwargs: {next(iter(given))[:100]!r} is nothing that a backbone of torchvision has")
    options = {"options": given} if given else {}
    return {
        "_target_": f"dino.modeling.{kind}Backbone",
        "name": values["backbone"],
        "out_features": maps,
        **own,
        **options,
    }


def _check_kwargs(given: Mapping[str, Any]) -> _Node:
    """`backbone_kwargs` without the number of channels.

    Raises:
        DataError: they ask for what is not allowed.
    """
    try:
        check_description(given, "backbone_kwargs")
    except DataError as error:
        raise DataError(f"backbone_kwargs: {error}") from error
    if given.get("in_chans", 3) != 3:
        raise DataError("backbone_kwargs: in_chans must be 3: images have three channels")
    return {name: value for name, value in given.items() if name != "in_chans"}


def _name_maps(indices: Any) -> list[str]:
    """The names of a backbone's maps for timm's numbers of them.

    Raises:
        DataError: these are no numbers.
    """
    if not isinstance(indices, list | tuple) or not all(_is_whole(index, 0, 9) for index in indices):
        raise _unexpected("backbone_kwargs: out_indices", indices, "a list of numbers from 0 to 9")
    return [f"res{index + 1}" for index in indices]


def _usual_norm(values: Mapping[str, Any]) -> _Node:
    """`norm` and `freeze` of a backbone where `backbone_kwargs` don't state them."""
    if not values["use_pretrained_backbone"]:
        return {"norm": "BN"}
    resnet = not values["use_timm_backbone"] and values["backbone"].startswith(("resne", "wide_resn"))
    return {"norm": "FrozenBN", **({"freeze": list(_FROZEN)} if resnet else {})}


def _out_indices(levels: int) -> list[int]:
    """timm's numbers of the maps that a pyramid of so many levels is made of: number i has stride 2^(i+1)."""
    return [1, 2, 3, 4] if levels > 4 else [2, 3, 4][-levels:]


def _check_widths(values: Mapping[str, Any]) -> None:
    """Raise a DataError where the width does not fit the heads or the neck's groups."""
    width = values["d_model"]
    if width % _GROUPS:
        raise _unexpected("d_model", width, f"a multiple of {_GROUPS}")
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if width % values[name]:
            raise _unexpected(name, values[name], f"a divisor of d_model, {width},")


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _whole(least: int, most: int) -> tuple[str, _Test]:
    return f"a whole number from {least:,} to {most:,}", lambda value: _is_whole(value, least, most)


def _number(least: float, most: float) -> tuple[str, _Test]:
    kinds = (int, float)
    return f"a number from {least:,} to {most:,}", lambda value: type(value) in kinds and least <= value <= most


_FLAG: tuple[str, _Test] = ("true or false", lambda value: isinstance(value, bool))
# Field -> what a message calls its values, and the test of a value.
_EXPECTED: dict[str, tuple[str, _Test]] = {
    "backbone": (
        "the name of a network of torchvision or timm",
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w.+-]{1,200}", value)),
    ),
    "backbone_kwargs": ("a dict, or null,", lambda value: value is None or isinstance(value, dict)),
    "num_channels": ("3 (other images are not read)", lambda value: value == 3),
    "position_embedding_type": ("sine or learned", lambda value: value in ("sine", "learned")),
    **dict.fromkeys(("use_timm_backbone", "use_pretrained_backbone", "shared_heads", "auxiliary_loss"), _FLAG),
    "encoder_layers": _whole(0, 1000),
    "decoder_layers": _whole(1, 1000),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), _whole(1, 1000)),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "num_queries"), _whole(1, 1_000_000)),
    **dict.fromkeys(("encoder_n_points", "decoder_n_points"), _whole(1, 1000)),
    "d_model": _whole(1, 1_000_000),
    "num_feature_levels": _whole(1, 20),
    "num_denoising": _whole(0, 1_000_000),
    "label_noise_ratio": _number(0, 1),
    "box_noise_scale": _number(0, 1000),
    **dict.fromkeys(("pe_temperature_H", "pe_temperature_W"), _number(1e-3, 1_000_000)),
    "pe_offset": _number(-1000, 1000),
    **dict.fromkeys(("class_cost", "bbox_cost", "giou_cost"), _number(0, 1_000_000)),
    **{f"{name}_loss_coefficient": _number(0, 1_000_000) for name in ("cls", "bbox", "giou")},
    "focal_alpha": _number(0, 1),
}


def describe_folder(folder: Path) -> dict[str, Any]:
    """Describe the model in a folder of transformers, by its two JSON files.

    Returns:
        `names`, `category_ids` and `about`, as a checkpoint of this project has them.

    Raises:
        DataError: a file is broken, or a field has a value that no model of this project has.
    """
    config = folder / CONFIG
    fields = read_json(config)
    try:
        network, names = describe_fields(fields), _read_names(fields)
    except DataError as error:
        raise DataError(f"can't use {config}: {error}") from error
    processor = folder / PROCESSOR
    stated = read_json(processor) if processor.is_file() else {}
    try:
        preprocessing = from_processor(stated)
    except DataError as error:
        raise DataError(f"can't use {processor}: {error}") from error
    given = {config: fields.get("category_ids"), processor: stated.get("category_ids")}
    source = next((path for path, ids in given.items() if ids is not None), None)
    ids = given[source] if source else list(range(len(names)))  # as transformers: a label is an id
    if not _are_ids(ids, len(names)):
        raise DataError(f"can't use {source}: category_ids must be {len(names)} different whole numbers, one a class")
    about = {"config": json.dumps({"network": network}), "preprocessing": preprocessing}
    return {"names": names, "category_ids": ids, "about": about}


def _read_names(fields: Mapping[str, Any]) -> list[str]:
    """The names of the classes, by label; those of transformers where there is no `id2label`.

    Raises:
        DataError: `id2label` has other keys than 0, 1, …, or other values than names.
    """
    labels = fields.get("id2label")
    if labels is None:
        return [f"LABEL_{label}" for label in range(_count_labels(fields))]
    names = [labels.get(str(label), labels.get(label)) for label in range(len(labels))]
    if not all(isinstance(name, str) for name in names):
        raise _unexpected("id2label", labels, "a dict of the labels 0, 1, … -> names")
    return names


def _are_ids(values: Any, count: int) -> bool:
    """Whether these are `count` different whole numbers."""
    whole = isinstance(values, list) and all(type(value) is int and abs(value) < 2**63 for value in values)
    return whole and len(values) == count == len(set(values))


# Field -> the part and its argument that hold the value, in a description of a `DINO`.
_HELD: dict[str, tuple[str, str]] = {
    "d_model": ("neck", "out_channels"),
    "num_feature_levels": ("neck", "num_levels"),
    "num_queries": ("query_selection", "num_queries"),
    "pe_offset": ("position_encoding", "offset"),
    **{name: ("denoising", argument) for name, argument in _NOISE.items()},
    **{
        f"{part}_{end}": (part, argument)
        for part in ("encoder", "decoder")
        for end, argument in {
            "layers": "num_layers",
            "attention_heads": "num_heads",
            "ffn_dim": "hidden_dim",
            "n_points": "num_points",
        }.items()
    },
}
_LOSSES = {  # field -> its name in a recipe's criterion
    "cls_loss_coefficient": "class_weight",
    "bbox_loss_coefficient": "l1_weight",
    "giou_loss_coefficient": "giou_weight",
    "focal_alpha": "alpha",
}
_GAMMA = 2.0  # of the focal loss
_COSTS = {"class_cost": "class_cost", "bbox_cost": "l1_cost", "giou_cost": "giou_cost"}  # the same, in its matcher


def fields_of(config: Mapping[str, Any], names: Sequence[str], category_ids: Sequence[int]) -> dict[str, Any]:
    """The fields of a transformers config for a described network: the inverse of `describe_fields`.

    Args:
        config: of a checkpoint's description: its `network`, and a `criterion` where a recipe had one.
        names, category_ids: of the classes.

    Returns:
        the fields of `FIELDS`, `id2label` and `label2id`. `network` holds the description itself where the other fields
        can't express it; they mirror it as far as they can.
    """
    fields = {name: value for name, value in FIELDS.items() if name != "backbone_checkpoint"}
    fields["use_pretrained_backbone"] = False  # the folder has the weights
    fields |= {"category_ids": list(category_ids), "id2label": {str(label): name for label, name in enumerate(names)}}
    node = _canonical(config["network"])
    fields |= _mirror_losses(config.get("criterion"))
    mirrored = _mirror(node)
    try:
        expressed = _canonical(describe_fields(fields | mirrored)) == node
    except DataError:  # sizes of a variant that no other network has
        expressed, mirrored = False, {}
    fields |= mirrored if expressed else {**mirrored, "network": config["network"]}
    return fields | {"label2id": {name: label for label, name in enumerate(names)}}


def _mirror(node: _Node) -> dict[str, Any]:
    """The fields of a canonical description, as far as they hold its values."""
    found: dict[str, Any] = {}
    for name, (part, argument) in _HELD.items():
        found[name] = _at(node, part).get(argument)
    found["shared_heads"] = _at(node, "decoder").get("_target_") == _full_name("dino.modeling.SharedHeadsDecoder")
    position = _at(node, "position_encoding")
    temperatures = position.get("temperatures")
    if isinstance(temperatures, list) and len(temperatures) == 2:
        found["pe_temperature_H"], found["pe_temperature_W"] = temperatures
    if position.get("_target_") == _full_name("dino.modeling.variants.LearnedPositionEncoding"):
        found["position_embedding_type"] = "learned"
    fields = {name: value for name, value in found.items() if _EXPECTED[name][1](value)}
    backbone = _at(_at(node, "neck"), "backbone")
    return fields | _mirror_backbone(backbone, fields.get("num_feature_levels", FIELDS["num_feature_levels"]))


def _mirror_backbone(backbone: _Node, levels: int) -> dict[str, Any]:
    """The fields of a backbone of torchvision or timm; {} for any other."""
    libraries = {_full_name(f"dino.modeling.{library}Backbone"): library for library in ("Torchvision", "Timm")}
    library = libraries.get(backbone.get("_target_"))
    maps = backbone.get("out_features")
    if library is None or not _are_maps(maps):
        return {}
    fields = {
        "backbone": backbone.get("name"),
        "use_timm_backbone": library == "Timm",
        "use_pretrained_backbone": False,
    }
    indices = [int(name[3:]) - 1 for name in maps]
    kwargs: dict[str, Any] = {} if indices == _out_indices(levels) else {"out_indices": indices}
    usual = _canonical(_describe_backbone({**FIELDS, **fields}))
    kwargs |= {key: backbone[key] for key in _OWN_BACKBONE if backbone.get(key) != usual[key]}
    kwargs |= backbone.get("options") or {}
    return fields | ({"backbone_kwargs": kwargs} if kwargs else {})


def _mirror_losses(criterion: Any) -> dict[str, Any]:
    """The fields of a recipe's criterion, as far as it is DINO's own."""
    if not isinstance(criterion, dict) or criterion.get("_target_") != "dino.layers.SetCriterion":
        return {}
    matcher = _at(criterion, "matcher")
    matcher = matcher if matcher.get("_target_") == "dino.layers.HungarianMatcher" else {}
    found = {name: criterion.get(argument) for name, argument in _LOSSES.items()}
    found |= {name: matcher.get(argument) for name, argument in _COSTS.items()}
    return {name: value for name, value in found.items() if _EXPECTED[name][1](value)}


def keeps_losses(criterion: Any) -> bool:
    """Whether the fields of a folder for transformers express a recipe's criterion; no criterion is DINO's own."""
    fields = {**FIELDS, **_mirror_losses(criterion)}
    matcher = {"_target_": "dino.layers.HungarianMatcher", "alpha": fields["focal_alpha"], "gamma": _GAMMA}
    matcher |= {argument: fields[name] for name, argument in _COSTS.items()}
    usual = {"_target_": "dino.layers.SetCriterion", "gamma": _GAMMA, "class_loss": None, "matcher": matcher}
    usual |= {argument: fields[name] for name, argument in _LOSSES.items()}
    if not isinstance(criterion, dict):
        return criterion is None
    return {**usual, **criterion, "matcher": {**matcher, **_at(criterion, "matcher")}} == usual


def _at(node: _Node, key: str) -> _Node:
    """A part of a description; {} where it is none."""
    part = node.get(key)
    return part if isinstance(part, dict) else {}


def _are_maps(values: Any) -> bool:
    """Whether these are names such as `res3`."""
    return isinstance(values, list) and all(isinstance(value, str) and _RES.fullmatch(value) for value in values)


def _full_name(target: Any) -> Any:
    """One name for a part that a description can call by several."""
    part = PARTS.get(target) if isinstance(target, str) else None
    return f"{part.__module__}.{part.__qualname__}" if part else target


def _canonical(node: Any) -> Any:
    """A description in one form: every argument stated, ResNets torchvision's, one name for each part."""
    if isinstance(node, list | tuple):
        return [_canonical(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    with suppress(TypeError, ValueError, AttributeError):  # a DataError too: it stays what it is
        node = without_detectron2(node)
    if node.get("_target_") == "dino.modeling.build_dino" and node.get("query_selection") is None:
        node = _expand(node)
    stated = _defaults(node.get("_target_")) | {key: _canonical(value) for key, value in node.items()}
    stated |= {"_target_": _full_name(node["_target_"])} if "_target_" in node else {}
    return {key: None if value == {} else value for key, value in stated.items()}


def _defaults(target: Any) -> _Node:
    """The default arguments of a part."""
    part = PARTS.get(target) if isinstance(target, str) else None
    part = Decoder if part is SharedHeadsDecoder else part
    arguments = inspect.signature(part).parameters if part else {}
    return {n: _canonical(p.default) for n, p in arguments.items() if p.default is not inspect.Parameter.empty}


def _expand(node: Mapping[str, Any]) -> _Node:
    """A description by `build_dino` as one by the parts that it makes."""
    given = {**_defaults("dino.modeling.build_dino"), **node}
    width = {"embed_dim": given.get("embed_dim")}
    classes = {"num_classes": given.get("num_classes")}
    shared = {name: given.get(name) for name in ("num_heads", "num_levels", "num_points", "hidden_dim")} | width
    neck = {"out_channels": given.get("embed_dim"), "num_levels": given.get("num_levels")}
    neck |= {"backbone": given.get("backbone"), "in_features": given.get("in_features")}
    denoising = {"num_denoising": given.get("num_denoising")}
    return {
        "_target_": "dino.modeling.DINO",
        "neck": {"_target_": "dino.modeling.ChannelMapper", **neck},
        "position_encoding": {"_target_": "dino.layers.SinePositionEncoding", **width},
        "encoder": {"_target_": "dino.modeling.Encoder", "num_layers": given.get("encoder_layers"), **shared},
        "query_selection": {
            "_target_": "dino.modeling.QuerySelection",
            "num_queries": given.get("num_queries"),
            **classes,
            **width,
        },
        "denoising": {"_target_": "dino.layers.ContrastiveDenoising", **classes, **width, **denoising},
        "decoder": {
            "_target_": "dino.modeling.Decoder",
            "num_layers": given.get("decoder_layers"),
            **classes,
            **shared,
        },
    }
