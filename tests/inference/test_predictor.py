import functools
import gc
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.backends.registry import lookup_backend

from dino.data.images import list_images, read_image
from dino.inference.predictor import Prediction, Predictor
from dino.inference.tiling import suppress
from dino.layers import Detections, one_label_detections
from dino.modeling.compile import PARTS
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import DataError, UserError
from dino.weights.description import build_network, detector_from_checkpoint

from ..coco_files import write_coco
from ..modeling.test_cuda_graphs import FakeRecorder
from ..tiny import tiny_network
from ..weights.test_description import RESNET, network

SMALL = Preprocessing(short_side=64, max_size=96, max_detections=10)


@torch.no_grad()
def stirred(model):
    """Moves the parameters a little, as heads that begin at zero would hide what lies before them.

    Not those of a deep backbone: nothing norms its activations here, and they would outgrow fp16.
    """
    for name, parameter in model.named_parameters():
        if not name.startswith("neck.backbone.body"):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_checkpoint(path, backbone=RESNET, preprocessing=SMALL, **content):
    """A small network with a ResNet-18 and random weights, as a run leaves it; `content`: more of the file."""
    model = build_network({"network": network(backbone=backbone)})
    for name, tensor in model.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 1)
    about = {"config": json.dumps({"network": network(backbone=backbone)}), "preprocessing": preprocessing._asdict()}
    described = {"names": ["red", "green", "blue"], "about": about, **content}
    torch.save({"model": stirred(model).state_dict(), **described}, path)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    write_checkpoint(path)
    return path


def tiny(make=tiny_network, preprocessing=SMALL, **options):
    """A predictor with three convolutions for a backbone, always with the same weights."""
    torch.manual_seed(0)
    detector = Detector(stirred(make()), preprocessing, ["red", "green", "blue"])
    return Predictor(detector, **{"score_thresh": 0, **options})


def picture(height=72, width=100, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def equal(one, other):
    return all(torch.equal(getattr(one, key), getattr(other, key)) for key in ("boxes", "scores", "labels"))


class Painted(torch.nn.Module):
    """In place of a network: finds the box around all pixels that are redder than others, as class 0."""

    def __init__(self):
        super().__init__()
        self.level_embed = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, images, padding):
        from dino.layers import LayerOutputs, Outputs

        assert padding is None
        self.seen.append(tuple(images.shape))
        red = images[:, 0] - images[:, 2] > 2
        boxes = torch.zeros(1, len(images), 1, 4)
        for box, mask in zip(boxes[0, :, 0], red, strict=True):
            ys, xs = torch.where(mask)
            if len(ys):
                h, w = mask.shape
                x0, x1, y0, y1 = xs.min() / w, (xs.max() + 1) / w, ys.min() / h, (ys.max() + 1) / h
                box.copy_(torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]))
        logits = torch.where(boxes[..., 2:3] > 0, 3.0, -9.0).expand(-1, -1, -1, 2) - torch.tensor([0.0, 20.0])
        predictions = LayerOutputs(logits, boxes)
        return Outputs(predictions, predictions)


def painted(**options):
    return Predictor(Detector(Painted().eval(), Preprocessing(max_detections=50), ["red", "other"]), **options)


