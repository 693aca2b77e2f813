"""8-bit integers for ONNX files, by ONNX Runtime's static quantisation."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dino.utils.files import UserError

from .export_wrapper import Fixed, Prepared

_CONVOLUTION, _PRODUCT = "Conv", ("MatMul", "Gemm")
_EARLY = 8  # first convolutions, which depthwise networks need in float32


def quantised(content: bytes, pictures: Iterable[Prepared], fixed: Fixed | None) -> Iterator[tuple[str, bytes]]:
    """Quantise convolutions and matrix products with weights, from most to fewest of them.

    Weights get 8 bits per output channel, activations the range that they take on `pictures`. Sampling, normalisation,
    softmax and products of activations stay float32.

    Args:
        content: an ONNX file in float32.
        pictures: to measure ranges on.
        fixed: the only size of the file.

    Yields:
        What is in 8 bits, in words; the file.

    Raises:
        UserError: ONNX Runtime can't quantise this file.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = [_feed(picture, fixed) for picture in pictures]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, ready = Path(folder) / "source.onnx", Path(folder) / "ready.onnx"
        source.write_bytes(content)
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        graph = onnx.load(ready).graph
        convolutions = [node.name for node in graph.node if node.op_type == _CONVOLUTION]
        others = _products_of_activations(graph)
        for words, kept in (
            ("all convolutions and matrix products", []),
            (f"all but the first {_EARLY} convolutions", convolutions[:_EARLY]),
            ("matrix products", convolutions),
        ):
            yield words, _quantise(ready, feeds, [*others, *kept], onnx.load_from_string(content).metadata_props)


def _quantise(ready: Path, feeds: list[dict], excluded: list[str], about: Any) -> bytes:
    """One file, with the description of the first one."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    target = ready.with_name("target.onnx")
    try:
        quantize_static(
            ready,
            target,
            _reader(feeds),
            op_types_to_quantize=[_CONVOLUTION, *_PRODUCT],
            nodes_to_exclude=excluded,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
    except Exception as error:  # its exceptions have no common class
        first = str(error).strip().splitlines()[0][:300]
        raise UserError(f"ONNX Runtime can't quantise this network: {first}; --size HEIGHT WIDTH may help") from error
    model = onnx.load(target)
    del model.metadata_props[:]
    model.metadata_props.extend(about)
    return model.SerializeToString()


def _reader(feeds: list[dict]) -> Any:
    """What ONNX Runtime reads calibration pictures from."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(feeds)

        def get_next(self):
            return next(self.rest, None)

    return Reader()


def _feed(picture: Prepared, fixed: Fixed | None) -> dict:
    """Inputs of the graph: the picture, as often as its batch wants."""
    batch = fixed.batch if fixed else 1
    return {"images": picture.images.repeat(batch, 0), "sizes": picture.sizes.repeat(batch, 0)}


def _products_of_activations(graph: Any) -> list[str]:
    """Names of the matrix products without a weight matrix: those of the attention among queries."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node.name for node in graph.node if node.op_type in _PRODUCT and node.input[1] not in matrices]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that ONNX Runtime's quantisation logs on Python's root logger."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)
