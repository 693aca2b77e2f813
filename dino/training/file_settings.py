"""The settings of a recipe that the file it loads calls for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dino.modeling import TimmBackbone, TorchvisionBackbone
from dino.modeling.backbones import timm_pixel_statistics
from dino.modeling.detector import Preprocessing
from dino.utils.run_folder import checkpoints
from dino.weights import locate
from dino.weights.file_facts import FileFacts, read_facts

from .recipe_nodes import full_name

logger = logging.getLogger("detectron2.dino")
_HEADS = {False: "dino.modeling.Decoder", True: "dino.modeling.SharedHeadsDecoder"}  # shared -> the decoder
_DECODER = "model.network.decoder._target_"
_POSITION = "model.network.position_encoding"
_BACKBONE = "model.network.neck.backbone"
_NOT_SET = Preprocessing()
_PIXELS = {"model.pixel_mean": _NOT_SET.pixel_mean, "model.pixel_std": _NOT_SET.pixel_std}
_MAP_NORM = f"{_BACKBONE}.map_norm"
_DEFAULTS = {f"{_POSITION}.temperatures": [20.0, 20.0], f"{_POSITION}.offset": 0.0, _MAP_NORM: "none"}  # of the classes


class Message(NamedTuple):
    """A line for the log, which may not be open yet."""

    level: int  # of `logging`
    text: str


class _Setting(NamedTuple):
    """A setting that a file calls for."""

    key: str
    value: Any
    stated: bool  # the recipe's own value counts as chosen by a person


def follow_facts(cfg: DictConfig, overrides: Sequence[str], path: str, facts: FileFacts) -> list[Message]:
    """Set in a complete recipe what a file needs: heads, position encoding, norms of maps, pixel statistics.

    What an override states stays, and so do pixel statistics of the recipe that are not ImageNet's.

    Args:
        overrides: those of the command line, each key=value.
        path, facts: of `read_start`.

    Returns:
        a message for each setting that changed, and a warning for each that contradicts the file.
    """
    if OmegaConf.select(cfg, "model.network") is None or not path:
        return []
    stated = [override.partition("=")[0] for override in overrides]
    found = [_apply(cfg, setting, stated, path) for setting in _settings(cfg, facts)]
    return [message for message in found if message]


def read_start(cfg: DictConfig, *, resume: bool, find: Callable[[str], str] = locate) -> tuple[str, FileFacts]:
    """The file that a recipe loads, and what it says; "" for none. Loading it says what is wrong with a broken one.

    It is `train.init_checkpoint`, or the last checkpoint of a run that resumes.

    Args:
        find: name, path or address -> file.

    Raises:
        UserError: there is no such file, or its address can't be fetched.
    """
    last = checkpoints(Path(cfg.train.output_dir)) if resume else []
    start = [cfg.train.init_checkpoint] if cfg.train.init_checkpoint and not last else []
    for path in [*map(str, last), *map(find, start)]:
        try:
            return path, read_facts(path)
        except Exception:  # a broken or foreign file can raise anything
            continue
    return "", FileFacts()


def log_messages(messages: Sequence[Message]) -> None:
    """Write messages to the log."""
    for level, text in messages:
        logger.log(level, text)


def _settings(cfg: DictConfig, facts: FileFacts) -> list[_Setting]:
    """What the file calls for, as far as the recipe has such settings."""
    found = []
    if facts.shared_heads is not None and _target(cfg, _DECODER) in _HEADS.values():
        found.append(_Setting(_DECODER, _HEADS[facts.shared_heads], False))
    if facts.position and _target(cfg, f"{_POSITION}._target_") == "dino.layers.SinePositionEncoding":
        found.append(_Setting(f"{_POSITION}.temperatures", list(facts.position.temperatures), False))
        found.append(_Setting(f"{_POSITION}.offset", facts.position.offset, False))
    if facts.map_norm and _target(cfg, f"{_BACKBONE}._target_") in map(full_name, (TimmBackbone, TorchvisionBackbone)):
        found.append(_Setting(_MAP_NORM, facts.map_norm, False))
    return found + _pixel_settings(cfg, facts)


def _pixel_settings(cfg: DictConfig, facts: FileFacts) -> list[_Setting]:
    """Those of a checkpoint, or those that timm's weights of a backbone expect."""
    pixels = {"model.pixel_mean": facts.pixel_mean, "model.pixel_std": facts.pixel_std}
    if facts.format == "backbone" and _target(cfg, f"{_BACKBONE}._target_") == full_name(TimmBackbone):
        pixels = {f"model.{name}": x for name, x in timm_pixel_statistics(cfg.model.network.neck.backbone.name).items()}
    return [
        _Setting(key, list(values), not _same(OmegaConf.select(cfg, key), _PIXELS[key]))
        for key, values in pixels.items()
        if values and OmegaConf.select(cfg, key) is not None
    ]


def _target(cfg: DictConfig, key: str) -> str:
    """The name of a class in a recipe; "" where there is none."""
    target = OmegaConf.select(cfg, key)
    return target if isinstance(target, str) else full_name(target) if target else ""


def _apply(cfg: DictConfig, setting: _Setting, stated: Sequence[str], path: str) -> Message | None:
    """Set what is not stated already."""
    key, value = setting.key, setting.value
    current = _target(cfg, key) if key == _DECODER else OmegaConf.select(cfg, key, default=_DEFAULTS.get(key))
    if _same(current, value):
        return None
    wanted, before = _shown(key, value), _shown("", current)  # the update changes lists in place
    if setting.stated or any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in stated):
        return Message(logging.WARNING, f"{_shown(key, current)} stays as it is set, but {path} calls for {wanted}")
    OmegaConf.update(cfg, key, value)
    return Message(logging.INFO, f"follows the file: {wanted}, as {path} was trained, instead of {before}")


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal; numbers up to rounding."""
    if isinstance(a, str) or isinstance(b, str) or a is None or b is None:
        return a == b
    a, b = ([x] if isinstance(x, int | float) else list(x) for x in (a, b))
    return len(a) == len(b) and all(abs(x - y) < 1e-3 for x, y in zip(a, b, strict=True))


def _shown(key: str, value: Any) -> str:
    """As an override for a shell; without a key, the value alone."""
    text = value if isinstance(value, str | int | float | None) else f"[{','.join(map(str, value))}]"
    return f"'{key}={text}'" if key and str(text).startswith("[") else f"{key}={text}" if key else str(text)
