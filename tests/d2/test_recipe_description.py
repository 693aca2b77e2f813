import importlib
import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import SwinTransformer
from detectron2.utils.registry import _convert_target_to_string as name_of
from PIL import Image
from torch import nn

from dino.d2 import recipe
from dino.d2.checkpoint import Checkpointer
from dino.d2.recipe_description import describe, recipe_of
from dino.training.recipe_nodes import plain
from dino.utils.files import DataError, UserError
from dino.weights.description import model_from_checkpoint
from dino.weights.network_parts import _PARTS_OF_DETECTRON2

from ..tiny import TinyBackbone, random_batch
from ..weights.states import randomise
from .recipes import ROOT, SHRINK, SMALL, file_arguments, load_recipe, write_two_sets

NAMES = ["red", "green", "blue"]


def small_recipe(path=SMALL):
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(path)), [o for o in SHRINK if o.startswith("model.")])
    cfg.model.num_classes = len(NAMES)
    return cfg


def save(cfg, folder):
    """A checkpoint of the recipe with random weights, as the engine writes it."""
    model = randomise(instantiate(cfg.model))
    Checkpointer(model, str(folder), names=NAMES, about=describe(cfg)).save("model")
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("path", [SMALL, ROOT / "configs/dino_r50_4scale_12ep.py"])
def test_resnets_are_built_from_torchvisions(tmp_path, path):
    cfg = small_recipe(path)
    cfg.model.pixel_std = [1, 2, 3]
    model = save(cfg, tmp_path)
    found = model_from_checkpoint(tmp_path / "model.pth")
    assert type(found.network.neck.backbone).__name__ == "TorchvisionBackbone"
    assert found.names == NAMES
    sizes = {SMALL: (288, 576)}.get(path, (800, 1333))
    assert found.preprocessing == ((123.675, 116.28, 103.53), (1.0, 2.0, 3.0), *sizes, 20, None)
    images, padding = random_batch(2)
    expected, actual = model.network(images, padding).decoder, found.network(images, padding).decoder
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_backbones_are_built_with_detectron2(tmp_path):
    cfg = small_recipe()
    small = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    cfg.model.network.neck.backbone = L(SwinTransformer)(out_indices=[1, 2, 3], **small)
    cfg.model.network.neck.in_features = ["p1", "p2", "p3"]
    model = save(cfg, tmp_path)
    batch = random_batch(2)
    found = model_from_checkpoint(tmp_path / "model.pth").network(*batch).decoder
    assert torch.equal(found.boxes, model.network(*batch).decoder.boxes)


def test_backbones_of_a_persons_own_are_refused(tmp_path):
    cfg = small_recipe()
    cfg.model.network.neck.backbone = L(TinyBackbone)()
    cfg.model.network.neck.in_features = ["res3", "res4", "res5"]
    save(cfg, tmp_path)
    with pytest.raises(DataError, match=r"'tests\.tiny\.TinyBackbone' is not on the list"):
        model_from_checkpoint(tmp_path / "model.pth")


def test_listed_names_are_those_that_recipes_store():
    """`describe` writes the name that Detectron2 makes of a class, so the list must have it under this name."""
    for name, path in _PARTS_OF_DETECTRON2.items():
        module, _, attribute = path.partition(":")
        stored = name_of(getattr(importlib.import_module(module), attribute))
        assert stored == name.replace("dino.d2.backbones.", "dino.d2.detectron2_backbones.")  # its former name
        assert stored in _PARTS_OF_DETECTRON2


def test_descriptions_are_plain_text():
    config = describe(small_recipe())["config"]
    assert json.loads(config)["network"]["decoder"]["num_classes"] == 3  # interpolations are resolved
    assert plain({"a": nn.GELU, "b": [nn.functional.relu, (1, 2.5)], "c": None, "d": True, "e": lambda x: x})["a"] == (
        "torch.nn.GELU"
    )
    json.dumps(plain({"a": object(), "b": lambda x: x}))


def test_a_resize_without_a_bound_is_described(tmp_path):
    """Loaded as the programs do: there a key that the recipe does not state is an error, not None."""
    words = file_arguments(*write_two_sets(tmp_path))
    cfg = load_recipe(*words, config=ROOT / "projects/dino/configs/dino_r18_shapes.py")
    found = describe(cfg)["preprocessing"]
    assert (found["short_side"], found["max_size"]) == (160, None)


def test_the_range_of_deep_images_travels(tmp_path):
    """From one setting of the recipe to both mappers, the checkpoint, and the recipe made from that."""
    train, val = write_two_sets(tmp_path)
    grey = np.random.default_rng(0).integers(0, 256, (64, 80), dtype=np.uint8)
    deep = tmp_path / "deep.tif"
    Image.fromarray(grey.astype(np.float32) * 10 - 50).save(deep)
    words = [*file_arguments(train, val), *SHRINK]
    cfg = load_recipe(*words, "model.input_range=[-50,2500]")
    entry = {"file_name": str(deep), "height": 64, "width": 80}
    assert (instantiate(cfg.dataloader.train.mapper).read(entry).image[:, :, 0] == grey).all()
    cfg.dataloader.test.mapper.augmentations = []
    assert (instantiate(cfg.dataloader.test.mapper)(entry)["image"][2].numpy() == grey).all()
    save(cfg, tmp_path)
    assert model_from_checkpoint(tmp_path / "model.pth").preprocessing.input_range == (-50, 2500)
    again = recipe.complete(recipe_of(tmp_path / "model.pth"), [], recipe.DataFiles(None, None, *val), eval_only=True)
    assert again.dataloader.test.mapper.input_range == [-50, 2500]
    assert instantiate(again.model).preprocessing.input_range == (-50, 2500)
    with pytest.raises(DataError, match=r"deep\.tif: its mode F .*model\.input_range of a recipe"):
        instantiate(load_recipe(*words).dataloader.train.mapper).read(entry)
    with pytest.raises(UserError, match=r"input_range must be \[low, high\]"):
        load_recipe(*words, "model.input_range=[3,2]")


def test_the_range_reaches_combined_images(tmp_path):
    train, val = write_two_sets(tmp_path)
    path = ROOT / "projects/dino/configs/dino_r50_4scale_12ep_dense_o2o.py"
    cfg = load_recipe(*file_arguments(train, val), "model.input_range=[0,9]", "train.max_iter=4", config=path)
    assert instantiate(cfg.dataloader.train.mapper).input_range == [0, 9]
