"""The compiled form of the deformable attention operator: loading, registration, self-test, and the choice to use it.

`torch.ops.dino.deform_attn_forward` takes locations and weights; `torch.ops.dino.deform_attn_fused_forward` takes raw
offsets, logits and reference boxes, as `MultiScaleDeformableAttention` has them. Nothing here is loaded before the
first use on a device. `python -m dino.build` makes the shared objects, `python -m dino.env` says what was found.
"""

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

CHOICES = ("auto", "reference", "gather", "compiled")
PLAIN = ("reference", "gather")  # forms in plain PyTorch
VARIABLE = "DINO_DEFORM_ATTN"
FOLDER = Path(__file__).parent  # of the shared objects
FILES = {"cpu": "_deform_attn_cpu.so", "cuda": "_deform_attn_cuda.so"}
SCHEMA = "_deform_attn_schema.so"  # the operators' names and arguments; the other files register kernels for them
HINT = "`python -m dino.build` builds it"

_override: ContextVar[str | None] = ContextVar(VARIABLE, default=None)
_verdicts: dict[torch.device, "Verdict"] = {}
_warned: set[torch.device] = set()


class Verdict(NamedTuple):
    """What was found out about the compiled operator on a device."""

    usable: bool
    broken: bool  # a shared object is there, but can't be used
    reason: str


@contextlib.contextmanager
def deform_attn_implementation(choice: str) -> Iterator[None]:
    """Choose the implementation of `deform_attn` for a block of code; wins over the variable DINO_DEFORM_ATTN.

    Args:
        choice: "reference" is plain PyTorch; "gather" too, without `grid_sample`. "compiled" insists on the compiled
            operator. "auto" takes it where it is built and passes its self-test.

    Raises:
        ValueError: another word.
    """
    token = _override.set(_checked(choice, "deform_attn_implementation"))
    try:
        yield
    finally:
        _override.reset(token)


def requested() -> str:
    """The choice that holds now: of the innermost `deform_attn_implementation`, else of DINO_DEFORM_ATTN, else auto."""
    return _override.get() or _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{where} must be one of {', '.join(CHOICES)}, but is {choice!r}")
    return choice


@torch.compiler.assume_constant_result
def use_compiled(device: torch.device) -> bool:
    """Whether the compiled operator is to run on `device`. Compiled graphs keep the answer they were traced with.

    Raises:
        RuntimeError: it was asked for, and is not built or fails its self-test.
        ValueError: DINO_DEFORM_ATTN holds an unknown word.
    """
    choice = requested()
    if choice in PLAIN:
        return False
    found = verdict(device)
    if found.usable:
        return True
    if choice == "compiled":
        raise RuntimeError(f"the compiled deform_attn was asked for, but {found.reason}")
    if found.broken and device not in _warned:
        _warned.add(device)
        warnings.warn(f"deform_attn runs as plain PyTorch: {found.reason}", RuntimeWarning, stacklevel=3)
    return False


@torch.compiler.assume_constant_result
def use_gather() -> bool:
    """Whether the plain form is to do without `grid_sample`. Compiled graphs keep the answer."""
    return requested() == "gather"


def verdict(device: torch.device) -> Verdict:
    """Load the operator for `device` and try it there, once."""
    if device not in _verdicts:
        _verdicts[device] = _find_out(device)
    return _verdicts[device]


def _find_out(device: torch.device) -> Verdict:
    if device.type not in FILES:
        return Verdict(False, False, f"there is none for devices of type {device.type}")
    file = FOLDER / FILES[device.type]
    if not file.exists():
        return Verdict(False, False, f"it is not built for {device.type} ({HINT})")
    try:
        load(device.type)
    except (OSError, RuntimeError) as error:
        return Verdict(False, True, f"{file.name} can't be loaded ({HINT} again): {_first_line(error)}")
    try:
        with _plain_mode(device):
            _self_test(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return Verdict(False, True, f"its self-test on {device} failed ({HINT} again): {_first_line(error)}")
    return Verdict(True, False, "it is built and agrees with the reference")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def load(device_type: str) -> None:
    """Load the shared object for a type of device, after that with the schema; repeating is harmless.

    Raises:
        OSError: a shared object is absent or does not fit this machine or this torch.
    """
    if not hasattr(torch.ops.dino, "deform_attn_fused_backward"):
        # A part for the CPU that was built before there was a schema of its own brings it along.
        torch.ops.load_library(FOLDER / (SCHEMA if (FOLDER / SCHEMA).exists() else FILES["cpu"]))
        if not hasattr(torch.ops.dino, "deform_attn_fused_backward"):
            raise OSError(f"{SCHEMA} is absent")
        _register()
    torch.ops.load_library(FOLDER / FILES[device_type])


def cpu_kernels() -> str:
    """Which of the loaded CPU kernels run on this processor: avx512, avx2 or generic."""
    name = ctypes.CDLL(str(FOLDER / FILES["cpu"])).dino_deform_attn_cpu
    name.restype = ctypes.c_char_p
    return name().decode()


# ---- rules for torch.library ---------------------------------------------------------------------------------------

VMAP_REFUSAL = "deform_attn can't be mapped by vmap: fold the mapped dimension into the batch dimension instead"


def _fake_forward(value: Tensor, shapes: list[int], locations: Tensor, *_: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))


