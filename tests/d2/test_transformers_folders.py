"""A training, with Detectron2 and without, starts from a folder of transformers."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch

from dino.d2.checkpoint import Checkpointer
from dino.d2.recipe_description import recipe_of
from dino.modeling.detector import Detector
from dino.training.run_checkpoints import RunCheckpoints
from dino.weights.file_facts import read_facts

from ..weights.folders import IDS, NAMES, PREPROCESSING, tiny_detector, write_tiny
from ..weights.test_folder_json import split


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
