from itertools import pairwise

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from dino.d2.recipe_description import describe
from dino.inference.predictor import Predictor
from dino.modeling.detector import Detector
from dino.weights.description import PARTS, detector_from_checkpoint

from ..tiny import TinyBackbone, random_batch, random_targets
from .recipes import ABLATIONS, ROOT, SHRINK

NAMES = ["red", "green", "blue"]
KEPT = ("num_layers", "num_queries", "num_denoising")  # what recipes are about
SMALLER = [entry for entry in SHRINK if entry.startswith("model.network") and not entry.split("=")[0].endswith(KEPT)]
CHAIN = ("denoising", "pure", "mixed", "twice", "contrastive")


def load(name):
    cfg = LazyConfig.load(str(ROOT / f"projects/dino/configs/ablation/{name}.py"))
    cfg = LazyConfig.apply_overrides(cfg, SMALLER)
    cfg.model.num_classes = len(NAMES)
    cfg.model.network.neck.backbone = L(TinyBackbone)()
    cfg.model.network.neck.in_features = ["res3", "res4", "res5"]
    return cfg


@pytest.fixture(autouse=True)
def tiny_backbone_is_known(monkeypatch):
    monkeypatch.setitem(PARTS, "tests.tiny.TinyBackbone", TinyBackbone)


@pytest.mark.parametrize("name", [path.stem for path in ABLATIONS])
def test_ablations_train_and_are_rebuilt(name, tmp_path):
    """One step, then the same answers from the checkpoint alone."""
    cfg = load(name)
    model = instantiate(cfg.model)
    batch, targets = random_batch(2), random_targets(2, 3)
    losses = model.criterion(model.network(*batch, targets), targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    content = {"model": model.state_dict(), "names": NAMES, "about": describe(cfg)}
    torch.save(content, tmp_path / "model.pth")
    found = detector_from_checkpoint(tmp_path / "model.pth")
    with torch.no_grad():
        for actual, expected in zip(found.network(*batch).decoder, model.eval().network(*batch).decoder, strict=True):
            torch.testing.assert_close(actual, expected)
    small = Detector(found.network, found.preprocessing._replace(short_side=48), NAMES)
    predict = Predictor(small, score_thresh=0)
    assert len(predict(torch.rand(3, 40, 60)).boxes) > 0


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablations_say_what_differs_and_how_to_run_them(path):
    described = path.read_text().split('"""')[1]
    assert f"python tools/lazyconfig_train_net.py --config-file {path.relative_to(ROOT)}" in described
    assert len(described.splitlines()[0]) > 20


def test_the_chain_changes_one_part_at_a_time_and_ends_at_dino():
    models = [OmegaConf.to_container(load(f"chain_{i}_{name}").model) for i, name in enumerate(CHAIN, 1)]
    parts = [{key: model["network"][key] for key in model["network"] if key != "_target_"} for model in models]
    changed = [{key for key in a if a[key] != b[key]} for a, b in pairwise(parts)]
    assert changed == [{"query_selection"}, {"query_selection"}, {"decoder"}, {"denoising"}]
    assert models[-1] == OmegaConf.to_container(load("base").model)
    assert len({str(model["criterion"]) for model in models}) == 1


def test_the_network_is_the_papers_and_its_training_that_for_small_data():
    base, paper, small = (
        LazyConfig.load(str(ROOT / path))
        for path in (
            "projects/dino/configs/ablation/base.py",
            "configs/common/models/dino_r50.py",
            "projects/dino/configs/dino_efficientnet_lite0_small_data.py",
        )
    )
    for part in ("criterion", "network.query_selection._target_", "network.decoder._target_"):
        assert OmegaConf.select(base.model, part) == OmegaConf.select(paper.model, part)
    noise = {key: value for key, value in base.model.network.denoising.items() if key != "embed_dim"}
    assert noise == {key: paper.model.network.denoising[key] for key in noise}
    assert base.model.network.neck.backbone == small.model.network.neck.backbone
    assert base.model.pixel_mean == small.model.pixel_mean
    assert base.optimizer == small.optimizer
    assert base.lr_multiplier == small.lr_multiplier
    changed = {key for key in base.train if base.train[key] != small.train[key]}
    assert changed == {"max_iter", "eval_period", "checkpointer"}
    augmentations = [cfg.dataloader.train.mapper.augmentations for cfg in (base, small)]
    assert augmentations[0][:-1] == augmentations[1][:-1]
    assert augmentations[0][-1].sizes == [160]
