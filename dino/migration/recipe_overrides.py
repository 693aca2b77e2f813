"""Settings of the official program -> the nearest recipe of this project, and what to change in it."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dino.training.recipe_nodes import plain
from dino.training.recipe_reading import read_recipe
from dino.utils.files import DataError, UsageError
from dino.utils.overrides import apply, has_key
from dino.utils.printable import printable
from dino.utils.recipes import recipes

from .name_map import NameMap, Setting, read_map

_RECIPES = {  # backbone there -> names of recipes with the nearest
    "resnet50": r"dino_r50_\dscale_\d+ep",
    "resnet101": r"dino_r101_\dscale_\d+ep",
    "swin_T_224_1k": r"dino_swin_t_224_\dscale_\d+ep",
    "swin_B_224_22k": r"dino_swin_b_384_\dscale_\d+ep",
    "swin_B_384_22k": r"dino_swin_b_384_\dscale_\d+ep",
    "swin_L_224_22k": r"dino_swin_l_224_\dscale_\d+ep",
    "swin_L_384_22k": r"dino_swin_l_384_\dscale_\d+ep",
    "convnext_xlarge_22k": r"dino_convnext_l_\dscale_\d+ep",
}
_NETWORK = "model.network"
_TRAIN_AUGMENTATIONS = "dataloader.train.mapper.augmentations.1.branches"  # one without a crop, one with it
_TEST_AUGMENTATIONS = "dataloader.test.mapper.augmentations.0"
_BATCH = "dataloader.train.total_batch_size"
_START = "dino train RECIPE"  # what stands for the configuration itself
_LEFT_OUT, _MISSING, _BY_HAND = "left out", "missing", "by hand"
_INDEX = re.compile(r"\.(\d+)")
_QUOTES = str.maketrans({letter: "_" for letter in '"\\\n\r'})  # in a docstring
_NOTE = "note"  # of what is carried over
_UNKNOWN = "no setting of that program"


class Remark(NamedTuple):
    """A setting that no override carries over, and why; or a note on one.

    Args:
        key, value: there. kind: "left out", "missing", "by hand", "no setting of that program", or "note".
        text: the reason, what it would do, or what to do.
    """

    key: str
    value: Any
    kind: str
    text: str


class Conversion(NamedTuple):
    """A configuration of the official program, as one of this project.

    Args:
        recipe: name of the nearest recipe.
        overrides: key=value, what differs from it. values: the same, by key.
        additions: key -> value of what the recipe leaves at its default: for a recipe file, not for the command line.
        remarks: settings that are not carried over. never_read: those that the official program does not read itself.
    """

    recipe: str
    overrides: list[str]
    values: dict[str, Any]
    additions: dict[str, Any]
    remarks: list[Remark]
    never_read: list[str]


class _Wanted(NamedTuple):
    """What converting some settings has brought: our key -> value, and remarks."""

    values: dict[str, Any]
    remarks: Sequence[Remark] = ()
    usual: frozenset[str] = frozenset()  # our keys whose value is the default there, and here


def convert_settings(settings: Mapping[str, Any], gpus: int | None = None) -> Conversion:
    """Find the nearest recipe and its overrides.

    Args:
        settings: key -> value of the official program; what its files state and these don't has their value.
        gpus: number of the GPUs there, which multiplies batch_size; None keeps the recipe's batch.

    Raises:
        DataError: no key is the official program's, or a value is none that it can have.
    """
    name_map = read_map("official")
    known = {key for key in settings if key in name_map.settings and name_map.settings[key].group == "config"}
    if not known:
        raise DataError("no key is a setting of the official program, such as enc_layers or dn_number")
    defaults = {key: setting.default for key, setting in name_map.settings.items() if setting.group == "config"}
    config = {**defaults, **settings, **({} if gpus is None else {"world_size": gpus})}
    wanted = _convert(config, name_map)
    return _nearest(config, wanted, [key for key in settings if _is_never_read(name_map, key)])


def recipe_text(conversion: Conversion, source: str) -> str:
    """A recipe of a conversion, with what no override can set: the text of a file.

    Args:
        source: the configuration file, for the first line.
    """
    functions = sorted(value for key, value in conversion.additions.items() if _is_function(key, value))
    imports = [f"from {name.rpartition('.')[0]} import {name.rpartition('.')[2]}" for name in functions]
    values = {**conversion.values, **conversion.additions}
    lines = [
        f'"""{PurePath(source).name.translate(_QUOTES)} of the official program, from {conversion.recipe}."""',
        "",
        *sorted([*imports, "from dino.training.recipe_reading import read_recipe"]),
        "",
        f'recipe = read_recipe("{conversion.recipe}")',
        "dataloader, lr_multiplier, model, optimizer, train = (",
        '    recipe[part] for part in ("dataloader", "lr_multiplier", "model", "optimizer", "train")',
        ")",
        "del recipe  # the names in this file are the keys of the recipe",
        *(_assignment(key, value) for key, value in values.items()),
    ]
    return "\n".join(lines) + "\n"


def _assignment(key: str, value: Any) -> str:
    """A line of a recipe."""
    written = value.rpartition(".")[2] if _is_function(key, value) else repr(value)
    place = _INDEX.sub(r"[\1]", key)
    return f"{place} = {written}"


def _is_never_read(name_map: NameMap, key: str) -> bool:
    return key in name_map.settings and name_map.settings[key].never_read


def _convert(config: Mapping[str, Any], name_map: NameMap) -> _Wanted:
    """All settings, each function of several once."""
    values: dict[str, Any] = {}
    remarks: list[Remark] = []
    usual: set[str] = set()
    called: set[str] = set()
    for key, value in config.items():
        setting = name_map.settings.get(key)
        if setting is None:
            remarks.append(Remark(key, value, _UNKNOWN, "no file and no argument of the official program has it"))
        elif setting.convert not in called:
            function = _FUNCTIONS.get(setting.convert)
            called |= {setting.convert} if function else set()
            found = function(config) if function else _convert_one(setting, value)
            values |= found.values
            remarks += found.remarks
            usual |= found.usual
    return _Wanted(values, remarks, frozenset(usual))


def _convert_one(setting: Setting, value: Any) -> _Wanted:
    """A setting by its own value: one of the listed, or as it stands."""
    listed = next((other for other in setting.values if _same(other.theirs, value)), None)
    if listed and listed.set:
        pairs = (override.partition("=") for override in listed.set)
        return _Wanted({key: _literal(text) for key, _, text in pairs})
    if listed and (listed.left_out or listed.missing):
        return _Wanted({}, [_remark(setting.key, value, listed.left_out, listed.missing)])
    if setting.ours and setting.convert == "copy":
        usual = _same(value, setting.default) and "ours_default" not in setting.stated
        differs = _same(value, setting.default) and not usual
        remarks = [Remark(setting.key, value, _NOTE, setting.why)] if differs else []
        return _Wanted(dict.fromkeys(setting.keys(), value), remarks, frozenset(setting.keys() if usual else ()))
    usual = _same(value, setting.default) or setting.never_read or _START in setting.ours or bool(listed)
    return _Wanted({}, () if usual else [_remark_of(setting, value)])


def _literal(text: str) -> Any:
    """A value of official.toml: a Python literal, else text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _remark_of(setting: Setting, value: Any) -> Remark:
    """Why a value other than the default is not carried over."""
    if not setting.ours:
        return _remark(setting.key, value, setting.left_out, setting.missing)
    return Remark(setting.key, value, _BY_HAND, ": ".join(filter(None, (", ".join(setting.ours), setting.why))))


