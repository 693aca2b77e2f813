"""The CUDA kernels: their arithmetic on a CPU stand-in, their machine code and, where there is a GPU, all of it."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from dino.layers import deform_attn, deform_attn_reference
from dino.layers.ops import operator, self_test

from . import compiled, cuda_build, mutants

SHAPES = [(9, 18), (5, 9), (3, 4), (1, 1)]
SMALL = [(6, 7), (3, 3)]
ODD = [(2, 3), (1, 5), (4, 1), (2, 2), (1, 1), (3, 3), (2, 1)]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BOUND = {F16: 2e-3, BF16: 1e-2, F32: 1e-5, F64: 1e-12}  # of the greatest difference over the greatest magnitude
PLACE_BOUND = {**BOUND, F32: 5e-5}
PLAIN, POINTS, BOXES = 0, 2, 4

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: the kernels are not run")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """(operators, device, library)"""
    if cuda_build.toolkit_headers() is None or shutil.which("g++") is None:
        pytest.skip("no CUDA headers or no g++")
    path = os.environ.get(mutants.LIBRARY) or mutants.build(tmp_path_factory.mktemp("stand_in"))
    return torch.ops.dino_on_cpu, torch.device("cpu"), mutants.load(path)


@pytest.fixture(scope="session")
def gpu():
    operator.load("cuda")
    return torch.ops.dino, torch.device("cuda", torch.cuda.current_device()), None


@pytest.fixture(params=["stand_in", pytest.param("gpu", marks=needs_gpu)])
def backend(request):
    """(operators, device)"""
    return request.getfixturevalue(request.param)[:2]


def flat(shapes):
    return [size for shape in shapes for size in shape]


def off_the_borders(locations, shapes):
    """Moved by at most 2 % of a cell, so that no sample lies where the gradient jumps."""
    size = locations.new_tensor([(w, h) for h, w in shapes])[:, None]
    cells = locations * size - 0.5
    return (cells.floor() + (cells - cells.floor()).clamp(0.02, 0.98) + 0.5) / size


def random_case(shapes, form, *, batch=2, queries=7, heads=2, dim=32, points=4, dtype=F32, weight_dtype=None):
    """(grad, value, places, weights[, reference]); queries None: one for each cell."""
    weight_dtype, wide = weight_dtype or dtype, F64 if dtype == F64 else F32
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    queries = tokens if queries is None else queries
    grad = torch.randn(batch, queries, heads * dim).to(dtype)
    value = torch.randn(batch, tokens, heads, dim).to(dtype)
    if form == PLAIN:
        locations = -0.4 + 1.8 * torch.rand(batch, queries, heads, levels, points, 2, dtype=F64)
        weights = torch.randn(batch, queries, heads, levels, points)
        weights[torch.rand(weights.shape) < 0.1] = 0
        return grad, value, off_the_borders(locations, shapes).to(wide), weights.to(weight_dtype)
    offsets = torch.randn(batch, queries, heads, levels, points, 2) * 2
    logits = torch.randn(batch, queries, heads, levels * points)
    reference = torch.rand(batch, queries, levels, form).to(wide)
    return grad, value, offsets.to(weight_dtype), logits.to(weight_dtype), reference


def fused_reference(value, shapes, offsets, logits, reference):
    boxes = reference[:, :, None, :, None]
    if reference.shape[-1] == POINTS:
        locations = boxes + offsets / offsets.new_tensor([(w, h) for h, w in shapes])[:, None]
    else:
        locations = boxes[..., :2] + offsets / offsets.shape[-2] * boxes[..., 2:] * 0.5
    return deform_attn_reference(value, shapes, locations, logits.softmax(-1).view(offsets.shape[:-1]))


def expected_results(case, shapes):
    """Output and gradients, by the reference in float64."""
    grad, *inputs = (x.double() for x in case)
    inputs = [x.requires_grad_() for x in inputs]
    reference = deform_attn_reference if len(inputs) == 3 else fused_reference
    output = reference(inputs[0], shapes, *inputs[1:])
    return [output, *torch.autograd.grad(output, inputs, grad)]


@contextlib.contextmanager
def new_memory_holds_no_numbers():
    """In this mode, PyTorch fills memory that it hands out, so that reading it before it is written is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def results(backend, case, shapes, deterministic=False):
    operators, device = backend
    grad, value, *others = (x.to(device) for x in case)
    name = "deform_attn" if len(others) == 2 else "deform_attn_fused"
    backward = getattr(operators, f"{name}_backward" + "_deterministic" * deterministic)
    forward = getattr(operators, f"{name}_forward")
    with new_memory_holds_no_numbers():
        return [forward(value, flat(shapes), *others), *backward(grad, value, flat(shapes), *others)]


