"""Recording of one batch inside a DINO, by hooks: nothing in the network knows of this module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino.layers import (
    ContrastiveDenoising,
    DenoisingQueries,
    MultiScaleDeformableAttention,
    Outputs,
    Queries,
    SetCriterion,
    Target,
    Tokens,
)
from dino.modeling import DINO, Decoder, QuerySelection
from dino.modeling.variants import DistinctSelection, LearnedSizeSelection, LookForwardOnce, PureSelection
from dino.structures import concatenate

_LOOKS = {"once": LookForwardOnce, "twice": Decoder}
_CALLS = (
    2  # of a box head in its decoder layer: for the predicted box, then for the box that the next layer starts from
)


class Samples(NamedTuple):
    """Sampling points of one attention layer of the decoder."""

    boxes: Tensor  # (B, T+Q, 4), its reference boxes
    locations: Tensor  # (B, T+Q, M, L, P, 2) as (x, y), fractions of the unpadded image
    weights: Tensor  # (B, T+Q, M, L, P), one in sum for each head


class Record(NamedTuple):
    """Recorded values of a batch; no tensor carries a gradient."""

    memory: Tokens  # the encoder's result
    tokens: Tensor  # (B, Q) int64, the selected ones, best first
    scores: Tensor  # (B, Q) the highest class score of each of them, in [0, 1]
    anchors: Tensor  # (B, Q, 4) their anchors, which do not depend on the image
    queries: Queries  # initial queries of the decoder
    denoising: DenoisingQueries
    denoising_labels: Tensor  # (B, T) int64, classes of the embeddings of the denoising queries; -1 without object
    samples: list[Samples]  # of each decoder layer
    outputs: Outputs
    matches: list[tuple[Tensor, Tensor]]  # of each image: K queries of the last layer, and their objects
    losses: dict[str, float]  # weighted, by name
    gradients: dict[str, Tensor]  # "once" and "twice" -> (N, N, 2), see `_box_gradients`

    def count_tokens(self, image: int) -> int:
        """Number of tokens of an image that are not padding."""
        padding = self.memory.padding_mask
        return self.memory.features.shape[1] if padding is None else int((~padding[image]).sum())


def record(
    network: DINO, images: Tensor, padding: Tensor | None, targets: list[Target], criterion: SetCriterion
) -> Record:
    """Run a batch as in training, in the mode (`train` or `eval`) of the network, and record it.

    Args:
        network: any DINO whose queries are selected as by `QuerySelection` and denoised as by `ContrastiveDenoising`.
        images, padding: as of `DINO.forward`.
        targets: the objects of each image, at least one in all.
        criterion: its losses and matching are recorded.

    Raises:
        ValueError: there is no object in the batch, denoising is switched off, or a part of the network is a variant
            with nothing to draw.
    """
    _check_parts(network)
    selection, attentions = network.query_selection, [layer.cross_attention for layer in network.decoder.layers]
    watched = {"selection": selection, "classes": selection.class_head, "denoising": network.denoising}
    with torch.no_grad(), _watch(watched | {f"layer {i}": part for i, part in enumerate(attentions)}) as calls:
        outputs = network(images, padding, targets)
    ((memory,), (queries, _)), (_, dn) = calls["selection"][0], calls["denoising"][0]
    if dn.num_groups == 0:
        raise ValueError("nothing to denoise: the batch has no objects, or num_denoising is 0")
    with torch.no_grad():
        logits = calls["classes"][0][1]  # (B, S, C)
        anchors, usable = selection.anchors(memory)
        features = selection.project(memory.features.masked_fill(~usable[..., None], 0))
        tokens = selection.best_tokens(features, anchors, usable, memory.padding_mask)
        samples = [_look(a, *calls[f"layer {i}"][0][0], memory.valid_ratios) for i, a in enumerate(attentions)]
        losses = {name: loss.item() for name, loss in criterion(outputs, targets).items()}
        matches = criterion.matcher(type(outputs.decoder)(*(x[-1:] for x in outputs.decoder)), targets)[0]

    def pulls(decoder: Decoder) -> Tensor:
        return _box_gradients(decoder, concatenate(dn.queries, queries), memory, outputs, criterion, targets)

    return Record(
        memory=memory,
        tokens=tokens,
        scores=logits.sigmoid().amax(-1).gather(1, tokens),
        anchors=anchors.take_along_dim(tokens[..., None], 1).sigmoid(),
        queries=queries,
        denoising=dn,
        denoising_labels=_labels_of(dn.queries.content, network.denoising.label_embed.weight.detach()),
        samples=samples,
        outputs=outputs,
        matches=[tuple(map(torch.as_tensor, pair)) for pair in matches],
        losses=losses,
        gradients={name: pulls(_looking(network.decoder, kind)) for name, kind in _LOOKS.items()},
    )


def _check_parts(network: DINO) -> None:
    """Raise a ValueError that names a part of the network without selected tokens, or without negatives, to record."""
    selection, denoising = network.query_selection, network.denoising
    classes = network.decoder.class_heads[0].out_features
    if (
        type(selection) not in (QuerySelection, DistinctSelection, LearnedSizeSelection, PureSelection)
        or selection.class_head.out_features != classes
    ):
        raise ValueError(
            f"its queries come from {type(selection).__name__}, which does not select tokens by their {classes} "
            "classes: there is nothing to draw as for DINO"
        )
    if denoising.KINDS != ContrastiveDenoising.KINDS:
        raise ValueError(f"{type(denoising).__name__} makes no negatives: there is nothing to draw as for DINO")


def _looking(decoder: Decoder, kind: type[Decoder]) -> Decoder:
    """The decoder, over the same modules and hooks, but it looks forward as `kind` does."""
    other = copy.copy(decoder)
    other.look_forward = partial(kind.look_forward, other)
    return other


@contextlib.contextmanager
def _watch(parts: dict[str, nn.Module]) -> Iterator[dict[str, list[tuple]]]:
    """Record (inputs, output) of every call of these modules, under their names."""
    calls: dict[str, list[tuple]] = {name: [] for name in parts}

    def keep(name: str):
        return lambda module, inputs, output: calls[name].append((inputs, output))

    handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _look(
    attention: MultiScaleDeformableAttention,
    query: Tensor,
    reference: Tensor,
    value: Tensor,
    padding: Tensor | None,
    shapes: list[tuple[int, int]],
    valid_ratios: Tensor,
) -> Samples:
    """Sampling points of `attention`, from the arguments of its forward pass and the unpadded fractions (B, L, 2)."""
    sizes = (*query.shape[:2], attention.num_heads, attention.num_levels, attention.num_points)  # (B, Q, M, L, P)
    weights = attention.attention_weights(query).view(*sizes[:3], -1).softmax(-1).view(sizes)
    offsets = attention.sampling_offsets(query).view(*sizes, 2).to(reference.dtype)
    locations = attention.sampling_locations(reference[:, :, None, :, None], offsets, shapes)
    boxes = reference[:, :, 0] / valid_ratios[:, None, 0].repeat(1, 1, 2)
    return Samples(boxes, locations / valid_ratios[:, None, None, :, None], weights)


def _labels_of(content: Tensor, embedding: Tensor) -> Tensor:
    """(B, T, E) contents of denoising queries and the (C, E) embeddings of classes -> (B, T) int64, -1 for zeros."""
    labels = torch.cdist(content, embedding[None].to(content)).argmin(-1)
    return labels.masked_fill((content == 0).all(-1), -1)


@torch.enable_grad()
def _box_gradients(
    decoder: nn.Module,
    queries: Queries,
    memory: Tokens,
    outputs: Outputs,
    criterion: SetCriterion,
    targets: list[Target],
) -> Tensor:
    """Gradients of the box losses of layer i with respect to the outputs of the box head of layer j -> (N, N, 2).

    A head has two outputs in its layer: the step to the predicted box, and the step to the box that the next layer
    starts from. Entries are Euclidean norms of the gradient of `loss_bbox` + `loss_giou` of layer i. Runs the decoder
    once more; leaves nothing in `.grad`.
    """
    steps: list[Tensor] = []
    heads = set(decoder.box_heads)  # a shared one is watched once
    handles = [head.register_forward_hook(lambda _, inputs, output: steps.append(output)) for head in heads]
    try:
        _, predictions = decoder(queries, memory).split(queries.content.shape[1] - outputs.decoder.boxes.shape[2])
    finally:
        for handle in handles:
            handle.remove()
    losses = criterion(Outputs(predictions, outputs.proposals), targets)
    layers = len(predictions.boxes)
    rows = []
    for i in range(layers):
        suffix = f"_{i}" if i < layers - 1 else ""
        loss = losses[f"loss_bbox{suffix}"] + losses[f"loss_giou{suffix}"]
        pulls = torch.autograd.grad(loss, steps, retain_graph=True, allow_unused=True)
        rows.append(torch.stack([loss.new_zeros(()) if pull is None else pull.norm() for pull in pulls]))
    return torch.stack(rows).view(layers, layers, _CALLS)
