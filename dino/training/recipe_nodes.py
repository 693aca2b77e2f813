"""The nodes of a recipe: written as calls, named by dotted paths, built into objects. As Detectron2's LazyConfig."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dino.modeling.variants import Branches, CombinedCriterion

_SHARED_BY_LOSSES = ("matcher", "class_loss", "class_weight", "l1_weight", "giou_weight", "alpha", "gamma")


class LazyCall:
    """Notes a call in place of making it: `LazyCall(Encoder)(num_layers=6)` is a node of a recipe.

    Args:
        target: a class or function, or its dotted path.
    """

    def __init__(self, target: Callable | str):
        self._target = target

    def __call__(self, **arguments: Any) -> DictConfig:
        """Make the node: the arguments, and the target under `_target_`."""
        target = full_name(self._target) if is_dataclass(self._target) else self._target  # omegaconf would read fields
        return DictConfig({**arguments, "_target_": target}, flags={"allow_objects": True})


def full_name(part: Any) -> str:
    """The shortest dotted path of a class or function; the `repr` of anything else."""
    named = hasattr(part, "__qualname__") and hasattr(part, "__module__")
    if not named or "<" in part.__qualname__:
        return repr(part)
    packages = part.__module__.split(".")
    paths = [".".join([*packages[:count], part.__qualname__]) for count in range(1, len(packages) + 1)]
    return next((path for path in paths[:-1] if _is_at(part, path)), paths[-1])


def _is_at(part: Any, path: str) -> bool:
    try:
        return pkgutil.resolve_name(path) is part
    except (AttributeError, ImportError, ValueError):
        return False


def plain(node: Any) -> Any:
    """Turn the content of a node into JSON types: classes and functions become names, other objects their `repr`."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return node if node is None or isinstance(node, str | int | float) else full_name(node)


def instantiate(node: Any, find: Callable[[str], Callable] = pkgutil.resolve_name) -> Any:
    """Build a node: parts from dicts with a `_target_`, the innermost first; lists and dicts of parts.

    Args:
        node: of a recipe.
        find: dotted path of a target -> the class or function that is called.
    """
    if OmegaConf.is_list(node) or isinstance(node, list | tuple):
        return [instantiate(child, find) for child in node]
    if not isinstance(node, Mapping):
        return node
    arguments = {key: instantiate(child, find) for key, child in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    target = node["_target_"]
    return (find(target) if isinstance(target, str) else target)(**arguments)


def add_branch(model: DictConfig, name: str, branch: DictConfig, losses: DictConfig) -> None:
    """Add a branch to the network of a recipe's `model`, in place, and its losses to the criterion.

    Args:
        model: of the recipe; its criterion is a `SetCriterion` or a variant of it, or has branches already.
        name: of the branch; its losses are called after it.
        branch: see `dino.modeling.variants.branches`.
        losses: a criterion. Matcher, class loss and weights are those of the main criterion, unless it has its own.
    """
    if "branches" not in model.network:
        model.network["branches"] = LazyCall(Branches)()
        model["criterion"] = LazyCall(CombinedCriterion)(criterion=model.criterion, branches=LazyCall(Branches)())
    for key in _SHARED_BY_LOSSES:
        if key in model.criterion.criterion and key not in losses:
            losses[key] = f"${{...criterion.{key}}}"
    model.network.branches[name] = branch
    model.criterion.branches[name] = losses
