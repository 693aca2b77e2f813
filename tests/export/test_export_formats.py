import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.export import export_formats
from dino.export.export_formats import _OPSET, FORMATS, write
from dino.export.export_wrapper import ExportWrapper, Fixed, describe, prepare
from dino.export.verify import _match, run_exported, run_network
from dino.layers import deform_attn_implementation
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import DataError

from ..tiny import tiny_network
from ..weights.states import randomise

ROOT = Path(__file__).parents[2]
PREPROCESSING = Preprocessing(short_side=96, max_size=160, max_detections=20)
NAMES = ["red", "green", "blue cat"]
FIXED = Fixed(2, 96, 128)
ANY = [(1, 65, 200), (3, 161, 100), (2, 96, 128)]  # batch, height, width
CASES = {
    "onnx": ("onnx", None, "grid"),
    "onnx-gather-fixed": ("onnx", FIXED, "gather"),
    "torch-export": ("torch-export", FIXED, "grid"),
    "torchscript": ("torchscript", FIXED, "grid"),
}


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return Detector(randomise(tiny_network(num_levels=2)), PREPROCESSING, NAMES).eval()


@pytest.fixture(scope="module")
def wrapper(detector):
    return ExportWrapper(detector).eval()


@pytest.fixture(scope="module")
def traced():
    """`export_formats.trace`, whose open sizes take a while, once per argument."""
    return functools.cache(export_formats._trace)


@pytest.fixture(scope="module")
def exported(wrapper, traced):
    """Name of a case -> the bytes of its file, made once."""
    made = {}

    def make(case):
        form, fixed, sampling = CASES[case]
        if form == "onnx":
            pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        if case not in made:
            about = describe(NAMES, [0.3, 0.4, 0.5], PREPROCESSING, fixed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export_formats, "_trace", traced)
                made[case] = write(form, wrapper, fixed, about, sampling=sampling)
        return made[case]

    return make


def noise(batch, height, width, seed=0):
    """Soft noise; all images but the first are smaller than the batch."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (batch, 3, height, width), dtype=np.uint8)
    sizes = np.array([[height - 20 * (i > 0), width - 30 * (i > 0)] for i in range(batch)], np.int64)
    return images, sizes


def expected_of(detector, images, sizes):
    """The network's own boxes, scores and labels, by the definition of the attention."""
    with torch.no_grad(), deform_attn_implementation("reference"):
        return detector.network(*detector.pad(torch.from_numpy(images), torch.from_numpy(sizes))).decoder


