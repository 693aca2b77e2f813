"""`deform_attn`, and its compiled form: loading, registration, and the choice of a form.

`torch.ops.dino.deform_attn_forward` takes locations and weights. `torch.ops.dino.deform_attn_fused_forward` takes raw
offsets, logits and reference boxes, as `MultiScaleDeformableAttention` has them. The first use on a device loads the
shared objects. `python -m dino.layers.ops.build` builds them; `dino env` shows which form runs.
"""

import contextlib
import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import self_test
from .reference import Shapes, check_sizes, deform_attn_gather, deform_attn_reference, flat

_CHOICES = ("auto", "reference", "gather", "compiled")
PLAIN = ("reference", "gather")  # forms in plain PyTorch
VARIABLE = "DINO_DEFORM_ATTN"
FOLDER = Path(__file__).parent  # of the shared objects
FILES = {"cpu": "_deform_attn_cpu.so", "cuda": "_deform_attn_cuda.so"}
_SCHEMA = "_deform_attn_schema.so"  # the operators' names and arguments; the other files register kernels for them
HINT = "`python -m dino.layers.ops.build` builds it"

_override: ContextVar[str | None] = ContextVar(VARIABLE, default=None)
_verdicts: dict[torch.device, "_Verdict"] = {}  # those that are final
_warned: set[tuple[torch.device, bool]] = set()  # (device, whether the verdict was final)
_lock = threading.RLock()  # the same thread may take it again, for example in a finalizer


class _Verdict(NamedTuple):
    """Whether the compiled operator can be used on a device, and why."""

    usable: bool
    broken: bool  # a shared object exists, but can't be used
    reason: str
    final: bool = True  # False: the self-test could not run now; the next call tries again


def deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of a feature pyramid, by the compiled operator where it is built.

    The context manager `deform_attn_implementation` or the variable DINO_DEFORM_ATTN (auto, reference, gather or
    compiled) chooses the form. Each call outside compiled code reads the variable. Autocast casts `value` and
    `weights`, never `locations`. `torch.jit.trace` records plain PyTorch, which any process can run, and the transforms
    of `torch.func` differentiate and map plain PyTorch.

    Args:
        value: (B, S, M, D), float32, float64, float16 or bfloat16; levels concatenated, row after row inside a level.
        shapes: L pairs (H, W) with sum of H*W = S.
        locations: (B, Q, M, L, P, 2) as (x, y) fractions of the level; 0 is the left or top edge, 1 the right or bottom
            edge. Samples outside read zeros. Keep them in float32: bfloat16 can't resolve a position in a pixel.
        weights: (B, Q, M, L, P), of any of these types.

    Returns:
        (B, Q, M*D) in the dtype of `value`, or of autocast.

    Raises:
        ValueError: sizes do not fit together; DINO_DEFORM_ATTN is another word.
        RuntimeError: "compiled" was chosen, but the operator is not built, fails its self-test or can't run here.
    """
    if not torch.jit.is_tracing():  # there the sizes are tensors: a comparison would fix them, with a warning
        check_sizes(value, shapes, locations, weights)
    if use_compiled(value.device):
        return torch.ops.dino.deform_attn_forward(value, flat(shapes), locations, weights)
    dtype = autocast_dtype(value.device.type)
    value, weights = _cast_for_autocast(value, dtype), _cast_for_autocast(weights, dtype)
    form = deform_attn_gather if _use_gather() else deform_attn_reference
    return form(value, shapes, locations, weights)


def deform_attn_fused(value: Tensor, shapes: Shapes, offsets: Tensor, logits: Tensor, reference: Tensor) -> Tensor:
    """`deform_attn` of raw offsets, logits and reference points or boxes, by the compiled operator.

    Args:
        value, shapes: as of `deform_attn`.
        offsets: (B, Q, M, L, P, 2), in cells around a point, or P-ths of half a side around the centre of a box.
        logits: (B, Q, M, L*P), before the softmax.
        reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes (cx, cy, w, h), as fractions of each level.

    Returns:
        (B, Q, M*D).
    """
    return torch.ops.dino.deform_attn_fused_forward(value, flat(shapes), offsets, logits, reference)


@contextlib.contextmanager
def deform_attn_implementation(choice: str) -> Iterator[None]:
    """Choose the form of `deform_attn` for a block of code; overrides the variable DINO_DEFORM_ATTN.

    Args:
        choice: "reference": plain PyTorch. "gather": plain PyTorch without `grid_sample`. "compiled": the compiled
            operator, or an error. "auto": the compiled operator where it is built and passes its self-test.

    Raises:
        ValueError: another word.
    """
    token = _override.set(_checked(choice, "deform_attn_implementation"))
    try:
        yield
    finally:
        _override.reset(token)


def requested() -> str:
    """The current choice: of the innermost `deform_attn_implementation`, else of DINO_DEFORM_ATTN, else auto."""
    return _override.get() or _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def _checked(choice: str, where: str) -> str:
    if choice not in _CHOICES:
        raise ValueError(f"{where} must be one of {', '.join(_CHOICES)}, but is {choice!r}")
    return choice


@torch.compiler.assume_constant_result
def use_compiled(device: torch.device) -> bool:
    """Whether the compiled operator runs on `device`. Compiled graphs keep the answer of their tracing.

    Raises:
        RuntimeError: "compiled" was chosen, but the operator is not built, fails its self-test, can't be tested now, or
            meets `torch.jit.trace` or `torch.func`, which need plain PyTorch.
        ValueError: DINO_DEFORM_ATTN is an unknown word.
    """
    choice = requested()
    if choice in PLAIN:
        return False
    found = _unfit_for_caller() or verdict(device)
    if found.usable:
        return True
    if choice == "compiled":
        error = NotImplementedError if found is _TRANSFORMED else RuntimeError
        raise error(f"the compiled deform_attn was asked for, but {found.reason}")
    if found.broken and _first_time(device, found.final):
        always = f"deform_attn runs as plain PyTorch: {found.reason}"
        now = f"deform_attn runs as plain PyTorch this time: {found.reason}"
        warnings.warn(always if found.final else now, RuntimeWarning, stacklevel=3)
    return False


def transformed() -> bool:
    """Whether a transform of `torch.func` (grad, jvp, vmap, …) runs. It has no rules for operators of torch.library."""
    return torch._C._are_functorch_transforms_active()


def _unfit_for_caller() -> _Verdict | None:
    """Why the operator, usable or not, is no choice for this call; None where it is one. Says nothing about devices.

    The sizes of levels are tensors inside `torch.jit.trace`, with which fvcore and the old ONNX exporter work as well.
    An operator takes numbers: the trace would fix them.
    """
    if torch.jit.is_tracing():
        return _TRACED
    return _TRANSFORMED if transformed() else None


_TRACED = _Verdict(False, False, "torch.jit.trace can't record it for pictures of other sizes: use auto or reference")
_TRANSFORMED = _Verdict(
    False,
    False,
    "torch.func can't transform it: use auto or gather; or, instead of vmap, fold the mapped dimension into the batch "
    "dimension",
)


def _first_time(device: torch.device, final: bool) -> bool:
    with _lock:
        before = len(_warned)
        _warned.add((device, final))
        return len(_warned) > before


@torch.compiler.assume_constant_result
def _use_gather() -> bool:
    """Whether the plain form avoids `grid_sample`, for which `torch.func.jvp` has no rule. Compiled graphs keep it."""
    return requested() == "gather" or transformed()


def verdict(device: torch.device) -> _Verdict:
    """Load the operator for `device` and test it there, once. Other threads that call meanwhile wait for the verdict.

    A failed self-test and a failed load are final. A self-test that can't run, because memory ran out or a CUDA graph
    is captured, is not: the next call tries again.
    """
    device = _with_index(device)
    found = _verdicts.get(device)
    if found is None and _is_capturing(device):
        found = _Verdict(False, True, _CAPTURING.format(device=device), final=False)
    if found is None:
        with _lock:
            found = _verdicts.get(device) or _find_out(device)
            if found.final:
                _verdicts[device] = found
    return found


_CAPTURING = (
    "its self-test on {device} has not run yet, and can't while a CUDA graph is captured: "
    "use the operator once before the capture"
)


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device(device.type, torch.cuda.current_device())
    return device


def _is_capturing(device: torch.device) -> bool:
    """Whether the current stream is captured. Does not initialize CUDA, before which nothing can be captured."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _find_out(device: torch.device) -> _Verdict:
    if device.type not in FILES:
        return _Verdict(False, False, f"there is none for devices of type {device.type}")
    file = FOLDER / FILES[device.type]
    if not file.exists():
        return _Verdict(False, False, f"it is not built for {device.type} ({HINT})")
    try:
        load(device.type)
    except (OSError, RuntimeError) as error:
        return _Verdict(False, True, f"{file.name} can't be loaded ({HINT} again): {_first_line(error)}")
    try:
        _self_test(device)
    except (AssertionError, NotImplementedError) as error:
        return _Verdict(False, True, f"its self-test on {device} failed ({HINT} again): {_first_line(error)}")
    except (RuntimeError, MemoryError) as error:
        return _could_not_run(device, error)
    return _Verdict(True, False, "it is built and agrees with the reference")