def _remark(key: str, value: Any, left_out: str, missing: str = "") -> Remark:
    return Remark(key, value, _LEFT_OUT if left_out else _MISSING, left_out or missing)


def _same(one: Any, other: Any) -> bool:
    """Equal, where True is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _nearest(config: Mapping[str, Any], wanted: _Wanted, never_read: list[str]) -> Conversion:
    """The recipe with the fewest differences.

    Raises:
        DataError: an unknown backbone.
    """
    backbone = config["backbone"]
    pattern = _RECIPES.get(backbone) if isinstance(backbone, str) else None
    if pattern is None:
        raise DataError(f"backbone={printable(backbone)!r}: the official program has {', '.join(_RECIPES)}")
    names = [name for name in sorted(recipes()) if re.fullmatch(pattern, name)]
    compared = {name: _compare(read_recipe(name), wanted) for name in names}
    recipe = min(names, key=lambda name: len(compared[name][0]) + len(compared[name][1]))
    overrides, additions = compared[recipe]
    lines = [f"{key}={_written(value)}" for key, value in overrides.items()]
    return Conversion(recipe, lines, overrides, additions, list(wanted.remarks), never_read)


def _compare(cfg: DictConfig, wanted: _Wanted) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides that a recipe needs for the wanted values, and additions for what it leaves at its default.

    Raises:
        DataError: a value is of another type than the recipe's.
    """
    overrides, additions = {}, {}
    for key, value in wanted.values.items():
        if not has_key(cfg, key) or _is_function(key, value):
            additions |= {} if key in wanted.usual else {key: value}
            continue
        before = plain(OmegaConf.select(cfg, key))
        try:
            apply(cfg, [f"{key}={_written(value)}"])
        except UsageError as error:
            raise DataError(str(error)) from None
        if plain(OmegaConf.select(cfg, key)) != before:
            overrides[key] = value
    if _BATCH in overrides:  # else the learning rate would grow with the batch
        overrides["optimizer.lr"] = cfg.optimizer.lr
    return overrides, additions


