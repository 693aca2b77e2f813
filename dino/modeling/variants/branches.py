"""Branches of `DINO`: further predictions that only training makes. Inference never runs them.

A branch gets the denoising queries, the queries of the main predictions with them in front, the memory, and the
network's query selection and decoder; it returns `Outputs`. `CombinedCriterion` gives them losses of their own. A
branch runs the decoder by itself, so the main predictions stay the same to the bit.
"""

from __future__ import annotations

from torch import Tensor, nn

from dino.structures import DenoisingQueries, Outputs, Queries, Tokens, separate

from ..transformer import Attend, Decoder, QuerySelection, full_attention


class Branches(nn.ModuleDict):
    """Branches of a network, or their criteria, by name: `L(Branches)(hybrid=...)` in a recipe.

    Args:
        modules: each under its name.
    """

    def __init__(self, **modules: nn.Module):
        super().__init__(modules)


class SharedHybridBranch(nn.Module):
    """More queries for a one-to-many assignment (hybrid branch of H-DETR, arXiv 2207.13080).

    The queries are the tokens that come after those of the main queries in one ranking; only their contents are new.
    All heads are shared, and the encoder has the losses of the main proposals alone. In the published program both
    groups of queries run through the decoder together, under a mask that separates them.

    Args:
        num_queries: most queries of the branch; an image with few tokens gets fewer.
        embed_dim: E, width of the tokens.
    """

    def __init__(self, *, num_queries: int = 1500, embed_dim: int = 256):
        super().__init__()
        self.content = nn.Embedding(num_queries, embed_dim)
        nn.init.xavier_uniform_(self.content.weight)

    def forward(
        self,
        denoising: DenoisingQueries,
        queries: Queries,
        memory: Tokens,
        query_selection: QuerySelection,
        decoder: Decoder,
    ) -> Outputs:
        """See the module -> `Outputs` without proposals."""
        boxes = query_selection.next_boxes(memory, len(self.content.weight))  # (B, Q, 4)
        content = self.content.weight[: boxes.shape[1]].expand(len(boxes), -1, -1)
        predictions = decoder(Queries(content, boxes), memory, full_attention)
        return Outputs(predictions, predictions.without_layers())


class HybridBranch(QuerySelection):
    """A hybrid branch that selects its own queries, with a head of its own (Relation-DETR, arXiv 2407.11699).

    Features of the tokens are those of the main selection. The heads of the decoder are shared, but a bias of its
    self-attention is not used. Arguments are those of `QuerySelection`.
    """

    def __init__(self, *, num_queries: int = 1500, num_classes: int, embed_dim: int = 256, anchor_size: float = 0.05):
        super().__init__(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim, anchor_size=anchor_size)
        del self.project  # that of the main selection is used

    def forward(
        self,
        denoising: DenoisingQueries,
        queries: Queries,
        memory: Tokens,
        query_selection: QuerySelection,
        decoder: Decoder,
    ) -> Outputs:
        """See the module -> `Outputs` with proposals."""
        own, proposals = self.choose(memory, query_selection.project)
        return Outputs(decoder(own, memory, full_attention), proposals)


class SecondPass(nn.Module):
    """The same queries through the decoder once more, without self-attention (DAC-DETR, NeurIPS 2023).

    Only the first layer keeps its self-attention, as in the published program: both passes have the same first layer.
    """

    def forward(
        self,
        denoising: DenoisingQueries,
        queries: Queries,
        memory: Tokens,
        query_selection: QuerySelection,
        decoder: Decoder,
    ) -> Outputs:
        """See the module -> `Outputs` without proposals, but with denoising."""
        predictions = decoder(queries, memory, _only_first)
        outputs = separate(predictions, predictions, denoising)
        return outputs._replace(proposals=outputs.decoder.without_layers())


def _only_first(mask: Tensor | None, boxes: list[Tensor]) -> Attend | None:
    """Full attention in the first layer, none later."""
    return full_attention(mask, boxes) if len(boxes) == 1 else None
