"""Where tests find the compiled operator, and builds of it for other vector units or with sanitizers."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino.layers import MultiScaleDeformableAttention, deform_attn_reference
from dino.layers.ops import build, operator

ROOT = Path(__file__).parents[3]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BOUND = {F16: 1e-3, BF16: 8e-3, F32: 1e-5, F64: 1e-13}  # of output and value gradient
PLACE_BOUND = {F16: 2e-3, BF16: 1.6e-2, F32: 5e-5, F64: 1e-12}  # of the other gradients
VARIABLE = "DINO_TEST_OPERATOR"  # a folder with the build that a test run is to use, set by the tests that start one


def folder_of_operator(temporary):
    """Of the build in the package; else of a new one. Skips where there is none and no compiler."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    if (operator.FOLDER / operator.FILES["cpu"]).exists():
        return operator.FOLDER
    try:
        build._find_compilers()
    except build.BuildError as reason:
        pytest.skip(f"the compiled operator is not built, and can't be: {reason}")
    build_for_cpu(temporary)
    return temporary


def build_for_cpu(folder):
    (result,) = build.build(folder, ["cpu"])
    assert result.state == "built", result


def build_variant(folder, monkeypatch, vectors, flags=()):
    """Build kernels for one vector unit only, with additional flags."""
    chosen = {name: flags_ if name == vectors else [] for name, flags_ in build._VECTORS.items()}
    monkeypatch.setattr(build, "_VECTORS", chosen)
    monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, *flags])
    build_for_cpu(folder)


def run_tests(folder, *arguments, **environment):
    """Run this folder's tests of the compiled operator against the build in `folder`."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/layers/ops/test_deform_attn_compiled.py", *arguments]
    environment = {**os.environ, VARIABLE: str(folder), **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def off_the_borders(locations, shapes):
    """Moved by at most 2 % of a cell, so that no sample lies where the gradient jumps."""
    size = locations.new_tensor([(w, h) for h, w in shapes])[:, None]
    cells = locations * size - 0.5
    return (cells.floor() + (cells - cells.floor()).clamp(0.02, 0.98) + 0.5) / size


def random_shapes(chance):
    """One to five levels, of odd sizes, down to 1 x 1."""
    return [(chance.choice([1, 2, 3, 5, 8, 13]), chance.choice([1, 2, 4, 7, 11])) for _ in range(chance.randint(1, 5))]


def random_sizes(seed):
    """(shapes, B, Q, M, D, P): many queries and few, dimensions that fill no vector."""
    chance = random.Random(seed)
    sizes = (chance.randint(1, 3), chance.choice([1, 2, 9, 40, 200]), chance.randint(1, 4))
    return random_shapes(chance), *sizes, chance.choice([1, 3, 4, 8, 12, 16, 20, 32, 33, 64, 80]), chance.randint(1, 6)


def tokens_of(shapes):
    return sum(h * w for h, w in shapes)


def plain_inputs(shapes, batch, queries, heads, dim, points, dtype=torch.float32, weight_dtype=None):
    """(value, locations, weights), float32 or float64 locations reaching far outside, some weights zero."""
    wide = torch.promote_types(dtype, torch.float32)
    value = torch.randn(batch, tokens_of(shapes), heads, dim).to(dtype)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2).to(wide) * 1.6 - 0.3
    locations = torch.where(torch.rand_like(locations) < 0.05, locations * 50, locations)
    weights = torch.rand(locations.shape[:-1])
    weights = torch.where(torch.rand_like(weights) < 0.1, 0.0, weights).to(weight_dtype or dtype)
    return value, off_the_borders(locations, shapes), weights


def fused_inputs(shapes, batch, queries, heads, dim, points, coordinates, dtype=torch.float32):
    """(value, offsets, logits, reference), every sample a quarter or three quarters of a cell from the borders."""
    wide = torch.promote_types(dtype, torch.float32)
    value = torch.randn(batch, tokens_of(shapes), heads, dim).to(dtype)
    offsets = torch.randn(batch, queries, heads, len(shapes), points, 2).mul(4).round().div(2) + 0.25
    logits = (torch.randn(batch, queries, heads, len(shapes) * points) * 3).to(dtype)
    size = torch.tensor([(w, h) for h, w in shapes], dtype=wide)
    centres = ((torch.rand(batch, queries, len(shapes), 2) * size).round() + 0.5) / size
    sides = torch.randint(0, 2, centres.shape) * 2 + 1  # in units of 2 * points cells: an offset counts 1 or 3
    reference = torch.cat([centres, sides * 2 * points / size], -1)[..., :coordinates]
    return value, offsets.to(dtype), logits, reference


def fused_oracle(shapes):
    """The module's arithmetic around the plain reference."""

    def function(value, offsets, logits, reference):
        module = MultiScaleDeformableAttention(4, 1, len(shapes), offsets.shape[-2])
        locations = module.sampling_locations(reference[:, :, None, :, None], offsets, shapes)
        return deform_attn_reference(value, shapes, locations, logits.softmax(-1).view(offsets.shape[:-1]))

    return function


def with_gradients(function, inputs, grad):
    """[output, gradient of each input]"""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def worst(actual, expected):
    """Largest difference over largest magnitude."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return ((actual.double() - expected).abs().max() / scale).item() if scale else actual.abs().sum().item()
