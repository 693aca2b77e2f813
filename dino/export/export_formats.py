"""Formats of exported programs: each is written to bytes and run from bytes."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from dino.layers import deform_attn_implementation
from dino.utils.files import DataError

from .export_wrapper import ExportWrapper, Fixed
from .onnx_types import pin_locations, remove_traces

_KEY = "dino"  # of the description inside a file
_OPSET = 18  # of ONNX; GridSample needs 16
_OUTPUTS = ("boxes", "scores", "labels")

Run = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]  # images, sizes -> boxes, scores, labels


class _Format(NamedTuple):
    """A format's writer, and the function that runs its files."""

    write: Callable[[ExportWrapper, Fixed | None, dict[str, Any]], bytes]
    run: Callable[[bytes], Run]


def _trace(wrapper: ExportWrapper, fixed: Fixed | None) -> ExportedProgram:
    """Trace the graph of `wrapper`, for one size or for any.

    Raises:
        DataError: the network can't be exported like this.
    """
    network = wrapper.detector.network
    open_sizes = {}
    if fixed is None:
        lowest = _coarsest_stride(network) + 1
        batch, height, width = Dim("batch"), Dim("height", min=lowest), Dim("width", min=lowest)
        open_sizes = {"images": {0: batch, 2: height, 3: width}, "sizes": {0: batch}}
    size = fixed or Fixed(2, 256, 320)
    try:
        return torch.export.export(wrapper, _example(size), dynamic_shapes=open_sizes or None, strict=False)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        hint = "" if fixed else "; a fixed size may be possible: --size HEIGHT WIDTH"
        first = str(error).strip().splitlines()[0][:300]
        raise DataError(
            f"this network can't be exported for {'this' if fixed else 'any'} size{hint}. {first}"
        ) from error


def _coarsest_stride(network: torch.nn.Module) -> int:
    """Width of a cell of the last level in pixels."""
    neck = network.neck
    return neck.backbone.output_shape()[neck.in_features[-1]].stride * 2 ** len(neck.extra_levels)


def _example(size: Fixed) -> tuple[Tensor, Tensor]:
    """Images of noise; where there are several, all but the first are padded."""
    images = torch.randint(256, (size.batch, 3, size.height, size.width), dtype=torch.uint8)
    sizes = torch.tensor([[size.height, size.width]]).repeat(size.batch, 1)
    sizes[1:] = sizes[1:] * 3 // 4
    return images, sizes


def _to_torch_export(wrapper: ExportWrapper, fixed: Fixed | None, about: dict[str, Any]) -> bytes:
    """A program that `torch.export.load` reads; the description is the extra file `dino.json`."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "No complete tensor found in the group": views of one weight
        torch.export.save(_trace(wrapper, fixed), file, extra_files={f"{_KEY}.json": json.dumps(about)})
    return file.getvalue()


def _to_torchscript(wrapper: ExportWrapper, fixed: Fixed | None, about: dict[str, Any]) -> bytes:
    """A traced module that `torch.jit.load` reads; the description is the extra file `dino.json`.

    Raises:
        DataError: no size is given.
    """
    if fixed is None:
        raise DataError("TorchScript is for one size: give --size HEIGHT WIDTH")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Python numbers, which are meant to be constants here
        traced = torch.jit.trace(wrapper, _example(fixed), check_trace=False)
        return bytes(torch.jit.freeze(traced).save_to_buffer(_extra_files={f"{_KEY}.json": json.dumps(about)}))


def _to_onnx(wrapper: ExportWrapper, fixed: Fixed | None, about: dict[str, Any]) -> bytes:
    """ONNX in standard operators; the description is in the metadata under `dino`.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    _need("onnx", "onnxscript")
    for library in ("torch.onnx", "onnxscript"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        names = {"input_names": ["images", "sizes"], "output_names": list(_OUTPUTS)}
        if fixed is None:
            names["dynamic_shapes"] = ({0: "batch", 2: "height", 3: "width"}, {0: "batch"})  # what the axes are called
        graph = _trace(wrapper, fixed)
        program = torch.onnx.export(graph, opset_version=_OPSET, dynamo=True, verbose=False, optimize=False, **names)
    _tidy(program.model)
    program.model.metadata_props[_KEY] = json.dumps(about)
    model = program.model_proto
    remove_traces(model)
    pin_locations(model)
    return model.SerializeToString()


def _tidy(model) -> None:
    """Simplify an ONNX model (of `onnx_ir`) in place.

    Uses some rules of onnxscript's `optimize` only: 0.7.2 merges two clamps of one value into bounds of the same name
    and loses one of them. Programs that run the model fuse operators anyway.
    """
    from onnxscript import optimizer

    for step in (optimizer.inline, optimizer.fold_constants, optimizer.remove_unused_nodes):
        step(model)
    optimizer.remove_unused_functions(model)


def _need(*packages: str) -> None:
    """Raise an ImportError with the install command if one of `packages` is missing."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(f"ONNX needs {package}: pip install 'dino-detectron2[onnx]' ({error})") from error


def run_onnx(content: bytes) -> Run:
    """Run in ONNX Runtime on the CPU."""
    _need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images, sizes: session.run(list(_OUTPUTS), {"images": images, "sizes": sizes})


def _run_torch_export(content: bytes) -> Run:
    """Run in torch, operator by operator."""
    return _from_torch(torch.export.load(io.BytesIO(content)).module())


def _run_torchscript(content: bytes) -> Run:
    """Run in torch's interpreter."""
    return _from_torch(torch.jit.load(io.BytesIO(content)))


def _from_torch(module: Callable) -> Run:
    """Turn a function of tensors into one of arrays."""

    @torch.no_grad()
    def run(images: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
        return [x.numpy() for x in module(torch.from_numpy(images), torch.from_numpy(sizes))]

    return run


FORMATS = {
    "onnx": _Format(_to_onnx, run_onnx),
    "torch-export": _Format(_to_torch_export, _run_torch_export),
    "torchscript": _Format(_to_torchscript, _run_torchscript),
}
_SAMPLING = {"grid": "reference", "gather": "gather"}  # command line's word -> implementation of deform_attn


@torch.no_grad()
def write(
    form: str, wrapper: ExportWrapper, fixed: Fixed | None, about: dict[str, Any], *, sampling: str = "grid"
) -> bytes:
    """Export in standard operators.

    Args:
        form: a key of `FORMATS`.
        wrapper: in evaluation mode, on the CPU.
        fixed: the only size, or None for any batch and size.
        about: from `describe`.
        sampling: "grid" samples by GridSample, "gather" by look-ups.

    Raises:
        DataError: the network can't be exported like this.
        ImportError: a library of this form is not installed.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that no other program knows
    try:
        with deform_attn_implementation(_SAMPLING[sampling]):
            return FORMATS[form].write(wrapper, fixed, about)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
