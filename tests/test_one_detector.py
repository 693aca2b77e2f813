"""One code for preprocessing and post-processing: every adapter finds the same, and no other module has its own."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino import cli
from dino.explain import explain_batch as explain
from dino.export.export_wrapper import ExportWrapper
from dino.inference.predictor import Predictor
from dino.layers import Detections
from dino.modeling.detector import Detector, Preprocessing

from .coco_files import NAMES, write_coco
from .tiny import default_criterion, tiny_network
from .weights.states import randomise

PACKAGE = Path(__file__).parents[1] / "dino"
HEIGHT, WIDTH = 64, 80
PREPROCESSING = Preprocessing((120.0, 110.0, 100.0), (50.0, 60.0, 70.0), HEIGHT, 96, 20)
# What only some modules may say: normalisation, padding, pairs of query and class; the detector and who reads settings.
OWNERS = {
    r"pixel_std|PIXEL_STD": {
        "modeling/detector.py",
        "d2/meta_arch.py",  # constructor
        "d2/config.py",  # yacs
        "d2/recipe_description.py",
        "modeling/backbones.py",  # those of timm's weights
        "weights/description.py",
        "weights/file_facts.py",  # what a file says
        "weights/transformers_preprocessing.py",  # what an image processor of transformers says
        "training/file_settings.py",  # the recipe's settings
    },
    r"58\.395|0\.229": {"modeling/detector.py"},
    r"IMAGENET_STD": {"modeling/detector.py", "d2/meta_arch.py", "d2/config.py", "weights/imagenet.py"},
    r"\bNormalize\(|ImageList": set(),
    r"padding = torch\.(ones|zeros)|>= sizes": {"modeling/detector.py"},
    r"\.topk\(": {"layers/postprocess.py", "modeling/transformer.py", "modeling/variants/query_selection.py"},
    r"batched_nms\(": {"inference/tiling.py"},
}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return randomise(tiny_network()).eval()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def of_instances(detector, pixels):
    (result,) = detector([{"image": torch.from_numpy(pixels).permute(2, 0, 1)}])
    found = result["instances"]
    return Detections(found.pred_boxes.tensor, found.scores, found.pred_classes)


def test_all_adapters_find_the_same(network, picture):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dino.d2.augmented_detector import AugmentedDetector
    from dino.d2.meta_arch import DINODetector
    from dino.d2.tiled_detector import TiledDetector

    plain = Detector(network, PREPROCESSING, NAMES).eval()
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    (expected,) = plain.detect([pixels])
    parts = {"network": network, "criterion": default_criterion(), "num_classes": 3, "max_detections": 20}
    parts |= {"pixel_mean": PREPROCESSING.pixel_mean, "pixel_std": PREPROCESSING.pixel_std}
    tiled = TiledDetector(**parts, short_side=HEIGHT, max_size=96, tile=WIDTH)
    augmented = AugmentedDetector(**parts, sizes=[HEIGHT], flips=[False], overlap=1.0)
    exported = ExportWrapper(plain)(pixels[None], torch.tensor([[HEIGHT, WIDTH]]))
    results = {
        "DINODetector": of_instances(DINODetector(**parts).eval(), picture),
        "TiledDetector": of_instances(tiled.eval(), picture),
        "AugmentedDetector": of_instances(augmented.eval(), picture),
        "Predictor": Predictor(plain, score_thresh=0)(picture).detections,
        "Predictor of tiles": Predictor(plain, score_thresh=0, tile=WIDTH)(picture).detections,
        "ExportWrapper": Detections(*(values[0] for values in exported)),
    }
    for name, found in results.items():
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4, msg=name)


def test_explanations_begin_with_the_same_pixels(network, picture, tmp_path, monkeypatch):
    data = write_coco(tmp_path)
    with Image.open(Path(data.images) / "image_1.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    short = min(pixels.shape[1:])
    detector = Detector(network, PREPROCESSING._replace(short_side=short, max_size=None), NAMES).eval()
    seen = []

    def keep(network, images, padding, targets, criterion):
        seen.append(images)
        raise ValueError("enough")

    monkeypatch.setattr(explain, "detector_from_checkpoint", lambda path: detector)
    monkeypatch.setattr(explain, "record", keep)
    weights = tmp_path / "w.pth"
    weights.touch()
    words = [str(weights), data.annotations, data.images, "--image=image_1.png", f"--output={tmp_path / 'out'}"]
    assert cli.main(["explain", *words]) == 1
    assert torch.equal(seen[0], detector.batch([pixels])[0])


@pytest.mark.parametrize("pattern", OWNERS)
def test_nobody_else_prepares_images_or_chooses_detections(pattern):
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name for name, text in files.items() if re.search(pattern, text)} == OWNERS[pattern]


def test_such_code_would_be_found():
    copied = "images = (images - about.pixel_mean) / about.pixel_std\nscores, pair = scores.topk(300)"
    assert sum(bool(re.search(pattern, copied)) for pattern in OWNERS) == 2
