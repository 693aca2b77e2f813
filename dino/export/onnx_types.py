"""Types inside an ONNX graph: which parts compute in half precision, and which must not."""

from __future__ import annotations

from typing import Any

import numpy as np

_WITH_WEIGHTS = ("Conv", "MatMul", "Gemm")  # run in float16
_LIGHT = ("Relu", "Clip", "MaxPool", "Add", "Mul")  # do so between them
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node's metadata: the modules that made it
_HEADS = ("class_head", "box_head", "sampling_offsets", "decoder.position")  # of scores, boxes and sampling locations


def pin_locations(model: Any) -> None:
    """Make OpenVINO compute sampling locations in float32, in place.

    By default, OpenVINO runs a graph in bfloat16 where the processor has it: its 8 bits misplace samples by half a
    cell. It leaves in float32 what reaches an output without passing a convolution or a matrix product. So the boxes
    depend on one number of each sampling grid, in a branch for negative image sizes, which never runs.

    Args:
        model: an `onnx.ModelProto` with the input "sizes" and the output "boxes".
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    grids = list(dict.fromkeys(node.input[1] for node in graph.node if node.op_type == "GridSample"))
    if not grids:
        return
    arrays = {"zero": np.int64(0), "start": np.zeros(4, np.int64), "end": np.ones(4, np.int64)}
    arrays["one"] = np.array([1], np.int64)
    graph.initializer.extend(numpy_helper.from_array(np.asarray(x), f"pin_{name}") for name, x in arrays.items())
    _rename_output(graph, "boxes", "pin_boxes")
    corners = [f"pin_{i}" for i in range(len(grids))]
    nodes = [
        helper.make_node("Slice", [grid, "pin_start", "pin_end"], [corner], f"{corner}_slice")
        for grid, corner in zip(grids, corners, strict=True)
    ]
    steps = [
        ("Max", corners, "pin_all"),
        ("Reshape", ["pin_all", "pin_one"], "pin_number"),
        ("Less", ["sizes", "pin_zero"], "pin_negative"),
        ("Slice", ["pin_negative", "pin_first", "pin_last"], "pin_first_size"),
        ("Reshape", ["pin_first_size", "pin_one"], "pin_never"),
        ("Where", ["pin_never", "pin_number", "pin_boxes"], "boxes"),
    ]
    for name, side in (("pin_first", 0), ("pin_last", 1)):
        graph.initializer.append(numpy_helper.from_array(np.full(2, side, np.int64), name))
    nodes += [helper.make_node(kind, inputs, [output], f"pin_{output}_node") for kind, inputs, output in steps]
    graph.node.extend(nodes)


def to_float16(content: bytes) -> bytes:
    """Compute convolutions and matrix products in float16, and store their weights so.

    Everything else stays float32: normalisation, softmax, sampling, boxes, scores and the selection of tokens; so do
    the last layers of boxes, scores and sampling offsets.

    Args:
        content: an ONNX file in float32.
    """
    import onnx

    model = onnx.load_from_string(content)
    _Halving(model.graph).run()
    return model.SerializeToString()


class _Halving:
    """Gives nodes of a graph float16, with one cast where a value crosses to other nodes."""

    def __init__(self, graph: Any):
        from onnx import TensorProto

        self.graph = graph
        self.weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.half = self._choose()  # names of nodes
        self.made = {name: node.name in self.half for node in graph.node for name in node.output}  # value -> is half
        self.casts: dict[tuple[str, bool], Any] = {}  # (value, to half) -> its cast
        self.half_weights: dict[str, Any] = {}

    def run(self) -> None:
        """Change the graph."""
        nodes = []
        for node in self.graph.node:
            half = node.name in self.half
            for i, name in enumerate(node.input):
                node.input[i] = self._as(name, half, nodes)
            nodes.append(node)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        kept = [*(t for t in self.graph.initializer if t.name in used), *self.half_weights.values()]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _choose(self) -> set[str]:
        """Names of the nodes that run in float16."""
        chosen: set[str] = set()
        values: set[str] = set()  # that these nodes make
        for node in self.graph.node:
            if self._is_heavy(node) or self._is_light(node, values):
                chosen.add(node.name)
                values.update(node.output)
        return chosen

    def _is_heavy(self, node: Any) -> bool:
        """Whether it is a convolution or product with weights, and none of those that need float32."""
        return node.op_type in _WITH_WEIGHTS and node.input[1] in self.weights and not _in_heads(node)

    def _is_light(self, node: Any, values: set[str]) -> bool:
        """Whether it is an operator for float16 that reads nothing but `values` and constants."""
        read = {name for name in node.input if name and name not in self.weights}
        return node.op_type in _LIGHT and bool(read) and read <= values

    def _as(self, name: str, half: bool, nodes: list[Any]) -> str:
        """The name under which a node of this kind reads a value; adds its cast to `nodes` where it has none."""
        from onnx import TensorProto, helper, numpy_helper

        if name in self.weights:
            if half and name not in self.half_weights:
                array = numpy_helper.to_array(self.weights[name]).astype(np.float16)
                self.half_weights[name] = numpy_helper.from_array(array, f"{name}_half")
            return f"{name}_half" if half else name
        if not name or self.made.get(name, False) == half:
            return name
        if (name, half) not in self.casts:
            target = f"{name}_{'half' if half else 'float'}"
            kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            self.casts[name, half] = helper.make_node("Cast", [name], [target], f"{target}_cast", to=kind)
            nodes.append(self.casts[name, half])
        return self.casts[name, half].output[0]


def _in_heads(node: Any) -> bool:
    """Whether a node belongs to a layer whose outputs are scores, boxes or positions."""
    scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
    return any(head in scopes for head in _HEADS)


def _rename_output(graph: Any, name: str, new: str) -> None:
    """Rename the value of this name, but not the graph's output."""
    for node in graph.node:
        _replace(node.input, name, new)
        _replace(node.output, name, new)


def _replace(names: Any, old: str, new: str) -> None:
    for i, name in enumerate(names):
        if name == old:
            names[i] = new


def remove_traces(model: Any) -> None:
    """Remove the exporter's notes on Python code from each node, in place: paths of this machine, and their size."""
    for node in model.graph.node:
        kept = [p for p in node.metadata_props if p.key == _SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
