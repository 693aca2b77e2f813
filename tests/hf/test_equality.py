"""The model of transformers computes what `Detector` computes, and so what the official program does."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("timm")

from dino.data.images import resize_image
from dino.hf import DinoDetrImageProcessor
from dino.layers import HungarianMatcher, SetCriterion
from dino.modeling.detector import Detector, Preprocessing, to_target
from tests.tiny import stirred

from .tiny_model import tiny_model

SIZE, IDS = {"shortest_edge": 60, "longest_edge": 100}, [3, 8, 21]
LARGE, SMALL = (70, 100), (90, 65)  # height, width


@pytest.fixture(scope="module")
def model():
    model = tiny_model().eval()
    stirred(model)
    return model


@pytest.fixture(scope="module")
def detector(model):
    """The same network with this project's own preprocessing and criterion."""
    settings, criterion = Preprocessing(short_side=60, max_size=100), SetCriterion(matcher=HungarianMatcher())
    return Detector(model.model.network, settings, ["a", "b", "c"], criterion=criterion).eval()


@pytest.fixture(scope="module")
def processor():
    return DinoDetrImageProcessor(size=SIZE, category_ids=IDS)


def pixels(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(detector, *pictures):
    """What `Detector.detect` takes for pictures (H, W, 3)."""
    images = [resize_image(picture, detector.size(*picture.shape[:2])) for picture in pictures]
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


def check(found, outputs):
    """Compare outputs of the model with those of the network."""
    for layer in range(len(outputs.decoder.logits)):
        assert torch.allclose(found.intermediate_logits[:, layer], outputs.decoder.logits[layer], atol=1e-6, rtol=0)
        places = found.intermediate_reference_points[:, layer]
        assert torch.allclose(places, outputs.decoder.boxes[layer], atol=1e-6, rtol=0)
    assert torch.equal(found.logits, found.intermediate_logits[:, -1])
    assert torch.equal(found.pred_boxes, found.intermediate_reference_points[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["wide", "high"])
def test_a_picture_alone(model, detector, processor, size):
    picture = pixels(*size)
    found = model(**processor(Image.fromarray(picture), return_tensors="pt"))
    images = resized(detector, picture)
    check(found, detector.network(*detector.batch(images)))
    (wanted,) = detector.detect(images, [size])
    (detected,) = processor.post_process_object_detection(found, 0, [size])
    assert len(wanted.scores) == 60
    assert torch.equal(detected["labels"], wanted.labels)
    assert torch.allclose(detected["scores"], wanted.scores, atol=1e-6, rtol=0)
    assert torch.allclose(detected["boxes"], wanted.boxes, atol=1e-4, rtol=0)  # pixels


@torch.no_grad()
def test_a_padded_batch(model, detector, processor):
    pictures = [pixels(*LARGE), pixels(*SMALL)]
    inputs = processor(pictures, return_tensors="pt")
    images, padding = detector.batch(resized(detector, *pictures))
    assert padding.any()
    check(model(**inputs), detector.network(images, padding))


@torch.no_grad()
def test_losses_of_a_padded_batch(model, detector, processor):
    """Without denoising, so that nothing is drawn."""
    pictures, boxes = [pixels(*LARGE), pixels(*SMALL)], torch.tensor([[10.0, 20, 40, 45]])
    objects = [{"bbox": [10, 20, 30, 25], "category_id": 21, "area": 750, "iscrowd": 0}]
    annotations = [{"image_id": number, "annotations": objects[number:]} for number in (0, 1)]  # one, and none
    inputs = processor(pictures, annotations=annotations, return_tensors="pt")
    targets = [to_target(torch.tensor([2]), boxes, LARGE), to_target(torch.zeros(0).long(), boxes[:0], SMALL)]
    images, padding = detector.batch(resized(detector, *pictures))
    wanted = detector.criterion(detector.network(images, padding), targets)
    found = model(**inputs)
    assert torch.isfinite(found.loss)
    assert set(found.loss_dict) == set(wanted)
    for name, loss in wanted.items():
        assert torch.allclose(found.loss_dict[name], loss, atol=1e-6, rtol=1e-6), name
    assert torch.allclose(found.loss, sum(wanted.values()), rtol=1e-6)


def test_collated_samples_train(model, processor):
    objects = [{"bbox": [10, 20, 30, 25], "category_id": 8}]
    samples = [
        processor(pixels(*size), annotations={"image_id": 1, "annotations": objects * number}, return_tensors="pt")
        for number, size in enumerate([LARGE, SMALL, LARGE])
    ]
    model = copy.deepcopy(model).train()
    model(**processor.collate(samples)).loss.backward()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(gradients) == set(learning)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@torch.no_grad()
def test_pictures_of_one_size_do_not_depend_on_the_batch_but_padding_changes_results(model, processor):
    """As in every DETR: zeros reach GroupNorm and the borders of convolutions. `Detector.detect` never pads."""
    picture, same, other = pixels(*LARGE), pixels(*LARGE)[::-1].copy(), pixels(*SMALL)
    alone, together, padded = (model(**processor(batch)) for batch in ([picture], [picture, same], [picture, other]))
    assert torch.allclose(together.logits[0], alone.logits[0], atol=1e-5, rtol=0)
    assert torch.allclose(together.pred_boxes[0], alone.pred_boxes[0], atol=1e-5, rtol=0)
    assert not torch.allclose(padded.logits[0], alone.logits[0], atol=1e-3, rtol=0)


@torch.no_grad()
def test_a_mask_without_padding_changes_nothing(model, processor):
    inputs = processor(pixels(*LARGE), return_tensors="pt")
    assert inputs["pixel_mask"].all()
    masked, bare = model(**inputs), model(inputs["pixel_values"])
    assert torch.allclose(masked.logits, bare.logits, atol=1e-6, rtol=0)
    assert torch.allclose(masked.pred_boxes, bare.pred_boxes, atol=1e-6, rtol=0)
