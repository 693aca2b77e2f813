"""DINO: the network, from images to predictions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dino.structures import Outputs, Target, Tokens, concatenate, separate


class DINO(nn.Module):
    """DETR with improved denoising anchor boxes (arXiv 2203.03605), assembled from its parts.

    Args:
        neck: images -> L maps of one width, see `ChannelMapper`.
        position_encoding: padding mask (B, H, W) -> (B, E, H, W), see `SinePositionEncoding`.
        encoder: Tokens -> Tokens, see `Encoder`.
        query_selection: Tokens -> (Queries, LayerOutputs), see `QuerySelection`.
        denoising: (targets, number of queries) -> DenoisingQueries, see `ContrastiveDenoising`.
        decoder: (Queries, Tokens) -> LayerOutputs, see `Decoder`.
        branches: further predictions by name, for training only: (denoising, queries, memory, query selection, decoder)
            -> Outputs, see `dino.modeling.variants.branches`.

    Raises:
        UserError: a branch can't work with the other parts.
    """

    def __init__(
        self,
        *,
        neck: nn.Module,
        position_encoding: nn.Module,
        encoder: nn.Module,
        query_selection: nn.Module,
        denoising: nn.Module,
        decoder: nn.Module,
        branches: Mapping[str, nn.Module] | None = None,
    ):
        super().__init__()
        self.neck = neck
        self.position_encoding = position_encoding
        self.level_embed = nn.Parameter(torch.randn(neck.num_levels, neck.out_channels))  # (L, E)
        self.encoder = encoder
        self.query_selection = query_selection
        self.denoising = denoising
        self.decoder = decoder
        self.branches = nn.ModuleDict(branches)
        for branch in self.branches.values():
            if hasattr(branch, "check"):
                branch.check(query_selection, decoder)

    def forward(self, images: Tensor, padding: Tensor | None, targets: list[Target] | None = None) -> Outputs:
        """Predict; with targets, also denoise them.

        Args:
            images: (B, 3, H, W), normalised, zero where padded.
            padding: the padding mask (B, H, W) bool, True where padded; None where no image is padded, which is faster.
            targets: the objects of each image (training), or None (inference).
        """
        memory = self.encoder(self.tokenize(self.neck(images), padding))
        queries, proposals = self.query_selection(memory)
        if targets is None:
            return Outputs(self.decoder(queries, memory), proposals)
        dn = self.denoising(targets, queries.content.shape[1])
        queries = concatenate(dn.queries, queries)
        decoder, denoising = separate(self.decoder(queries, memory), dn)
        parts = (dn, queries, memory, self.query_selection, self.decoder)
        extra = {name: branch(*parts) for name, branch in self.branches.items()}
        return Outputs(decoder, proposals, denoising, extra)

    def tokenize(self, maps: list[Tensor], padding_mask: Tensor | None) -> Tokens:
        """L maps (B, E, h, w) and the padding mask (B, H, W) of the images -> one sequence of tokens."""
        masks = [_downsample(padding_mask, m) for m in maps]  # (B, h, w)
        pairs = zip(masks, self.level_embed, strict=True)
        position = [self.position_encoding(mask) + code[:, None, None] for mask, code in pairs]
        features = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        return Tokens(
            features=features,
            position=torch.cat([p.flatten(2).transpose(1, 2) for p in position], 1).to(features.dtype),
            padding_mask=None if padding_mask is None else torch.cat([m.flatten(1) for m in masks], 1),
            shapes=[(m.shape[-2], m.shape[-1]) for m in maps],
            valid_sizes=torch.stack([_valid_size(m) for m in masks], 1),
        )


def _downsample(padding_mask: Tensor | None, features: Tensor) -> Tensor:
    """Padding mask (B, H, W) of the images, or None, at the size of features (B, E, h, w) -> (B, h, w) bool."""
    if padding_mask is None:
        return features.new_zeros((features.shape[0], *features.shape[-2:]), dtype=torch.bool)
    for axis, cells in enumerate(features.shape[-2:], 1):  # by integers: dino/export/verify_batches.py says why
        pixels = torch.arange(cells, device=padding_mask.device) * padding_mask.shape[axis] // cells
        padding_mask = padding_mask.bool().index_select(axis, pixels)
    return padding_mask


def _valid_size(padding_mask: Tensor) -> Tensor:
    """(B, H, W) -> (B, 2) float32: width and height of the unpadded part, from the first row and column."""
    return torch.stack([(~padding_mask[:, 0]).sum(1), (~padding_mask[:, :, 0]).sum(1)], -1).float()
