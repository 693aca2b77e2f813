"""A recipe in the hands of Detectron2's own `tools/lazyconfig_train_net.py`: what that program does with its parts.

The program itself is no part of the installed package; `benchmarks/detectron2_tools.py` runs it from a checkout.
"""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import contextlib
import json
import os
import random
import shutil
from itertools import islice

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.export import scripting_with_instances
from detectron2.structures import Boxes

from dino.d2.recipe import read_recipe
from dino.d2.training.sampler import TrainLoader
from dino.inference.predictor import Predictor
from dino.training.recipe_lengths import iterations
from dino.utils.files import DataError, UserError
from dino.weights.description import detector_from_checkpoint

from ..coco_files import CocoFiles
from ..tiny import TinyBackbone
from .recipes import SHRINK, SMALL, write_two_sets
from .tiny import tiny_detector

LENGTH = 6


def read(folder):
    """The recipe as that program reads it: nothing is filled in but what a user overrides."""
    given = [word for word in SHRINK if not word.startswith("train.epochs")]
    for split, files in zip(("train", "test"), write_two_sets(folder, counts=(2, 1, 3, 1, 2, 1)), strict=True):
        node = f"dataloader.{split}.dataset"
        given += [f"{node}.name=of_{split}", f"{node}.annotations={files.annotations}", f"{node}.images={files.images}"]
    given += ["dataloader.evaluator.dataset_name=of_test", "model.num_classes=3", "train.device=cpu"]
    given += [f"train.max_iter={LENGTH}", "train.eval_period=0", "train.checkpointer.period=2"]
    return LazyConfig.apply_overrides(LazyConfig.load(str(SMALL)), given)


@pytest.fixture
def cfg(tmp_path):
    """With three convolutions for a backbone."""
    cfg = read(tmp_path)
    cfg.model.network.neck.backbone = LazyCall(TinyBackbone)()
    cfg.model.network.neck.in_features = ["res3", "res4", "res5"]
    return cfg


class Kill(hooks.HookBase):
    """Ends a training before an iteration, between two checkpoints."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


class Watched:
    """A loader that notes its batches."""

    def __init__(self, loader, batches):
        self.loader, self.batches = loader, batches

    def __iter__(self):
        for batch in self.loader:
            self.batches.append([(x["file_name"], x["image"].sum().item()) for x in batch])
            yield batch


def run(cfg, *, resume=False, until=None):
    """What that program does -> the images of each batch of this start, and the sum of their pixels."""
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    cfg.optimizer.params.pop("model")
    batches = []
    trainer = SimpleTrainer(model, Watched(instantiate(cfg.dataloader.train), batches), optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)

    def evaluate():
        return inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))

    trainer.register_hooks(
        [
            Kill(until),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, evaluate),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(start, cfg.train.max_iter)
    return batches


def in_folder(cfg, folder):
    folder.mkdir()
    cfg.train.output_dir = str(folder)
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    return cfg


def test_a_resumed_run_sees_what_an_unbroken_one_sees(cfg, tmp_path):
    """Images and their augmentation, from the first batch after the last checkpoint on."""
    whole = run(in_folder(cfg, tmp_path / "whole"))
    first = run(in_folder(cfg, tmp_path / "broken"), until=3)
    rest = run(cfg, resume=True)
    assert len(whole) == LENGTH
    assert first == whole[:3]
    assert rest == whole[2:]  # the checkpoint of iteration 1 was the last one


def test_the_seed_of_the_recipe_counts(cfg, tmp_path):
    cfg.train.max_iter = 2
    first = run(in_folder(cfg, tmp_path / "first"))
    cfg.train.seed = 7
    assert run(in_folder(cfg, tmp_path / "second")) != first


def test_what_the_program_ignores_is_said_once(cfg, tmp_path, caplog):
    cfg.train.max_iter = 1
    cfg.train.ema.enabled, cfg.train.grad_accum_steps, cfg.train.activation_checkpointing = True, 2, ["encoder"]
    run(in_folder(cfg, tmp_path / "first"))
    (line,) = [record.getMessage() for record in caplog.records if "only `dino train`" in record.getMessage()]
    stated = "train.clip_norm=0.1, train.grad_accum_steps=2, train.ema.enabled=True, train.activation_checkpointing=["
    assert f"the recipe also sets {stated}" in line
    assert "\n" not in line


def test_nothing_is_said_of_a_recipe_that_asks_for_nothing(cfg, tmp_path, caplog):
    cfg.train.clip_norm, cfg.train.max_iter = None, 1
    run(in_folder(cfg, tmp_path / "run"))
    assert "only `dino train`" not in caplog.text


def test_lengths_follow_from_the_epochs(cfg):
    cfg.train.max_iter = iterations("train.epochs")
    cfg.train.eval_period = iterations("train.eval_epochs", least=0)
    cfg.train.checkpointer.period = iterations("train.eval_epochs")
    cfg.train.epochs, cfg.train.eval_epochs = 4, 0.5
    assert (cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period) == (12, 2, 2)  # 3 an epoch
    assert dict(**cfg.train.checkpointer) == {"period": 2, "max_to_keep": 3}


def test_the_recipes_of_the_paper_state_lengths_that_the_program_reads(cfg):
    paper = LazyConfig.load(str(SMALL.parents[3] / "configs/dino_r50_4scale_12ep.py"))
    assert paper.train.max_iter is None  # COCO is not here
    paper.dataloader.train.dataset = cfg.dataloader.train.dataset
    paper.dataloader.train.total_batch_size = 2
    assert (paper.train.max_iter, paper.train.eval_period, paper.train.checkpointer.period) == (36, 3, 3)
    assert read_recipe("dino_r50_4scale_12ep").train.max_iter is None  # open, until the data is known


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of a model that a checkpoint can describe, with `config.yaml` as that program writes it."""
    folder = tmp_path_factory.mktemp("program")
    cfg = read(folder)
    cfg.train.max_iter, cfg.train.checkpointer.period = 1, 100
    cfg.optimizer = LazyCall(torch.optim.SGD)(params=cfg.optimizer.params, lr=1e-3)  # a small checkpoint
    run(in_folder(cfg, folder / "run"))
    return folder / "run"