def check(actual, case, shapes):
    names = ["output", "value", "places", "weights", "reference"]
    for name, x, y, source in zip(names, actual, expected_results(case, shapes), [case[0], *case[1:]], strict=False):
        assert x.dtype == source.dtype
        assert x.shape == y.shape
        wide = F64 if case[1].dtype == F64 else F32
        kind = source.dtype if name in ("output", "value") or source.dtype in (F16, BF16) else wide
        bound = (BOUND if name in ("output", "value") else PLACE_BOUND)[kind]
        error = (x.cpu().double() - y).abs().max() / y.abs().max().clamp_min(1e-30)
        assert error < bound, f"{name}: {error:.2g}"


@pytest.mark.parametrize("form", [PLAIN, POINTS, BOXES])
@pytest.mark.parametrize(
    ("types", "dim"),
    [
        *itertools.product([(F32, F32), (BF16, BF16), (F16, F32)], [16, 32, 64, 128, 5]),
        ((F64, F64), 32),
        ((F64, F64), 5),
    ],
    ids=str,
)
def test_like_the_reference(backend, types, dim, form):
    case = random_case(SMALL, form, dim=dim, dtype=types[0], weight_dtype=types[1])
    check(results(backend, case, SMALL), case, SMALL)


def check_both_modes(backend, case, shapes):
    """Against the reference, and two deterministic runs against each other."""
    check(results(backend, case, shapes), case, shapes)
    actual = results(backend, case, shapes, deterministic=True)
    check(actual, case, shapes)
    again = results(backend, case, shapes, deterministic=True)
    assert all(torch.equal(x, y) for x, y in zip(actual, again, strict=True))


@pytest.mark.parametrize("form", [PLAIN, BOXES])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_queries_that_are_cells(backend, dtype, form):
    """Backward sorts the samples of tiles, which borders cut on both sides. Lists are made for part of the images."""
    case = random_case(SHAPES, form, batch=2, queries=None, dtype=dtype)
    check_both_modes(backend, case, SHAPES)


@pytest.mark.parametrize(("dim", "heads"), [(16, 4), (32, 3), (64, 1), (128, 2)])
@pytest.mark.parametrize(("dtype", "form"), [(F32, POINTS), (BF16, PLAIN), (F16, BOXES)], ids=str)
def test_tiles_of_every_width(backend, dtype, form, dim, heads):
    shapes = [(3, 17), (2, 2)]
    case = random_case(shapes, form, batch=1, queries=None, heads=heads, dim=dim, points=3, dtype=dtype)
    check_both_modes(backend, case, shapes)


# Several rounds of 16 lanes; then tiles of fewer rows, 8 to 1, for a tile has at most 4096 samples; then none.
@pytest.mark.parametrize("points", [17, 32, 33, 130, 256, 257])
@pytest.mark.parametrize("form", [PLAIN, POINTS])
def test_tiles_of_many_samples(backend, form, points):
    shapes = [(9, 2)] if points < 100 else [(2, 3)]
    case = random_case(shapes, form, batch=1, queries=None, heads=1, points=points)
    check_both_modes(backend, case, shapes)


@pytest.mark.parametrize("kilobytes", [64, 36, 24, 16])
def test_tiles_on_devices_of_less_memory(stand_in, kilobytes):
    """16 x 8, 16 x 2 and 16 x 1 queries; no tile."""
    operators, device, library = stand_in
    library.limit_shared(kilobytes << 10)
    try:
        case = random_case([(9, 5)], PLAIN, batch=1, queries=None, points=15)
        check_both_modes((operators, device), case, [(9, 5)])
    finally:
        library.limit_shared(227 << 10)


@pytest.mark.parametrize("cell", [(0.3, 0.4), (2.2, 3.3), (1.4, 5.6), (15.7, 7.8)])
def test_all_samples_in_one_cell(backend, cell):
    """4096 samples of one key, the most that 12 bits can number, in corners and inside."""
    shapes = [(8, 16)]
    case = random_case(shapes, PLAIN, batch=1, queries=None, heads=1, dim=16, points=32)
    case[2][:] = torch.tensor(cell) / torch.tensor([16, 8])
    check(results(backend, case, shapes), case, shapes)
    check(results(backend, case, shapes, deterministic=True), case, shapes)