def assert_same(detector, run, images, sizes):
    boxes, scores, labels = run(images, sizes)
    predictions = expected_of(detector, images, sizes)
    count = min(PREPROCESSING.max_detections, predictions.logits[-1, 0].numel())
    assert boxes.shape == (len(images), count, 4)
    assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)
    for b, (height, width) in enumerate(sizes):
        values, order = predictions.logits[-1, b].sigmoid().flatten().sort(descending=True)
        np.testing.assert_allclose(scores[b], values[:count].numpy(), atol=2e-4)
        for box, score, label in zip(boxes[b], scores[b], labels[b], strict=True):
            near = ((values - float(score)).abs() < 4e-4) & (order % len(NAMES) == int(label))
            x, y, w, h = (predictions.boxes[-1, b][order[near] // len(NAMES)] * torch.tensor([width, height] * 2)).T
            candidates = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
            assert (candidates - torch.from_numpy(box)).abs().amax(1).min() < 0.05


def test_any_batch_and_size_in_onnx(detector, exported):
    run = FORMATS["onnx"].run(exported("onnx"))
    for size in ANY:
        assert_same(detector, run, *noise(*size))


def test_any_batch_and_size_in_torch_export(detector, wrapper, exported, traced):
    """The graph that ONNX was made from. (Reading such a file is slow: see the slow test.)"""
    exported("onnx")
    for size in ANY:
        assert_same(detector, export_formats._from_torch(traced(wrapper, None).module()), *noise(*size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "sampling"), [("torch-export", "grid"), ("torch-export", "gather"), ("onnx", "gather")]
)
def test_any_batch_and_size_in_other_forms(detector, wrapper, form, sampling):
    run = FORMATS[form].run(write(form, wrapper, None, {}, sampling=sampling))
    for size in ANY:
        assert_same(detector, run, *noise(*size))


@pytest.mark.parametrize("case", [name for name, (_, fixed, _) in CASES.items() if fixed])
def test_one_size(detector, exported, case):
    run = FORMATS[CASES[case][0]].run(exported(case))
    assert_same(detector, run, *noise(*FIXED))


def test_one_size_is_the_only_one(exported):
    run = FORMATS["onnx"].run(exported("onnx-gather-fixed"))
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(*noise(2, 96, 160))


def test_torchscript_wants_a_size(wrapper):
    with pytest.raises(DataError, match="--size HEIGHT WIDTH"):
        write("torchscript", wrapper, None, {})


def test_what_cannot_be_exported_says_so(detector, wrapper, monkeypatch):
    def fail(images):
        raise RuntimeError("windows do not fit\nand more")

    monkeypatch.setattr(detector.network.neck, "forward", fail)
    with pytest.raises(DataError, match=r"for any size; a fixed size may be possible: --size .*windows do not fit$"):
        write("torch-export", wrapper, None, {})


@pytest.mark.parametrize("case", ["onnx", "onnx-gather-fixed"])
def test_onnx_has_standard_operators_only(exported, case):
    content = exported(case)
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": _OPSET}
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert ("GridSample" in {node.op_type for node in model.graph.node}) == (CASES[case][2] == "grid")
    dims = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in model.graph.input]
    if case == "onnx":
        assert dims == [["batch", 3, "height", "width"], ["batch", 2]]
    else:
        assert dims == [[2, 3, 96, 128], [2, 2]]


def description_of(form, content):
    if form == "onnx":
        onnx = pytest.importorskip("onnx")
        return json.loads({p.key: p.value for p in onnx.load_from_string(content).metadata_props}["dino"])
    files = {"dino.json": ""}
    if form == "torchscript":
        torch.jit.load(io.BytesIO(content), _extra_files=files)
    else:
        torch.export.load(io.BytesIO(content), extra_files=files)
    return json.loads(files["dino.json"])


@pytest.mark.parametrize("case", CASES)
def test_files_describe_themselves(exported, case):
    form, fixed, _ = CASES[case]
    about = description_of(form, exported(case))
    assert about["names"] == NAMES
    assert about["category_ids"] == [1, 2, 3]
    assert about["thresholds"] == [0.3, 0.4, 0.5]
    assert about["input_range"] is None
    assert describe(NAMES, [0], PREPROCESSING._replace(input_range=(1, 2)), None)["input_range"] == [1, 2]
    assert about["resize"] == ({"fit": [96, 128]} if fixed else {"short_side": 96, "max_size": 160})


def script_of_the_docs():
    return re.search(r"```python\n(# serve\.py.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL).group(1)


@pytest.mark.parametrize("case", ["onnx", "onnx-gather-fixed"])
def test_served_without_torch(exported, detector, tmp_path, case):
    """The script of docs/export.md, in a process that can't import torch, on an image that is resized."""
    content = exported(case)
    (tmp_path / "model.onnx").write_bytes(content)
    (tmp_path / "serve.py").write_text("import sys\nsys.modules['torch'] = None\n" + script_of_the_docs())
    pixels = np.random.default_rng(1).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "an image.png")
    command = [sys.executable, "serve.py", "model.onnx", "an image.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    fixed = CASES[case][1]
    inputs = prepare(pixels, describe(NAMES, [0], PREPROCESSING, fixed)["resize"])
    found = run_exported(FORMATS["onnx"].run(content), inputs, fixed)
    height, width = inputs.sizes[0].tolist()
    boxes = found.boxes * torch.tensor([90 / width, 50 / height] * 2)
    thresholds = torch.tensor([0.3, 0.4, 0.5])
    lines = [
        f"{NAMES[label]} {score:.2f} {[round(x, 1) for x in box]}"
        for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        if score >= thresholds[label]
    ]
    assert lines
    assert len(result.stdout.splitlines()) == len(lines)
    assert [line.split("[")[0] for line in result.stdout.splitlines()] == [line.split("[")[0] for line in lines]


def test_openvino(exported, detector):
    content = exported("onnx")
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model = openvino.Core().read_model(io.BytesIO(content))
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # bfloat16 on some processors
    for size in ANY[:2]:
        images, sizes = noise(*size)
        results = compiled({"images": images, "sizes": sizes})
        found = [results[name] for name in ("boxes", "scores", "labels")]
        assert_same(detector, lambda *_, found=found: found, images, sizes)


@pytest.mark.parametrize("case", ["onnx", "torchscript"])
def test_verification_finds_the_same(exported, detector, case):
    """Against the operator that runs by default."""
    form, fixed, _ = CASES[case]
    inputs = prepare(noise(1, 150, 170)[0][0].transpose(1, 2, 0), describe(NAMES, [0], PREPROCESSING, fixed)["resize"])
    pair = run_network(detector, inputs), run_exported(FORMATS[form].run(exported(case)), inputs, fixed)
    differences = _match(*pair)
    assert len(differences) == PREPROCESSING.max_detections
    assert all(d is not None and d[0] < 0.05 and d[1] < 1e-3 for d in differences)
