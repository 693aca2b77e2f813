"""Levels of the pyramid, matched between a file and a model by stride."""

from __future__ import annotations

import re

from torch import Tensor

from dino.modeling import DINO

from .names import StateDict

_LAST_STRIDE = 32  # of the coarsest map of every published DINO's backbone
_Strides = dict[str, list[int]]  # of the projections under "lateral" and "extra_levels", finest first


def fit_levels(own: StateDict, network: DINO) -> tuple[StateDict, dict[str, str]]:
    """Renumber the file's projections and level embeddings, so that strides match those of the network.

    A file does not name its strides. A file with as many projections of both kinds as the model has the same strides.
    In any other file, the coarsest lateral map is assumed to have stride 32.

    Returns:
        the state dict, and {name: reason} of tensors that keep some initial values.
    """
    ours, counts = _strides_of(network), count_projections(own)
    if counts == {kind: len(strides) for kind, strides in ours.items()}:
        return own, {}
    theirs = {
        "lateral": [_LAST_STRIDE >> n for n in reversed(range(counts["lateral"]))],
        "extra_levels": [_LAST_STRIDE << n for n in range(1, counts["extra_levels"] + 1)],
    }
    fitted = {_new_name(name, theirs, ours): value for name, value in own.items()}
    fitted["level_embed"], fresh = _fit_embedding(own["level_embed"], network.level_embed, theirs, ours)
    return fitted, {"level_embed": f"the rows of {', '.join(fresh)} only"} if fresh else {}


def _fit_embedding(found: Tensor, initial: Tensor, theirs: _Strides, ours: _Strides) -> tuple[Tensor, list[str]]:
    """The rows (L, E) of the network's strides, from the file or else initial ones -> and the strides of the latter."""
    rows = {stride: row for row, stride in enumerate(theirs["lateral"] + theirs["extra_levels"])}
    embed = initial.detach().clone()  # (L, E)
    fresh = []
    for level, stride in enumerate(ours["lateral"] + ours["extra_levels"]):
        if stride in rows and rows[stride] < len(found) and found.shape[1:] == embed.shape[1:]:
            embed[level] = found[rows[stride]]
        else:
            fresh.append(f"stride {stride}")
    return embed, fresh


def _strides_of(network: DINO) -> _Strides:
    """Read the strides of a network's projections."""
    neck = network.neck
    shapes = neck.backbone.output_shape()
    lateral = [shapes[name].stride for name in neck.in_features]
    return {
        "lateral": lateral,
        "extra_levels": [lateral[-1] << n for n in range(1, neck.num_levels - len(lateral) + 1)],
    }


def count_projections(own: StateDict) -> dict[str, int]:
    """Count the projections of each kind in a state dict."""
    return {
        kind: sum(bool(re.fullmatch(rf"neck\.{kind}\.\d+\.0\.weight", k)) for k in own)
        for kind in ("lateral", "extra_levels")
    }


def _new_name(name: str, theirs: _Strides, ours: _Strides) -> str:
    """A tensor's name with the number of its level in the model, or with its stride where the model lacks the level."""
    match = re.fullmatch(r"neck\.(lateral|extra_levels)\.(\d+)\.(.+)", name)
    if not match or int(match[2]) >= len(theirs[match[1]]):
        return name
    kind, stride = match[1], theirs[match[1]][int(match[2])]
    number = ours[kind].index(stride) if stride in ours[kind] else f"stride{stride}"
    return f"neck.{kind}.{number}.{match[3]}"
