"""Settings of the official program -> the nearest recipe of this project, and what to change in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dino.training.recipe_nodes import plain
from dino.training.recipe_reading import read_recipe
from dino.utils.files import DataError, UsageError
from dino.utils.overrides import apply, has_key
from dino.utils.printable import printable
from dino.utils.recipes import recipes

from .converted_values import BATCH, Remark, Wanted, convert_values, same
from .name_map import read_map

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
_WEIGHTS = {  # files of Swin's authors, which recipes do not name
    "swin_T_224_1k": "swin_tiny_patch4_window7_224.pth",
    "swin_B_224_22k": "swin_base_patch4_window7_224_22k.pth",
    "swin_B_384_22k": "swin_base_patch4_window12_384_22k.pth",
    "swin_L_224_22k": "swin_large_patch4_window7_224_22k.pth",
    "swin_L_384_22k": "swin_large_patch4_window12_384_22k.pth",
}
_FUNCTION = "optimizer.params.lr_factor_func"  # its value is a function, which no override can give
_INDEX = re.compile(r"\.(\d+)")
_QUOTES = str.maketrans({letter: "_" for letter in '"\\\n\r'})  # in a docstring


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


def convert_settings(settings: Mapping[str, Any], gpus: int | None = None) -> Conversion:
    """Find the nearest recipe and its overrides.

    Args:
        settings: key -> value of the official program; what its files state and these don't has their value.
        gpus: number of the GPUs there, which multiplies batch_size; None keeps the recipe's batch.

    Raises:
        DataError: no key is the official program's, or a value is none that it can have.
    """
    name_map = read_map("official")
    defaults = {key: setting.default for key, setting in name_map.settings.items() if setting.group == "config"}
    if not defaults.keys() & settings.keys():
        raise DataError("no key is a setting of the official program, such as enc_layers or dn_number")
    config = {**defaults, **settings, **({} if gpus is None else {"world_size": gpus})}
    wanted = convert_values(config, name_map)
    never_read = [key for key in settings if key in name_map.settings and name_map.settings[key].never_read]
    return _nearest(config, wanted, never_read)


def recipe_text(conversion: Conversion, source: str) -> str:
    """A recipe of a conversion, with what no override can set: the text of a file.

    Args:
        source: the configuration file, for the first line.
    """
    functions = sorted(value for key, value in conversion.additions.items() if key == _FUNCTION)
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
    written = value.rpartition(".")[2] if key == _FUNCTION else repr(value)
    place = _INDEX.sub(r"[\1]", key)
    return f"{place} = {written}"


def _nearest(config: Mapping[str, Any], wanted: Wanted, never_read: list[str]) -> Conversion:
    """The recipe with the fewest differences.

    Raises:
        DataError: an unknown backbone.
    """
    backbone = config["backbone"]
    pattern = _RECIPES.get(backbone) if isinstance(backbone, str) else None
    if pattern is None:
        raise DataError(f"backbone={printable(backbone)!r}: the official program has {', '.join(_RECIPES)}")
    names = [name for name in sorted(recipes()) if re.fullmatch(pattern, name)]
    names = [name for name in names if f"_{config['num_feature_levels']}scale_" in name] or names
    compared = {name: _compare(read_recipe(name), wanted) for name in names}
    recipe = min(names, key=lambda name: len(compared[name][0]) + len(compared[name][1]))
    overrides, additions = compared[recipe]
    lines = [f"{key}={_written(value)}" for key, value in overrides.items()]
    return Conversion(recipe, lines, overrides, additions, [*wanted.remarks, *_weights(backbone)], never_read)


def _weights(backbone: str) -> list[Remark]:
    """Where the weights of a backbone come from, unless the recipe or an override says it."""
    if backbone not in _WEIGHTS:
        return []
    text = f"start from train.init_checkpoint={_WEIGHTS[backbone]}, a file of Swin's authors; the recipe names none"
    return [Remark("backbone", backbone, "by hand", text)]


def _compare(cfg: DictConfig, wanted: Wanted) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides that a recipe needs for the wanted values, and additions for what it leaves at its default.

    Raises:
        DataError: a value is of another type than the recipe's.
    """
    overrides, additions = {}, {}
    for key, value in wanted.values.items():
        if not has_key(cfg, key) or key == _FUNCTION:
            additions |= {} if key in wanted.usual else {key: value}
            continue
        before = plain(OmegaConf.select(cfg, key))
        if same(before, value):
            continue
        try:
            apply(cfg, [f"{key}={_written(value)}"])
        except UsageError as error:
            raise DataError(str(error)) from None
        if plain(OmegaConf.select(cfg, key)) != before:
            overrides[key] = value
    _move_classes(overrides, additions)
    if BATCH in overrides:  # else the learning rate would grow with the batch
        overrides["optimizer.lr"] = cfg.optimizer.lr
    return overrides, additions


def _move_classes(overrides: dict[str, Any], additions: dict[str, Any]) -> None:
    """Let the classes follow their arguments into the additions: alone they would have their own defaults."""
    for node in dict.fromkeys(key.rpartition(".")[0] for key in additions):
        target = f"{node}._target_"
        if target in overrides:
            additions[target] = overrides.pop(target)


def _written(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return str(value)