@pytest.mark.parametrize("shapes", [[(3, 4)] * 6, [(2, 70)], [(40, 1), (1, 40)], ODD], ids=str)
def test_keys_that_cells_share(backend, shapes):
    """Levels four apart, and cells 32 apart, have the same keys."""
    case = random_case(shapes, BOXES, batch=1, queries=None, heads=1, dim=16, points=3)
    check_both_modes(backend, case, shapes)


def test_as_many_levels_as_there_can_be(backend):
    shapes = [(1, 1)] * 160
    case = random_case(shapes, BOXES, batch=1, queries=None, heads=1, dim=16, points=1)
    check(results(backend, case, shapes), case, shapes)
    few = random_case(shapes, PLAIN, batch=1, queries=3, heads=1, dim=16, points=1)
    check(results(backend, few, shapes, deterministic=True), few, shapes)


@pytest.mark.parametrize("queries", [None, 20])
@pytest.mark.parametrize(
    ("dtype", "places", "weights"), [(BF16, F32, F32), (F32, F64, F32), (F16, F16, BF16), (F32, BF16, F32)], ids=str
)
def test_mixed_types(backend, dtype, places, weights, queries):
    # Places of 16 bits are offsets: rounded locations may lie on lines where the gradient jumps.
    for form in (BOXES,) if places in (F16, BF16) else (PLAIN, POINTS):
        grad, value, place, weight, *reference = random_case(SMALL, form, queries=queries, dtype=dtype)
        reference = [x.double() if places == F64 else x for x in reference]
        case = [grad, value, place.to(places), weight.to(weights), *reference]
        check(results(backend, case, SMALL), case, SMALL)
        check(results(backend, case, SMALL, deterministic=True), case, SMALL)


@pytest.mark.parametrize(("dim", "queries"), [(32, None), (32, 20), (5, 20)])
@pytest.mark.parametrize("form", [POINTS, BOXES])
def test_reference_without_gradient(backend, form, queries, dim):
    """The last result is empty, the others are the same to the last bit."""
    operators, device = backend
    grad, value, *others = case = [x.to(device) for x in random_case(SMALL, form, queries=queries, dim=dim)]
    expected = results(backend, case, SMALL, deterministic=True)[1:]
    backward = operators.deform_attn_fused_backward_deterministic
    with new_memory_holds_no_numbers():
        actual = backward(grad, value, flat(SMALL), *others, False)
        *added, nothing = operators.deform_attn_fused_backward(grad, value, flat(SMALL), *others, False)
    assert actual[-1].numel() == nothing.numel() == 0
    assert all(torch.equal(x, y) for x, y in zip(actual[:-1], expected[:-1], strict=True))
    for x, y in zip(added, expected[:-1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [POINTS, BOXES])
def test_samples_far_outside(backend, form):
    """One image reads nothing, as where it is padding; queries of the next read far away now and then."""
    case = random_case(SMALL, form, batch=3, queries=None)
    case[2][1] = 1e6
    case[2][2, ::3, :, :, 1] = -1e30
    actual = results(backend, case, SMALL)
    assert not any(x[1].any() for x in (actual[0], *actual[1:4]))
    check_both_modes(backend, case, SMALL)


@pytest.mark.parametrize(("dim", "dtype"), [(1, F32), (40, F32), (64, F32), (64, BF16)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_odd_sizes(backend, deterministic, dim, dtype):
    for form, points, heads in [(PLAIN, 3, 1), (POINTS, 1, 3), (BOXES, 5, 2)]:
        case = random_case(ODD, form, batch=3, queries=11, heads=heads, dim=dim, points=points, dtype=dtype)
        check(results(backend, case, ODD, deterministic), case, ODD)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_more_samples_than_fit_in_shared_memory(backend, dtype):
    for deterministic in (False, True):
        case = random_case(SMALL, POINTS, queries=5, points=70, dtype=dtype)
        check(results(backend, case, SMALL, deterministic), case, SMALL)


def test_long_lists_in_one_order(backend):
    """600 samples in one cell, which has eight lists: 75 in each. Some samples are equal."""
    case = random_case([(2, 3)], PLAIN, batch=1, queries=300, heads=1, points=2)
    case[2][:] = 0.52 + 0.1 * torch.rand(case[2].shape)
    case[2][0, 100:200] = case[2][0, :100]
    actual = results(backend, case, [(2, 3)], deterministic=True)
    check(actual, case, [(2, 3)])
    again = results(backend, case, [(2, 3)], deterministic=True)
    assert all(torch.equal(x, y) for x, y in zip(actual, again, strict=True))


def test_several_lists_of_a_cell(backend):
    """Level 1 has eight for each cell, and would begin at no multiple of eight, were level 0 not rounded up."""
    shapes = [(9, 18), (2, 4)]
    case = random_case(shapes, PLAIN, batch=1, queries=300, heads=2, dim=16, points=2)
    check(results(backend, case, shapes, deterministic=True), case, shapes)


def test_strided_and_unaligned_inputs(backend):
    case = random_case(SMALL, PLAIN)
    strided = [torch.stack([x, x], -1)[..., 0] for x in case]
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in case]
    expected = results(backend, case, SMALL, deterministic=True)
    for other in (strided, shifted):
        actual = results(backend, other, SMALL, deterministic=True)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dim", [32, 5])
@pytest.mark.parametrize("deterministic", [False, True])
def test_samples_outside_read_nothing(backend, deterministic, dim):
    """Not even what isn't a number; locations that are none read nothing either."""
    grad, value, locations, weights = random_case(SMALL, PLAIN, dim=dim)
    locations[:] = 0.5
    locations[:, ::2] = torch.tensor([-3.0, 1e30])
    locations[:, 1] = torch.nan
    value[:, 0] = value[:, 41] = torch.nan  # corners of level 0; the centre is elsewhere
    output, by_value, *others = results(backend, (grad, value, locations, weights), SMALL, deterministic)
    assert not output[:, ::2].any()
    assert not output[:, 1].any()
    assert all(x.isfinite().all() for x in (output, by_value, *others))
    assert not any(x[:, ::2].any() or x[:, 1].any() for x in others)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"heads": 0}, {"dim": 0}], ids=str)
