"""The compiled operator on the CPU, against the reference in float64 and against the official program's numbers."""

import copy
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dino.layers import MultiScaleDeformableAttention, deform_attn, deform_attn_implementation, deform_attn_reference
from dino.layers.ops import build, operator
from tests.golden.golden import GoldenFile

from . import compiled
from .compiled import BOUND, PLACE_BOUND, fused_inputs, fused_oracle, plain_inputs, random_sizes, with_gradients, worst

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPES = [(9, 18), (5, 9), (3, 4), (1, 1)]
SIZES = [(SHAPES, 2, 3, 2, 32, 4), (SHAPES, 2, 207, 2, 32, 4)]  # rows are read where they are; from a copy


@pytest.fixture(scope="module", autouse=True)
def compiled_operator(tmp_path_factory):
    """All tests of this file run the compiled operator."""
    patch = pytest.MonkeyPatch()
    patch.setattr(operator, "FOLDER", compiled.folder_of_operator(tmp_path_factory.mktemp("operator")))
    patch.setattr(operator, "_verdicts", {})
    operator.load("cpu")
    with deform_attn_implementation("compiled"):
        yield
    patch.undo()


def plain(shapes):
    return lambda value, locations, weights: deform_attn(value, shapes, locations, weights)


def fused(shapes):
    sizes = [size for shape in shapes for size in shape]
    return lambda value, *rest: torch.ops.dino.deform_attn_fused_forward(value, sizes, *rest)


def compare(actual_function, expected_function, inputs):
    """Largest errors, [output, gradients], against float64."""
    value = inputs[0]
    queries = inputs[1].shape[1]
    grad = torch.randn(value.shape[0], queries, value.shape[2] * value.shape[3]).to(value.dtype)
    actual = with_gradients(actual_function, inputs, grad)
    expected = with_gradients(expected_function, [x.double() for x in inputs], grad.double())
    assert [x.dtype for x in actual] == [value.dtype, *(x.dtype for x in inputs)]
    return [worst(x, y) for x, y in zip(actual, expected, strict=True)]


def check(errors, dtype):
    assert max(errors[:2]) <= BOUND[dtype], errors
    assert max(errors[2:]) <= PLACE_BOUND[dtype], errors


# ---- numbers


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
@pytest.mark.parametrize("seed", range(12))
def test_accuracy(seed, dtype):
    shapes, *sizes = random_sizes(seed)
    inputs = plain_inputs(shapes, *sizes, dtype=dtype)
    check(compare(plain(shapes), lambda v, p, w: deform_attn_reference(v, shapes, p, w), inputs), dtype)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
@pytest.mark.parametrize("seed", range(6))
def test_accuracy_of_fused_form(seed, dtype, coordinates):
    shapes, batch, queries, heads, dim, points = random_sizes(100 + seed)
    inputs = fused_inputs(shapes, batch, queries, heads, dim, points, coordinates, dtype)
    check(compare(fused(shapes), fused_oracle(shapes), inputs), dtype)


@pytest.mark.parametrize("sizes", SIZES)
def test_mixed_types(sizes):
    """Autocast leaves locations in float32, and may leave value and weights in different types."""
    value, locations, weights = plain_inputs(*sizes, dtype=BF16, weight_dtype=F32)
    check(
        compare(plain(SHAPES), lambda v, p, w: deform_attn_reference(v, SHAPES, p, w), (value, locations, weights)),
        BF16,
    )
    output = deform_attn(value.float(), SHAPES, locations.double(), weights.half())
    expected = deform_attn_reference(value.double(), SHAPES, locations.double(), weights.half().double())
    assert worst(output, expected) < 1e-5


def test_golden_arrays():
    golden = GoldenFile("01")
    for case in [f"op/{name}" for name in golden.config["cases"]]:
        shapes = [tuple(row) for row in golden[f"{case}/spatial_shapes"].tolist()]
        names = ["value", "sampling_locations", "attention_weights"]
        results = with_gradients(plain(shapes), [golden[f"{case}/{n}"] for n in names], golden[f"{case}/grad_output"])
        for name, result in zip(["output", *(f"grad_{n}" for n in names)], results, strict=True):
            golden.check(f"{case}/{name}", result)


