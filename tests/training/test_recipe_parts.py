"""Parts of recipes without Detectron2. `tests/d2/test_two_roads.py` compares them with Detectron2's."""

import json
import os
import re
from itertools import islice

import pytest
import torch
from omegaconf import OmegaConf

from dino.training.recipe_completion import DataFiles, complete, scale_to_batch, use_epochs
from dino.training.recipe_data import class_names, files_of
from dino.training.recipe_nodes import LazyCall, full_name, instantiate
from dino.training.recipe_parts import (
    build_detector,
    build_optimizer,
    build_schedule,
    check_supported,
    train_loader,
    val_images,
)
from dino.training.recipe_reading import read_recipe
from dino.utils.files import DataError, UsageError, UserError
from dino.utils.recipes import recipes

from ..coco_files import write_coco

NAME = "dino_r18_shapes"
NOT_READABLE = re.compile("faster_rcnn|retinanet|swin|vitdet|mvit|regnet")  # see tests/d2/test_two_roads.py


@pytest.fixture
def files(tmp_path):
    train, val = (
        write_coco(tmp_path / "train", (2, 0, 3, 1), category_ids=(7, 42)),
        write_coco(tmp_path / "val", (1, 2), category_ids=(7, 42), seed=1),
    )
    return DataFiles(*train, *val)


def completed(files, *overrides, name=NAME):
    return complete(read_recipe(name), ["dataloader.train.num_workers=0", "train.device=cpu", *overrides], files)


def test_images_without_objects_are_dropped_on_request(tmp_path, files):
    """They stay in the validation data, and in training data without any object, which the summary refuses."""
    key = "dataloader.train.dataset.filter_empty"
    cfg = completed(files, f"{key}=True")
    assert [train_loader(c).images.data.images[-1]["id"] for c in (cfg, completed(files))] == [4, 4]
    assert [len(train_loader(c).images) for c in (cfg, completed(files))] == [3, 4]
    assert len(train_loader(cfg).ratios) == 3
    empty = DataFiles(*write_coco(tmp_path / "empty", (0, 0), category_ids=(7, 42)), *files[2:])
    assert len(train_loader(completed(empty, f"{key}=True")).images) == 2
    both = DataFiles(*files[:2], *files[:2])
    assert len(val_images(completed(both, f"{key}=True"))) == 4


def test_a_step_of_training(files):
    cfg = completed(files, "model.network.decoder.num_layers=1", "optimizer.lr=1e-3")
    check_supported(cfg)
    use_epochs(cfg, 4)
    assert [cfg.model.num_classes, cfg.train.max_iter] == [2, 6]
    data, loader = val_images(cfg), train_loader(cfg)
    assert [data.names, data.category_ids] == [["red", "green"], [7, 42]]
    detector = build_detector(cfg, data.names, data.category_ids)
    assert [detector.names, detector.category_ids] == [["red", "green"], [7, 42]]
    optimizer = build_optimizer(cfg, detector)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in detector.parameters()
    )
    loader.begin(seed=0, start=0, parts=1)
    images, targets, infos = zip(*next(iter(loader)), strict=True)
    assert {image.dtype for image in images} == {torch.uint8}
    assert {info["image_id"] for info in infos} == {1, 2, 3, 4}
    before = detector.network.level_embed.clone()
    sum(detector.losses(images, targets).values()).backward()
    optimizer.step()
    assert not torch.equal(detector.network.level_embed, before)


def test_a_start_in_the_middle_sees_what_an_unbroken_run_sees(files):
    def batches(start, **options):
        cfg = completed(
            files, "dataloader.train.total_batch_size=2", *(f"dataloader.train.{k}={v}" for k, v in options.items())
        )
        loader = train_loader(cfg)
        loader.begin(seed=1, start=start, parts=1)
        return [[(image.sum().item(), info["image_id"]) for image, _, info in b] for b in islice(loader, 4 - start)]

    whole = batches(0)
    assert batches(2) == batches(2, num_workers=2) == whole[2:]


def test_a_batch_that_cannot_be_divided(files):
    loader = train_loader(completed(files))
    loader.begin(seed=0, start=0, parts=3)
    with pytest.raises(UserError, match=r"total_batch_size=4 can't be divided by train.grad_accum_steps=3"):
        next(iter(loader))


def test_images_of_another_size_than_stated(files):
    cfg = completed(files)
    loader = train_loader(cfg)
    loader.images.data.images[0]["width"] = 71
    loader.begin(seed=0, start=0, parts=1)
    with pytest.raises(DataError, match=r"image_1\.png is 72x64, but the annotations say 71x64"):
        next(iter(loader))