def _could_not_run(device: torch.device, error: Exception) -> _Verdict:
    """The verdict after a failed start: final if the code does not fit the device; any other error may pass."""
    reason = _first_line(error)
    if any(text in reason for text in _UNFIT):
        return _Verdict(False, True, f"it is not built for {device} ({HINT} again): {reason}")
    return _Verdict(
        False, True, f"its self-test on {device} can't run now (the next call tries again): {reason}", False
    )


# Errors of CUDA for code that was built for other architectures, or by a newer toolkit.
_UNFIT = ("no kernel image", "device kernel image is invalid", "unsupported toolchain", "invalid device function")


def _self_test(device: torch.device) -> None:
    self_test.run(torch.ops.dino, device)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def load(device_type: str) -> None:
    """Load the schema and the shared object for a type of device. Repeated calls change nothing.

    Raises:
        OSError: a shared object is missing, or does not fit this machine or this torch.
    """
    if not hasattr(torch.ops.dino, "deform_attn_fused_backward"):
        # A CPU part that was built before the schema became a file of its own includes the schema.
        torch.ops.load_library(FOLDER / (_SCHEMA if (FOLDER / _SCHEMA).exists() else FILES["cpu"]))
        if not hasattr(torch.ops.dino, "deform_attn_fused_backward"):
            raise OSError(f"{_SCHEMA} is absent")
        _register()
    torch.ops.load_library(FOLDER / FILES[device_type])


def cpu_kernels() -> str:
    """Which of the loaded CPU kernels run on this processor: avx512, avx2 or generic."""
    name = ctypes.CDLL(str(FOLDER / FILES["cpu"])).dino_deform_attn_cpu
    name.restype = ctypes.c_char_p
    return name().decode()


# ---- rules for torch.library ---------------------------------------------------------------------------------------

_VMAP_REFUSAL = "deform_attn can't be mapped by vmap: fold the mapped dimension into the batch dimension instead"


def _fake_forward(value: Tensor, shapes: list[int], locations: Tensor, *_: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))


def _fake_backward(grad: Tensor, value: Tensor, shapes: list[int], *others: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, *others))


def _fake_fused_backward(grad, value, shapes, offsets, logits, reference, by_reference=True) -> tuple[Tensor, ...]:
    results = tuple(x.new_empty(x.shape) for x in (value, offsets, logits))
    return *results, reference.new_empty(reference.shape if by_reference else (0,))


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _gradient(form: str, ctx, grad: Tensor) -> tuple:
    """Choose between two operators by torch's deterministic mode, which the stable ABI can't read."""
    suffix = "_deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    value, *others = ctx.saved_tensors
    backward = getattr(torch.ops.dino, f"{form}_backward{suffix}")
    if len(others) == 2:
        by_value, *rest = backward(grad, value, ctx.shapes, *others)
        return by_value, None, *rest
    by_reference = ctx.needs_input_grad[-1]
    by_value, by_offsets, by_logits, *rest = backward(grad, value, ctx.shapes, *others, by_reference)
    return by_value, None, by_offsets, by_logits, rest[0] if by_reference else None


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type to which autocast currently casts values and weights; None where autocast is off or unknown (meta)."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if known and torch.is_autocast_enabled(device_type) else None


def _cast_for_autocast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast a value or weights as autocast does: float64 stays."""
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _autocast_forward(
    operator, device_type: str, value: Tensor, shapes: list[int], locations: Tensor, weights, *reference
):
    """Cast value and weights (logits). Locations keep their type: bfloat16 can't resolve a position in a pixel."""
    dtype = autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        return operator(
            _cast_for_autocast(value, dtype), shapes, locations, _cast_for_autocast(weights, dtype), *reference
        )


def _refuse_vmap(info, in_dims, *args) -> None:
    raise NotImplementedError(_VMAP_REFUSAL)


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("dino", "IMPL")  # lives as long as the registrations made with it


def _register() -> None:
    for form in ("deform_attn", "deform_attn_fused"):
        forward, backward = f"dino::{form}_forward", f"dino::{form}_backward"
        torch.library.register_fake(forward, _fake_forward)
        for name in (backward, f"{backward}_deterministic"):
            torch.library.register_fake(name, _fake_fused_backward if "fused" in form else _fake_backward)
        torch.library.register_autograd(forward, functools.partial(_gradient, form), setup_context=_remember)
        for name in (forward, backward, f"{backward}_deterministic"):
            torch.library.register_vmap(name, _refuse_vmap)
        operator = getattr(torch.ops.dino, f"{form}_forward").default
        for device_type in FILES:
            rule = functools.partial(_autocast_forward, operator, device_type)
            _library().impl(f"{form}_forward", rule, f"Autocast{device_type.upper()}")