@pytest.mark.parametrize("sizes", SIZES)
def test_far_places(sizes):
    """Beyond all borders, and beyond all numbers, a sample reads nothing and has no gradient."""
    value, locations, weights = plain_inputs(*sizes)
    for far in (-1e30, -2.0, 3.0, 1e9, float("inf"), float("-inf"), float("nan")):
        inputs = (value, torch.full_like(locations, far), weights)
        results = with_gradients(plain(SHAPES), inputs, torch.ones(2, sizes[2], 64))
        assert not any(x.any() for x in results), far


@pytest.mark.parametrize("sizes", SIZES)
def test_offsets_that_are_no_numbers(sizes):
    """They do what far ones do."""
    value, offsets, logits, reference = fused_inputs(*sizes, 2)
    some = torch.rand(offsets.shape) < 0.2
    far, *others = (
        with_gradients(
            fused(SHAPES),
            (value, torch.where(some, torch.full_like(offsets, place), offsets), logits, reference),
            torch.ones(2, sizes[2], 64),
        )
        for place in (3e4, float("nan"), float("inf"), float("-inf"))
    )
    for results in others:
        assert all(map(torch.equal, results, far))


def test_softmax_of_extreme_logits():
    value, offsets, logits, reference = fused_inputs(*SIZES[0], 2)
    logits[..., 0] = 1e4
    logits[..., 1] = -1e4
    expected = fused_oracle(SHAPES)(*(x.double() for x in (value, offsets, logits, reference)))
    assert worst(fused(SHAPES)(value, offsets, logits, reference), expected) < 1e-5
    logits[0, 0, 0, 3] = float("nan")
    assert fused(SHAPES)(value, offsets, logits, reference)[0, 0, :32].isnan().all()


# ---- determinism


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sizes", SIZES)
def test_threads_change_no_bit(sizes, dtype):
    grad = torch.randn(2, sizes[2], 64).to(dtype)
    cases = [(plain(SHAPES), plain_inputs(*sizes, dtype=dtype)), (fused(SHAPES), fused_inputs(*sizes, 4, dtype))]
    for function, inputs in cases:
        results = []
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            results.append(with_gradients(function, inputs, grad))
        torch.set_num_threads(1)
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ---- shapes and memory