@pytest.fixture
def trained(run_folder, tmp_path):
    """Its checkpoint in a copy of the folder."""
    folder = shutil.copytree(run_folder, tmp_path / "copy", copy_function=os.link)
    return folder / "model_final.pth"


def categories(run_folder):
    return CocoFiles(str(run_folder.parent / "val/annotations.json"), "").read()["categories"]


def replace(path, content):
    """Write a file anew: the copies share their content."""
    path.unlink()
    path.write_text(content)


def test_its_checkpoint_predicts(trained, run_folder):
    detector = detector_from_checkpoint(trained)
    assert detector.names == [category["name"] for category in categories(run_folder)]
    assert detector.preprocessing.short_side == 48
    assert detector.preprocessing.max_detections == 20
    model = instantiate(LazyConfig.load(str(trained.parent / "config.yaml")).model).eval()
    DetectionCheckpointer(model).load(str(trained))
    image = torch.randint(256, (3, 48, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (expected,), (found,) = model([{"image": image}]), detector.detect([image])
    torch.testing.assert_close(found.scores, expected["instances"].scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected["instances"].pred_boxes.tensor, rtol=1e-4, atol=1e-2)
    found = Predictor.from_checkpoint(trained, score_thresh=0)(image.permute(1, 2, 0).numpy())
    assert len(found.boxes) == 20


def test_without_its_recipe_the_message_says_what_to_add(trained):
    (trained.parent / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"does not describe its model.*lazyconfig_train_net\.py, put the config\.yaml"):
        detector_from_checkpoint(trained)


def test_classes_have_numbers_where_no_evaluation_named_them(trained):
    (trained.parent / "inference/classes.json").unlink()
    assert detector_from_checkpoint(trained).names == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c\x1b[31m"], "abc", [1, 2, 3]])
def test_strange_classes_are_refused(trained, names):
    replace(trained.parent / "inference/classes.json", json.dumps({"names": names}))
    with pytest.raises(DataError, match="model_final"):
        detector_from_checkpoint(trained)


def entries_of(count):
    return [{"image_id": i, "width": 4, "height": 4, "annotations": []} for i in range(count)]


def test_the_loader_for_other_programs():
    """An explicit start holds; without one and without a trainer, it is 0. A negative seed is another one each time."""
    entries = entries_of(9)

    def make(**options):
        return TrainLoader(entries, lambda entry: {**entry}, total_batch_size=3, **options)

    def ids(loader, count):
        return [[x["image_id"] for x in batch] for batch in islice(loader, count)]

    whole = ids(make(seed=5), 6)
    assert ids(make(seed=5, start=2), 4) == whole[2:]
    assert ids(make(seed=6), 6) != whole
    random_seed = make(seed=-1)
    assert ids(random_seed, 6) != ids(make(seed=-1), 6)
    assert random_seed.seed >= 0


def test_generators_of_the_main_process_continue():
    """Images that are read in this process leave no trace in its noise."""

    def drawing(entry):
        return {**entry, "drawn": (random.random(), np.random.rand(), torch.rand(()).item())}

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    batches = iter(TrainLoader(entries_of(4), drawing, total_batch_size=2))
    first = next(batches)
    before = state()
    second = next(batches)
    assert state() == before
    assert first[0]["drawn"] != second[0]["drawn"]


def test_the_classes_beside_the_detections(run_folder):
    found, known = json.loads((run_folder / "inference/classes.json").read_text()), categories(run_folder)
    assert found == {"names": [c["name"] for c in known], "category_ids": [c["id"] for c in known]}


def test_scripting_says_that_tracing_is_the_way():
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    with pytest.raises(UserError, match=r"DINODetector can be traced, not scripted: .*TracingAdapter") as refused:
        scripting_with_instances(tiny_detector().eval(), fields)
    assert "\n" not in str(refused.value)
