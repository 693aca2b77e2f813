import math

import pytest
import torch

from dino.layers import MultiScaleDeformableAttention, deform_attn, deform_attn_gather, deform_attn_reference

SHAPES = [(4, 5), (3, 2), (1, 1)]
TOKENS = sum(h * w for h, w in SHAPES)
OPERATORS = [deform_attn, deform_attn_reference, deform_attn_gather]


def random_inputs(batch=2, queries=4, heads=2, dim=3, points=2, dtype=torch.float64):
    """Samples reach beyond all four borders."""
    value = torch.randn(batch, TOKENS, heads, dim, dtype=dtype)
    locations = -0.3 + 1.6 * torch.rand(batch, queries, heads, len(SHAPES), points, 2, dtype=dtype)
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, dtype=dtype)
    return value, locations, weights


def bilinear_by_hand(image, x, y):
    """`image[row][column]` holds a list of channels; x and y in [0, 1], zeros outside."""
    height, width, channels = len(image), len(image[0]), len(image[0][0])
    column, row = x * width - 0.5, y * height - 0.5
    sample = [0.0] * channels
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                share = (1 - abs(row - i)) * (1 - abs(column - j))
                sample = [s + share * pixel for s, pixel in zip(sample, image[i][j], strict=True)]
    return sample


def deform_attn_by_hand(value, shapes, locations, weights):
    batch, queries, heads, _, points, _ = locations.shape
    result = value.new_zeros(batch, queries, heads, value.shape[-1])
    for b in range(batch):
        for m in range(heads):
            start = 0
            for level, (height, width) in enumerate(shapes):
                image = value[b, start : start + height * width, m].view(height, width, -1).tolist()
                start += height * width
                for q in range(queries):
                    for p in range(points):
                        sample = bilinear_by_hand(image, *locations[b, q, m, level, p].tolist())
                        result[b, q, m] += weights[b, q, m, level, p] * value.new_tensor(sample)
    return result.flatten(2)


@pytest.mark.parametrize("operator", OPERATORS)
def test_against_loops(operator):
    value, locations, weights = random_inputs()
    expected = deform_attn_by_hand(value, SHAPES, locations, weights)
    torch.testing.assert_close(operator(value, SHAPES, locations, weights), expected)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("place", "expected"),
    [((0.5, 0.5), 2.5), ((0.0, 0.0), 0.0), ((1.0, 1.0), 1.25), ((0.1, 0.9), 1.68), ((-0.2, 0.5), 0.0)],
)
def test_published_samples(operator, place, expected):
    """A 2 x 3 grid that holds 0 … 5."""
    value = torch.arange(6.0).view(1, 6, 1, 1)
    sample = operator(value, [(2, 3)], torch.tensor(place).view(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))
    assert sample.item() == pytest.approx(expected, abs=1e-6)


def test_gradients_of_reference():
    inputs = [x.requires_grad_() for x in random_inputs(batch=1, queries=2, dim=2)]
    assert torch.autograd.gradcheck(lambda value, *rest: deform_attn_reference(value, SHAPES, *rest), inputs)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_keep_their_type(operator, dtype):
    """Locations stay in float32; only the rounding of values, weights and result remains."""
    value, locations, weights = random_inputs(dtype=torch.float32)
    output = operator(value.to(dtype), SHAPES, locations, weights.to(dtype))
    assert output.dtype == dtype
    expected = deform_attn_by_hand(value.to(dtype).double(), SHAPES, locations.double(), weights.to(dtype).double())
    torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_no_queries():
    value, locations, weights = random_inputs(queries=0)
    assert deform_attn(value, SHAPES, locations, weights).shape == (2, 0, 6)


def test_sizes_that_do_not_fit_are_named():
    value, locations, weights = random_inputs()
    with pytest.raises(ValueError, match=f"value must be .*{TOKENS}"):
        deform_attn(value[:, 1:], SHAPES, locations, weights)
    with pytest.raises(ValueError, match="locations must be"):
        deform_attn(value, SHAPES, locations[:, :, :1], weights)
    with pytest.raises(ValueError, match="locations must be"):
        deform_attn(value, SHAPES, locations[:, :, :, :2], weights)
    with pytest.raises(ValueError, match="weights must be"):
        deform_attn(value, SHAPES, locations, weights[..., :1])


def test_module_starts_by_looking_around():
    """Head m looks towards m * 45 degrees, point p at p + 1 cells, on all levels; all points weigh the same."""
    attention = MultiScaleDeformableAttention(16, num_heads=8, num_levels=2, num_points=4)
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = [[[(x * p, y * p) for p in (1, 2, 3, 4)]] * 2 for x, y in compass]
    offsets = attention.sampling_offsets.bias.view(8, 2, 4, 2)
    torch.testing.assert_close(offsets, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)
    zeros = [attention.sampling_offsets.weight, attention.attention_weights.weight, attention.attention_weights.bias]
    zeros += [attention.value_proj.bias, attention.output_proj.bias]
    assert not any(x.any() for x in zeros)


def test_module_reads_zeros_at_padding():
    attention = MultiScaleDeformableAttention(6, num_heads=2, num_levels=len(SHAPES), num_points=2)
    query, tokens = torch.randn(1, 3, 6), torch.randn(1, TOKENS, 6)
    torch.nn.init.normal_(attention.value_proj.bias)  # a bias must not fill the padding again
    torch.nn.init.zeros_(attention.output_proj.bias)
    reference = torch.rand(1, 3, len(SHAPES), 2)
    padding = torch.zeros(1, TOKENS, dtype=torch.bool)
    padding[:, ::2] = True
    changed = torch.where(padding[..., None], 100.0, tokens)
    expected = attention(query, reference, tokens, padding, SHAPES)
    torch.testing.assert_close(attention(query, reference, changed, padding, SHAPES), expected)
    everything = torch.ones_like(padding)
    assert not attention(query, reference, tokens, everything, SHAPES).any()


def test_module_scales_offsets():
    """By cells around points; by half sides of the box, divided by the number of points, around boxes."""
    attention = MultiScaleDeformableAttention(4, num_heads=1, num_levels=1, num_points=4)
    offsets = torch.tensor([3.0, -2.0])
    point = attention.sampling_locations(torch.tensor([0.5, 0.25]), offsets, [(8, 6)])
    torch.testing.assert_close(point.flatten(), torch.tensor([0.5 + 3 / 6, 0.25 - 2 / 8]))
    box = attention.sampling_locations(torch.tensor([0.5, 0.25, 0.4, 0.2]), offsets, [(8, 6)])
    torch.testing.assert_close(box.flatten(), torch.tensor([0.5 + 3 / 4 * 0.2, 0.25 - 2 / 4 * 0.1]))


def test_module_refuses_an_odd_width():
    with pytest.raises(ValueError, match="embed_dim 30 is not a multiple of num_heads 8"):
        MultiScaleDeformableAttention(30, num_heads=8, num_levels=1, num_points=4)
