import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from dino.d2 import DINODetector
from dino.d2.instances import ClippedInstances, UnclippedInstances
from dino.modeling.backbones import Padding

from ..modeling.test_transfers import Waits
from .tiny import random_input, tiny_detector

SETS = ("", "_0", "_interm", "_dn", "_dn_0")  # of predictions, with two decoder layers
NAMES = {f"loss_{term}{which}" for term in ("ce", "bbox", "giou") for which in SETS}


def losses_of(model, inputs, seed=3):
    """Training losses with a fixed draw of the denoising noise."""
    torch.manual_seed(seed)
    return model.train()(inputs)


def detect(model, inputs):
    return [result["instances"] for result in model.eval()(inputs)]


def assert_all_trained(model, inputs):
    """Finite losses, and a finite gradient for every trainable parameter, be it zero."""
    losses = losses_of(model, inputs)
    assert all(torch.isfinite(loss) for loss in losses.values())
    model.zero_grad()
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    return losses


def test_is_registered():
    assert META_ARCH_REGISTRY.get("DINODetector") is DINODetector


def test_training_returns_named_scalars():
    losses = losses_of(tiny_detector(), [random_input("a.png"), random_input("b.png", height=48)])
    assert set(losses) == NAMES
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad for loss in losses.values())


def test_detection_returns_sorted_instances():
    found = detect(tiny_detector(max_detections=9), [random_input("a.png"), random_input("b.png", height=48)])
    assert [f.image_size for f in found] == [(64, 80), (48, 80)]
    for instances in found:
        assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        assert instances.pred_boxes.tensor.shape == (9, 4)
        assert torch.equal(instances.scores, instances.scores.sort(descending=True).values)
        assert instances.pred_classes.min() >= 0
        assert instances.pred_classes.max() < 3


def test_detection_needs_neither_annotations_nor_sizes():
    (found,) = detect(tiny_detector(), [{"image": torch.zeros(3, 40, 56)}])
    assert found.image_size == (40, 56)


def test_detection_builds_no_graph():
    (found,) = detect(tiny_detector(), [random_input("a.png")])
    assert not found.scores.requires_grad


