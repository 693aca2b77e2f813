"""Values of the official program's settings, as values of this project's recipes."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dino.utils.files import DataError
from dino.utils.printable import printable

from .name_map import NameMap, Setting, Value

BATCH = "dataloader.train.total_batch_size"
_LARGEST = 1_000_000  # of any number but a seed
_LARGEST_SEED = 2**32 - 1
_MOST_DROPS = 100  # of the learning rate
_NETWORK = "model.network"
_TRAIN_AUGMENTATIONS = "dataloader.train.mapper.augmentations.1.branches"  # one without a crop, one with it
_TEST_AUGMENTATIONS = "dataloader.test.mapper.augmentations.0"
_START = "dino train RECIPE"  # what stands for the configuration itself
_LEFT_OUT, _MISSING, _BY_HAND = "left out", "missing", "by hand"
_NOTE = "note"  # of what is carried over
_OF_A_PROCESS = ("commad_txt", "dist_backend", "dist_url", "distributed", "gpu", "local_rank", "rank")  # in stored runs
_UNKNOWN = "no setting of that program"
_ACTIVATIONS = ("relu", "gelu", "selu")
_ONE_SHARED = (_LEFT_OUT, "one shared head of the two: no published model has it; here each layer has its own pair")
_ONCE = (_MISSING, "look forward once with shared heads or dropout: LookForwardOnce has a pair of heads for each layer")
_OTHER_ACTIVATION = (_LEFT_OUT, "relu, gelu and selu alone: glu is an error there, and no published model has prelu")


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


class Wanted(NamedTuple):
    """What converting some settings has brought: our key -> value, and remarks."""

    values: dict[str, Any]
    remarks: Sequence[Remark] = ()
    usual: frozenset[str] = frozenset()  # our keys whose value is the default there, and here


def convert_values(config: Mapping[str, Any], name_map: NameMap) -> Wanted:
    """All settings, each function of several once.

    Raises:
        DataError: a value is none that the setting can have.
    """
    values: dict[str, Any] = {}
    remarks: list[Remark] = []
    usual: set[str] = set()
    called: set[str] = set()
    for key, value in config.items():
        setting = name_map.settings.get(key)
        if key in _OF_A_PROCESS:
            continue
        if setting is None:
            remarks.append(Remark(key, value, _UNKNOWN, "no file and no argument of the official program has it"))
            continue
        _check_truth(setting, value)
        if setting.convert not in called:
            function = _FUNCTIONS.get(setting.convert)
            called |= {setting.convert} if function else set()
            found = function(config) if function else _convert_one(setting, value)
            values |= found.values
            remarks += found.remarks
            usual |= found.usual
    return Wanted(values, remarks, frozenset(usual))


def _check_truth(setting: Setting, value: Any) -> None:
    """Refuse what is neither True nor False, nor 1 or 0, for a setting that is read as a truth value."""
    if isinstance(setting.default, bool) and not setting.never_read and value not in (True, False):
        raise DataError(f"{setting.key}={printable(value)}: True or False was expected")


def _convert_one(setting: Setting, value: Any) -> Wanted:
    """A setting by its own value: one of the listed, or as it stands."""
    listed = next((other for other in setting.values if same(other.theirs, value)), None)
    if listed:
        return _convert_listed(setting, listed)
    if setting.keys() and setting.convert == "copy":
        return _copy(setting, value)
    usual = same(value, setting.default) or setting.never_read or _START in setting.ours
    return Wanted({}, () if usual else [_remark_of(setting, value)])


def _convert_listed(setting: Setting, value: Value) -> Wanted:
    """A value that the map lists."""
    pairs = (override.partition("=") for override in value.set)
    refused = value.left_out or value.missing
    remarks = [_remark(setting.key, value.theirs, value.left_out, value.missing)] if refused else []
    return Wanted({key: _literal(text) for key, _, text in pairs}, remarks)


def _copy(setting: Setting, value: Any) -> Wanted:
    """A value as it stands, with a note where it is the default there, and ours differs."""
    keys, usual = setting.keys(), same(value, setting.default)
    if type(setting.default) in (int, float) and setting.key != "epochs":  # `_schedule` checks these
        most = _LARGEST_SEED if setting.key == "seed" else _LARGEST
        _number({setting.key: value}, setting.key, whole=isinstance(setting.default, int), most=most)
    differs = usual and "ours_default" in setting.stated
    remarks = [Remark(setting.key, value, _NOTE, setting.why)] if differs else []
    return Wanted(dict.fromkeys(keys, value), remarks, frozenset(keys if usual and not differs else ()))


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


def same(one: Any, other: Any) -> bool:
    """Equal, where True is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _number(config: Mapping[str, Any], key: str, *, whole: bool = False, least: float = 0, most: int = _LARGEST) -> Any:
    """The value of a setting that must be a number.

    Raises:
        DataError: it is none, or smaller than `least`, or larger than `most`.
    """
    value = config[key]
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise DataError(f"{key}={printable(value)}: {kind} from {least} to {most:,} was expected")
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


