"""Types inside ONNX graphs: small graphs, and the exported network."""

import numpy as np
import pytest

from dino.export.onnx_types import pin_locations, remove_traces, to_float16

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SCOPES = "pkg.torch.onnx.name_scopes"
RANDOM = np.random.default_rng(0)


def tensor(name, *shape):
    return onnx.numpy_helper.from_array(RANDOM.standard_normal(shape).astype(np.float32), name)


def value(name, kind=onnx.TensorProto.FLOAT, shape=None):
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def node(kind, inputs, output, scope="", **attributes):
    made = onnx.helper.make_node(kind, inputs.split(), [output], f"{output}_node", **attributes)
    made.metadata_props.add(key=SCOPES, value=f"['{scope}']")
    made.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File /home/me/dino.py")
    return made


def model(nodes, inputs, outputs, weights):
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def products():
    """A product, a normalisation, a shared weight, and a head."""
    nodes = [
        node("MatMul", "x first", "a"),
        node("Add", "a bias", "b"),
        node("Relu", "b", "c"),
        node("MatMul", "c second", "d"),
        node("LayerNormalization", "d bias bias", "e"),
        node("Add", "e bias", "f"),
        node("MatMul", "f head", "y", "network.decoder.box_heads.0"),
    ]
    weights = [tensor("first", 8, 6), tensor("bias", 6), tensor("second", 6, 6), tensor("head", 6, 4)]
    return model(nodes, [value("x", shape=[3, 8])], [value("y", shape=[3, 4])], weights)


def run(content, **inputs):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, inputs)


def test_half_precision(products):
    """Weights of products in float16, those of heads and normalisation in float32; few casts, and nearly equal."""
    made = onnx.load_from_string(to_float16(products.SerializeToString()))
    onnx.checker.check_model(made, full_check=True)
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert kinds == {"first_half": half, "bias_half": half, "second_half": half, "bias": full, "head": full}
    assert [n.op_type for n in made.graph.node].count("Cast") == 2
    x = RANDOM.standard_normal((3, 8)).astype(np.float32)
    (before,), (after,) = (run(m.SerializeToString(), x=x) for m in (products, made))
    assert before.dtype == after.dtype == np.float32
    difference = np.abs(before - after).max()
    assert 0 < difference < 0.02


def test_traces_are_removed(products):
    remove_traces(products)
    keys = [p.key for n in products.graph.node for p in n.metadata_props]
    assert set(keys) == {SCOPES}
    assert b"/home/me" not in products.SerializeToString()


def sampling(*more):
    """Boxes are the mean of samples."""
    nodes = [
        node("Mul", "offsets scale", "grid"),
        node("GridSample", "image grid", "samples"),
        node("ReduceMean", "samples axes", "boxes", keepdims=0),
    ]
    weights = [tensor("scale", 1), onnx.numpy_helper.from_array(np.array([1, 2]), "axes")]
    inputs = [value("image", shape=[1, 2, 4, 4]), value("offsets", shape=[1, 3, 2, 2])]
    inputs.append(value("sizes", onnx.TensorProto.INT64, [1, 2]))
    return model([*nodes, *more], inputs, [value("boxes", shape=[1, 2])], weights)


def test_boxes_depend_on_locations_and_do_not_change():
    before = sampling()
    after = onnx.load_from_string(before.SerializeToString())
    pin_locations(after)
    onnx.checker.check_model(after, full_check=True)
    assert after.graph.output[0].name == "boxes"
    readers = [n.op_type for n in after.graph.node if "grid" in n.input]
    assert readers == ["GridSample", "Slice"]
    inputs = {
        "image": RANDOM.standard_normal((1, 2, 4, 4)).astype(np.float32),
        "offsets": RANDOM.uniform(-1, 1, (1, 3, 2, 2)).astype(np.float32),
        "sizes": np.array([[4, 4]]),
    }
    np.testing.assert_array_equal(*(run(m.SerializeToString(), **inputs)[0] for m in (before, after)))


def test_graphs_without_sampling_stay(products):
    before = products.SerializeToString()
    pin_locations(products)
    assert products.SerializeToString() == before


def test_openvino_keeps_locations_in_float32():
    """Samples of a ramp are the locations themselves: bfloat16 rounds them, unless they are pinned."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    errors = []
    for pin in (lambda _: None, pin_locations):
        made = ramp()
        pin(made)
        hint = {"INFERENCE_PRECISION_HINT": "bf16"}
        compiled = core.compile_model(core.read_model(made.SerializeToString()), "CPU", hint)
        image = np.tile(np.arange(256, dtype=np.float32) - 192, (1, 1, 4, 1))  # small where it is sampled
        inputs = {"image": image, "offsets": OFFSETS, "sizes": np.array([[4, 256]])}
        (exact,) = run(made.SerializeToString(), **inputs)
        found = compiled({name: x for name, x in inputs.items() if name != "sizes" or pin is pin_locations})["boxes"]
        errors.append(np.abs(found - exact).max())
    assert errors[1] < errors[0] / 4


OFFSETS = np.stack([np.linspace(0.501, 0.509, 64), np.zeros(64)], -1).astype(np.float32).reshape(1, 64, 1, 2)


def ramp():
    """Boxes are samples of an image, and pass a convolution, as all that is sampled does."""
    nodes = [
        node("Mul", "offsets one", "half"),
        node("Add", "half zero", "grid"),
        node("GridSample", "image grid", "samples"),
        node("Conv", "samples weight", "boxes"),
    ]
    constants = {"one": [1.0], "zero": [1e-6], "weight": [[[[1.0]]]]}
    arrays = [onnx.numpy_helper.from_array(np.array(x, np.float32), name) for name, x in constants.items()]
    inputs = [value("image", shape=[1, 1, 4, 256]), value("offsets", shape=[1, 64, 1, 2])]
    inputs.append(value("sizes", onnx.TensorProto.INT64, [1, 2]))
    return model(nodes, inputs, [value("boxes", shape=[1, 1, 64, 1])], arrays)