def test_nothing(backend, sizes):
    case = random_case(SMALL, PLAIN, **sizes)
    for deterministic in (False, True):
        actual = results(backend, case, SMALL, deterministic)
        assert [x.shape for x in actual] == [x.shape for x in case]
        assert not any(x.any() for x in actual)


def test_what_is_refused(backend):
    grad, value, locations, weights = random_case(SMALL, PLAIN)
    with pytest.raises(RuntimeError, match="weights must be"):
        results(backend, (grad, value, locations, weights[:, :3]), SMALL)
    many = random_case([(1, 1)] * 200, PLAIN)
    with pytest.raises(RuntimeError, match="200 levels"):
        results(backend, many, [(1, 1)] * 200)


# ---- faults that are planted


def test_every_planted_fault_has_its_place():
    """Where a source has changed, tests/layers/ops/mutants.py must follow."""
    assert not cuda_build.lost(mutants.MUTANTS.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bfloat16: halves of a word swapped", r"head width 32, bfloat16, queries are cells"),
        ("lists: the last entry left out", r"backward\w*: value differs .*float32, queries are cells"),
    ],
)
def test_self_test_refuses(stand_in, name, message):
    operators, device, library = stand_in
    library.plant(list(mutants.MUTANTS).index(name) + 1)
    try:
        with pytest.raises(AssertionError, match=message):
            self_test.run(operators, device)
    finally:
        library.plant(0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_self_test_accepts(stand_in):
    self_test.run(*stand_in[:2])


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_planted_fault_is_noticed(stand_in):
    """By the tests above and by the self-test; or it is known why not."""
    del stand_in  # skips where it can't be built
    done = subprocess.run(
        [sys.executable, "-m", "tests.layers.ops.mutants"], cwd=compiled.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# ---- on a GPU only


@needs_gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_encoder_size(gpu, dtype):
    """The size of an image of 800 x 1333 pixels, against the reference in float64."""
    shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]
    case = random_case(shapes, BOXES, batch=1, queries=None, heads=2, dtype=dtype)
    check(results(gpu[:2], case, shapes), case, shapes)


@needs_gpu
def test_other_streams(gpu):
    case = random_case(SMALL, PLAIN)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # the inputs come late; a kernel on another stream would read something else
        actual = results(gpu[:2], case, SMALL)
    stream.synchronize()
    check(actual, case, SMALL)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_other_devices(gpu):
    case = random_case(SMALL, PLAIN)
    check(results((gpu[0], torch.device("cuda", 1)), case, SMALL), case, SMALL)


@needs_gpu
def test_deterministic_mode_is_followed(gpu):
    case = [x.to(gpu[1]) for x in random_case(SHAPES, PLAIN, queries=None)]

    def gradients():
        grad, *inputs = (x.detach().clone().requires_grad_() for x in case)
        output = deform_attn(inputs[0], SHAPES, *inputs[1:])
        return torch.autograd.grad(output, inputs, grad)

    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients() for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@needs_gpu
def test_gradients_by_differences(gpu):
    case = random_case(SMALL, PLAIN, batch=1, dim=3, dtype=F64)[1:]
    inputs = [x.to(gpu[1]).requires_grad_() for x in case]

    def function(value, locations, weights):
        return torch.ops.dino.deform_attn_forward(value, flat(SMALL), locations, weights)

    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-10)