def paint(height, width, *boxes):
    pixels = np.full((height, width, 3), 100, np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = (250, 20, 20)
    return pixels


def test_boxes_are_in_pixels_of_the_picture():
    found = painted()(paint(300, 200, (40, 50, 90, 130)))
    assert found.boxes.shape == (1, 4)
    assert torch.allclose(found.boxes[0], torch.tensor([40.0, 50, 90, 130]), atol=0.5)
    assert found.names == ["red"]
    assert found.labels.tolist() == [0]
    assert len(found) == 1
    assert found.image_size == (300, 200)
    assert found.scores[0] == pytest.approx(0.9526, abs=1e-3)


def test_every_kind_of_input_gives_the_same(tmp_path):
    pixels = picture()
    name = tmp_path / "a b ü 图.png"
    Image.fromarray(pixels).save(name)
    predictor = tiny()
    expected = predictor(pixels)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (str(name), name, Image.fromarray(pixels), tensor, tensor.float() / 255):
        assert equal(predictor(given), expected)
    assert equal(predictor(pixels[:, :, ::-1], channels="BGR"), expected)
    for given in (tmp_path, f"{tmp_path}/*.png", [name], (pixels,), tensor[None], iter([Image.fromarray(pixels)])):
        (found,) = predictor(given)
        assert equal(found, expected)
    assert len(predictor([tmp_path, pixels, [pixels, name]])) == 4


def test_a_checkpoint_by_its_path(checkpoint):
    """The short form; a `Detector` is accepted too, unless it would train."""
    expected = Predictor.from_checkpoint(checkpoint, device="cpu", score_thresh=0)(picture())
    for given in (checkpoint, str(checkpoint)):
        assert equal(Predictor(given, device="cpu", score_thresh=0)(picture()), expected)
    detector = detector_from_checkpoint(checkpoint)
    assert len(Predictor(detector, device="cpu", score_thresh=0)(picture())) == len(expected)
    with pytest.raises(UserError, match=r"in training mode: call detector.eval\(\)"):
        Predictor(detector.train())
    with pytest.raises(TypeError, match="not NoneType"):
        Predictor(None)
    with pytest.raises(DataError, match=r"weights not found: absent\.pth"):
        Predictor("absent.pth")


def test_category_ids_reach_the_detections(tmp_path):
    write_checkpoint(tmp_path / "model.pth", category_ids=[7, 1, 42])
    found = Predictor(tmp_path / "model.pth", device="cpu", score_thresh=0)(picture())
    assert {entry["category_id"] for entry in found.to_coco(image_id=1)} <= {7, 1, 42}
    assert found.to_coco(image_id=1)[0]["category_id"] == [7, 1, 42][found.labels[0]]


def test_a_batch_is_a_list_of_pictures():
    batch = np.stack([picture(seed=1), picture(seed=2)])
    predictor = tiny()
    for one, other in zip(predictor(batch), batch, strict=True):
        assert equal(one, predictor(other))
    bgr = predictor(torch.from_numpy(batch[:, :, :, ::-1].copy()).permute(0, 3, 1, 2), channels="BGR")
    assert equal(bgr[1], predictor(batch[1]))
    assert np.asarray(bgr[1].draw()).shape == batch[1].shape


def test_channels_matter():
    red = paint(100, 100, (20, 20, 60, 60))
    assert len(painted()(red)) == 1
    assert len(painted()(red[:, :, ::-1])) == 0
    assert len(painted()(red[:, :, ::-1].copy(), channels="BGR")) == 1


def test_grey_and_turned_pictures(tmp_path):
    predictor = tiny()
    grey = picture()[:, :, 0]
    assert equal(predictor(grey), predictor(np.repeat(grey[:, :, None], 3, 2)))
    turned = Image.fromarray(picture())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    found = predictor(tmp_path / "turned.png")
    assert found.image_size == (100, 72)
    assert equal(found, predictor(Image.open(tmp_path / "turned.png")))
    assert equal(found, predictor(np.rot90(picture(), -1)))
    assert found.draw().size == (72, 100)


def test_an_image_does_not_depend_on_its_neighbours():
    pictures = [picture(seed=1), picture(90, 60, seed=2), picture(seed=3), picture(500, 700, seed=4), picture(seed=5)]
    alone = [tiny()(p) for p in pictures]
    for one, other in zip(alone, tiny(batch_size=4)(pictures), strict=True):
        assert torch.allclose(one.boxes, other.boxes, atol=1e-3)
        assert torch.allclose(one.scores, other.scores, atol=1e-5)


def test_equal_sizes_run_together():
    predictor = painted(batch_size=3)
    predictor([paint(60, 80), paint(80, 60), paint(60, 80), paint(60, 80)])
    assert predictor.network.seen == [(2, 3, 800, 1066), (1, 3, 1066, 800), (1, 3, 800, 1066)]


def test_thresholds():
    everything = tiny()(picture())
    assert len(everything) == 10
    assert (everything.scores.diff() <= 0).all()
    limit = everything.scores[4].item()
    assert len(tiny_with(score_thresh=limit)) == 5
    assert len(tiny_with(max_detections=3)) == 3
    assert len(tiny_with(max_detections=1000)) == 36
    assert len(tiny_with(score_thresh=1)) == 0


def tiny_with(**options):
    return tiny(**options)(picture())


def test_one_label_per_box():
    logits = torch.tensor([[2.0, 1.9, -1], [0, 1, 1], [-3, -4, -5]])
    boxes = torch.rand(3, 4)
    found = one_label_detections(logits, boxes, (10, 10), 300)
    assert found.labels.tolist() == [0, 1, 0]
    assert torch.allclose(found.scores, torch.tensor([2.0, 1, -3]).sigmoid())
    assert len(one_label_detections(logits, boxes, (10, 10), 2).scores) == 2
    assert len({tuple(box) for box in tiny_with(select=one_label_detections).boxes.tolist()}) == 10


def test_suppression_within_classes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [6, 0, 16, 10]])
    found = Detections(boxes, torch.tensor([0.5, 0.9, 0.7, 0.6]), torch.tensor([0, 0, 1, 0]))
    assert suppress(found, 0.5).scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    batch = Detections(*(values[None] for values in found))
    assert len(tiny_with(select=lambda *_: batch)) == 4
    assert len(tiny_with(select=lambda *_: batch, nms=0.5)) == 3


