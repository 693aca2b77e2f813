"""Detectron2's own detectors go through the same recipes, data and trainer as DINO."""

import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from dino.d2.training import engine

from ..tools.programs import run_program
from .recipes import ROOT, file_arguments, load_recipe, write_two_sets

FOLDER = ROOT / "projects/dino/configs/ablation"
ANCESTORS = ("faster_rcnn_r18_fpn", "retinanet_r18_fpn")


@pytest.mark.parametrize("name", ANCESTORS)
def test_an_ancestor_is_built_for_the_classes_of_the_data(tmp_path, name):
    """On the data and the budget of base.py, from random weights, with trainable norms."""
    train, val = write_two_sets(tmp_path)
    cfg = load_recipe(*file_arguments(train, val), config=FOLDER / f"{name}.py")
    base = load_recipe(*file_arguments(train, val), config=FOLDER / "base.py")
    for loader in (cfg.dataloader.train, base.dataloader.train):
        assert OmegaConf.to_container(loader, resolve=False).pop("settings") == "${oc.select:train,null}"
        del loader.settings  # all of `train`, which may differ in other settings
    for part in ("dataloader", "train.max_iter", "train.eval_period", "train.seed"):
        assert OmegaConf.select(cfg, part) == OmegaConf.select(base, part)
    assert cfg.train.init_checkpoint == ""
    model = engine._build_model(cfg)
    assert all(p.requires_grad for p in model.parameters())
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 20
    mapper = instantiate(cfg.dataloader.train.mapper)
    batch = [mapper(x) for x in instantiate(cfg.dataloader.train.dataset)[:2]]
    with EventStorage():
        losses = model(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert getattr(model, "roi_heads", model).num_classes == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ANCESTORS)
def test_an_ancestor_is_trained_and_evaluated(tmp_path, name):
    train, val = write_two_sets(tmp_path)
    words = ["--config-file", FOLDER / f"{name}.py", *file_arguments(train, val), "train.output_dir=run"]
    result = run_program("lazyconfig_train_net", *words, "train.max_iter=2", "train.eval_period=1", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert [entry["iteration"] for entry in record] == [1, 2]
    assert "bbox/AP" in record[0]
    assert (tmp_path / "run/train_batch.png").exists()
