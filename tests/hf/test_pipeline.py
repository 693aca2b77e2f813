"""`pipeline("object-detection")` of transformers with DINO, from a folder and from objects."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw

pytest.importorskip("transformers")
pytest.importorskip("timm")

from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

from dino.data.images import read_image, resize_image
from dino.hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino.modeling.detector import Detector, Preprocessing
from tests.tiny import stirred

from .tiny_model import NAMES, tiny_model

SIZE = {"shortest_edge": 60, "longest_edge": 100}


def draw(width, height, seed=0):
    """Coloured rectangles on noise."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(90, 160, (height, width, 3), dtype=np.uint8))
    for colour in ((230, 20, 20), (20, 230, 20), (20, 20, 230)):
        x, y = (int(random.integers(0, side - 30)) for side in (width, height))
        ImageDraw.Draw(image).rectangle((x, y, x + 25, y + 20), fill=colour)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model and its image processor."""
    model = tiny_model().eval()
    stirred(model)
    processor = DinoDetrImageProcessor(size=SIZE, max_detections=20, category_ids=[3, 8, 21])
    with torch.no_grad():  # scores on both sides of the threshold
        logits = model(**processor(draw(100, 70), return_tensors="pt")).logits
        model.model.network.decoder.class_heads[-1].bias -= logits.flatten().topk(11).values[-2:].mean()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detect(folder):
    return pipeline("object-detection", model=str(folder), device="cpu")


def test_the_pipeline_knows_the_model(folder, caplog):
    pipeline("object-detection", model=str(folder), device="cpu")
    assert not [record.message for record in caplog.records if record.levelname == "ERROR"]


def test_the_pipeline_does_not_ask_whether_to_run_code(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "n")
    pipeline("object-detection", model=str(folder), device="cpu")
    assert not asked


@pytest.fixture(scope="module")
def detector(folder):
    network = DinoDetrForObjectDetection.from_pretrained(folder).eval().model.network
    return Detector(network, Preprocessing(short_side=60, max_size=100, max_detections=20), list(NAMES.values())).eval()


def expect(detector, image, threshold=0.5):
    """What the pipeline must say of a picture, by `Detector`."""
    picture = np.asarray(image)
    resized = torch.from_numpy(resize_image(picture, detector.size(*picture.shape[:2]))).permute(2, 0, 1)
    (found,) = detector.detect([resized], [picture.shape[:2]])
    kept = found.scores > threshold
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        {"score": score, "label": detector.names[label], "box": dict(zip(corners, box, strict=True))}
        for score, label, box in zip(
            found.scores[kept].tolist(), found.labels[kept].tolist(), found.boxes[kept].int().tolist(), strict=True
        )
    ]


def check(found, wanted):
    assert [(one["label"], one["box"]) for one in found] == [(one["label"], one["box"]) for one in wanted]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in wanted], abs=1e-6)


def test_the_folder_gives_our_classes(folder):
    assert type(AutoModelForObjectDetection.from_pretrained(folder)) is DinoDetrForObjectDetection
    for options in ({}, {"use_fast": True}, {"use_fast": False}):
        processor = AutoImageProcessor.from_pretrained(folder, **options)
        assert type(processor) is DinoDetrImageProcessor
        assert (processor.category_ids, processor.max_detections) == ([3, 8, 21], 20)


def test_a_picture(detect, detector):
    image = draw(100, 70)
    found, wanted = detect(image), expect(detector, image)
    assert 0 < len(wanted) < 20
    check(found, wanted)
    assert len(detect(image, threshold=0.0)) == 20
    check(detect(image, threshold=0.6), expect(detector, image, 0.6))


def test_files_are_turned_upright(detect, detector, tmp_path):
    exif, path = Image.Exif(), tmp_path / "turned.png"
    exif[ExifTags.Base.Orientation] = 6
    draw(100, 70).save(path, exif=exif)
    upright = Image.fromarray(read_image(path))
    assert upright.size == (70, 100)
    check(detect(str(path)), expect(detector, upright))


def test_several_pictures_of_several_sizes(detect, detector):
    images = [draw(100, 70), draw(65, 90, 1), draw(100, 70, 2)]
    for found, image in zip(detect(images), images, strict=True):
        check(found, expect(detector, image))


def test_batches_of_pictures_of_one_size(detect, detector):
    images = [draw(100, 70, seed) for seed in range(3)]
    for found, image in zip(detect(images, batch_size=2), images, strict=True):
        check(found, expect(detector, image))


def test_batches_of_several_sizes_need_pad_size(folder, detect):
    """transformers stacks the pictures of a batch as they are."""
    images = [draw(100, 70), draw(65, 90, 1)]
    with pytest.raises(RuntimeError, match="size"):
        detect(images, batch_size=2)
    processor = DinoDetrImageProcessor.from_pretrained(folder, pad_size={"height": 100, "width": 100})
    model = AutoModelForObjectDetection.from_pretrained(folder)
    padded = pipeline("object-detection", model=model, image_processor=processor, device="cpu")
    for alone, together in zip(padded(images), padded(images, batch_size=2), strict=True):
        check(together, alone)
