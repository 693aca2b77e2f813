import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dino import cli
from dino.export import export_checkpoint
from dino.export.export_checkpoint import Narrow
from dino.export.export_formats import FORMATS, _Format
from dino.export.verify import Comparison, Limits, _match
from dino.layers import Detections
from dino.weights.description import PARTS

from ..coco_files import NAMES, write_coco
from ..tiny import TinyBackbone
from ..weights.test_description import network, write, write_content


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    """Three convolutions instead of a ResNet, to save time."""
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())


NETWORK = network(num_levels=2, in_features=["res5"])


@pytest.fixture
def checkpoint(tmp_path):
    write(tmp_path / "model.pth", NETWORK, names=list(NAMES), about=about(short_side=96, max_size=160))
    return tmp_path / "model.pth"


def about(**sizes):
    preprocessing = {"pixel_mean": [120.0] * 3, "pixel_std": [60.0] * 3, "max_detections": 20, **sizes}
    return {"config": json.dumps({"network": NETWORK}), "preprocessing": preprocessing}


def pretend(monkeypatch, change=lambda boxes: boxes):
    """Instead of ONNX: a "file" that is run by the network itself, with its boxes changed."""
    made = []

    def write(detector, fixed, about):
        made.append(detector)
        return b"a program"

    def run(content):
        assert content == b"a program"

        @torch.no_grad()
        def call(images, sizes):
            boxes, scores, labels = made[0](torch.from_numpy(images), torch.from_numpy(sizes))
            return [x.numpy() for x in (change(boxes), scores, labels)]

        return call

    monkeypatch.setitem(FORMATS, "onnx", _Format(write, run))


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def test_from_the_checkpoint_to_onnx(checkpoint, tmp_path, capsys):
    """The whole way, compared on images of a data set whose annotations are given."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    data = write_coco(tmp_path / "data ü")
    output = tmp_path / "new folder/model.onnx"
    verify = ["--verify", data.images, "--verify-json", data.annotations]
    assert export(checkpoint, output, "--size", 96, 128, *verify) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "compared on 4 images" in out
    assert "largest differences of these: boxes" in out
    assert "exported, difference +0.000" in out
    assert "onnx, batch 1, 96 x 128, 3 classes" in out
    assert [p.name for p in output.parent.iterdir()] == ["model.onnx"]


def test_a_program_that_differs_is_not_kept(checkpoint, tmp_path, monkeypatch, capsys):
    data = write_coco(tmp_path / "data")
    pretend(monkeypatch, lambda boxes: boxes + 3)
    assert export(checkpoint, tmp_path / "out.onnx", "--verify", data.images) == 1
    assert "out.onnx is not written, since it differs from the network: " in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_fixed_size_is_verified_at_that_size(checkpoint, tmp_path, monkeypatch, capsys):
    data = write_coco(tmp_path / "data")
    pretend(monkeypatch)
    arguments = ["--size", 96, 128, "--batch", 2, "--verify", data.images, "--limit", 2]
    assert export(checkpoint, tmp_path / "out.onnx", *arguments) == 0
    out = capsys.readouterr().out
    assert "compared on 2 images" in out
    assert "batch 2, 96 x 128" in out


def absent(tmp_path):
    return tmp_path / "absent.pth"


def broken(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 no checkpoint")
    return tmp_path / "broken.pth"


def undescribed(tmp_path):
    write_content(tmp_path / "bare.pth", about=None)
    return tmp_path / "bare.pth"


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [(absent, 2, "absent.pth"), (broken, 1, "broken.pth"), (undescribed, 1, "bare.pth does not describe its model")],
)
def test_bad_checkpoints(tmp_path, capsys, make, code, message):
    path = make(tmp_path)
    assert export(path, tmp_path / "out.onnx") == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--score-thresh", 0.1, 0.2], 1, "--score-thresh has 2 values for 3 classes: red, green, blue"),
        (["--verify", "nowhere"], 2, "image folder not found: nowhere"),
        (["--format", "torchscript"], 1, "TorchScript is for one size: give --size HEIGHT WIDTH"),
    ],
)
def test_bad_arguments(checkpoint, tmp_path, capsys, arguments, code, message):
    assert export(checkpoint, tmp_path / "out.onnx", *arguments) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def data_flags(data, flag):
    return [flag, data.annotations, data.images]


def test_8_bits_with_their_loss_of_ap(checkpoint, tmp_path, capsys):
    """Random weights: an AP of 0 loses nothing."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    data = write_coco(tmp_path / "data")
    flags = ["--dtype", "int8", *data_flags(data, "--calibrate"), *data_flags(data, "--val")]
    assert export(checkpoint, tmp_path / "int8.onnx", "--size", 96, 128, *flags) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "in 8 bits: all convolutions and matrix products" in out
    assert "exported, difference" in out
    assert "onnx int8, batch 1, 96 x 128" in out
    model = onnx.load(tmp_path / "int8.onnx")
    assert "dino" in {p.key for p in model.metadata_props}
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}