def _backbone_rate(config: Mapping[str, Any]) -> Wanted:
    """The learning rate of the backbone, a tenth of the other."""
    lr, backbone = _number(config, "lr"), _number(config, "lr_backbone")
    if math.isclose(backbone, 0.1 * lr):
        return Wanted({})
    text = "a tenth of optimizer.lr here; another factor is a function, optimizer.params.lr_factor_func, in a recipe"
    return Wanted({}, [Remark("lr_backbone", backbone, _BY_HAND, text)])


def _batch(config: Mapping[str, Any]) -> Wanted:
    """The batch of all GPUs; the recipe's, that of the published runs, where the number of GPUs is unknown."""
    batch = _number(config, "batch_size", whole=True, least=1)
    if config.get("world_size"):
        return Wanted({BATCH: batch * _number(config, "world_size", whole=True, least=1)})
    if batch in (1, 2):
        return Wanted({})
    return Wanted({}, [Remark("batch_size", batch, _BY_HAND, f"of one GPU: say how many with --gpus, or set {BATCH}")])


def _schedule(config: Mapping[str, Any]) -> Wanted:
    """Epochs at which the learning rate falls to a tenth, each within the training."""
    epochs = _number(config, "epochs", least=1)
    if config["multi_step_lr"]:
        drops = sorted(set(_numbers(config, "lr_drop_list")))
    else:
        step = _number(config, "lr_drop", whole=True, least=1)
        drops = list(range(step, math.ceil(epochs), step))
    drops = [drop for drop in drops if drop < epochs]
    if len(drops) > _MOST_DROPS:
        raise DataError(f"lr_drop: {len(drops):,} drops of the learning rate in {epochs} epochs")
    values = [float(f"1e-{count}") for count in range(len(drops) + 1)]
    return Wanted({"lr_multiplier.milestones": drops, "lr_multiplier.values": values})


def _temperatures(config: Mapping[str, Any]) -> Wanted:
    """Of y, then of x."""
    pair = [float(_number(config, key)) for key in ("pe_temperatureH", "pe_temperatureW")]
    return Wanted({f"{_NETWORK}.position_encoding.temperatures": pair})


def _levels(config: Mapping[str, Any]) -> Wanted:
    """The maps of the backbone, by the names that it gives them here."""
    levels = config["return_interm_indices"]
    if levels not in ([0, 1, 2, 3], [1, 2, 3], [3]):
        raise DataError(f"return_interm_indices={printable(levels)}: that program has [0, 1, 2, 3], [1, 2, 3] and [3]")
    if str(config["backbone"]).startswith("swin"):
        names = [f"p{level}" for level in levels]
        return Wanted({f"{_NETWORK}.neck.backbone.out_indices": levels, f"{_NETWORK}.neck.in_features": names})
    return Wanted({f"{_NETWORK}.neck.backbone.out_features": [f"res{level + 2}" for level in levels]})