def test_small_objects_are_found_in_tiles():
    """The whole picture is resized to a fifth, and its one box spans everything; tiles see each object alone."""
    boxes = [(100, 100, 140, 130), (2050, 800, 2090, 850), (3900, 1900, 3990, 1960)]
    predictor = painted(tile=1024)
    found = predictor(paint(2000, 4000, *boxes))
    whole, *rest = predictor.network.seen
    assert whole == (1, 3, 666, 1332)
    assert set(rest) == {(1, 3, 800, 800)}
    assert len(rest) == 3 * 5
    got = sorted(box for box in found.boxes.round().int().tolist() if box[2] - box[0] < 1000)
    assert np.allclose(got, sorted(boxes), atol=3)
    assert len(found) == 4
    assert len(painted(tile=4000)(paint(2000, 4000, *boxes))) == 1


@pytest.mark.parametrize("shape", [(1, 65_535), (65_535, 1)])
def test_tiles_of_an_extreme_shape_stay_small(shape):
    predictor = painted(tile=1024, batch_size=16)
    predictor(paint(*shape))
    assert len(predictor.network.seen) < 10
    assert sum(batch * height * width for batch, _, height, width in predictor.network.seen) < 200_000


def test_objects_on_a_cut_are_found_once():
    found = painted(tile=1024, batch_size=4)(paint(1000, 1900, (880, 300, 1020, 420)))
    assert len(found) == 1
    assert np.allclose(found.boxes[0], (880, 300, 1020, 420), atol=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_thresh": 2}, "score_thresh must be in"),
        ({"nms": -1}, "nms must be in"),
        ({"tile": 3}, "tile must be in"),
        ({"overlap": 1}, "overlap must be in"),
        ({"batch_size": 0}, "batch_size must be in"),
        ({"max_detections": -1}, "max_detections must be in"),
        ({"max_detections": 0}, "max_detections must be in"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\) of uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\) of uint8"),
        (np.zeros((4, 5, 3), np.float32), "float32"),
        (np.zeros((0, 5, 3), np.uint8), "holds no picture"),
        (np.zeros((1, 2, 3, 4), np.uint8), "must be"),
        (torch.zeros(4, 5, 3), r"not \(4, 5, 3\)"),
        (torch.zeros(3, 0, 3), r"not \(3, 0, 3\)"),
        (torch.full((3, 4, 5), 2.0), r"must lie in \[0, 1\]"),
        (torch.full((3, 4, 5), torch.nan), r"must lie in \[0, 1\]"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "int64"),
        ("absent.jpg", "input not found: absent.jpg"),
        ("absent/*.jpg", "no images match absent"),
        ("", "no images in the folder"),
    ],
)
def test_what_is_no_picture(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        tiny()(given)


@pytest.mark.parametrize("given", [7, None, b"abc", {"image": 1}, [3]])
def test_wrong_types(given):
    with pytest.raises(TypeError, match="a path, PIL image, array, tensor or list of them was expected, not "):
        tiny()(given)
    with pytest.raises(ValueError, match="channels must be"):
        tiny()(picture(), channels="rgb")


def test_broken_files_are_named_or_left_out(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "image_2.png").write_bytes((tmp_path / "image_2.png").read_bytes()[:300])
    (tmp_path / "image_3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"can't read image .*image_2\.png"):
        tiny()(tmp_path)
    errors = []
    found = list(tiny(batch_size=2).stream(tmp_path, on_error=errors.append))
    assert [f.source.name for f in found] == ["image_1.png", "image_4.png"]
    assert ["image_2.png" in str(errors[0]), "image_3.png" in str(errors[1])] == [True, True]


def test_pictures_of_extreme_shape():
    for height, width in ((1, 1), (1, 5000), (3000, 2)):
        found = tiny()(picture(height, width))
        assert torch.isfinite(found.boxes).all()
        assert found.draw().size == (width, height)


def test_numbers_that_are_none():
    predictor = tiny()
    with torch.no_grad():
        predictor.network.decoder.class_heads[-1].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="an image: the predictions are NaN or infinite"):
        predictor(picture())


def test_folding_changes_nothing_but_rounding(checkpoint):
    """Slots of the same token are compared: rounding can change which tokens are selected."""
    one = Predictor(detector_from_checkpoint(checkpoint), score_thresh=0)(picture())
    other = Predictor.from_checkpoint(checkpoint, device="cpu", score_thresh=0)(picture())
    assert torch.allclose(one.scores, other.scores, atol=1e-5)
    assert torch.allclose(one.boxes, other.boxes, atol=1e-2)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in Predictor.from_checkpoint(checkpoint).network.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(checkpoint, dtype):
    exact = Predictor.from_checkpoint(checkpoint, device="cpu", score_thresh=0)(picture())
    found = Predictor.from_checkpoint(checkpoint, device="cpu", dtype=dtype, score_thresh=0)(picture())
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert torch.allclose(found.scores, exact.scores, atol=0.05)


def compiled(backend, model, pictures, preprocessing=SMALL, **options):
    """How many graphs are compiled after each of these pictures, which must find what the network finds as it is."""
    graphs, counts = [], []

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    expected = [tiny(model, preprocessing)(p) for p in pictures]
    predictor = tiny(model, preprocessing).compile(backend=compile_graph, fullgraph=True, **options)
    for one, other in zip(map(predictor, pictures), expected, strict=True):
        assert torch.allclose(one.scores, other.scores, atol=1e-5)
        assert torch.allclose(one.boxes, other.boxes, atol=1e-3)
        counts.append(len(graphs))
    return counts


def test_compiled():
    """Traced whole, and run as the traced operators."""
    small = functools.partial(tiny_network, num_levels=2, num_layers=1)
    first, second = compiled("aot_eager", small, [picture(), picture(seed=1)], dynamic=False)
    assert first == second == len(PARTS) + 1  # the position encoding is called for each of two levels


@pytest.mark.slow
def test_compiled_for_any_size():
    """As `dino predict --compile` does: nothing is compiled for a second size.

    All levels have several cells: inductor compiles those of one cell by themselves. It can begin a part twice.
    """
    first, second = compiled(
        "inductor",
        tiny_network,
        [picture(130, 200), picture(210, 170)],
        SMALL._replace(short_side=160, max_size=320),
    )
    assert len(PARTS) <= first == second <= 2 * len(PARTS)


def test_bad_checkpoints(tmp_path):
    (tmp_path / "model.pth").write_text("no checkpoint")
    for name in ("model.pth", "absent.pth"):
        with pytest.raises(DataError, match=name):
            Predictor.from_checkpoint(tmp_path / name)


@pytest.mark.slow
def test_memory_stays_flat():
    """2,000 pictures of five sizes; what is measured is the peak, which can't fall."""
    predictor = tiny(batch_size=2)
    sizes = [(40, 60), (60, 40), (64, 64), (30, 90), (50, 52)]
    total = 0

    def pictures(count):
        for number in range(count):
            yield picture(*sizes[number % 5], seed=number)

    for found in predictor.stream(pictures(400)):
        total += len(found)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for found in predictor.stream(pictures(2000)):
        total += len(found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
    assert total == 2400 * 10


def test_drawing():
    pixels = np.full((120, 160, 3), 128, np.uint8)
    boxes = torch.tensor([[20.0, 30, 80, 90], [-5, -5, 30, 20], [100, 60, 170, 130]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 2])
    found = Prediction(Detections(boxes, scores, labels), ["a", "ü", "图"], (120, 160), pixels)
    drawn = np.asarray(found.draw())
    assert drawn.shape == pixels.shape
    assert (pixels == 128).all()
    changed = (drawn != 128).any(2)
    assert changed[89:91, 30:70].any()
    assert not changed[50:80, 30:70].any()
    assert len({tuple(c) for c in drawn[60, [20, 100]]} | {tuple(drawn[20, 10])}) == 3


def test_colours_differ():
    from dino.inference.palette import colour_of as _colour_of

    colours = np.array([_colour_of(label) for label in range(18)], float)
    distances = np.abs(colours[:, None] - colours[None]).sum(2) + 999 * np.eye(18)
    assert distances.min() > 30


BCCD = Path(os.environ.get("DINO_BCCD", Path(__file__).parents[3] / "shared/data/bccd"))


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"no photographs in {BCCD} (DINO_BCCD)")
def test_photographs(checkpoint):
    files = list_images(BCCD / "images")[:6]
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu", score_thresh=0, batch_size=3)
    for path, found in zip(files, predictor(files), strict=True):
        assert found.image_size == read_image(path).shape[:2]
        assert len(found) == 10


def test_cuda_graphs_find_the_same():
    """With a recorder that only pretends; on a CPU the network runs as ever."""
    plain, replayed = tiny(cuda_graphs=0), tiny(cuda_graphs=2)
    assert plain.detector.graphs is None
    recorder = replayed.detector.graphs.recorder = FakeRecorder()
    for number, size in enumerate(((72, 100), (72, 100), (100, 72), (72, 100))):
        assert equal(replayed(picture(*size, seed=number)), plain(picture(*size, seed=number)))
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    with pytest.raises(ValueError, match="cuda_graphs"):
        tiny(cuda_graphs=-1)


def test_few_tiles_are_resized_at_a_time(monkeypatch):
    predictor, seen = painted(tile=64), []
    detect = predictor.detector.detect
    monkeypatch.setattr(
        predictor.detector,
        "detect",
        lambda images, *args, **options: seen.append(len(images)) or detect(images, *args, **options),
    )
    predictor(paint(256, 512, (20, 20, 60, 60)))
    assert sum(seen) > 40
    assert max(seen) == 16