def fake_int8(monkeypatch, *losses):
    """8-bit files of ever fewer operators, that lose these points of AP."""
    rest = iter(losses)
    monkeypatch.setattr(export_checkpoint, "quantised", lambda *_: ((f"form {i}", b"a program") for i in range(2)))
    exact = Comparison(images=50, detections=100, matched=1, box=90, score=0.9, ap=(0.5, 0.5))
    monkeypatch.setattr(export_checkpoint, "compare", lambda *_, **__: exact._replace(ap=(0.5, 0.5 - next(rest) / 100)))


@pytest.mark.parametrize(
    ("losses", "flags", "written"),
    [
        *((((0.9,), [], "form 0")), (((1.1, 0.9), [], "form 1")), (((1.1, 1.05), [], None))),
        *(((0.9, 0.9), ["--max-ap-loss", 0.5], None), ((4.9,), ["--max-ap-loss", 5], "form 0")),
    ],
)
def test_the_bound_of_the_loss(checkpoint, tmp_path, monkeypatch, capsys, losses, flags, written):
    """The first form below the bound is written; none, if all lose more."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    data = write_coco(tmp_path / "data")
    pretend(monkeypatch)
    fake_int8(monkeypatch, *losses)
    flags = ["--dtype", "int8", *data_flags(data, "--calibrate"), *data_flags(data, "--val"), *flags]
    assert export(checkpoint, tmp_path / "out.onnx", *flags) == (0 if written else 1)
    out, err = capsys.readouterr()
    assert (tmp_path / "out.onnx").exists() == bool(written)
    if written:
        assert out.count("in 8 bits") == len(losses)
        assert f"in 8 bits: {written}" in out
    else:
        assert f"out.onnx is not written, since it differs from the network: AP falls by {losses[-1]:.2f}" in err


@pytest.mark.parametrize(("dtype", "loss"), [("float32", 0.1), ("fp16", 0.1), ("bf16", 1), ("int8", 1)])
def test_bounds_of_types(dtype, loss):
    """Narrower types: of AP alone where it says something, else of what is found again too."""
    moved = Comparison(images=20, detections=100, matched=40, box=90, score=0.9, ap=None)
    found = moved._replace(ap=(0.5, 0.5 - 0.009 * loss))
    lost = moved._replace(ap=(0.5, 0.5 - 0.011 * loss))
    assert any("60 of 100 detections are missing" in issue for issue in Narrow(dtype).issues(moved))
    assert (Narrow(dtype).issues(found) == []) == (dtype != "float32")
    assert any("AP falls by" in issue for issue in Narrow(dtype).issues(lost))
    assert not any("AP falls by" in issue for issue in Narrow(dtype, max_ap_loss=2).issues(lost))
    for unclear in (moved._replace(ap=(0.01, 0.02)), found._replace(images=19)):
        assert any("60 of 100 detections are missing" in issue for issue in Narrow(dtype).issues(unclear))


def test_bfloat16_for_programs_of_torch(checkpoint, tmp_path, capsys):
    flags = ["--dtype", "bf16", "--size", 96, 128]
    assert export(checkpoint, tmp_path / "model.ts", *flags) == 0, capsys.readouterr().err
    assert "torchscript bf16" in capsys.readouterr().out
    run = FORMATS["torchscript"].run((tmp_path / "model.ts").read_bytes())
    boxes, scores, _ = run(np.zeros((1, 3, 96, 128), np.uint8), np.array([[96, 128]]))
    assert boxes.dtype == scores.dtype == np.float32
    assert np.isfinite(boxes).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["o.onnx", "--dtype", "bf16"], "ONNX Runtime computes no bfloat16 on CPUs"),
        (["o.pt2", "--dtype", "fp16"], "use --dtype bf16"),
        (["o.ts", "--dtype", "int8", "--val", "a", "b", "--calibrate", "a", "b"], "8 bits are for ONNX"),
        (["o.onnx", "--dtype", "int8", "--val", "a", "b"], "--calibrate ANNOTATIONS IMAGES"),
        (["o.onnx", "--dtype", "int8", "--calibrate", "a", "b"], "--val ANNOTATIONS IMAGES"),
        (["o.onnx", "--calibrate", "a", "b"], "--calibrate is for --dtype int8"),
        (["o.onnx", "--max-ap-loss", 1], "--max-ap-loss needs --val"),
        (["o.onnx", "--max-ap-loss", "nan", "--val", "a", "b"], "--max-ap-loss must be at least 0 points"),
    ],
)
def test_types_that_do_not_fit(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        export("model.pth", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["out.bin"], ["o.onnx", "--size", 0, 5], ["o.onnx", "--batch", 2], ["o.onnx", "--verify-json", "a"]),
        *(["o.onnx", "--score-thresh", 1.2], ["o.onnx", "--val", "a", "b", "--verify", "b"]),
    ],
)
def test_wrong_command_lines(arguments):
    with pytest.raises(SystemExit) as caught:
        export("model.pth", *arguments)
    assert caught.value.code == 2


def test_other_classes_are_refused(checkpoint, tmp_path, capsys):
    data = write_coco(tmp_path / "data")
    data.change(lambda content: content["categories"][0].update(name="pink"))
    arguments = ["--verify", data.images, "--verify-json", data.annotations]
    assert export(checkpoint, tmp_path / "out.onnx", *arguments) == 1
    assert "has the classes ['pink', 'green', 'blue'], the model ['red', 'green', 'blue']" in capsys.readouterr().err


def test_nothing_is_replaced(tmp_path, capsys):
    (tmp_path / "out.onnx").write_text("precious")
    assert export(absent(tmp_path), tmp_path / "out.onnx") == 1
    assert "out.onnx exists: choose another name" in capsys.readouterr().err
    assert (tmp_path / "out.onnx").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_refused_writes_leave_nothing(checkpoint, tmp_path, monkeypatch, capsys, number):
    pretend(monkeypatch)
    truly = Path.write_bytes

    def fail(path, content):
        truly(path, content[:4])
        raise OSError(number, "refused", str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert export(checkpoint, tmp_path / "out.onnx") == 1
    assert "error: can't write" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_absent_libraries_are_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert export(checkpoint, tmp_path / "out.onnx") == 1
    assert "ONNX needs onnxscript: pip install 'dino-detectron2[onnx]'" in capsys.readouterr().err


def some(*rows):
    """Detections of rows (x0, y0, x1, y1, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def test_matching():
    expected = some((0, 0, 50, 50, 0.9, 1), (0, 0, 50, 50, 0.8, 1), (60, 0, 90, 50, 0.7, 0), (0, 60, 9, 69, 0.01, 0))
    found = some((60, 0, 90.5, 50, 0.7, 0), (0, 0, 50, 51, 0.79, 1), (0, 0, 50, 50, 0.9, 1))
    np.testing.assert_allclose(_match(expected, found), [(0, 0), (1, 0.01), (0.5, 0)], atol=1e-6)
    assert _match(expected, found._replace(labels=found.labels + 1)) == [None] * 3
    assert _match(expected, found._replace(boxes=found.boxes + 30)) == [None] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matched": 97}, "3 of 100 detections are missing or moved, 2% are allowed"),
        ({"box": 0.6}, "boxes differ by up to 0.6 pixels, 0.5 are allowed"),
        ({"score": 0.02}, "scores differ by up to 0.02, 0.01 are allowed"),
        ({"ap": (0.5, 0.49)}, "AP falls by 1.00 points, 0.1 are allowed"),
    ],
)
def test_limits(change, message):
    fine = Comparison(images=5, detections=100, matched=98, box=0.5, score=0.01, ap=(0.5, 0.4995))
    assert fine.issues(Limits()) == []
    assert fine._replace(**change).issues(Limits()) == [message]
