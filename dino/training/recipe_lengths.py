"""Numbers of iterations that follow from epochs and the data, in a form that Detectron2's own programs can read.

A recipe writes `max_iter=iterations("train.epochs")`. `dino train` leaves such a number open until it has read the
data. Detectron2's `tools/lazyconfig_train_net.py` reads it as any other number: omegaconf counts the recipe's images
then.
"""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dino.utils.files import UserError

from .recipe_nodes import instantiate

_RESOLVER = "dino.iterations"
LENGTHS = {  # numbers of iterations, and the epochs from which they follow where they are None
    "train.max_iter": "train.epochs",
    "train.eval_period": "train.eval_epochs",
    "train.checkpointer.period": "train.eval_epochs",
}


def iterations(epochs: str, least: int = 1) -> str:
    """A number of iterations as a value of a recipe.

    Args:
        epochs: key of the number of epochs.
        least: the smallest result.
    """
    return f"${{{_RESOLVER}:${{{epochs}}},{least}}}"


def count_iterations(epochs: float, num_images: int, batch_size: int, least: int = 1) -> int:
    """Iterations of so many epochs; an epoch has at least one."""
    return max(least, round(epochs * max(1, math.ceil(num_images / batch_size))))


def leave_open(cfg: DictConfig) -> None:
    """Replace each `iterations` of a recipe by None, in place: it follows from the data, see `use_epochs`."""
    for key in LENGTHS:
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group)
        raw = OmegaConf.to_container(node, resolve=False).get(name) if OmegaConf.is_dict(node) else None
        if isinstance(raw, str) and raw.startswith(f"${{{_RESOLVER}:"):
            node[name] = None


def _resolve(epochs: float, least: int, *, _root_: Any) -> int | None:
    """The number, from the recipe's training data; None where these can't be read, as for a mere evaluation."""
    train = OmegaConf.select(_root_, "dataloader.train")
    if not 0 <= epochs < math.inf:
        raise UserError(f"a number of epochs can't be {epochs}")
    if train and train.total_batch_size < 1:
        raise UserError(f"dataloader.train.total_batch_size can't be {train.total_batch_size}")
    try:
        return count_iterations(epochs, len(instantiate(train.dataset)), train.total_batch_size, least)
    except (AttributeError, UserError):
        return None


OmegaConf.register_new_resolver(_RESOLVER, _resolve, replace=True)