# ---- machine code


@pytest.fixture(scope="session")
def machine_code(tmp_path_factory):
    """Fast kernels for compute capability 9.0 and head width 32, DINO's. All widths take minutes to compile."""
    file = cuda_build.compile_cuda("90", tmp_path_factory.mktemp("sm_90"), widths=[32])
    if cuda_build.tool("cuobjdump") is None or cuda_build.tool("nvdisasm") is None:
        pytest.skip("compiled, but no cuobjdump to look inside")
    return {name: kernel for name, kernel in cuda_build.kernels(file).items() if cuda_build.FAST.search(name)}


SPILL = r"\b(LDL|STL)"


def check_stack(kernel, most=8):
    """Nothing is spilled but, in forward, a number or two for each query and head, outside of the loop over samples.

    More registers than 64 would leave room for three blocks instead of four, which costs more than it saves.
    """
    if not kernel.name.startswith("forward"):
        assert kernel.stack == 0, kernel.name
        assert not kernel.count(SPILL), kernel.name
    assert kernel.stack <= most, kernel.name
    assert kernel.count(SPILL) <= 8, kernel.name
    assert not [line for loop in kernel.inner_loops() for line in loop if re.search(SPILL, line)], kernel.name


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_spilled_in_loops(machine_code):
    assert len(machine_code) == 3 * (2 + 2 + 4 + 1)  # types; forward, backward by queries, by tiles, lists
    for kernel in machine_code.values():
        check_stack(kernel)


@needs_nvcc
@pytest.mark.timeout(900)
def test_tiles_have_no_memory_that_is_not_counted(machine_code):
    """A tile may fill the memory of a device to the last byte. The system takes 1 KiB besides."""
    assert {kernel.shared for name, kernel in machine_code.items() if "tiles" in name} <= {0, 1024}


@needs_nvcc
@pytest.mark.timeout(900)
def test_loads_are_wide(machine_code):
    """Packets of 16 bytes: values, samples in shared memory, and sums of the gradient of the values.

    Where a lane of backward_tiles has eight channels of a half type, it loads two times 8 bytes.
    """
    for name, kernel in machine_code.items():
        tiles, floats = name.startswith("backward_tiles"), "<float" in name
        width = r"LDG\.E\.128" if floats or not tiles else r"LDG\.E\.64"
        values = [loop for loop in kernel.inner_loops() if sum(bool(re.search(width, line)) for line in loop) >= 4]
        assert values, name
        if "sum_lists" not in name:
            assert any(re.search(r"LDS\.128", line) for loop in values for line in loop), name
        adds = name.startswith("backward_packets") or (tiles and name.endswith("true>"))  # the last: ADD
        assert bool(kernel.count(r"RED.*F32x4")) == adds, name
        assert not kernel.count(r"RED\S*\.F32\."), name


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", cuda_build.ARCHITECTURES)
def test_compiles_for(architecture, tmp_path):
    file = cuda_build.compile_cuda(architecture, tmp_path)
    if cuda_build.tool("cuobjdump") and cuda_build.tool("nvdisasm"):
        fast = [kernel for name, kernel in cuda_build.kernels(file).items() if cuda_build.FAST.search(name)]
        assert len(fast) == 3 * (4 * (2 + 2 + 4) + 3)  # as above for four head widths, lists for three
        for kernel in fast:
            check_stack(kernel, most=16)
