"""Settings of a recipe that only `dino train` follows: another program's trainer ignores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

_NEUTRAL: dict[str, tuple] = {  # key below `train` -> values that ask for nothing
    "clip_norm": (None, 0),
    "grad_accum_steps": (None, 1),
    "ema.enabled": (None, False),
    "activation_checkpointing": (None, []),
    "skip_non_finite": (None, False),
    "compile": (None, False),
    "cuda_graphs": (None, 0),
    "deterministic": (None, False),
    "parallel": (None, "ddp"),
    "init_parts": (None, "all"),
    "best.patience": (None, 0),
    "log_matching": (None, False),
    "wandb.enabled": (None, False),
}
_OF_AMP: dict[str, tuple] = {"amp.dtype": (None, "float16"), "amp.evaluation": (None, False)}


def only_dino_train(settings: Mapping[str, Any]) -> list[str]:
    """What a recipe asks for, and Detectron2's trainers ignore, as words `key=value`.

    Args:
        settings: the `train` of the recipe, with or without the keys of configs/common/train.py.
    """
    node = settings if OmegaConf.is_config(settings) else OmegaConf.create(dict(settings))
    neutral = _NEUTRAL | (_OF_AMP if OmegaConf.select(node, "amp.enabled") else {})
    values = {key: OmegaConf.select(node, key) for key in neutral}
    return [f"train.{key}={value}" for key, value in values.items() if value not in neutral[key]]
