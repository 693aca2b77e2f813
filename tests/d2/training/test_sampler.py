import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import random
from collections import Counter
from itertools import islice

import numpy as np
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from torch.utils.data._utils.pin_memory import pin_memory

from dino.d2.training import sampler
from dino.d2.training.sampler import TrainLoader, seed_random
from dino.training.image_order import endless_order, repeat_factors
from dino.utils.files import DataError

from ..tiny import random_input

IMAGES = [
    {"image_id": n, "width": 40 + 30 * (n % 2), "height": 50, "annotations": [{"category_id": int(n == 0)}]}
    for n in range(10)
]


def drawing(entry):
    """A mapper that draws from all three generators, as augmentations do."""
    return {**entry, "drawn": (random.random(), np.random.rand(), torch.rand(()).item())}


def loader(start=0, parts=1, num_workers=0, seed=3, **options):
    made = TrainLoader(IMAGES, drawing, total_batch_size=4, num_workers=num_workers, **options)
    made.seed, made.start, made.parts = seed, start, parts
    return made


def batches(count, **options):
    return list(islice(iter(loader(**options)), count))


def test_every_image_once_per_epoch():
    ids = [x["image_id"] for batch in batches(5) for x in batch]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10] != ids[10:]


def test_a_start_in_the_middle_sees_what_an_unbroken_run_sees():
    """Images, order and augmentation; whoever reads them."""
    whole = batches(6)
    assert batches(3, start=3) == whole[3:]
    assert batches(3, start=3, num_workers=2) == whole[3:]
    assert batches(6, seed=4) != whole


@pytest.mark.parametrize("gpu", [True, False])
def test_images_are_pinned_where_there_is_a_gpu(monkeypatch, gpu):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sampler, "build_detection_train_loader", lambda *_, **kwargs: [asked.append(kwargs)])
    iter(loader())
    assert [kwargs["pin_memory"] for kwargs in asked] == [gpu]


def test_pinning_leaves_instances_whole(monkeypatch):
    """PyTorch's thread pins tensors in lists and dicts, and passes on what it does not know."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (pinned.append(x), x.clone())[1])
    image = random_input("a.png")
    (found,) = pin_memory([image])
    assert found["instances"] is image["instances"]
    assert found["image"] is not image["image"]
    assert torch.equal(found["image"], image["image"])
    assert [x is image["image"] for x in pinned] == [True]


def test_augmentation_differs_between_epochs():
    drawn = {}
    for x in [x for batch in batches(5) for x in batch]:
        drawn.setdefault(x["image_id"], set()).add(x["drawn"])
    assert all(len(values) == 2 for values in drawn.values())


def test_parts_of_a_batch_are_the_batch():
    parts = batches(6, parts=2, start=1)
    assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == batches(3, start=1)


def test_processes_share_the_stream(monkeypatch):
    """Two processes see, iteration by iteration, the images of one."""
    whole = batches(3)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        halves.append(batches(3))
    for batch, ours, theirs in zip(whole, *halves, strict=True):
        assert sorted(x["image_id"] for x in ours + theirs) == sorted(x["image_id"] for x in batch)
        assert len(ours) == len(theirs) == 2


def test_rare_classes_are_shown_more_often():
    """Class 1 is on one image of ten, a fifth of the threshold: that image counts sqrt(5) times."""
    ids = [x["image_id"] for batch in batches(300, repeat_threshold=0.5) for x in batch]
    assert ids.count(0) / ids.count(1) == pytest.approx(5**0.5, rel=0.15)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_like_shapes(num_workers):
    """Two batches share out eight images of an epoch of ten: four lie, four stand, or nearly so."""
    options = dict(sorted_batches=8, num_workers=num_workers)
    found = batches(50, **options)
    widths = [[x["width"] for x in batch] for batch in found]
    mixed = [len(set(batch)) == 2 for batch in widths]
    assert sum(mixed) < sum(len({x["width"] for x in batch}) == 2 for batch in batches(50)) - 10
    assert 15 < sum(batch[0] == 40 for batch in widths) < 35  # wide batches don't always come last
    assert sum(batch[0] == 40 for batch in widths[::2]) < 20
    shown = Counter(x["image_id"] for batch in found for x in batch)
    assert set(shown.values()) == {20}  # each image once an epoch
    assert batches(5, start=7, **options) == found[7:12]


def test_sorting_in_runs_longer_than_an_epoch_is_an_epoch_at_most():
    assert [loader(sorted_batches=n).sorted_batches for n in (1, 2, 8)] == [1, 2, 2]


def test_batches_that_cannot_be_divided_are_refused():
    with pytest.raises(DataError, match=r"total_batch_size=4 can't be divided among 1 processes and .*steps=3"):
        batches(1, parts=3)


def test_seeds_of_several_numbers():
    def draw(*numbers):
        seed_random(*numbers)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(2, 1), draw(1, 2, 0), draw(1)}) >= 3


def test_the_order_is_that_of_detectron2():
    expected = islice(TrainingSampler(7, seed=11), 50)
    assert list(islice(endless_order(7, 11), 50)) == list(expected)


def test_repeated_images_are_those_of_detectron2():
    numbers = np.random.default_rng(0)
    labels = [
        list(numbers.choice(6, size=numbers.integers(0, 4), p=[0.6, 0.2, 0.1, 0.05, 0.03, 0.02])) for _ in range(40)
    ]
    dicts = [{"annotations": [{"category_id": int(label)} for label in found]} for found in labels]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.5)
    torch.testing.assert_close(repeat_factors(labels, 0.5), factors, rtol=0, atol=0)
    assert factors.max() > 2
    expected = islice(RepeatFactorTrainingSampler(factors, seed=3), 200)
    assert list(islice(endless_order(40, 3, factors), 200)) == list(expected)