def _dilation(config: Mapping[str, Any]) -> Wanted:
    """DC5, of ResNets."""
    if not config["dilation"]:
        return Wanted({})
    if str(config["backbone"]).startswith("resnet"):
        return Wanted({f"{_NETWORK}.neck.backbone.stages._target_": "dino.d2.detectron2_backbones.dilated_stages"})
    text = "drops the last patch merging of Swin, and the weights of that stage with it; nothing of ConvNeXt"
    return Wanted({}, [Remark("dilation", config["dilation"], _LEFT_OUT, text)])


def _queries(config: Mapping[str, Any]) -> Wanted:
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
    return Wanted({f"{_NETWORK}.query_selection._target_": target}, remarks)


def _criterion(config: Mapping[str, Any]) -> Wanted:
    """The class of the criterion."""
    every_token = bool(config["two_stage_keep_all_tokens"]) and config["two_stage_type"] != "no"
    if config["aux_loss"]:
        name = "variants.SeparateCriterion" if every_token else ""
        return Wanted({"model.criterion._target_": f"dino.modeling.{name}" if name else "dino.layers.SetCriterion"})
    text = "one class for FinalCriterion and SeparateCriterion together"
    remarks = [Remark("aux_loss", config["aux_loss"], _MISSING, text)] if every_token else []
    return Wanted({"model.criterion._target_": "dino.modeling.variants.FinalCriterion"}, remarks)


def _layers(config: Mapping[str, Any]) -> Wanted:
    """The classes of encoder and decoder, with dropout and activation where these have them."""
    rate, activation = _number(config, "dropout"), config["transformer_activation"]
    shared = [bool(config[f"dec_pred_{head}_embed_share"]) for head in ("class", "bbox")]
    once = bool(config["use_detached_boxes_dec_out"])
    arguments = {"dropout": rate, "activation": activation if activation in _ACTIVATIONS else "relu"}
    arguments = {} if arguments == {"dropout": 0, "activation": "relu"} else arguments
    encoder = "variants.DropoutEncoder" if arguments else "Encoder"
    values = _part("encoder", encoder, arguments)
    values |= _part("decoder", _decoder_name(once, all(shared), arguments), {} if once else arguments)
    reasons = {
        "dec_pred_bbox_embed_share": (_ONE_SHARED, len(set(shared)) > 1),
        "use_detached_boxes_dec_out": (_ONCE, once and (any(shared) or arguments)),
        "transformer_activation": (_OTHER_ACTIVATION, activation not in _ACTIVATIONS),
    }
    return Wanted(values, _remarks(config, reasons))


def _remarks(config: Mapping[str, Any], reasons: Mapping[str, tuple[tuple[str, str], object]]) -> list[Remark]:
    """Remarks on the settings whose condition holds: key -> ((kind, text), condition)."""
    return [Remark(key, config[key], *reason) for key, (reason, holds) in reasons.items() if holds]


def _decoder_name(once: bool, shared: bool, arguments: Mapping[str, Any]) -> str:
    """A class below dino.modeling."""
    if once:
        return "variants.LookForwardOnce"
    heads = "SharedHeads" if shared else ""
    return f"variants.{heads}DropoutDecoder" if arguments else f"{heads}Decoder"


def _part(part: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The class of a part of the network, and its arguments, by our keys."""
    return {
        f"{_NETWORK}.{part}.{key}": value for key, value in {"_target_": f"dino.modeling.{name}", **arguments}.items()
    }


def _denoising(config: Mapping[str, Any]) -> Wanted:
    """Its budget; 0 switches it off."""
    number = _number(config, "dn_number", whole=True)
    return Wanted({f"{_NETWORK}.denoising.num_denoising": number if config["use_dn"] else 0})


def _augmentation(config: Mapping[str, Any]) -> Wanted:
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
    return Wanted(values)


_FUNCTIONS: dict[str, Callable[[Mapping[str, Any]], Wanted]] = {  # by the name in official.toml
    "augmentation": _augmentation,
    "backbone_rate": _backbone_rate,
    "batch": _batch,
    "criterion": _criterion,
    "denoising": _denoising,
    "dilation": _dilation,
    "layers": _layers,
    "levels": _levels,
    "queries": _queries,
    "schedule": _schedule,
    "temperatures": _temperatures,
}