def _fake_backward(grad: Tensor, value: Tensor, shapes: list[int], *others: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, *others))


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _gradient(form: str, ctx, grad: Tensor) -> tuple:
    """The stable ABI can't read torch's deterministic mode, so it is read here and chooses between two operators."""
    suffix = "_deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    value, *others = ctx.saved_tensors
    by_value, *rest = getattr(torch.ops.dino, f"{form}_backward{suffix}")(grad, value, ctx.shapes, *others)
    return by_value, None, *rest


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type to which autocast casts values and weights now; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def cast_for_autocast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What autocast does to a value or to weights: float64 stays."""
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _autocast_forward(
    operator, device_type: str, value: Tensor, shapes: list[int], places: Tensor, weights, *reference
):
    """Value and weights (logits) are cast. Places keep their type: bfloat16 can't place a sample within a pixel."""
    dtype = autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        return operator(cast_for_autocast(value, dtype), shapes, places, cast_for_autocast(weights, dtype), *reference)


def _refuse_vmap(info, in_dims, *args) -> None:
    raise NotImplementedError(VMAP_REFUSAL)


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("dino", "IMPL")  # lives as long as the registrations made with it


def _register() -> None:
    for form in ("deform_attn", "deform_attn_fused"):
        forward, backward = f"dino::{form}_forward", f"dino::{form}_backward"
        torch.library.register_fake(forward, _fake_forward)
        for name in (backward, f"{backward}_deterministic"):
            torch.library.register_fake(name, _fake_backward)
        torch.library.register_autograd(forward, functools.partial(_gradient, form), setup_context=_remember)
        for name in (forward, backward, f"{backward}_deterministic"):
            torch.library.register_vmap(name, _refuse_vmap)
        operator = getattr(torch.ops.dino, f"{form}_forward").default
        for device_type in FILES:
            rule = functools.partial(_autocast_forward, operator, device_type)
            _library().impl(f"{form}_forward", rule, f"Autocast{device_type.upper()}")


# ---- self-test -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plain_mode(device: torch.device) -> Iterator[None]:
    """Real tensors, in float32, with gradients, whatever surrounds the first use: tracing, autocast, inference mode."""
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        deform_attn_implementation("reference"),
    ):
        yield


def _self_test(device: torch.device) -> None:
    """Both forms, forward and backward, against the reference on a case of a few samples. Raises AssertionError."""
    from .deform_attn import deform_attn_reference

    shapes, heads, points, queries, dim = [(3, 4), (2, 1)], 2, 2, 3, 8
    flat = [size for shape in shapes for size in shape]

    def wave(*sizes: int, step: float) -> Tensor:
        """Numbers in [-1, 1] that don't touch the state of the random generator."""
        count = torch.Size(sizes).numel()
        return torch.arange(count, dtype=torch.float32, device=device).mul(step).sin().view(sizes).requires_grad_()

    value = wave(2, 14, heads, dim, step=1.1)
    offsets = wave(2, queries, heads, len(shapes), points, 2, step=1.7)
    logits = wave(2, queries, heads, len(shapes) * points, step=2.3)
    reference = wave(2, queries, len(shapes), 4, step=0.7)
    grad = wave(2, queries, heads * dim, step=1.3).detach()
    boxes = reference[:, :, None, :, None]
    locations = boxes[..., :2] + offsets / points * boxes[..., 2:] * 0.5
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    expected_output = deform_attn_reference(value, shapes, locations, weights)
    plain = torch.ops.dino.deform_attn_forward(value, flat, locations, weights)
    fused = torch.ops.dino.deform_attn_fused_forward(value, flat, offsets, logits, reference)
    inputs = [value, offsets, logits, reference]
    expected = [expected_output, *torch.autograd.grad(expected_output, inputs, grad, retain_graph=True)]
    for form, output in (("plain", plain), ("fused", fused)):
        actual = [output, *torch.autograd.grad(output, inputs, grad, retain_graph=True)]
        for name, x, y in zip(("output", "value", "offsets", "logits", "reference"), actual, expected, strict=True):
            difference = (x - y).abs().max().item()
            if not difference <= 1e-4 * max(1.0, y.abs().max().item()):
                raise AssertionError(f"{form} form: {name} differs from the reference by {difference:.3g}")
