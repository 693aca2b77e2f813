import shutil
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T

from dino.d2.combining_mapper import CombiningMapper
from dino.d2.data_loading import OneOf, ShortSide, TrainMapper, dataset
from dino.d2.training import engine
from dino.d2.training.sampler import Place, TrainLoader
from dino.data.mixing import MixUp, Mosaic
from dino.utils.files import DataError, UserError

from ..coco_files import write_coco
from .processes import assert_same, checkpoint, losses
from .recipes import ROOT, tiny_recipe

RECIPE = ROOT / "projects/dino/configs/dino_r50_4scale_12ep_dense_o2o.py"
LENGTH = 6  # iterations
BATCH = 4


def augmentations():
    """Random in every way that those of the recipes are."""
    crop = [T.RandomCrop("absolute_range", (40, 60)), ShortSide([48, 64])]
    return [T.RandomFlip(), OneOf([[ShortSide([48, 56, 64])], crop])]


def combining(mosaic=1.0, mixup=1.0, begin=0.0, end=1.0, max_iter=LENGTH):
    parts = {"mosaic": Mosaic(probability=mosaic, side=32, max_size=64), "mixup": MixUp(probability=mixup)}
    return CombiningMapper(augmentations(), **parts, begin=begin, end=end, max_iter=max_iter)


@pytest.fixture
def images(tmp_path):
    return dataset("combined", *write_coco(tmp_path, counts=(2, 0, 3, 1, 2, 1, 4)))


def batches(images, mapper, count=LENGTH, *, start=0, parts=1, num_workers=0, seed=3):
    loader = TrainLoader(images, mapper, total_batch_size=BATCH, num_workers=num_workers)
    loader.begin(seed=seed, start=start, parts=parts)
    return list(islice(iter(loader), count * parts))


def plain(x):
    """The content of a mapped dict, to compare two bit for bit."""
    instances = x["instances"]
    fields = instances.image_size, instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist()
    return {**{k: v for k, v in x.items() if k not in ("image", "instances")}, "fields": fields}, x["image"].tolist()


def contents(batches):
    return [[plain(x) for x in batch] for batch in batches]


def combined(x):
    return " + " in x["file_name"]


def numbers_of(x):
    """Numbers of the files that an image shows."""
    return [int(Path(name).stem.partition("_")[2]) for name in x["file_name"].split(" + ")]


def test_without_chances_the_stream_is_that_of_the_plain_mapper(images):
    ours = batches(images, combining(mosaic=0, mixup=0))
    assert contents(ours) == contents(batches(images, TrainMapper(augmentations())))


