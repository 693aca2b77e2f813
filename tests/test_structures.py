import torch

from dino.layers import Queries, Tokens
from dino.structures import LayerOutputs, concatenate


def test_valid_ratios():
    tokens = Tokens(
        features=torch.zeros(1, 30, 1),
        position=torch.zeros(1, 30, 1),
        padding_mask=torch.zeros(1, 30, dtype=torch.bool),
        shapes=[(4, 6), (2, 3)],
        valid_sizes=torch.tensor([[[5.0, 4.0], [3.0, 1.0]]]),
    )
    torch.testing.assert_close(tokens.valid_ratios, torch.tensor([[[5 / 6, 1.0], [1.0, 0.5]]]))


def test_split():
    predictions = LayerOutputs(torch.randn(2, 1, 5, 3), torch.randn(2, 1, 5, 4))
    head, tail = predictions.split(2)
    assert torch.equal(head.logits, predictions.logits[:, :, :2])
    assert torch.equal(tail.boxes, predictions.boxes[:, :, 2:])


def test_concatenate_puts_the_first_in_front():
    first = Queries(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(5, 5, dtype=torch.bool))
    second = Queries(torch.ones(1, 3, 3), torch.ones(1, 3, 4))
    both = concatenate(first, second)
    assert both.content[0, :, 0].tolist() == [0, 0, 1, 1, 1]
    assert both.box_logits[0, :, 0].tolist() == [0, 0, 1, 1, 1]
    assert both.attn_mask is first.attn_mask
