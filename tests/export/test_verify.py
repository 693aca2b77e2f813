"""What is compared before a file is kept: pictures alone, and batches at which masks go wrong."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino import cli
from dino.export.export_wrapper import ExportWrapper, Fixed
from dino.export.verify import Case, Comparison, Limits, compare, read_data
from dino.export.verify_batches import Batch, cells_of, delicate_ends, network_strides, plan
from dino.modeling import dino as dino_module
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import DataError
from dino.weights.description import PARTS

from ..coco_files import NAMES, write_coco
from ..tiny import TinyBackbone, tiny_network
from ..weights.states import randomise
from ..weights.test_description import network, write

RESIZE = {"short_side": 96, "max_size": 160}
NETWORK = network(num_levels=2, in_features=["res5"])
SHAPES = [(64, 72), (72, 64)]
KINDS = ["padded batch of 2", "padded batch of 4", "smallest size", "largest size", "delicate sizes"]


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    preprocessing = Preprocessing(max_detections=20, **RESIZE)
    return Detector(randomise(tiny_network(num_levels=2)), preprocessing, list(NAMES)).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("verify") / "data")


def by_float32(padding_mask, features):
    """The mask whose pixels ONNX Runtime finds by a division of float32 numbers."""
    if padding_mask is None:
        return features.new_zeros((len(features), *features.shape[-2:]), dtype=torch.bool)
    for axis in (1, 2):
        size, cells = padding_mask.shape[axis], features.shape[axis + 1]
        ratio = torch.tensor(cells, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
        padding_mask = padding_mask.index_select(axis, (torch.arange(cells).float() / ratio).floor().long())
    return padding_mask


def program(detector, mask=None, fail=()):
    """An "exported program": the network itself, but for its mask; it fails for batches of the sizes `fail`."""

    @torch.no_grad()
    def run(images, sizes):
        if len(images) in fail:
            raise RuntimeError(f"no batch of {len(images)}\nand more")
        with pytest.MonkeyPatch.context() as patch:
            if mask:
                patch.setattr(dino_module, "_downsample", mask)
            return [x.numpy() for x in ExportWrapper(detector)(torch.from_numpy(images), torch.from_numpy(sizes))]

    return run


def read(data, limit=4):
    return read_data(data.annotations, data.images, NAMES, limit)


@pytest.mark.parametrize("fixed", [None, Fixed(1, 96, 128), Fixed(3, 96, 128)])
def test_the_network_equals_itself(detector, data, fixed):
    resize = RESIZE if fixed is None else {"fit": [96, 128]}
    found = compare(detector, program(detector), read(data), resize=resize, fixed=fixed)
    assert found.issues(Limits()) == []
    singly = [f"{kind}, one by one" for kind in KINDS]
    assert {case.kind for case in found.cases} == (
        {*KINDS, *singly} if fixed is None else {"padded pictures", KINDS[4]}
    )
    assert all(case.detections == case.matched >= 10 and case.box < 1e-3 for case in found.cases)
    assert all(case.ap[0] == case.ap[1] for case in found.cases)
    assert all(f"  {case.kind}: " in str(found) for case in found.cases)


def test_a_planted_mask_is_found(detector, data):
    """It is right for the pictures alone, wrong only where a picture ends at a delicate pixel."""
    found = compare(detector, program(detector, by_float32), read(data), resize=RESIZE)
    assert found.box < 1e-3
    issues = found.issues(Limits())
    assert issues
    assert all(issue.startswith("delicate sizes") for issue in issues)
    assert any("one by one" in issue for issue in issues)


@pytest.mark.parametrize("step", [-1, 1])
def test_a_pixel_before_or_after_at_delicate_heights(detector, data, step):
    """All cells take the next pixel, but only along heights at which one of them is delicate."""

    def shifted(padding_mask, features):
        if padding_mask is None:
            return by_float32(padding_mask, features)
        (height, width), cells = padding_mask.shape[1:], features.shape[-2:]
        rows = torch.arange(cells[0]) * height // cells[0]
        if delicate_ends(height, cells[0]):
            rows = (rows + step).clamp(0, height - 1)
        return padding_mask[:, rows][:, :, torch.arange(cells[1]) * width // cells[1]]

    issues = compare(detector, program(detector, shifted), read(data), resize=RESIZE).issues(Limits())
    assert any(issue.startswith("delicate sizes (") for issue in issues)


def test_one_picture_is_enough(detector, data):
    found = compare(detector, program(detector), read(data, limit=1), resize=RESIZE)
    assert len(found.cases) == 10


def test_files_without_annotations(detector, tmp_path):
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(tmp_path / "a.png")
    found = compare(detector, program(detector), [tmp_path / "a.png"], resize=RESIZE)
    assert all(case.ap is None for case in found.cases)


def test_a_program_that_fails_for_a_batch(detector, data):
    with pytest.raises(DataError, match=r"fails for padded batch of 4, 96x\d+ with pictures of .*: no batch of 4$"):
        compare(detector, program(detector, fail=(4,)), read(data), resize=RESIZE)


def test_the_plan_for_any_size(detector):
    batches = plan(detector.network, RESIZE, SHAPES, None)
    lowest = network_strides(detector.network)[-1] + 1
    assert min(side for batch in batches for side in batch.canvas) >= lowest
    for batch in batches:
        assert all(1 <= n <= most for size in batch.sizes for n, most in zip(size, batch.canvas, strict=True))
    together = {batch.kind: batch for batch in batches if len(batch.sizes) > 1}
    assert list(together) == KINDS
    assert [len(set(together[kind].sizes)) for kind in KINDS[:2]] == [2, 4]
    assert [together[kind].canvas for kind in KINDS[2:4]] == [(96, 96), (96, 160)]
    cells = cells_of(detector.network, [32, 64])
    for batch in batches:
        if batch.kind == "delicate sizes":
            side, end = batch.canvas[0], batch.sizes[1][0]
            assert any(end in delicate_ends(side, count) for count in cells(side))


def test_the_plan_for_one_size(detector):
    batches = plan(detector.network, {"fit": [240, 320]}, SHAPES, Fixed(3, 240, 320))
    assert {batch.canvas for batch in batches} == {(240, 320)}
    assert {len(batch.sizes) for batch in batches} == {3}
    assert len({size for batch in batches for size in batch.sizes}) > 6
    batches = plan(detector.network, {"fit": [1, 640]}, SHAPES, Fixed(1, 1, 640))
    assert {size[0] for batch in batches for size in batch.sizes} == {1}


def test_batches_are_filled_from_the_corner():
    batch = Batch("any", (6, 8), [(6, 4), (3, 8)])
    images, sizes = batch.fill([np.full((2, 2, 3), value, np.uint8) for value in (7, 9)])
    assert sizes.tolist() == [[6, 4], [3, 8]]
    assert (images[0, :, :, :4] == 7).all()
    assert (images[1, :, :3] == 9).all()
    assert images.sum() == 3 * 24 * (7 + 9)
    assert [(b.kind, b.sizes, b.first) for b in batch.singly()] == [
        ("any, one by one", [(6, 4)], 0),
        ("any, one by one", [(3, 8)], 1),
    ]


def test_delicate_ends():
    """Against ONNX Runtime's formula in numpy, number by number."""
    assert delicate_ends(256, 32) == []
    for side, cells in ((240, 15), (480, 30), (600, 75), (750, 47), (454, 14)):
        ratio = np.float32(cells) / np.float32(side)
        wrong = [i * side // cells for i in range(cells) if int(np.float32(i) / ratio) != i * side // cells]
        assert set(wrong) <= set(delicate_ends(side, cells))
    assert delicate_ends(454, 14) == [227]  # PyTorch's
    assert delicate_ends(20, 0) == []


@pytest.mark.parametrize("side", [64, 63])
def test_levels_round_as_the_network_does(side):
    """The tiny network's convolutions round up; patches round down."""
    network = tiny_network()
    assert cells_of(network, network_strides(network))(side) == [8, 4, 2, 1]
    network.neck.forward = lambda x: [x[:, :, : x.shape[2] // n, : x.shape[3] // n] for n in (8, 16, 32, 64)]
    assert cells_of(network, network_strides(network))(side) == [side // n for n in (8, 16, 32, 64)]


def test_a_failure_names_its_case():
    case = Case("delicate sizes", "600x600 with pictures of 600x600, 567x567", 20, 19, 0.1, 0.001, (0.5, 0.5))
    found = Comparison(5, 100, 100, 0.1, 0.001, None, (case,))
    assert found.issues(Limits()) == []  # of a few, one can be a tie
    found = found._replace(cases=(case._replace(matched=18, box=207.0),))
    lost, moved = found.issues(Limits())
    assert lost == f"delicate sizes ({case.worst}): 2 of 20 detections are missing or moved, 5% are allowed"
    assert moved == f"delicate sizes ({case.worst}): boxes differ by up to 207 pixels, 0.5 are allowed"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())
    preprocessing = {"pixel_mean": [120.0] * 3, "pixel_std": [60.0] * 3, "max_detections": 20, **RESIZE}
    about = {"config": json.dumps({"network": NETWORK}), "preprocessing": preprocessing}
    write(tmp_path / "model.pth", NETWORK, names=list(NAMES), about=about)
    return tmp_path / "model.pth"


def test_a_nearest_neighbour_resize_in_onnx_is_refused(checkpoint, data, tmp_path, monkeypatch, capsys):
    """ONNX Runtime computes such a mask wrongly at 240 pixels; the network in PyTorch has the same mask either way."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    def resized(padding_mask, features):
        return F.interpolate(padding_mask[None].float(), size=features.shape[-2:])[0].bool()

    monkeypatch.setattr(dino_module, "_downsample", resized)
    arguments = ["export", checkpoint, tmp_path / "out.onnx", "--size", 240, 320, "--verify", data.images]
    assert cli.main([*map(str, arguments)]) == 1
    message = "out.onnx is not written, since it differs from the network: delicate sizes (240x320 with pictures of "
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