REFUSED = {
    "train.parallel=fsdp": "train.parallel=fsdp needs Detectron2",
    "train.wandb.enabled=True": "train.wandb.enabled=True needs Detectron2",
    "model.network.neck.backbone._target_=detectron2.modeling.MViT": "detectron2.modeling.MViT.*torchvision",
    "model.network.neck.backbone.freeze_at=2": "mixes frozen and trained norms",
    "model.network.neck.backbone.stem.norm=FrozenBN": "mixes frozen and trained norms",
    "dataloader.train.mapper.augmentations.0._target_=detectron2.data.transforms.Resize": "Resize, .*RandomFlip",
    "dataloader.evaluator._target_=mine.Evaluator2": "dataloader.evaluator is mine.Evaluator2",
    "dataloader.train.mapper._target_=detectron2.data.DatasetMapper": "DatasetMapper.*TrainMapper or CombiningMapper",
    "optimizer.params._target_=detectron2.solver.build.other": "optimizer.params is detectron2.solver.build.other",
    "model._target_=mine.Model": "model is mine.Model.*DINODetector works",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_what_needs_detectron2_is_named(override, message):
    cfg = read_recipe(NAME)
    key, _, value = override.partition("=")
    OmegaConf.update(cfg, key, {"True": True}.get(value, int(value) if value.isdecimal() else value))
    with pytest.raises(UserError, match=message) as raised:
        check_supported(cfg)
    assert "\n" not in str(raised.value)


def test_other_recipes_are_supported():
    names = [name for name in recipes() if not NOT_READABLE.search(name)]
    for name in names[::7]:  # the slow tests of tests/d2/test_two_roads.py read all
        check_supported(read_recipe(name))
    assert len(names) > 50


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes needs Detectron2"):
        check_supported(read_recipe(NAME))


BROKEN = {
    "optimizer.betas=[2,3]": (
        lambda cfg: build_optimizer(cfg, torch.nn.Linear(2, 2)),
        "optimizer of the recipe can't be built: Invalid beta",
    ),
    "model.network.encoder.num_heads=7": (lambda cfg: build_detector(cfg, ["a"]), "model of the recipe can't be built"),
    "model.network.neck.backbone.stages.depth=19": (
        lambda cfg: build_detector(cfg, ["a"]),
        "unknown torchvision backbone 'resnet19'",
    ),
    "model.criterion._target_=no.such": (
        lambda cfg: build_detector(cfg, ["a"]),
        "names no.such, which can't be imported",
    ),
}


@pytest.mark.parametrize(("override", "broken"), BROKEN.items())
def test_parts_that_refuse_their_arguments(override, broken, files):
    build, message = broken
    with pytest.raises(UserError, match=message):
        build(completed(files, override))


def test_classes_of_training_and_validation_differ(files, tmp_path):
    other = write_coco(tmp_path / "other", (1,), category_ids=(1, 2, 3))
    with pytest.raises(
        DataError, match=r"differ in their classes: only in training \[\], only in validation \['blue'\]"
    ):
        completed(files._replace(val_json=other.annotations, val_images=other.images))


def test_a_schedule_that_does_not_fit(files):
    with pytest.raises(UserError, match=r"lr_multiplier does not fit train\.epochs=3"):
        completed(files, "train.epochs=3", "train.device=cpu", name="dino_r50_4scale_12ep")


def test_wrong_schedules(files):
    with pytest.raises(UserError, match=r"names no\.such, which can't be imported"):
        completed(files, "lr_multiplier._target_=no.such")
    with pytest.raises(UserError, match=r"lr_multiplier of the recipe can't be built: .*unexpected keyword"):
        completed(files, "lr_multiplier._target_=fvcore.common.param_scheduler.ConstantParamScheduler")


def test_what_needs_detectron2_is_refused_before_data_are_read():
    files = DataFiles("missing.json", "missing", "missing.json", "missing")
    with pytest.raises(UserError, match="SwinTransformer, which needs Detectron2"):
        completed(files, name="dino_swin_t_224_4scale_12ep")


def test_epochs_and_batch(files):
    cfg = completed(files, "dataloader.train.total_batch_size=8", "train.epochs=2")
    use_epochs(cfg, 20)
    scale_to_batch(cfg, [])
    assert [cfg.optimizer.lr, cfg.train.max_iter] == [8e-4, 3]
    assert [build_schedule(cfg)(x) for x in (0, 0.79, 0.81)] == [1.0, 1.0, 0.1]


def test_coco_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    node = {"name": "coco_2017_val"}
    with pytest.raises(DataError, match=r"instances_val2017\.json: give --train and --val .*DETECTRON2_DATASETS"):
        files_of(node)
    written = write_coco(tmp_path / "coco/val2017", (1,))
    (tmp_path / "coco/annotations").mkdir()
    path = tmp_path / "coco/annotations/instances_val2017.json"
    path.write_bytes((tmp_path / "coco/val2017/annotations.json").read_bytes())
    assert files_of(node) == (str(path), written.images, "ignore", False)
    assert class_names(node) == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("node", "message"), [({"name": "mine"}, "'mine' has no files: give --train"), ({}, "must be written as")]
)
def test_data_sets_without_files(node, message):
    with pytest.raises(UserError, match=message):
        files_of(node)


def test_a_data_set_that_changes_is_read_again(files):
    node = {"name": "x", "annotations": files.train_json, "images": files.train_images}
    assert class_names(node) == ["red", "green"]
    with open(files.train_json) as file:
        content = json.load(file)
    content["categories"][0]["name"] = "crimson"
    with open(files.train_json, "w") as file:
        json.dump(content, file)
    os.utime(files.train_json, ns=(1, 1))
    assert class_names(node) == ["crimson", "green"]


def test_nodes():
    node = LazyCall("builtins.dict")(a=[LazyCall("collections.Counter")(x=2), 3], b={"c": (1, 2)}, d=None)
    assert instantiate(node) == {"a": [{"x": 2}, 3], "b": {"c": [1, 2]}, "d": None}
    assert [full_name(torch.nn.GELU), full_name(len)] == ["torch.nn.GELU", "builtins.len"]
    assert full_name(lambda: 0).startswith("<function")


@pytest.mark.parametrize("key", ["train.max_iter", "train.epochs", "dataloader.train.total_batch_size"])
@pytest.mark.parametrize("value", ["0", "-5"])
def test_lengths_and_batches_must_be_positive(files, key, value):
    with pytest.raises(UsageError, match=rf"{key} must be positive, not {value}"):
        completed(files, f"{key}={value}")
