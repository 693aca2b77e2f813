"""Contrastive denoising: queries from ground truth with added noise, positives and negatives (paper section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino.structures import DenoisingQueries, Queries, Target
from dino.utils.device import to_device

from .boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh


class Noise(NamedTuple):
    """The random numbers of one batch, for R = KINDS * groups copies of the K objects of all images.

    Of contrastive denoising, even copies are positives and odd ones negatives.
    """

    label_chance: Tensor  # (R, K) uniform in [0, 1)
    new_labels: Tensor  # (R, K) int64 in [0, C)
    box_signs: Tensor  # (R, K, 4), 0 or 1
    box_parts: Tensor  # (R, K, 4) uniform in [0, 1)


def denoising_mask(num_groups: int, group_size: int, num_queries: int, device: torch.device) -> Tensor:
    """(T+Q, T+Q) bool with T = num_groups * group_size, True where a row must not attend to a column.

    A group sees itself and the matching queries, but no other group; matching queries see matching queries only.
    """
    group = torch.arange(num_groups * group_size, device=device) // group_size
    group = torch.cat([group, group.new_full((num_queries,), -1)])  # (T+Q,), -1 for matching queries
    return (group[:, None] != group) & (group >= 0)


class ContrastiveDenoising(nn.Module):
    """Makes decoder queries from the ground truth of a batch by adding noise.

    Args:
        num_classes: C, number of classes.
        embed_dim: E, width of the queries.
        num_denoising: budget of positives (and as many negatives) per image, filled group by group. Where an image has
            more objects, a random choice of them is denoised. 0 switches denoising off.
        label_noise: half of this fraction of the labels is replaced by a random class, which may be the true one.
        box_noise: corners of positives move by less than this many half sides, of negatives by one to two times that.

    Raises:
        ValueError: a negative budget.
    """

    KINDS = 2  # of queries for each object in a group: a positive, then a negative

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        num_denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
    ):
        super().__init__()
        if num_denoising < 0:
            raise ValueError(f"num_denoising must be 0 (off) or more, but is {num_denoising}")
        self.label_embed = nn.Embedding(num_classes, embed_dim)
        self.num_denoising = num_denoising
        self.label_noise = label_noise
        self.box_noise = box_noise

    def forward(self, targets: list[Target], num_queries: int) -> DenoisingQueries:
        """Make T denoising queries, in front of `num_queries` matching queries, from the objects of B images.

        T = KINDS * groups * (objects of the fullest image), never more than KINDS * num_denoising.
        """
        targets = [self.sample(t) for t in targets]
        longest = max(len(t.labels) for t in targets)
        if longest == 0:
            return self.placeholder(targets, num_queries)
        num_groups = self.num_groups(longest)
        noise = self.draw(self.KINDS * num_groups, torch.cat([t.labels for t in targets]))
        return self.build(targets, num_queries, num_groups, noise)

    def num_denoised(self, counts: list[int]) -> int:
        """Number of objects that `forward` denoises, of images with `counts` objects."""
        return sum(min(count, self.num_denoising) for count in counts)

    def sample(self, target: Target) -> Target:
        """At most `num_denoising` objects. (The published programs have no bound and run out of memory in crowds.)"""
        count = len(target.labels)
        if count <= self.num_denoising:
            return target
        chosen = to_device(torch.randperm(count)[: self.num_denoising].sort().values, target.labels.device)
        return Target(target.labels[chosen], target.boxes[chosen])

    def num_groups(self, longest: int) -> int:
        """As many groups as the budget holds. (The official program takes a budget below 50 for a number of groups.)"""
        return max(1, self.num_denoising // longest)

    def draw(self, repeats: int, labels: Tensor) -> Noise:
        """New random numbers for `repeats` copies of K objects with (K,) labels."""
        shape, device = (repeats, len(labels)), labels.device
        return Noise(
            label_chance=torch.rand(shape, device=device),
            new_labels=torch.randint(self.label_embed.num_embeddings, shape, device=device),
            box_signs=torch.randint(2, (*shape, 4), device=device),
            box_parts=torch.rand((*shape, 4), device=device),
        )

    def build(self, targets: list[Target], num_queries: int, num_groups: int, noise: Noise) -> DenoisingQueries:
        """Add `noise`; copy r of an image's object g becomes query r * G + g, with G objects in the fullest image.

        Images with fewer objects get padding queries: zero content and the box (0.5, 0.5, 0.5, 0.5). Other queries
        attend to them and the class loss trains them as background, as in the official program.
        """
        counts = [len(t.labels) for t in targets]
        repeats, longest = self.KINDS * num_groups, max(counts)
        content = self.label_embed(self.noise_labels(torch.cat([t.labels for t in targets]), noise))  # (R, K, E)
        box_logits = inverse_sigmoid(self.noise_boxes(torch.cat([t.boxes for t in targets]), noise))  # (R, K, 4)
        indices = [[i for i, n in enumerate(counts) for _ in range(n)], [g for n in counts for g in range(n)]]
        image, index = to_device(indices, content.device)  # (K,) each

        def pad(x: Tensor) -> Tensor:
            padded = x.new_zeros(len(counts), longest, repeats, x.shape[-1])
            padded[image, index] = x.transpose(0, 1)
            return padded.transpose(1, 2).flatten(1, 2)  # (B, T, ·)

        mask = denoising_mask(num_groups, self.KINDS * longest, num_queries, content.device)
        return DenoisingQueries(Queries(pad(content), pad(box_logits), mask), targets, num_groups)

    def noise_labels(self, labels: Tensor, noise: Noise) -> Tensor:
        """(K,) -> (R, K)."""
        return torch.where(noise.label_chance < 0.5 * self.label_noise, noise.new_labels, labels)

    def noise_boxes(self, boxes: Tensor, noise: Noise) -> Tensor:
        """(K, 4) -> (R, K, 4), corners clamped to the image.

        Corners are not sorted, so the side of a negative can be below 0; the inverse sigmoid clamps it to 0.001.
        """
        half_sides = boxes[:, 2:].repeat(1, 2) / 2  # (K, 4)
        return xyxy_to_cxcywh((cxcywh_to_xyxy(boxes) + self.steps(noise) * half_sides).clamp(0, 1))

    def steps(self, noise: Noise) -> Tensor:
        """(R, K, 4): shift of each number of (x0, y0, x1, y1) in half sides."""
        negative = (torch.arange(len(noise.box_parts), device=noise.box_parts.device) % self.KINDS)[:, None, None]
        return (noise.box_parts + negative) * (2 * noise.box_signs - 1) * self.box_noise

    def placeholder(self, targets: list[Target], num_queries: int) -> DenoisingQueries:
        """A single query whose losses are 0, for a batch without objects: keeps every parameter in the graph."""
        content = self.label_embed.weight[0].expand(len(targets), 1, -1)  # (B, 1, E)
        box_logits = targets[0].boxes.new_zeros(len(targets), 1, 4)
        mask = denoising_mask(1, 1, num_queries, content.device)
        return DenoisingQueries(Queries(content, box_logits, mask), targets, num_groups=0)