def test_first_and_last_iterations_are_those_of_the_plain_mapper(images):
    ours = batches(images, combining(begin=1 / 3, end=2 / 3))
    plainly = contents(batches(images, TrainMapper(augmentations())))
    assert [[combined(x) for x in batch] for batch in ours] == [[1 <= n // 2 < 2] * BATCH for n in range(LENGTH)]
    assert contents(ours)[:2] + contents(ours)[4:] == plainly[:2] + plainly[4:]


def test_images_that_are_not_combined_are_those_of_the_plain_mapper(images):
    ours = [x for batch in batches(images, combining(0.3, 0.3)) for x in batch]
    plainly = [x for batch in batches(images, TrainMapper(augmentations())) for x in batch]
    untouched = [(plain(x), plain(y)) for x, y in zip(ours, plainly, strict=True) if not combined(x)]
    assert 2 < len(untouched) < len(ours) - 2
    assert all(x == y for x, y in untouched)


@pytest.mark.parametrize(("mosaic", "mixup", "expected"), [(1, 0, {4}), (0, 1, {2}), (1, 1, {8}), (0.5, 0.5, {1, 8})])
def test_how_many_images_are_in_one(images, mosaic, mixup, expected):
    seen = [numbers_of(x) for batch in batches(images, combining(mosaic, mixup)) for x in batch]
    assert expected <= {len(numbers) for numbers in seen}
    assert len(expected) == 2 or {len(numbers) for numbers in seen} == expected
    assert {number for numbers in seen for number in numbers} == set(range(1, 8))


def test_mixture_is_never_of_an_image_with_itself(images):
    pairs = [numbers_of(x) for batch in batches(images, combining(0, 1)) for x in batch]
    assert all(first != second for first, second in pairs)


def test_the_seed_decides(images):
    mapper = combining(0.5, 0.5)
    first = contents(batches(images, mapper))
    assert contents(batches(images, mapper)) == first
    assert contents(batches(images, mapper, seed=4)) != first


def test_a_start_in_the_middle_sees_what_an_unbroken_run_sees(images):
    """Whoever reads the images: a resume is exact, and the switch comes at the same iteration."""
    mapper = combining(0.5, 0.5, begin=1 / 3, end=5 / 6)
    whole = contents(batches(images, mapper))
    assert any(" + " in x["file_name"] for batch in whole for x, _ in batch)
    assert contents(batches(images, mapper, 3, start=3)) == whole[3:]
    assert contents(batches(images, mapper, 4, start=2, num_workers=2)) == whole[2:]


def test_parts_of_a_batch_are_the_batch(images):
    mapper = combining(0.5, 0.5, begin=1 / 3, end=5 / 6)
    parts = contents(batches(images, mapper, parts=2))
    assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == contents(batches(images, mapper))


def test_processes_share_the_stream(images, monkeypatch):
    mapper = combining(0.5, 0.5, begin=1 / 3, end=5 / 6)
    whole = contents(batches(images, mapper))
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        halves.append(contents(batches(images, mapper)))
    for batch, *both in zip(whole, *halves, strict=True):
        assert [x for pair in zip(*both, strict=True) for x in pair] == batch


@pytest.mark.parametrize("counts", [(2,), (1, 0), (1, 2, 0)])
def test_fewer_images_than_a_mosaic_has(tmp_path, counts):
    images = dataset("few", *write_coco(tmp_path, counts=counts))
    for x in batches(images, combining(), 1)[0]:
        assert len(numbers_of(x)) == 8
        assert set(numbers_of(x)) <= set(range(1, len(counts) + 1))


def test_images_without_objects(tmp_path):
    images = dataset("empty", *write_coco(tmp_path, counts=(0, 0, 0, 0)))
    for x in batches(images, combining(), 1)[0]:
        assert x["instances"].gt_boxes.tensor.shape == (0, 4)
        assert x["instances"].gt_classes.dtype == torch.int64


def at(images, index=0, iteration=0, seed=0):
    return Place(images, index, iteration, np.random.default_rng(seed))


def test_objects_of_all_images_without_crowd_regions(tmp_path):
    """An image of one object and one crowd region, with others of one object each."""
    files = write_coco(tmp_path, counts=(2, 1, 1, 1))
    files.change(lambda content: content["annotations"][0].update(iscrowd=1))
    images = dataset("crowd", *files)
    mapper = CombiningMapper(
        [], mosaic=Mosaic(probability=1, rotation=0, translation=0, scale=(1, 1)), mixup=MixUp(probability=1),
        begin=0, end=1, max_iter=1,
    )  # fmt: skip
    assert len(mapper(images[0], place=at(images))["instances"]) == 8


def test_size_and_classes_are_those_of_the_combined_image(images):
    mapped = combining(1, 0)(images[0], place=at(images))
    assert (mapped["height"], mapped["width"]) == (64, 72)  # two short sides of 32, two long sides of 36
    assert tuple(mapped["image"].shape[1:]) == mapped["instances"].image_size
    boxes = mapped["instances"].gt_boxes
    assert boxes.nonempty().all()
    assert len(boxes) == len(mapped["instances"].gt_classes)
    assert mapped["image_id"] == images[0]["image_id"]


@pytest.mark.parametrize(("mosaic", "mixup"), [(1, 0), (0, 1)])
def test_a_broken_image_among_the_others_is_named(tmp_path, mosaic, mixup):
    images = dataset("broken", *write_coco(tmp_path, counts=(1, 1)))
    Path(images[1]["file_name"]).write_bytes(Path(images[1]["file_name"]).read_bytes()[:100])
    with pytest.raises(DataError, match=r"can't read image .*image_2\.png"):
        combining(mosaic, mixup)(images[0], place=at(images))
    assert not combined(combining(mosaic, mixup, begin=0.5)(images[0], place=at(images)))


def test_another_size_than_annotated_is_named(tmp_path):
    images = dataset("sizes", *write_coco(tmp_path, counts=(1, 1)))
    images[1]["width"] = 60
    with pytest.raises(DataError, match=r"image_2\.png: .*72.*60"):
        combining(1, 0)(images[0], place=at(images))


def test_the_length_must_be_known(images):
    with pytest.raises(UserError, match=r"need the length of the training: set train\.max_iter"):
        combining(max_iter=None)(images[0], place=at(images))


@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.4), (-0.1, 1), (0, 1.1)])
def test_an_impossible_part_of_the_training_is_refused(begin, end):
    with pytest.raises(UserError, match=f"begin={begin} and end={end} of mosaic and mixup must rise"):
        combining(begin=begin, end=end)


def test_the_recipe_combines_from_the_second_epoch_to_the_seventh(tmp_path):
    cfg = LazyConfig.load(str(RECIPE))
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    again.train.max_iter = 12 * 7393
    mapper = instantiate(again.dataloader.train.mapper)
    assert [mapper.first_iteration, mapper.combination._iteration(mapper.combination.end)] == [7393, 7 * 7393]
    assert len(mapper.augmentations.augs) == 2


def combining_run(folder):
    """The tiny recipe for four iterations, with combined images in the second and third."""
    words = ("train.max_iter=4", "train.eval_period=0", "train.checkpointer.period=2")
    cfg = tiny_recipe(folder, *words, counts=(2, 0, 3, 1))
    cfg.dataloader.train.mapper = L(CombiningMapper)(
        augmentations=cfg.dataloader.train.mapper.augmentations,
        mosaic=L(Mosaic)(probability=0.7, side=32),
        mixup=L(MixUp)(probability=0.7),
        begin=0.25,
        end=0.75,
        max_iter="${train.max_iter}",
    )
    return cfg


def test_a_training_is_resumed_exactly_and_draws_its_combined_images(tmp_path):
    engine.train(combining_run(tmp_path), resume=False)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert (run / "train_batch.png").read_bytes() != (run / "train_batch_combined.png").read_bytes()
    shutil.copytree(run, whole / "run")
    (run / "model_final.pth").unlink()
    (run / "last_checkpoint").write_text("model_0000001.pth")
    engine.train(combining_run(tmp_path), resume=True)
    assert_same(checkpoint(tmp_path), checkpoint(whole))
    assert losses(tmp_path) == losses(whole)
    assert len(losses(whole)) == 4
