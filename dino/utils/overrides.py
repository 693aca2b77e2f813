"""Change a recipe by `key=value`: any text, typed by the value that the recipe has; the nearest key for a mistyped one.

Libraries are imported inside the functions: `dino --help` needs none of them.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .files import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_OTHER_NAMES = {  # setting -> bare words for it: its own, those of other programs and of Detectron2's older system
    "train.epochs": "epochs epoch num_epochs",
    "train.max_iter": "max_iter max_iters iterations iters steps",
    "train.eval_epochs": "eval_epochs",
    "train.eval_period": "eval_period",
    "train.checkpointer.period": "checkpoint_period save_period",
    "train.output_dir": "output_dir out_dir work_dir",
    "train.init_checkpoint": "init_checkpoint weights pretrained load_from",
    "train.grad_accum_steps": "grad_accum_steps accumulate",
    "train.clip_norm": "clip_norm",
    "train.amp.enabled": "amp fp16",
    "train.ema.enabled": "ema",
    "train.best.patience": "patience",
    "train.device": "device",
    "train.seed": "seed",
    "train.compile": "compile",
    "train.log_period": "log_period",
    "train.log_matching": "log_matching",
    "train.wandb.enabled": "wandb",
    "train.deterministic": "deterministic",
    "optimizer.lr": "lr lr0 base_lr learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "dataloader.train.total_batch_size": "total_batch_size batch_size batch ims_per_batch",
    "dataloader.train.num_workers": "num_workers workers",
    "model.num_classes": "num_classes classes nc",
    "model.network.query_selection.num_queries": "num_queries queries",
}
SHORT_NAMES = {name: key for key, names in _OTHER_NAMES.items() for name in names.split()}  # small letters
PARTS = ("train", "optimizer", "dataloader", "lr_multiplier", "model")  # of a recipe; the first with a bare word has it
_OPEN = {  # settings that a recipe may leave at None -> a value of their type
    "model.input_range": [0.0, 1.0],
    "train.checkpointer.period": 1,
    "train.eval_period": 1,
    "train.max_iter": 1,
    "train.reference_batch": 1,
    "train.wandb.name": "",
}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NONE = ("null", "none")
_OVERRIDE = re.compile(r"[~+]?[A-Za-z_][\w.-]*=.*", re.S)
_SCALARS = {  # of YAML: tag -> pattern, first letters
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    "float": (r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|Inf)", "-+.0123456789iI"),
    "null": (r"null|Null|NULL|None|~", "nN~"),
}
_INTERPOLATION = re.compile(r"\$\{[\w.]+\}")


@functools.cache
def _loader() -> type:
    """A reader of YAML as people mean it: 1e-4 is a number; yes, no, dates and numbers of base 60 are text."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 - a name that PyYAML prescribes

    for tag, (pattern, first) in _SCALARS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), list(first))
    return Loader


def is_override(word: str) -> bool:
    """Whether a word of a command line has the form key=value."""
    return bool(_OVERRIDE.fullmatch(word))


def keys_of(overrides: Sequence[str]) -> set[str]:
    """The keys that overrides state."""
    return {override.partition("=")[0] for override in overrides}