@pytest.mark.parametrize("size", [(96, 112), (64, 112), (64, 80)], ids=["larger", "wider", "equal"])
def test_an_image_does_not_depend_on_its_neighbour(size):
    model, image = tiny_detector(), random_input("a.png")
    (alone,) = detect(model, [image])
    neighbour = random_input("b.png", height=size[0], width=size[1])
    for beside in (detect(model, [image, neighbour])[0], detect(model, [neighbour, image])[1]):
        assert torch.equal(beside.pred_classes, alone.pred_classes)
        torch.testing.assert_close(beside.scores, alone.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(beside.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=0, atol=1e-3)


def test_images_of_mixed_sizes_keep_their_order():
    model = tiny_detector()
    inputs = [random_input(str(n), height=h) for n, h in enumerate((64, 48, 64, 56, 48))]
    for together, image in zip(detect(model, inputs), inputs, strict=True):
        torch.testing.assert_close(together.scores, detect(model, [image])[0].scores, rtol=0, atol=1e-5)


def test_padding_in_a_training_batch_is_masked():
    model = tiny_detector()
    images, padding = model.batch([random_input("a.png")["image"], random_input("b.png", 1, 48, 96)["image"]])
    assert images.shape == (2, 3, 64, 96)
    assert not images[padding[:, None].expand_as(images)].any()
    assert padding[0].equal((torch.arange(96) >= 80).expand(64, -1))
    assert padding[1].equal((torch.arange(64) >= 48)[:, None].expand(-1, 96))


def test_pixels_are_normalised():
    model = tiny_detector()
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(-1, 32, 32)
    images, _ = model.batch([pixel])
    expected = torch.tensor([(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375])
    torch.testing.assert_close(images[0, :, 5, 5], expected)


def test_pixel_statistics_move_with_the_model_but_are_not_stored():
    model = tiny_detector()
    assert {"pixel_mean", "pixel_std"} <= dict(model.named_buffers()).keys()
    assert not any("pixel" in key for key in model.state_dict())


@pytest.mark.parametrize("counts", [(2, 0), (0, 0), (0,)])
def test_images_without_objects(counts):
    losses = assert_all_trained(tiny_detector(), [random_input(str(n), count) for n, count in enumerate(counts)])
    assert set(losses) == NAMES
    if not any(counts):
        assert all(losses[name] == 0 for name in losses if "bbox" in name or "giou" in name or "dn" in name)


@pytest.mark.parametrize("label", [3, -1, 90])
def test_labels_out_of_range_name_the_file(label):
    inputs = [random_input("good.png"), random_input("bad.png")]
    inputs[1]["instances"].gt_classes[1] = label
    with pytest.raises(ValueError, match=rf"bad\.png: label {label} is not in \[0, 3\)"):
        losses_of(tiny_detector(), inputs)


@pytest.mark.parametrize("training", [True, False])
def test_data_of_another_number_of_classes_says_what_to_set(training):
    """Of fewer classes no label is out of range, so that nothing else would notice it."""
    model = tiny_detector().train(training)
    with pytest.raises(ValueError, match=r"b.png: the data has 2 classes, the model 3: .*cfg\.model\.num_classes"):
        model([random_input("a.png"), {**random_input("b.png"), "num_classes": 2}])


def test_detections_below_the_threshold_are_left_out():
    model, inputs = tiny_detector(), [random_input("a.png")]
    everything = detect(model, inputs)[0]
    model.score_thresh = everything.scores.median().item()
    found = detect(model, inputs)[0]
    assert 0 < len(found) < len(everything)
    assert torch.equal(found.scores, everything.scores[everything.scores >= model.score_thresh])


def test_non_finite_predictions_name_the_file():
    inputs = [random_input("good.png"), random_input("bad.png")]
    inputs[1]["image"] = torch.full((3, 64, 80), float("nan"))
    with pytest.raises(FloatingPointError, match=r"predictions for bad\.png.*batch: good\.png, bad\.png"):
        losses_of(tiny_detector(), inputs)


def test_detection_with_broken_weights_names_the_file():
    model = tiny_detector().eval()
    nn.init.constant_(model.network.decoder.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match=r"photo\.png: the predictions are NaN or infinite"):
        model([random_input("photo.png")])


def test_detection_names_the_image_of_a_batch():
    inputs = [random_input(name) for name in ("good.png", "bad.png", "fine.png")]
    inputs[1]["image"] = torch.full((3, 64, 80), float("nan"))
    with pytest.raises(FloatingPointError, match=r"^bad\.png: the predictions"):
        tiny_detector().eval()(inputs)


@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
def test_detection_reads_back_once_per_batch(monkeypatch, clips):
    """Whether all is finite, and whether no clipped box is empty, in one transfer each: nothing else is asked for."""
    asked, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (asked.append(x.shape), tolist(x))[1])
    model, inputs = tiny_detector().eval(), [random_input(f"{n}.png") for n in range(3)]
    model.instances = ClippedInstances() if clips else UnclippedInstances()
    with Waits() as waits:
        found = model(inputs)
    assert len(found) == 3
    assert waits.seen == []
    assert asked == [(3,)] * (1 + clips)


def test_images_without_file_name_are_called_by_their_id():
    image = {**random_input(None), "image_id": 17}
    image["instances"].gt_classes[0] = 3
    with pytest.raises(ValueError, match="image 17: label 3"):
        losses_of(tiny_detector(), [image])


def test_boxes_refer_to_the_picture_that_the_image_was_made_from():
    model, image = tiny_detector(), random_input("a.png", height=64, width=80)
    (small,), (large,) = (detect(model, [image | size]) for size in ({}, {"height": 640, "width": 160}))
    assert large.image_size == (640, 160)
    factor = torch.tensor([2.0, 10.0, 2.0, 10.0])
    torch.testing.assert_close(large.pred_boxes.tensor, small.pred_boxes.tensor * factor)
    assert torch.equal(large.scores, small.scores)


def test_fewer_tokens_than_queries():
    """An image smaller than 208 pixels has fewer than 900 cells."""
    model = tiny_detector(num_queries=900, max_detections=300)
    inputs = [random_input("a.png", 3, height=64, width=64)]
    (found,) = detect(model, inputs)
    tokens = 64 + 16 + 4 + 1
    assert len(found) == 3 * tokens
    assert found.pred_boxes.tensor.isfinite().all()
    losses = assert_all_trained(model, inputs)
    assert set(losses) == NAMES


def test_an_image_of_one_cell():
    model = tiny_detector()
    (found,) = detect(model, [random_input("a.png", height=7, width=5)])
    assert found.pred_boxes.tensor.isfinite().all()
    assert_all_trained(model, [random_input("a.png", 1, height=7, width=5), random_input("b.png", height=7, width=5)])


def test_more_objects_than_denoising_slots_and_queries():
    model = tiny_detector(num_queries=12, num_denoising=6)
    slots = []
    model.network.decoder.register_forward_pre_hook(lambda _, args: slots.append(args[0].content.shape[1]))
    losses = assert_all_trained(model, [random_input("crowd.png", 40), random_input("few.png", 1)])
    assert set(losses) == NAMES
    assert slots == [2 * 6 + 12]


def test_denoising_switched_off():
    model = tiny_detector(num_denoising=0)
    losses = assert_all_trained(model, [random_input("a.png")])
    assert all(losses[name] == 0 for name in losses if "dn" in name)


def test_one_class():
    model = tiny_detector(num_classes=1, num_queries=12, max_detections=300)
    inputs = [random_input("a.png", num_classes=1)]
    assert_all_trained(model, inputs)
    (found,) = detect(model, inputs)
    assert len(found) == 12  # as many as there are (query, class) pairs, not the 300 that were asked for
    assert not found.pred_classes.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype):
    model, inputs = tiny_detector(), [random_input("a.png"), random_input("b.png", height=48)]
    exact = losses_of(model, inputs)
    seen = set()
    model.network.encoder.layers[0].feed_forward.linear1.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    with torch.autocast("cpu", dtype):
        losses = assert_all_trained(model, inputs)
    assert seen == {dtype}
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    total, exact_total = (sum(x.values()).item() for x in (losses, exact))
    assert total == pytest.approx(exact_total, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_detection_under_autocast(dtype):
    model, inputs = tiny_detector(), [random_input("a.png")]
    with torch.autocast("cpu", dtype):
        (found,) = detect(model, inputs)
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    torch.testing.assert_close(found.scores, detect(model, inputs)[0].scores, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_detection_with_half_weights(dtype):
    model, inputs = tiny_detector(), [random_input("a.png")]
    (exact,) = detect(model, inputs)
    (found,) = detect(model.to(dtype), inputs)
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    torch.testing.assert_close(found.scores, exact.scores, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("image_type", [torch.uint8, torch.float32])
def test_images_of_either_type(image_type):
    model, image = tiny_detector(), random_input("a.png")
    (expected,) = detect(model, [image])
    (found,) = detect(model, [image | {"image": image["image"].to(image_type)}])
    assert torch.equal(found.scores, expected.scores)


def test_backbones_that_ask_for_padding_get_it():
    """In the neck, on whatever road the images come; what leaves the detector keeps the size of the image."""
    model = tiny_detector()
    seen = []
    backbone = model.network.neck.backbone
    backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    image = random_input("a.png", height=40, width=56)
    (unpadded,) = detect(model, [image])
    model.network.neck.padding = Padding(multiple=32, square=0)
    (padded,) = detect(model, [image])
    assert seen == [(40, 56), (64, 64)]
    assert padded.image_size == unpadded.image_size == (40, 56)
    images, padding = model.batch([image["image"]])
    assert images.shape[-2:] == (40, 56)
    assert padding is None


def test_visualizer_draws_the_predictions():
    visualizer = pytest.importorskip("detectron2.utils.visualizer", reason="OpenCV is not installed")
    image = random_input("a.png", height=64, width=80)
    (found,) = detect(tiny_detector(), [image])
    pixels = image["image"].permute(1, 2, 0).numpy()
    metadata = Metadata(name="tiny", thing_classes=["red", "green", "blue"])
    drawn = visualizer.Visualizer(pixels, metadata).draw_instance_predictions(found.to("cpu")).get_image()
    assert drawn.shape == pixels.shape
    assert np.abs(drawn.astype(int) - pixels).sum() > 0


def test_parts_of_the_network_are_modules():
    """So that `.to(device)`, `.train()` and checkpoints reach them."""
    model = tiny_detector()
    assert all(isinstance(part, nn.Module) for part in (model.network, model.criterion, model.criterion.matcher))


def test_the_number_of_detections_can_be_set():
    model = tiny_detector(max_detections=20)
    assert model.max_detections == 20
    model.max_detections = 5
    assert len(detect(model, [random_input("a.png")])[0]) == 5
