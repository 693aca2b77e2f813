"""Distinct query selection."""

import pytest
import torch
from torch import nn
from torchvision.ops import nms

from dino.layers.boxes import inverse_sigmoid
from dino.modeling import QuerySelection
from dino.modeling.variants import DistinctSelection
from dino.modeling.variants.query_selection import _keep_distinct
from dino.structures import Tokens

from ...tiny import random_batch, tiny_network

SIZES = {"num_classes": 1, "embed_dim": 5}


class Column(nn.Module):
    """Columns `first` to `last` of the features, in place of a head."""

    def __init__(self, first, last):
        super().__init__()
        self.columns = slice(first, last)

    def forward(self, x):
        return x[..., self.columns]


def selection_of(boxes, scores, **options):
    """A selection among tokens of these boxes (cxcywh) and scores, and their memory: 0 is the anchor of all."""
    features = torch.cat([torch.tensor(scores)[:, None], inverse_sigmoid(torch.tensor(boxes))], 1)[None]
    selection = DistinctSelection(**SIZES, **options)
    selection.project, selection.class_head, selection.box_head = nn.Identity(), Column(0, 1), Column(1, 5)
    usable = torch.ones(1, len(scores), dtype=torch.bool)
    selection.anchors = lambda memory: (torch.zeros(1, len(scores), 4), usable)
    return selection, Tokens(features, features, None, [(1, len(scores))], torch.ones(1, 1, 2))


A, NEAR_A, B, SMALL_A = [0.3, 0.3, 0.2, 0.2], [0.31, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.3, 0.3, 0.12, 0.12]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(2, [A, B]), (3, [A, B, SMALL_A]), (4, [A, B, SMALL_A, NEAR_A]), (9, [A, B, SMALL_A, NEAR_A])],
)
def test_overlapping_boxes_come_last(count, expected):
    """By falling score: a box, its neighbour, another box, and one inside the first that overlaps it by 0.36."""
    selection, memory = selection_of([A, NEAR_A, B, SMALL_A], [4.0, 3.0, 2.0, 1.0], num_queries=count)
    queries, proposals = selection(memory)
    torch.testing.assert_close(queries.box_logits[0].sigmoid(), torch.tensor(expected))
    torch.testing.assert_close(proposals.boxes[0, 0], torch.tensor(expected))


def test_only_the_pool_is_compared():
    """With a pool of 2 boxes for 1 query, or 1 for each of 2, the best tokens are taken as they are."""
    boxes, scores = [A, NEAR_A, B], [3.0, 2.0, 1.0]
    selection, memory = selection_of(boxes, scores, num_queries=2, pool=1)
    torch.testing.assert_close(selection(memory)[0].box_logits[0].sigmoid(), torch.tensor([A, NEAR_A]))


@pytest.mark.parametrize("max_iou", [0.5, 0.7])
def test_kept_boxes_are_those_of_suppression(max_iou):
    """The difference is at most a few boxes at the end of long chains."""
    torch.manual_seed(0)
    centers = torch.rand(3, 12, 1, 2).expand(-1, -1, 10, -1).flatten(1, 2)
    low = centers + 0.05 * torch.randn(3, 120, 2)
    boxes = torch.cat([low, low + 0.2 + 0.05 * torch.rand(3, 120, 2)], -1)
    kept = _keep_distinct(boxes, max_iou)
    for image, mask in zip(boxes, kept, strict=True):
        expected = torch.zeros(120, dtype=torch.bool)
        expected[nms(image, torch.arange(120, 0, -1.0), max_iou)] = True
        assert expected.sum() < 115
        assert (mask != expected).sum() <= 2


def test_chains_within_the_rounds_are_exact():
    """Each box overlaps the next one only: the first, third and fifth stay."""
    low = torch.arange(5.0)[:, None] * 0.5
    boxes = torch.cat([low, torch.zeros(5, 1), low + 1, torch.ones(5, 1)], 1)[None]
    assert _keep_distinct(boxes, 0.3).tolist() == [[True, False, True, False, True]]


def test_without_overlap_it_is_query_selection():
    """No overlap is above 1. Padding and tokens without an anchor come last in both."""
    torch.manual_seed(0)
    network = tiny_network()
    images, padding = random_batch(2)
    memory = network.encoder(network.tokenize(network.neck(images), padding))
    sizes = {"num_queries": 12, "num_classes": 3, "embed_dim": 32}
    distinct, plain = DistinctSelection(**sizes, max_iou=1.0), QuerySelection(**sizes)
    plain.load_state_dict(distinct.state_dict())
    for one, other in zip(distinct(memory), plain(memory), strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert ours is theirs or torch.equal(ours, theirs)
    remaining = distinct.next_boxes(memory, 1000).shape[1]
    assert remaining == memory.features.shape[1] - 12