def apply(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Change a recipe in place.

    Args:
        overrides: each key=value. The recipe's present value decides how the text is read: as it stands for text,
            else as a number, a truth value, or a list or dict in YAML or JSON; null is None. Quotes around a whole
            value are taken off, and ${key} refers to another key.

    Returns:
        the recipe.

    Raises:
        UsageError: a key is unknown, or a value is of another type; the message names the nearest key, or the type.
    """
    from omegaconf import OmegaConf

    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"{override!r} is no override: write key=value")
        if key[:1] in ("+", "~") and key[1:]:
            raise UsageError(f"{key!r}: an override changes a key; to add or remove one, write a recipe of your own")
        OmegaConf.update(cfg, resolve_key(cfg, key), _convert(cfg, key, text), merge=True)
    return cfg


def resolve_key(cfg: DictConfig, key: str) -> str:
    """The key itself, dotted, with numbers as indices of lists.

    Raises:
        UsageError: the recipe has no such key. The message names the nearest, at any depth.
    """
    if has_key(cfg, key):
        return key
    raise UsageError(f"the recipe has no key {key!r}; the nearest is {_nearest(key, list(_all_keys(cfg)))!r}")


def find_setting(cfg: DictConfig, name: str) -> str:
    """The key of a setting by a bare word, such as epochs, lr, batch or seed; a whole key is itself.

    Raises:
        UsageError: no key has this name, or several have it that no rule ranks; the message names the nearest, or
            them.
    """
    if has_key(cfg, name):
        return name
    known = list(_all_keys(cfg))
    short = SHORT_NAMES.get(name.lower())
    if short in known:
        return short
    found = sorted((key for key in known if key.rpartition(".")[2] == name), key=_rank)
    if len(found) > 1 and _rank(found[0]) == _rank(found[1]):
        raise UsageError(f"{name!r} is the name of several settings: write one of {', '.join(found[:6])}")
    if found:
        return found[0]
    raise UsageError(f"the recipe has no setting {name!r}; the nearest is {_nearest(name, known)!r}")


def has_key(cfg: DictConfig, key: str) -> bool:
    """Whether the recipe has a dotted key; lists are indexed by numbers. A value of None counts."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    *path, last = key.split(".")
    try:
        node = OmegaConf.select(cfg, ".".join(path)) if path else cfg
    except OmegaConfBaseException:  # a key such as a..b
        return False
    if OmegaConf.is_list(node):
        return last.isdecimal() and int(last) < len(node)
    return OmegaConf.is_dict(node) and (last in node or last == "_target_")


def _all_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, from the outside to the inside."""
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(node):
        return
    keys = range(len(node)) if OmegaConf.is_list(node) else [k for k in node if k != "_target_"]
    for key in keys:
        yield f"{prefix}{key}"
        if not OmegaConf.is_interpolation(node, key):
            yield from _all_keys(node[key], f"{prefix}{key}.")


def _rank(key: str) -> tuple[int, int]:
    """The place of a key among those that share a bare word: by its part of the recipe, then by its depth."""
    part = key.partition(".")[0]
    return (PARTS.index(part) if part in PARTS else len(PARTS)), key.count(".")


def _nearest(key: str, known: Sequence[str]) -> str:
    """The most similar key: as a whole, or its last words, whatever the case."""
    plain = key.lower().replace("-", "_")
    depth = plain.count(".") + 1
    short = SHORT_NAMES.get(plain.rpartition(".")[2])

    def similarity(name: str) -> tuple[float, int, int]:
        words = name.lower().split(".")
        whole = max(_ratio(plain, ".".join(words)), _ratio(plain, ".".join(words[-depth:])))
        part, deep = _rank(name)
        return whole + _ratio(plain.rpartition(".")[2], words[-1]) / 2, -part, -deep

    best = max(known, key=similarity, default="")
    return short if short in known and similarity(best)[0] < 1.5 else best


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _convert(cfg: DictConfig, key: str, text: str) -> Any:
    """The value that a text means for a key.

    Raises:
        UsageError: it is of another type than the recipe's value.
    """
    from omegaconf import OmegaConf

    if text == "???":
        raise UsageError(f"{key} can't be '???', which omegaconf reads as a missing value")
    if _INTERPOLATION.fullmatch(text) and has_key(cfg, text[2:-1]):
        return text
    present = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    present = _OPEN.get(key) if present is None else present
    if isinstance(present, str) or key.endswith("_target_"):
        return _to_text(text)
    return None if text.lower() in _NONE else _to_type(key, text, present)


def _to_type(key: str, text: str, present: Any) -> Any:
    """The value of a text that is not None, of the type of the present value."""
    from omegaconf import OmegaConf

    if isinstance(present, bool):
        return _to_bool(key, text)
    if isinstance(present, int | float):
        return _to_number(key, text, present)
    if OmegaConf.is_dict(present):
        return _to_dict(key, text, present)
    if OmegaConf.is_list(present) or isinstance(present, list):
        return _to_list(key, text, present)
    return _guess(text)


def _to_text(text: str) -> str | None:
    """The text as it stands, without quotes around all of it; a leading ~/ is the home folder."""
    if text == "null":
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1]
    elif text == "~" or text.startswith("~/"):
        text = os.path.expanduser(text)
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # so that omegaconf reads no ${...} in it


def _to_bool(key: str, text: str) -> bool:
    if text.lower() not in _WORDS:
        raise UsageError(f"{key} must be True or False, not {text!r}")
    return _WORDS[text.lower()]


def _to_number(key: str, text: str, present: float) -> float:
    """An int where the text is one, or where a whole number replaces an int; else a float."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if number != number:  # NaN
        raise UsageError(f"{key} must be a number, not {text!r}")
    return int(number) if isinstance(present, int) and number.is_integer() else number


def _to_dict(key: str, text: str, present: Any) -> dict:
    value = _parse(text)
    if isinstance(value, dict):
        return value
    words = [f"{key}.{name}" for name in present if name != "_target_"]
    raise UsageError(f"{key} holds several settings: write {' or '.join(words[:3]) or key}=..., not {text!r}")


def _to_list(key: str, text: str, present: Any) -> list:
    value = _parse(text)
    if not isinstance(value, list):
        raise UsageError(f"{key} must be a list: write {key}=[{text.strip('[]()')}]")
    if len(present) and all(map(_is_number, present)) and not all(map(_is_number, value)):
        raise UsageError(f"{key} must be a list of numbers, not {text!r}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _guess(text: str) -> Any:
    """A value without a type to follow: a number, a truth value, None, a list or a dict; else text."""
    value = _parse(text)
    return _to_text(text) if isinstance(value, str) or (isinstance(value, dict) and text[:1] != "{") else value


def _parse(text: str) -> Any:
    """A value in YAML or JSON; the text itself where it is neither."""
    import yaml

    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
