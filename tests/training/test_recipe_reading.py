"""Recipes read without Detectron2, also where it is installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dino.training.parameter_groups import tenth_for_backbone
from dino.training.recipe_reading import read_recipe, save_recipe
from dino.utils.files import UserError

RECIPE = """
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
import detectron2.modeling as modeling
from dino.d2.data import ShortSide  # a former name
from dino.d2.optim import tenth_for_backbone
from dino.layers import SetCriterion
from .parts import dataloader, lr_multiplier, optimizer, train

model = L(SetCriterion)(matcher=None, function=tenth_for_backbone, backbone=L(modeling.ResNet)(depth=18))
dataloader.augmentations = [L(T.RandomFlip)(prob=0.5), L(ShortSide)(sizes=[2])]
dataloader.kind = dict(_target_=model.backbone._target_, depth=50)
_hidden = dict(a=1)
number = 3
"""
PARTS = "dataloader = dict(a=1)\nlr_multiplier = optimizer = train = dict(lr='${..x}', betas=(1, 2))"


def recipe(folder, text=RECIPE, parts=PARTS):
    folder.mkdir(exist_ok=True)
    (folder / "parts.py").write_text(parts)
    (folder / "mine.py").write_text(text)
    return str(folder / "mine.py")


def test_imports_become_paths(tmp_path):
    cfg = read_recipe(recipe(tmp_path))
    assert sorted(cfg) == ["dataloader", "lr_multiplier", "model", "optimizer", "train"]
    assert [node._target_ for node in cfg.dataloader.augmentations] == [
        "detectron2.data.transforms.RandomFlip",
        "dino.d2.data_loading.ShortSide",
    ]
    assert cfg.model.backbone._target_ == cfg.dataloader.kind._target_ == "detectron2.modeling.ResNet"
    assert cfg.model.function is tenth_for_backbone
    assert "detectron2" not in repr(type(cfg.model._target_))
    assert OmegaConf.is_interpolation(cfg.train, "lr")


def test_each_import_of_a_recipe_is_its_own(tmp_path):
    text = "from .parts import *\nmodel = dict(a=1)"
    parts = "from .inner import shared as optimizer\nfrom .inner import shared as train\ntrain.a = 2\n"
    parts += "dataloader = lr_multiplier = {}"
    recipe(tmp_path, parts=parts)
    (tmp_path / "inner.py").write_text("shared = dict(a=1)")
    (tmp_path / "mine.py").write_text(text)
    cfg = read_recipe(str(tmp_path / "mine.py"))
    assert [cfg.optimizer.a, cfg.train.a] == [1, 2]


@pytest.mark.parametrize("name", ["dino_r18_small_data", "dino_r50_4scale_12ep_dense_o2o", "relation_detr"])
def test_saved_recipes_are_read_again(name, tmp_path):
    cfg = read_recipe(name)
    save_recipe(cfg, tmp_path / "config.yaml")
    again = read_recipe(str(tmp_path / "config.yaml"))
    save_recipe(again, tmp_path / "again.yaml")
    assert again.optimizer.betas == [0.9, 0.999]
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()


WRONG = {
    "model = 1 +": "SyntaxError: invalid syntax",
    "import no_such_module": "line 1: ModuleNotFoundError: No module named 'no_such_module'",
    "a = 1\n1 / 0": "line 2: ZeroDivisionError",
    "from .missing import model": "there is no file .*missing.py",
    "from . import parts": "there is no file",
    "from ............................................................x import model": "there is no file /x.py",
    "from .mine import model": "RecursionError",
    "from detectron2 import model_zoo\nmodel_zoo.get_config('a')": "line 2: it calls detectron2.model_zoo.get_config",
    "from dino.d2.data import TrainMapper\nclass Mine(TrainMapper): ...": "line 2: it derives a class from dino.d2",
    "model = dict()": "does not define dataloader, optimizer, lr_multiplier, train",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_wrong_recipes(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        read_recipe(recipe(tmp_path, text))
    assert "mine.py" in str(raised.value)


@pytest.mark.parametrize("content", ["- a", "a: [", "model: !!python/object/apply:os.system ['true']", "\x00"])
def test_wrong_yaml(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml (can't be read|is no recipe)"):
        read_recipe(str(path))


def test_a_recipe_by_name_from_an_empty_folder(tmp_path):
    """Without Detectron2, and without importing it where it is installed."""
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "from dino.training.recipe_reading import read_recipe\n"
        "print(read_recipe('dino_r18_small_data').model.network.neck.backbone._target_)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.stdout.strip() == "detectron2.modeling.ResNet", result.stderr
