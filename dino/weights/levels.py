"""Levels of the pyramid, matched between a file and a model by their strides."""

from __future__ import annotations

import re

from dino.modeling import DINO

from .names import StateDict

LAST_STRIDE = 32  # of the coarsest map of every backbone that a published DINO uses
Strides = dict[str, list[int]]  # of the projections under "lateral" and "coarser", finest first


def fit_levels(own: StateDict, network: DINO) -> tuple[StateDict, dict[str, str]]:
    """Give projections the numbers, and level embeddings the rows, of the same strides in the network.

    A file does not name its strides. One with as many projections of both kinds as the model has the model's, any other
    one is taken to have a coarsest lateral map of stride 32.

    Returns:
        the state dict, and {name: reason} of tensors that are fresh in part.
    """
    ours, counts = strides_of(network), count_projections(own)
    if counts == {kind: len(strides) for kind, strides in ours.items()}:
        return own, {}
    theirs = {
        "lateral": [LAST_STRIDE >> n for n in reversed(range(counts["lateral"]))],
        "coarser": [LAST_STRIDE << n for n in range(1, counts["coarser"] + 1)],
    }
    fitted = {new_name(name, theirs, ours): value for name, value in own.items()}
    rows = {stride: row for row, stride in enumerate(theirs["lateral"] + theirs["coarser"])}
    embed = network.level_embed.detach().clone()  # (L, E)
    fresh = []
    for level, stride in enumerate(ours["lateral"] + ours["coarser"]):
        if stride in rows and own["level_embed"].shape[1:] == embed.shape[1:]:
            embed[level] = own["level_embed"][rows[stride]]
        else:
            fresh.append(f"stride {stride}")
    fitted["level_embed"] = embed
    return fitted, {"level_embed": f"the rows of {', '.join(fresh)} only"} if fresh else {}


def strides_of(network: DINO) -> Strides:
    """The strides of a network's projections."""
    neck = network.neck
    shapes = neck.backbone.output_shape()
    lateral = [shapes[name].stride for name in neck.in_features]
    return {"lateral": lateral, "coarser": [lateral[-1] << n for n in range(1, neck.num_levels - len(lateral) + 1)]}


def count_projections(own: StateDict) -> dict[str, int]:
    """How many projections of each kind a state dict has."""
    return {
        kind: sum(bool(re.fullmatch(rf"neck\.{kind}\.\d+\.0\.weight", k)) for k in own)
        for kind in ("lateral", "coarser")
    }


def new_name(name: str, theirs: Strides, ours: Strides) -> str:
    """A tensor's name with the number of its level in the model; levels that the model lacks go by their stride."""
    match = re.fullmatch(r"neck\.(lateral|coarser)\.(\d+)\.(.+)", name)
    if not match:
        return name
    kind, stride = match[1], theirs[match[1]][int(match[2])]
    place = ours[kind].index(stride) if stride in ours[kind] else f"stride{stride}"
    return f"neck.{kind}.{place}.{match[3]}"