@pytest.mark.parametrize(("batch", "queries", "points"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_empty(batch, queries, points):
    value, locations, weights = plain_inputs(SHAPES, batch, queries, 2, 8, points)
    results = with_gradients(plain(SHAPES), (value, locations, weights), torch.ones(batch, queries, 16))
    assert results[0].shape == (batch, queries, 16)
    assert not any(x.any() for x in results)
    inputs = fused_inputs(SHAPES, batch, queries, 2, 8, points, 4)
    results = with_gradients(fused(SHAPES), inputs, torch.ones(batch, queries, 16))
    assert [x.shape for x in results[1:]] == [x.shape for x in inputs]


def scattered(x):
    """The same numbers with other strides."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("sizes", SIZES)
def test_strides_change_nothing(sizes):
    grad = torch.randn(2, sizes[2], 64)
    for function, inputs in ((plain(SHAPES), plain_inputs(*sizes)), (fused(SHAPES), fused_inputs(*sizes, 2))):
        expected = with_gradients(function, inputs, grad)
        leaves = [scattered(x).requires_grad_() for x in inputs]
        assert not any(x.is_contiguous() for x in leaves[:2])
        output = function(*leaves)
        actual = [output, *torch.autograd.grad(output, leaves, scattered(grad))]
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    leaves = [x.requires_grad_() for x in plain_inputs(*sizes)]
    plain(SHAPES)(*leaves).sum().backward()  # the gradient of a sum has strides of zero
    assert leaves[0].grad.isfinite().all()


def test_more_than_2_31_elements_are_refused():
    value, locations, weights = (torch.zeros(1).expand(2**20, *x.shape[1:]) for x in plain_inputs(*SIZES[1]))
    with pytest.raises(RuntimeError, match=r"value has .* elements; fewer than 2\^31 are supported: split the batch"):
        deform_attn(value, SHAPES, locations, weights)


def test_the_operator_checks_what_it_gets():
    forward = torch.ops.dino.deform_attn_forward
    value, locations, weights = plain_inputs([(4, 5)], 1, 2, 2, 8, 3)
    for arguments, message in (
        ((value, [4, 6], locations, weights), "value must be of sizes"),
        ((value, [4, 5, 1], locations, weights), "shapes must hold"),
        ((value, [-4, -5], locations, weights), "at least 1 x 1"),
        ((value, [4, 5], locations[..., :1], weights), "locations must be of sizes"),
        ((value, [4, 5], locations, weights[:, :1]), "weights must be of sizes"),
        ((value.int(), [4, 5], locations, weights), "value must be of type"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)
    inputs = fused_inputs([(4, 5)], 1, 2, 2, 8, 3, 2)
    with pytest.raises(RuntimeError, match="2 \\(point\\) or 4 \\(box\\)"):
        torch.ops.dino.deform_attn_fused_forward(inputs[0], [4, 5], *inputs[1:3], inputs[3][..., :1])
    with pytest.raises(RuntimeError, match="grad must be of sizes"):
        torch.ops.dino.deform_attn_backward(torch.ones(1, 2, 8), value, [4, 5], locations, weights)


# ---- registration


def operator_calls():
    shapes = [3, 4, 2, 1]
    pairs = [(3, 4), (2, 1)]
    inputs = plain_inputs(pairs, 1, 2, 2, 4, 2, dtype=F64)
    grad = torch.randn(1, 2, 8, dtype=F64)
    yield "deform_attn_forward", (inputs[0], shapes, *inputs[1:])
    for name in ("deform_attn_backward", "deform_attn_backward_deterministic"):
        yield name, (grad, inputs[0], shapes, *inputs[1:])
    inputs = fused_inputs(pairs, 1, 2, 2, 4, 2, 4, dtype=F64)
    yield "deform_attn_fused_forward", (inputs[0], shapes, *inputs[1:])
    for name in ("deform_attn_fused_backward", "deform_attn_fused_backward_deterministic"):
        yield name, (grad, inputs[0], shapes, *inputs[1:])


@pytest.mark.parametrize("index", range(6))
def test_opcheck(index):
    name, arguments = list(operator_calls())[index]
    if "forward" in name:
        arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(getattr(torch.ops.dino, name).default, arguments)


class Names(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("form", ["deform_attn", "deform_attn_fused"])
def test_deterministic_mode_chooses_the_backward(form, deterministic):
    shapes = [(3, 4), (2, 1)]
    if form == "deform_attn":
        run, inputs = plain(shapes), plain_inputs(shapes, 2, 3, 2, 3, 2, dtype=F64)
    else:
        run, inputs = fused(shapes), fused_inputs(shapes, 2, 3, 2, 3, 2, 4, dtype=F64)
    inputs = [x.requires_grad_() for x in inputs]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Names() as names:
            gradients = torch.autograd.grad(run(*inputs).sum(), inputs)
    finally:
        torch.use_deterministic_algorithms(before)
    assert (f"{form}_backward_deterministic" in names.seen) == deterministic
    assert (f"{form}_backward" in names.seen) != deterministic
    expected = torch.autograd.grad(run(*inputs).sum(), inputs)
    for x, y in zip(gradients, expected, strict=True):
        assert torch.equal(x, y)


def test_gradcheck():
    shapes = [(3, 4), (2, 1)]
    inputs = [x.requires_grad_() for x in plain_inputs(shapes, 2, 3, 2, 3, 2, dtype=F64)]
    assert torch.autograd.gradcheck(plain(shapes), inputs)
    for coordinates in (2, 4):
        inputs = [x.requires_grad_() for x in fused_inputs(shapes, 2, 3, 2, 3, 2, coordinates, dtype=F64)]
        assert torch.autograd.gradcheck(fused(shapes), inputs)


def attention_inputs(shapes, queries=5, width=16):
    tokens = compiled.tokens_of(shapes)
    reference = torch.rand(2, queries, len(shapes), 4)
    return torch.randn(2, queries, width), reference, torch.randn(2, tokens, width), torch.rand(2, tokens) < 0.2, shapes


def test_compiles_without_breaks():
    attention = MultiScaleDeformableAttention(16, num_heads=2, num_levels=2, num_points=3)
    torch.nn.init.normal_(attention.sampling_offsets.weight)

    def both(query, reference, value, padding, shapes, locations, weights):
        plain_result = deform_attn(value.unflatten(-1, (2, 8)), shapes, locations, weights)
        return attention(query, reference, value, padding, shapes) + plain_result

    fast = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for shapes, queries in (([(4, 5), (2, 3)], 5), ([(6, 3), (3, 2)], 7)):
        inputs = attention_inputs(shapes, queries)
        rest = plain_inputs(shapes, 2, queries, 2, 8, 3)[1:]
        expected, actual = both(*inputs, *rest), fast(*inputs, *rest)
        torch.testing.assert_close(actual, expected)
        expected_gradient = torch.autograd.grad(expected.sum(), attention.sampling_offsets.weight)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), attention.sampling_offsets.weight), expected_gradient
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict, monkeypatch):
    """Also where exporting is the first use: the self-test must run on real tensors."""
    monkeypatch.setattr(operator, "_verdicts", {})
    shapes = [(4, 5), (2, 3)]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MultiScaleDeformableAttention(16, num_heads=2, num_levels=2, num_points=3)

        def forward(self, query, reference, value, padding):
            return self.attention(query, reference, value, padding, shapes)

    network, inputs = Network(), attention_inputs(shapes)[:-1]
    queries = torch.export.Dim("queries", min=2)
    dynamic = ({1: queries}, {1: queries}, None, None)
    program = torch.export.export(network, inputs, dynamic_shapes=dynamic, strict=strict)
    assert "deform_attn_fused_forward" in str(program.graph)
    other = (torch.randn(2, 9, 16), torch.rand(2, 9, 2, 4), *inputs[2:])
    torch.testing.assert_close(program.module()(*other), network(*other))


def test_vmap_is_refused():
    inputs = [torch.stack([x, x]) for x in plain_inputs([(4, 5)], 1, 2, 2, 8, 3)]
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(plain([(4, 5)]))(*inputs)


def test_autocast_casts_value_and_weights_only():
    value, locations, weights = (x.requires_grad_() for x in plain_inputs(*SIZES[0]))
    expected = deform_attn(value.bfloat16(), SHAPES, locations, weights.bfloat16())
    for choice in ("compiled", "reference"):
        with torch.autocast("cpu", dtype=BF16), deform_attn_implementation(choice):
            output = deform_attn(value, SHAPES, locations, weights)
            assert output.dtype == BF16
            assert deform_attn(value.double(), SHAPES, locations.double(), weights.double()).dtype == F64
        torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
    by_value, by_locations, by_weights = torch.autograd.grad(expected.float().sum(), (value, locations, weights))
    assert by_value.dtype == by_locations.dtype == by_weights.dtype == F32
    shifted = deform_attn(value.bfloat16(), SHAPES, locations.bfloat16(), weights.bfloat16())
    assert not torch.equal(shifted, expected)  # what rounding locations would have done


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("autocast", [False, True])
def test_module(coordinates, autocast):
    """The module gives the same with the fused operator as with the reference."""
    attention = MultiScaleDeformableAttention(16, num_heads=2, num_levels=len(SHAPES), num_points=3)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.3)
    torch.nn.init.normal_(attention.attention_weights.weight)
    query, reference, tokens, padding, _ = attention_inputs(SHAPES)
    results = []
    for choice in ("compiled", "reference"):
        module = copy.deepcopy(attention)
        leaves = [x.clone().requires_grad_() for x in (query, reference[..., :coordinates], tokens)]
        with deform_attn_implementation(choice), torch.autocast("cpu", dtype=BF16, enabled=autocast):
            output = module(*leaves, padding, SHAPES)
        output.float().square().sum().backward()
        results.append([output, *(x.grad for x in [*leaves, *module.parameters()])])
    for x, y in zip(*results, strict=True):
        assert worst(x, y.double()) < (0.05 if autocast else 2e-5)


# ---- choice


@pytest.fixture
def free_choice(monkeypatch):
    """Nothing is chosen, and nothing is known about any device."""
    monkeypatch.setattr(operator, "_verdicts", {})
    monkeypatch.setattr(operator, "_warned", set())
    monkeypatch.delenv(operator.VARIABLE, raising=False)
    token = operator._override.set(None)
    yield monkeypatch
    operator._override.reset(token)


def called(monkeypatch):
    """Names of what deform_attn calls from now on."""
    names, real = [], deform_attn_reference

    def reference(*arguments):
        names.append("reference")
        return real(*arguments)

    monkeypatch.setattr(sys.modules[deform_attn.__module__], "deform_attn_reference", reference)
    return names


def test_choice_is_read_at_each_call(free_choice):
    assert operator.verdict(torch.device("cpu")).usable
    names, inputs = called(free_choice), plain_inputs(*SIZES[0])
    plain(SHAPES)(*inputs)
    assert names == []
    free_choice.setenv(operator.VARIABLE, "reference")
    plain(SHAPES)(*inputs)
    assert names == ["reference"]
    with deform_attn_implementation("compiled"):
        plain(SHAPES)(*inputs)
        with deform_attn_implementation("reference"):
            plain(SHAPES)(*inputs)
    assert names == ["reference"] * 2
    free_choice.setenv(operator.VARIABLE, "fast")
    with pytest.raises(ValueError, match="must be one of auto, reference, gather, compiled, but is 'fast'"):
        plain(SHAPES)(*inputs)
    with pytest.raises(ValueError, match="one of auto"), deform_attn_implementation("fast"):
        pass


def test_where_nothing_is_built(free_choice, tmp_path):
    free_choice.setattr(operator, "FOLDER", tmp_path)
    names, inputs = called(free_choice), plain_inputs(*SIZES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(SHAPES)(*inputs)
    assert names == ["reference"]
    with (
        deform_attn_implementation("compiled"),
        pytest.raises(RuntimeError, match=r"not built .*python -m dino\.layers\.ops\.build"),
    ):
        plain(SHAPES)(*inputs)


def test_other_devices_use_the_reference(free_choice):
    assert not operator.use_compiled(torch.device("meta"))
    with deform_attn_implementation("compiled"), pytest.raises(RuntimeError, match="none for devices of type meta"):
        operator.use_compiled(torch.device("meta"))


def test_a_failing_self_test_is_named_once(free_choice):
    def fail(device):
        raise AssertionError("plain form: output differs from the reference by 7")

    free_choice.setattr(operator, "_self_test", fail)
    names, inputs = called(free_choice), plain_inputs(*SIZES[0])
    with pytest.warns(RuntimeWarning, match="runs as plain PyTorch: its self-test on cpu failed .* by 7"):
        plain(SHAPES)(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(SHAPES)(*inputs)
    assert names == ["reference"] * 2
    with deform_attn_implementation("compiled"), pytest.raises(RuntimeError, match="asked for, but its self-test"):
        plain(SHAPES)(*inputs)


PROGRAM = """
import sys, warnings
from pathlib import Path
import torch
from dino.layers import deform_attn, operator
operator.FOLDER = Path(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        places, ones = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        result = deform_attn(ones[0], [(1, 1)], places, ones)
print(result.item(), [str(w.message) for w in caught if w.category is RuntimeWarning])
"""


def run_with_binary(folder, program=PROGRAM):
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=compiled.ROOT,
        env={**os.environ, operator.VARIABLE: "auto"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_binary_that_cannot_be_loaded(tmp_path):
    (tmp_path / operator.FILES["cpu"]).write_bytes(b"not a shared object")
    output = run_with_binary(tmp_path)
    assert output.startswith("1.0 [\"deform_attn runs as plain PyTorch: _deform_attn_cpu.so can't be loaded")
    assert "file too short" in output or "invalid ELF header" in output
    assert output.count("plain PyTorch") == 1


def test_a_binary_without_the_schema(tmp_path):
    shutil.copy(operator.FOLDER / operator.FILES["cpu"], tmp_path)
    output = run_with_binary(tmp_path)
    assert "_deform_attn_cpu.so can't be loaded (`python -m dino.layers.ops.build` builds it again): " in output
    assert f"{operator._SCHEMA} is absent" in output


CUDA_ALONE = """
import sys
from pathlib import Path
import torch
from dino.layers import operator
operator.FOLDER = Path(sys.argv[1])
operator.load("cuda")
places, ones = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
print(torch.ops.dino.deform_attn_forward(ones[0], [1, 1], places, ones[0, None]).item())
"""


def test_a_part_needs_the_schema_but_no_other_part(tmp_path):
    """The part for the CPU stands in for that for CUDA, under its name."""
    shutil.copy(operator.FOLDER / operator._SCHEMA, tmp_path)
    shutil.copy(operator.FOLDER / operator.FILES["cpu"], tmp_path / operator.FILES["cuda"])
    assert run_with_binary(tmp_path, CUDA_ALONE).strip() == "1.0"


def test_a_binary_of_before_the_schema_was_apart(tmp_path):
    """It holds a schema of its own, and serves until it is built again."""
    try:
        compiler = build._find_compilers()[0]
    except build.BuildError as reason:
        pytest.skip(str(reason))
    target = tmp_path / operator.FILES["cpu"]
    compile_, link = build._cpu_commands(compiler, build._find_torch(), target)
    (schema,), _ = build._schema_commands(compiler, build._find_torch(), tmp_path / "schema.so")
    for command in [*compile_, schema]:
        build.run([*command, "-O0"], build._SOURCES)
    build.run([*link, tmp_path / "schema.o"])
    assert run_with_binary(tmp_path) == "1.0 []\n"


def test_a_binary_that_computes_something_else(tmp_path, monkeypatch):
    """Samples half a cell beside where they should be."""
    try:
        build._find_compilers()
    except build.BuildError as reason:
        pytest.skip(str(reason))
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in build._SOURCES.glob("deform_attn*"):
        (sources / path.name).write_text(path.read_text().replace("A(-0.5)", "A(0.0)"))
    monkeypatch.setattr(build, "_SOURCES", sources)
    compiled.build_variant(tmp_path, monkeypatch, "generic", ["-O1"])
    output = run_with_binary(tmp_path)
    assert "1.0 ['deform_attn runs as plain PyTorch: its self-test on cpu failed" in output
    assert "plain form: output differs from the reference" in output
    assert output.count("plain PyTorch") == 1


# ---- other builds


def vectors_of_this_machine():
    flags = set(torch.backends.cpu.get_cpu_capability().lower().split())
    return ["generic", *(["avx2"] if flags & {"avx2", "avx512"} else []), *(["avx512"] if "avx512" in flags else [])]


@pytest.mark.slow
@pytest.mark.parametrize("vectors", build._VECTORS)
def test_every_vector_unit(vectors, tmp_path, monkeypatch):
    if vectors not in vectors_of_this_machine():
        pytest.skip(f"this processor has no {vectors}")
    compiled.build_variant(tmp_path, monkeypatch, vectors)
    done = compiled.run_tests(tmp_path, "-m", "not slow", "-k", "not binary")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("compiler", ["g++-10", "g++-11", "g++-12", "clang++-14", "g++ -march=native"])
def test_every_compiler(compiler, tmp_path, monkeypatch):
    if not shutil.which(compiler.split()[0]):
        pytest.skip(f"no {compiler}")
    monkeypatch.setenv("CXX", compiler)
    compiled.build_for_cpu(tmp_path)
    assert build.read_record("cpu", tmp_path)["compiler"].startswith(f"{compiler} ")
    done = compiled.run_tests(tmp_path, "-m", "not slow", "-k", "not binary and not compiles and not exports")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("vectors", build._VECTORS)
def test_sanitizers_find_nothing(vectors, tmp_path, monkeypatch):
    """AddressSanitizer and UndefinedBehaviorSanitizer over the tests above."""
    if vectors not in vectors_of_this_machine():
        pytest.skip(f"this processor has no {vectors}")
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g", "-fno-omit-frame-pointer"]
    compiled.build_variant(tmp_path, monkeypatch, vectors, flags)
    command = build._find_compilers()[0].command
    libraries = [build.run([*command, f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libubsan.so")]
    done = compiled.run_tests(
        tmp_path,
        *("-m", "not slow", "-k", "not binary and not compiles and not exports", "-p", "no:faulthandler"),
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