def _is_function(key: str, value: Any) -> bool:
    """Whether a value is a function, which no override can give; a part's `_target_` is a name."""
    return isinstance(value, str) and value.startswith("dino.") and not key.endswith("_target_")


def _written(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return str(value)


def _number(config: Mapping[str, Any], key: str, *, whole: bool = False, least: float = 0) -> Any:
    """The value of a setting that must be a number.

    Raises:
        DataError: it is none, or smaller than `least`.
    """
    value = config[key]
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        kind = "a whole number" if whole else "a number"
        raise DataError(f"{key}={printable(value)}: {kind} of at least {least} was expected")
    return value


def _numbers(config: Mapping[str, Any], key: str) -> list[int]:
    """The value of a setting that must be a list of numbers, one at least.

    Raises:
        DataError: it is none.
    """
    value = config[key]
    if not isinstance(value, list) or not value:
        raise DataError(f"{key}={printable(value)}: a list of numbers was expected")
    return [_number({key: item}, key, least=0) for item in value]


def _backbone_rate(config: Mapping[str, Any]) -> _Wanted:
    """The learning rate of the backbone, a tenth of the other."""
    lr, backbone = _number(config, "lr"), _number(config, "lr_backbone")
    if math.isclose(backbone, 0.1 * lr):
        return _Wanted({})
    text = "a tenth of optimizer.lr here; another factor is a function, optimizer.params.lr_factor_func, in a recipe"
    return _Wanted({}, [Remark("lr_backbone", backbone, _BY_HAND, text)])


def _batch(config: Mapping[str, Any]) -> _Wanted:
    """The batch of all GPUs; the recipe's, that of the published runs, where the number of GPUs is unknown."""
    batch = _number(config, "batch_size", whole=True, least=1)
    if config.get("world_size"):
        return _Wanted({_BATCH: batch * _number(config, "world_size", whole=True, least=1)})
    if batch in (1, 2):
        return _Wanted({})
    return _Wanted(
        {}, [Remark("batch_size", batch, _BY_HAND, f"of one GPU: say how many with --gpus, or set {_BATCH}")]
    )


def _schedule(config: Mapping[str, Any]) -> _Wanted:
    """Epochs at which the learning rate falls to a tenth, each within the training."""
    epochs = _number(config, "epochs", least=1)
    if config["multi_step_lr"]:
        drops = sorted(set(_numbers(config, "lr_drop_list")))
    else:
        step = _number(config, "lr_drop", whole=True, least=1)
        drops = list(range(step, math.ceil(epochs), step))
    drops = [drop for drop in drops if drop < epochs]
    values = [float(f"1e-{count}") for count in range(len(drops) + 1)]
    return _Wanted({"lr_multiplier.milestones": drops, "lr_multiplier.values": values})


def _temperatures(config: Mapping[str, Any]) -> _Wanted:
    """Of y, then of x."""
    pair = [float(_number(config, key)) for key in ("pe_temperatureH", "pe_temperatureW")]
    return _Wanted({f"{_NETWORK}.position_encoding.temperatures": pair})


def _levels(config: Mapping[str, Any]) -> _Wanted:
    """The maps of the backbone, by the names that it gives them here."""
    levels = config["return_interm_indices"]
    if levels not in ([0, 1, 2, 3], [1, 2, 3], [3]):
        raise DataError(f"return_interm_indices={printable(levels)}: that program has [0, 1, 2, 3], [1, 2, 3] and [3]")
    if str(config["backbone"]).startswith("swin"):
        names = [f"p{level}" for level in levels]
        return _Wanted({f"{_NETWORK}.neck.backbone.out_indices": levels, f"{_NETWORK}.neck.in_features": names})
    return _Wanted({f"{_NETWORK}.neck.backbone.out_features": [f"res{level + 2}" for level in levels]})


def _dilation(config: Mapping[str, Any]) -> _Wanted:
    """DC5, of ResNets."""
    if not config["dilation"]:
        return _Wanted({})
    if str(config["backbone"]).startswith("resnet"):
        return _Wanted({f"{_NETWORK}.neck.backbone.stages._target_": "dino.d2.detectron2_backbones.dilated_stages"})
    text = "drops the last patch merging of Swin, and the weights of that stage with it; nothing of ConvNeXt"
    return _Wanted({}, [Remark("dilation", config["dilation"], _LEFT_OUT, text)])


def _queries(config: Mapping[str, Any]) -> _Wanted:
    """The class of the query selection."""
    chosen = {
        "LearnedQueries": config["two_stage_type"] == "no",
        "LearnedSizeSelection": bool(config["two_stage_learn_wh"]),
        "AllTokenSelection": bool(config["two_stage_keep_all_tokens"]),
        "PureSelection": not config["embed_init_tgt"],
    }
    names = [name for name, holds in chosen.items() if holds]
    if config["two_stage_type"] not in ("standard", "no"):
        raise DataError(f"two_stage_type={printable(config['two_stage_type'])!r}: that program has standard and no")
    if chosen["LearnedQueries"]:
        names = names[:1]  # there the other three belong to two stages
    target = f"dino.modeling.variants.{names[0]}" if names else "dino.modeling.QuerySelection"
    text = f"one class for {' and '.join(names)} together"
    remarks = [Remark("two_stage_type", config["two_stage_type"], _MISSING, text)] if len(names) > 1 else []
    return _Wanted({f"{_NETWORK}.query_selection._target_": target}, remarks)


def _criterion(config: Mapping[str, Any]) -> _Wanted:
    """The class of the criterion."""
    every_token = bool(config["two_stage_keep_all_tokens"]) and config["two_stage_type"] != "no"
    if config["aux_loss"]:
        name = "variants.SeparateCriterion" if every_token else ""
        return _Wanted({"model.criterion._target_": f"dino.modeling.{name}" if name else "dino.layers.SetCriterion"})
    text = "one class for FinalCriterion and SeparateCriterion together"
    remarks = [Remark("aux_loss", config["aux_loss"], _MISSING, text)] if every_token else []
    return _Wanted({"model.criterion._target_": "dino.modeling.variants.FinalCriterion"}, remarks)


def _decoder(config: Mapping[str, Any]) -> _Wanted:
    """The class of the decoder."""
    key = f"{_NETWORK}.decoder._target_"
    shared = [bool(config[f"dec_pred_{head}_embed_share"]) for head in ("class", "bbox")]
    remarks = []
    if any(shared) and not all(shared):
        text = "one shared head of the two: no published model has it; here each layer has its own pair"
        remarks.append(Remark("dec_pred_bbox_embed_share", shared[1], _LEFT_OUT, text))
    if config["use_detached_boxes_dec_out"]:
        if any(shared):
            text = "shared heads together with look forward once: LookForwardOnce has a pair for each layer"
            remarks.append(Remark("use_detached_boxes_dec_out", True, _MISSING, text))
        return _Wanted({key: "dino.modeling.variants.LookForwardOnce"}, remarks)
    return _Wanted({key: f"dino.modeling.{'SharedHeadsDecoder' if all(shared) else 'Decoder'}"}, remarks)


def _denoising(config: Mapping[str, Any]) -> _Wanted:
    """Its budget; 0 switches it off."""
    number = _number(config, "dn_number", whole=True)
    return _Wanted({f"{_NETWORK}.denoising.num_denoising": number if config["use_dn"] else 0})


def _augmentation(config: Mapping[str, Any]) -> _Wanted:
    """The sizes of DETR's augmentation, multiplied by their common factor."""
    factor = config["data_aug_scale_overlap"]
    factor = 1 if factor is None else _number(config, "data_aug_scale_overlap") or 1
    resize, crop = _numbers(config, "data_aug_scales2_resize"), _numbers(config, "data_aug_scales2_crop")
    sizes, longest = _numbers(config, "data_aug_scales"), _number(config, "data_aug_max_size")
    sizes, resize, crop = ([int(size * factor) for size in some] for some in (sizes, resize, crop))
    values: dict[str, Any] = {f"{_TRAIN_AUGMENTATIONS}.1.0.sizes": resize}
    values[f"{_TRAIN_AUGMENTATIONS}.1.1.crop_size"] = crop
    places = (f"{_TRAIN_AUGMENTATIONS}.0.0", f"{_TRAIN_AUGMENTATIONS}.1.2", _TEST_AUGMENTATIONS)
    for node, some in zip(places, (sizes, sizes, [max(sizes)]), strict=True):
        values |= {f"{node}.sizes": some, f"{node}.max_size": int(longest * factor)}
    return _Wanted(values)


_FUNCTIONS: dict[str, Callable[[Mapping[str, Any]], _Wanted]] = {  # by the name in official.toml
    "augmentation": _augmentation,
    "backbone_rate": _backbone_rate,
    "batch": _batch,
    "criterion": _criterion,
    "decoder": _decoder,
    "denoising": _denoising,
    "dilation": _dilation,
    "levels": _levels,
    "queries": _queries,
    "schedule": _schedule,
    "temperatures": _temperatures,
}
