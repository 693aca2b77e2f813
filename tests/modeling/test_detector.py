import copy

import pytest
import torch
from torch import nn

from dino.layers import LayerOutputs, NonFiniteCostError, Outputs, Target, one_label_detections
from dino.modeling import CudaGraphs, detector
from dino.modeling.detector import IMAGENET_MEAN, IMAGENET_STD, Detector, Preprocessing, resized_size, to_target

from ..tiny import default_criterion, random_targets, tiny_network
from ..weights.states import randomise
from .test_cuda_graphs import FakeRecorder

SMALL = Preprocessing(max_detections=10)


def make(preprocessing=SMALL, **options):
    torch.manual_seed(0)
    return Detector(randomise(tiny_network(num_layers=1)), preprocessing, ["a", "b", "c"], **options).eval()


def image(height=64, width=80, seed=0):
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_equal(one, other, **tolerances):
    for name, first, second in zip(one._fields, one, other, strict=True):
        torch.testing.assert_close(first, second, msg=name, **tolerances)


class Spy(nn.Module):
    """In place of a network: keeps its inputs, and finds one box of class 0 in the middle of every image."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.seen = []

    def forward(self, images, padding, targets=None):
        self.seen.append((images, padding))
        boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(1, len(images), 1, 4)
        found = LayerOutputs(torch.tensor([2.0, -1.0]).expand(1, len(images), 1, 2), boxes)
        return Outputs(found, found)


@pytest.mark.parametrize("max_size", [1333, None])
def test_extreme_shapes_stay_bounded(max_size):
    for height, width in ((1, 65_535), (65_535, 1), (3, 65_535), (65_535, 65_535), (1, 1)):
        new = resized_size(height, width, 800, max_size)
        assert min(new) >= 1
        assert max(new) <= (2 * max_size if max_size else 128 * 800)
    assert resized_size(1, 65_535, 800, 1333) == (1, 2666)
    assert resized_size(10, 20_000, 800, 1333) == (1, 2000)


def test_equal_images_become_a_normalised_batch_without_padding():
    images, padding = make().batch([image(seed=1), image(seed=2)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(images[1], (image(seed=2).float() - mean) / std)
    assert padding is None


def test_a_batch_of_unequal_images_is_zero_where_padded():
    first, second = image(64, 80), image(48, 96)
    images, padding = make().batch([first, second])
    assert images.shape == (2, 3, 64, 96)
    assert torch.equal(padding[0], (torch.arange(96) >= 80).expand(64, -1))
    assert torch.equal(padding[1], (torch.arange(64) >= 48)[:, None].expand(-1, 96))
    assert not images[padding[:, None].expand_as(images)].any()
    for i, (single, (h, w)) in enumerate(((first, (64, 80)), (second, (48, 96)))):
        assert torch.equal(images[i, :, :h, :w], make().batch([single])[0][0])


def test_images_of_several_types_in_a_batch():
    floats = image(48, 96).float() + 0.25
    images, _ = make().batch([image(64, 80), floats])
    assert torch.equal(images[1, :, :48], make().batch([floats])[0][0])


def test_half_networks_get_images_that_were_normalised_in_float32():
    half = Detector(Spy(torch.bfloat16))
    images, _ = half.batch([image()])
    assert images.dtype == torch.bfloat16
    assert torch.equal(images, Detector(Spy()).batch([image()])[0].bfloat16())


def test_images_of_equal_size_run_together_and_none_is_padded():
    spy = Spy()
    Detector(spy).detect([image(40, 48), image(48, 40), image(40, 48), image(40, 48)], batch_size=2)
    assert [images.shape for images, _ in spy.seen] == [(2, 3, 40, 48), (1, 3, 40, 48), (1, 3, 48, 40)]
    assert all(padding is None for _, padding in spy.seen)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_result_does_not_depend_on_its_batch(batch_size):
    images = [image(h, 80, seed) for seed, h in enumerate((64, 48, 64, 56, 48, 64))]
    for alone, together in zip(images, make().detect(images, batch_size=batch_size), strict=True):
        (expected,) = make().detect([alone])
        assert_equal(together, expected, rtol=0, atol=1e-3)


def test_boxes_are_in_pixels_of_the_picture():
    detect = Detector(Spy()).detect
    (own,), (scaled,) = detect([image(100, 200)]), detect([image(100, 200)], [(1000, 400)])
    torch.testing.assert_close(own.boxes[0], torch.tensor([80.0, 30, 120, 70]))
    torch.testing.assert_close(scaled.boxes[0], torch.tensor([160.0, 300, 240, 700]))
    assert own.labels.tolist() == [0, 1]


def test_the_choice_of_detections_is_injected():
    images, every = [image(), image(seed=1)], Preprocessing(max_detections=36)  # 12 queries of 3 classes
    assert all(len(found.boxes) == 36 for found in make(every).detect(images))
    for found in make(every, select=one_label_detections).detect(images):
        assert len(found.boxes) == len({tuple(box) for box in found.boxes.tolist()}) == 12
    assert len(make(Preprocessing(max_detections=4)).detect(images)[0].scores) == 4


@pytest.mark.parametrize(("sources", "name"), [(["a.png", "b.png"], "b.png"), ((), "image 1 of the batch")])
def test_the_image_of_a_non_finite_prediction_is_named(sources, name):
    broken = torch.full((3, 64, 80), torch.nan)
    with pytest.raises(FloatingPointError, match=f"^{name}: the predictions are NaN or infinite"):
        make().detect([image(), broken], sources=sources)


def test_training_on_images_of_any_size_reaches_all_parameters():
    model = make(criterion=default_criterion()).train()
    images, targets = [image(64, 80), image(48, 96)], random_targets(2, 1)
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.manual_seed(3)
    found = model.losses(images, targets)
    torch.manual_seed(3)
    expected = default_criterion()(model.network(*model.batch(images), targets), targets)
    assert {name: loss.item() for name, loss in found.items()} == {k: v.item() for k, v in expected.items()}


def test_detecting_is_the_call_without_targets():
    model = make()
    assert_equal(model([image()])[0], model.detect([image()])[0])


def test_options_of_the_criterion_are_passed_on_where_they_are_not_the_default():
    seen = []

    def losses(outputs, targets, **options):
        seen.append(options)
        return {"loss": outputs.decoder.boxes.sum()}

    model, normalizer = Detector(Spy(), criterion=losses), torch.ones(2)
    for options in ({}, {"normalizer": None, "non_finite": "raise"}, {"normalizer": normalizer, "non_finite": "match"}):
        model.losses([image()], random_targets(1), **options)
    assert seen[:2] == [{}, {}]
    assert seen[2]["normalizer"] is normalizer
    assert seen[2]["non_finite"] == "match"


def test_the_image_of_a_non_finite_cost_is_named():
    def refuse(outputs, targets):
        raise NonFiniteCostError(image=1)

    model = Detector(Spy(), criterion=refuse)
    with pytest.raises(FloatingPointError, match=r"predictions for b\.png \(batch: a\.png, b\.png\)"):
        model.losses([image()] * 2, random_targets(1, 1), sources=["a.png", "b.png"])


def test_the_normalizer_counts_objects_and_denoised_objects(monkeypatch):
    model = make()
    monkeypatch.setattr(model.network.denoising, "num_denoised", lambda counts: 10 * max(counts))
    monkeypatch.setattr(detector, "global_loss_normalizer", lambda *args: args)
    assert model.loss_normalizer([2, 0, 3]) == (5, 30, torch.device("cpu"))


def test_graphs_are_replayed_within_the_block_only(monkeypatch):
    recorder = FakeRecorder()
    monkeypatch.setattr(detector, "CudaGraphs", lambda net, most: CudaGraphs(net, most=most, recorder=recorder))
    model, images = make(), [image(seed=seed) for seed in range(3)]
    expected = [model.detect([x])[0] for x in images]
    with model.replay(2):
        for x, one in zip(images, expected, strict=True):
            assert_equal(model.detect([x])[0], one)
        assert (recorder.recorded, recorder.replayed) == (1, 2)
        with model.replay(0):
            model.detect(images[:1])
        assert recorder.replayed == 2
        model.detect(images[:1])
        assert recorder.replayed == 3
    model.detect(images[:1])
    assert recorder.replayed == 3


def test_sizes_are_those_of_the_preprocessing():
    model = Detector(Spy(), Preprocessing(short_side=100, max_size=150))
    assert model.size(200, 400) == resized_size(200, 400, 100, 150) == (75, 150)
    assert model.size(400, 500) == (100, 125)


def test_objects_in_pixels_become_fractions_of_the_image():
    found = to_target(torch.tensor([2]), torch.tensor([[10.0, 20, 30, 60]]), (100, 40))
    assert isinstance(found, Target)
    torch.testing.assert_close(found.boxes, torch.tensor([[0.5, 0.4, 0.5, 0.4]]))


def test_copies_share_nothing():
    model = make()
    other = copy.deepcopy(model)
    nn.init.zeros_(other.network.level_embed)
    assert model.network.level_embed.any()
    assert not any(key.startswith("pixel") for key in model.state_dict())
    assert all(key.startswith("network.") for key in model.state_dict())
