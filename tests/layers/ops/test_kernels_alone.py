"""The CPU kernels in a program without PyTorch, on this processor and on an emulated ARM, against the reference."""

import shutil
import struct
import subprocess
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.layers import deform_attn_reference
from dino.layers.ops import build

from .compiled import BOUND, PLACE_BOUND, fused_inputs, fused_oracle, plain_inputs, random_sizes, with_gradients, worst

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
KINDS = [F32, F64, F16, BF16]  # in the order of Kind in deform_attn_cpu.h
DRIVER = Path(__file__).with_name("kernels_alone.cpp")
ARM, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SHAPES = [(9, 18), (5, 9), (3, 4), (1, 1)]

pytestmark = pytest.mark.slow


def compiled_driver(compiler, folder):
    program = folder / "kernels_alone"
    sources = [DRIVER, build._SOURCES / "deform_attn_generic.cpp"]
    build.run([*compiler, *build._FLAGS, "-static", f"-I{build._SOURCES}", *sources, "-o", program])
    return program


@pytest.fixture(scope="module", params=["native", "aarch64"])
def program(request, tmp_path_factory):
    """The command that runs the driver."""
    if request.param == "native":
        try:
            compiler = build._find_compilers()[0].command
        except build.BuildError as reason:
            pytest.skip(str(reason))
        return [compiled_driver(compiler, tmp_path_factory.mktemp("native"))]
    if absent := [name for name in (ARM, EMULATOR) if not shutil.which(name)]:
        pytest.skip(f"no {' and no '.join(absent)}: the kernels are not run as for an ARM processor")
    return [EMULATOR, compiled_driver([ARM], tmp_path_factory.mktemp("aarch64"))]


def to_bytes(x):
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def problem(shapes, inputs, grad, pack):
    """What the driver reads for one problem. `inputs`: value, places, weights and, in the fused form, reference."""
    value, places, weights, *reference = inputs
    batch, tokens, heads, dim = value.shape
    sizes = [batch, tokens, heads, dim, places.shape[1], len(shapes), places.shape[4]]
    box = reference[0].shape[-1] if reference else 0
    kinds = [KINDS.index(x.dtype) for x in (value, places, weights, *(reference or [value]))]
    flat = [size for shape in shapes for size in shape]
    header = struct.pack(f"{13 + len(flat)}q", *sizes, box, pack, *kinds, *flat)
    return header + b"".join(map(to_bytes, [*inputs, grad]))


def run(program, problems):
    """[output, gradient of each input] of every problem; `problems` are tuples of arguments for `problem`."""
    sent = b"".join(problem(*arguments) for arguments in problems)
    done = subprocess.run(program, input=sent, capture_output=True)
    assert done.returncode == 0, done.stderr
    results, position = [], 0
    for _, inputs, grad, _ in problems:
        results.append([])
        for like in [grad, *inputs]:
            size = like.numel() * like.element_size()
            data = torch.from_numpy(np.frombuffer(done.stdout, np.uint8, size, position).copy())
            results[-1].append(data.view(like.dtype).view(like.shape))
            position += size
    assert position == len(done.stdout)
    return results


def gradient_of(inputs):
    value, places = inputs[:2]
    return torch.randn(value.shape[0], places.shape[1], value.shape[2] * value.shape[3]).to(value.dtype)


def packs(inputs):
    """The ways to gather: from a copy, and from where rows lie, which takes whole vectors of 16 bytes."""
    value = inputs[0]
    return [1, 0] if value.shape[3] % (2 if value.dtype == F64 else 4) == 0 else [1]


def case(seed, form, dtype):
    """(shapes, inputs, reference in PyTorch)"""
    shapes, *sizes = random_sizes(seed)
    if form == 0:
        return shapes, plain_inputs(shapes, *sizes, dtype=dtype), lambda *x: deform_attn_reference(x[0], shapes, *x[1:])
    return shapes, fused_inputs(shapes, *sizes, form, dtype), fused_oracle(shapes)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("form", [0, 2, 4])
def test_numbers(program, form, dtype):
    """Forward and backward. `reference` is given in the working type, in which its gradient comes back."""
    problems, expected = [], []
    for seed in range(200, 206):
        shapes, inputs, function = case(seed, form, dtype)
        inputs = [*inputs[:3], *(x.to(F64 if dtype == F64 else F32) for x in inputs[3:])]
        grad = gradient_of(inputs)
        right = with_gradients(function, [x.double() for x in inputs], grad.double())
        for pack in packs(inputs):
            problems.append((shapes, inputs, grad, pack))
            expected.append(right)
    assert len({pack for *_, pack in problems}) == 2
    for actual, right in zip(run(program, problems), expected, strict=True):
        errors = [worst(x, y) for x, y in zip(actual, right, strict=True)]
        assert max(errors[:2]) <= BOUND[dtype], errors
        assert max(errors[2:]) <= PLACE_BOUND[dtype], errors


@pytest.mark.parametrize("dtype", KINDS)
def test_places_that_are_no_numbers(program, dtype):
    """They read nothing and have no gradient: all zero in the plain form, like far ones in the fused form."""
    plain = plain_inputs(SHAPES, 2, 3, 2, 32, 4, dtype=dtype)
    grad = gradient_of(plain)
    problems = [
        (SHAPES, (plain[0], torch.full_like(plain[1], place), plain[2]), grad, pack)
        for place in (nan, inf, -inf, -1e30, -2.0, 3.0, 1e9)
        for pack in (0, 1)
    ]
    for results in run(program, problems):
        assert not any(x.any() for x in results)
    value, offsets, *rest = fused_inputs(SHAPES, 2, 3, 2, 32, 4, 2, dtype)
    rest[1] = rest[1].to(F64 if dtype == F64 else F32)
    some = torch.rand(offsets.shape) < 0.2
    moved = [torch.where(some, torch.full_like(offsets, place), offsets) for place in (3e4, nan, inf, -inf)]
    far, *others = run(program, [(SHAPES, (value, x, *rest), grad, 1) for x in moved])
    for results in others:
        for x, y in zip(results, far, strict=True):
            assert torch.equal(x, y)


def test_logits_that_are_no_numbers(program):
    """They make their own slots no numbers, and nothing else."""
    value, offsets, logits, reference = fused_inputs(SHAPES, 2, 3, 2, 32, 4, 2)
    broken = [logits.clone() for _ in range(3)]
    for x, number in zip(broken, (nan, inf, 1e38), strict=True):
        x[0, 1, 1, 5] = number
    problems = [(SHAPES, (value, offsets, x, reference), torch.zeros(2, 3, 64), 1) for x in (logits, *broken)]
    right, *results = (outcome[0].view(2, 3, 2, 32) for outcome in run(program, problems))
    for output in results[:2]:
        assert output[0, 1, 1].isnan().all()
    assert results[2].isfinite().all()
    for output in results:
        output[0, 1, 1] = right[0, 1, 1]
        assert torch.equal(output, right)


def test_all_of_the_cpu_part_compiles_for_arm():
    if not shutil.which(ARM):
        pytest.skip(f"no {ARM}")
    include = ["-isystem", build._find_torch().folder / "include"]
    for path in build._SOURCES.glob("*.cpp"):
        build.run([ARM, *build._FLAGS, "-Wall", "-Werror", "-fsyntax-only", *include, path])
