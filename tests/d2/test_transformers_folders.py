"""A training, with Detectron2 and without, starts from a folder of transformers."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

from dino.d2.checkpoint import Checkpointer
from dino.d2.recipe_description import recipe_of
from dino.modeling.detector import Detector
from dino.training.run_checkpoints import RunCheckpoints
from dino.weights import read_content, resnet_to_torchvision, weights_of
from dino.weights.conversion import convert_file
from dino.weights.file_facts import read_facts
from dino.weights.file_weights import read_weights

from ..weights.folders import IDS, NAMES, PREPROCESSING, tiny_detector, write_tiny
from ..weights.test_folder_json import split
from .recipes import ROOT, SMALL
from .test_recipe_description import save, small_recipe


@pytest.mark.parametrize("several", [False, True])
def test_a_training_starts_from_a_folder(tmp_path, several):
    folder = tmp_path / "model"
    expected = write_tiny(folder).network.state_dict()
    if several:
        split(folder)
    for start in ("detectron2", "plain"):
        torch.manual_seed(5)
        network = tiny_detector().network
        if start == "plain":
            detector = Detector(network, PREPROCESSING, NAMES, category_ids=IDS)
            RunCheckpoints(tmp_path / "run", detector, {}).load_start(str(folder))
        else:
            Checkpointer(network, names=NAMES).load_start(str(folder))
        assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_a_recipe_follows_a_folder(tmp_path):
    write_tiny(tmp_path / "model", pe_offset=-0.5, shared_heads=False)
    cfg = recipe_of(tmp_path / "model")
    assert (cfg.model.num_classes, list(cfg.model.pixel_mean)) == (3, [120.0, 110.5, 103.53])
    assert cfg.train.init_checkpoint == str(tmp_path / "model/model.safetensors")
    facts = read_facts(tmp_path / "model/model.safetensors")
    assert (facts.shared_heads, facts.position.offset, facts.pixel_std) == (False, -0.5, (50.0, 57.12, 57.375))


def use_swin(cfg):
    small = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    cfg.model.network.neck.backbone = L(SwinTransformer)(out_indices=[1, 2, 3], **small)
    cfg.model.network.neck.in_features = ["p1", "p2", "p3"]


def use_resnet18(cfg):
    stages = cfg.model.network.neck.backbone.stages
    stages.depth = 18
    del stages["stride_in_1x1"]


RECIPES = {
    "small data": (SMALL, None),
    "the paper's": (ROOT / "configs/dino_r50_4scale_12ep.py", use_resnet18),
    "a Swin of Detectron2": (ROOT / "configs/dino_swin_l_384_4scale_12ep.py", use_swin),
    "branches": (ROOT / "projects/dino/configs/dino_r50_4scale_12ep_hybrid.py", use_resnet18),
    "another decoder": (ROOT / "projects/dino/configs/dino_r50_4scale_12ep_relation_detr.py", use_resnet18),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_of_a_recipe_comes_back(tmp_path, name):
    path, change = RECIPES[name]
    cfg = small_recipe(path)
    cfg.model.pixel_std = [1, 2, 3]
    if change:
        change(cfg)
    save(cfg, tmp_path)
    convert_file(tmp_path / "model.pth", tmp_path / "folder", to="huggingface")
    convert_file(tmp_path / "folder", tmp_path / "again.pth", to="own")
    first, again = (read_content(tmp_path / file) for file in ("model.pth", "again.pth"))
    assert first["names"] == again["names"]
    assert first["about"]["preprocessing"] == again["about"]["preprocessing"]
    before, after = resnet_to_torchvision(read_weights(first).state), weights_of(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_transformers_reads_branches(tmp_path):
    """Parts of a variant share tensors: they are written once, and come back shared."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    import dino.hf  # noqa: F401 (registers the model)

    path, change = RECIPES["branches"]
    cfg = small_recipe(path)
    change(cfg)
    network = save(cfg, tmp_path).network
    convert_file(tmp_path / "model.pth", tmp_path / "folder", to="huggingface")
    model, found = hf.AutoModelForObjectDetection.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(found.values()), found
    expected = resnet_to_torchvision(network.state_dict())
    assert all(torch.equal(value, expected[key]) for key, value in model.model.network.state_dict().items())
