"""Branches of `DINO`: further predictions that only training makes. Inference never runs them.

A branch gets the denoising queries, the queries of the main predictions with them in front, the memory, and the
network's query selection and decoder; it returns `Outputs`. `CombinedCriterion` gives them losses of their own. A
branch runs the decoder by itself, so the main predictions stay the same to the bit.

If a branch has a method `check(query_selection, decoder)`, `DINO` calls it when it is built.
"""

from __future__ import annotations

from torch import Tensor, nn

from dino.layers.matcher import takes
from dino.structures import DenoisingQueries, Outputs, Queries, Tokens, separate
from dino.utils.files import UserError

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
        num_queries: most queries of the branch; images with few tokens get fewer, or none.
        embed_dim: E, width of the tokens.
    """

    def __init__(self, *, num_queries: int = 1500, embed_dim: int = 256):
        super().__init__()
        self.content = nn.Embedding(num_queries, embed_dim)
        nn.init.xavier_uniform_(self.content.weight)

    def check(self, query_selection: nn.Module, decoder: nn.Module) -> None:
        """Check the parts that the branch uses.

        Raises:
            UserError: the selection ranks no tokens, or the decoder takes no `interaction`.
        """
        _check_selection(self, query_selection, "next_boxes", "ranks no tokens")
        _check_decoder(self, decoder)
        _check_content(self, decoder)

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
        count = boxes.shape[1]
        if not count:
            boxes = boxes.new_zeros(len(boxes), 1, 4)  # the decoder needs a query, which is dropped again
        content = self.content.weight[: boxes.shape[1]].expand(len(boxes), -1, -1)
        predictions, _ = decoder(Queries(content, boxes), memory, full_attention).split(count)
        return Outputs(predictions, predictions.without_layers())


class HybridBranch(QuerySelection):
    """A hybrid branch that selects its own queries, with a head of its own (Relation-DETR, arXiv 2407.11699).

    Features of the tokens are those of the main selection. The heads of the decoder are shared, but a bias of its
    self-attention is not used.

    Args:
        num_queries: queries of the branch, at most; an image with few tokens has fewer.
        num_classes, embed_dim, anchor_size: as of `QuerySelection`.
    """

    def __init__(self, *, num_queries: int = 1500, num_classes: int, embed_dim: int = 256, anchor_size: float = 0.05):
        super().__init__(num_queries=num_queries, num_classes=num_classes, embed_dim=embed_dim, anchor_size=anchor_size)
        del self.project  # that of the main selection is used

    def check(self, query_selection: nn.Module, decoder: nn.Module) -> None:
        """Check the parts that the branch uses.

        Raises:
            UserError: the selection makes no features of tokens, the decoder takes no `interaction`, or queries or
                classes do not fit.
        """
        _check_selection(self, query_selection, "project", "makes no features of tokens")
        _check_decoder(self, decoder)
        _check_content(self, decoder)
        classes, expected = len(self.class_head.bias), len(decoder.class_heads[0].bias)
        if classes != expected:
            raise UserError(f"HybridBranch has {classes} classes, but the decoder {expected}")

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
    """The same queries through the decoder once more, without self-attention (C-decoder of DAC-DETR, NeurIPS 2023).

    Only the first layer keeps its self-attention, as in the published program: both passes have the same first layer.
    """

    def check(self, query_selection: nn.Module, decoder: nn.Module) -> None:
        """Check the parts that the branch uses.

        Raises:
            UserError: the decoder takes no `interaction`.
        """
        _check_decoder(self, decoder)

    def forward(
        self,
        denoising: DenoisingQueries,
        queries: Queries,
        memory: Tokens,
        query_selection: QuerySelection,
        decoder: Decoder,
    ) -> Outputs:
        """See the module -> `Outputs` without proposals, but with denoising."""

        def only_first(mask: Tensor | None, boxes: list[Tensor]) -> Attend | None:
            return decoder.interaction(mask, boxes) if len(boxes) == 1 else None

        predictions, denoised = separate(decoder(queries, memory, only_first), denoising)
        return Outputs(predictions, predictions.without_layers(), denoised)


def _check_selection(branch: nn.Module, selection: nn.Module, needed: str, lack: str) -> None:
    """Raise a UserError where the query selection has no member `needed`."""
    if not hasattr(selection, needed):
        raise UserError(
            f"{type(branch).__name__} selects tokens by the network's query selection, but {type(selection).__name__} "
            f"{lack}: use a QuerySelection, or leave the branch out"
        )


def _check_decoder(branch: nn.Module, decoder: nn.Module) -> None:
    """Raise a UserError where the decoder takes no `interaction`."""
    if not takes(decoder, "interaction"):
        raise UserError(
            f"{type(branch).__name__} chooses how the decoder's queries read each other, but {type(decoder).__name__} "
            "takes no `interaction`: let its forward accept one, see Decoder, or leave the branch out"
        )


def _check_content(branch: nn.Module, decoder: nn.Module) -> None:
    """Raise a UserError where a branch has no queries, or contents of another width than the decoder's."""
    queries, width = branch.content.weight.shape
    if not queries or width != decoder.embed_dim:
        raise UserError(
            f"{type(branch).__name__} has {queries} queries of {width} channels, but at least one of "
            f'{decoder.embed_dim} was expected: in a recipe, embed_dim="${{...neck.out_channels}}"'
        )
