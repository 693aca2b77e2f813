"""A recipe in the hands of Detectron2's own `tools/lazyconfig_train_net.py`: what that program does with its parts.

The program itself is no part of the installed package; `benchmarks/detectron2_tools.py` runs it from a checkout.
"""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import json
import os
import random
import shutil

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
from dino.weights.detectron2_run import describe_run

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


class Seen(hooks.HookBase):
    """Notes the images of each iteration, and whether they came augmented alike."""

    def __init__(self, until):
        self.until, self.batches, self.noise = until, {}, {}

    def before_step(self):
        if self.trainer.iter == self.until:
            raise KeyboardInterrupt  # as a kill between two checkpoints

    def after_step(self):
        self.noise[self.trainer.iter] = torch.rand(()).item()


class Watched:
    """A loader that notes its batches."""

    def __init__(self, loader, batches):
        self.loader, self.batches = loader, batches

    def __iter__(self):
        for batch in self.loader:
            self.batches.append([(x["file_name"], x["image"].sum().item()) for x in batch])
            yield batch


def run(cfg, *, resume=False, until=None):
    """What that program does -> the batches of this start, in order, and the trainer's hook."""
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    cfg.optimizer.params.pop("model")
    batches, seen = [], Seen(until)
    trainer = SimpleTrainer(model, Watched(instantiate(cfg.dataloader.train), batches), optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)

    def evaluate():
        return inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))

    trainer.register_hooks(
        [
            seen,
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, evaluate),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    try:
        trainer.train(start, cfg.train.max_iter)
    except KeyboardInterrupt:
        pass
    return batches, seen


def in_folder(cfg, folder):
    folder.mkdir()
    cfg.train.output_dir = str(folder)
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    return cfg


def test_a_resumed_run_sees_what_an_unbroken_one_sees(cfg, tmp_path):
    """Images and their augmentation, from the first batch after the last checkpoint on."""
    whole, _ = run(in_folder(cfg, tmp_path / "whole"))
    first, _ = run(in_folder(cfg, tmp_path / "broken"), until=3)
    rest, _ = run(cfg, resume=True)
    assert len(whole) == LENGTH
    assert first == whole[:3]
    assert rest == whole[2:]  # the checkpoint of iteration 1 was the last one


def test_the_seed_of_the_recipe_counts(cfg, tmp_path):
    first, _ = run(in_folder(cfg, tmp_path / "first"))
    cfg.train.seed = 7
    assert run(in_folder(cfg, tmp_path / "second"))[0] != first


def test_reading_leaves_no_trace_in_the_noise(cfg, tmp_path):
    """Images are read in the main process here: its generators continue, so noise differs from step to step."""
    _, seen = run(in_folder(cfg, tmp_path / "run"))
    assert len(set(seen.noise.values())) == LENGTH


def test_what_the_program_ignores_is_said_once(cfg, tmp_path, caplog):
    cfg.train.ema.enabled, cfg.train.grad_accum_steps, cfg.train.activation_checkpointing = True, 2, ["encoder"]
    run(in_folder(cfg, tmp_path / "first"))
    (line,) = [record.getMessage() for record in caplog.records if "only `dino train`" in record.getMessage()]
    stated = "train.clip_norm=0.1, train.grad_accum_steps=2, train.ema.enabled=True, train.activation_checkpointing=["
    assert f"the recipe also sets {stated}" in line
    assert "\n" not in line


def test_nothing_is_said_of_a_recipe_that_asks_for_nothing(cfg, tmp_path, caplog):
    cfg.train.clip_norm = None
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


def test_the_loader_for_other_programs():
    """An explicit start holds; without one and without a trainer, it is 0. A negative seed is another one each time."""
    entries = [{"image_id": i, "width": 4, "height": 4, "annotations": []} for i in range(9)]
    make = lambda **options: TrainLoader(entries, lambda entry: {**entry}, total_batch_size=3, **options)  # noqa: E731
    ids = lambda loader, count: [[x["image_id"] for x in batch] for batch, _ in zip(loader, range(count), strict=False)]  # noqa: E731
    whole = ids(make(seed=5), 6)
    assert ids(make(seed=5, start=2), 4) == whole[2:]
    assert ids(make(seed=6), 6) != whole
    random_seed = make(seed=-1)
    assert ids(random_seed, 6) != ids(make(seed=-1), 6)
    assert random_seed.seed >= 0


def test_generators_of_the_main_process_continue():
    entries = [{"image_id": i, "width": 4, "height": 4, "annotations": []} for i in range(4)]
    drawing = lambda entry: {**entry, "drawn": (random.random(), np.random.rand(), torch.rand(()).item())}  # noqa: E731
    state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: E731
    batches = iter(TrainLoader(entries, drawing, total_batch_size=2))
    first = next(batches)
    before = state()
    second = next(batches)
    assert state() == before
    assert first[0]["drawn"] != second[0]["drawn"]


def test_the_classes_beside_the_detections(run_folder):
    found, known = json.loads((run_folder / "inference/classes.json").read_text()), categories(run_folder)
    assert found == {"names": [c["name"] for c in known], "category_ids": [c["id"] for c in known]}


RECIPE = """model:
  max_detections: 7
  num_classes: 3
  network: {_target_: dino.modeling.DINO, neck: {in_features: '${.backbone.out}', backbone: {out: [a, b]}}, deep: %s}
dataloader: {test: {mapper: {augmentations: [{sizes: !!python/tuple [48, 32]}, {other: 1}]}}}
optimizer: {factor: !!python/object/apply:os.system [touch %s]}
"""


def described(folder, deep, other="x"):
    (folder / "config.yaml").write_text(RECIPE % (deep, other))
    return describe_run(folder / "model_final.pth")


def test_a_recipe_is_read_as_plain_data(tmp_path):
    about = described(tmp_path, "'${..num_classes}'", tmp_path / "made")["about"]
    network = json.loads(about["config"])["network"]
    assert network["deep"] == 3
    assert network["neck"]["in_features"] == ["a", "b"]
    assert about["preprocessing"]["short_side"] == 48
    assert about["preprocessing"]["max_detections"] == 7
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("deep", "message"),
    [
        ("'${model.network.deep}'", "no plain value"),
        ("'${.neck}'", "no plain value"),
        ("'${.absent}'", "has no 'absent'"),
        ("'${oc.env:HOME}'", "no plain value"),
        ("'${dino.iterations:1,1}'", "no plain value"),
        ("'a${.neck.in_features}'", "no plain value"),
        ("[&a [1], *a]", "aliases"),
        ("[", "describes no model"),
        ("[" * 5000 + "]" * 5000, "describes no model"),
        ("!!python/object/apply:os.system [ls]", None),
        ("!unknown x", "describes no model"),
    ],
)
def test_hostile_recipes(tmp_path, deep, message):
    if message is None:
        assert json.loads(described(tmp_path, deep)["about"]["config"])["network"]["deep"] == ["ls"]
    else:
        with pytest.raises(DataError, match=message) as refused:
            described(tmp_path, deep)
        assert len(str(refused.value)) < 1000


def test_other_files_of_this_name_are_refused(tmp_path):
    assert describe_run(tmp_path / "model_final.pth") == {}
    for text in ("site_name: a", "- a", "", "a" * (2 << 20)):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml, describes no model"):
            describe_run(tmp_path / "model_final.pth")


def test_scripting_says_that_tracing_is_the_way():
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    with pytest.raises(UserError, match="DINODetector can be traced, not scripted: .*TracingAdapter") as refused:
        scripting_with_instances(tiny_detector().eval(), fields)
    assert "\n" not in str(refused.value)
