"""Figures of checkpoints: found objects, changed matches, gradients."""

import json

import numpy as np
import pytest
import torch

from dino.layers import HungarianMatcher, LayerOutputs, Outputs, Target
from dino.training import plain
from dino.weights.description import PARTS

from ..coco_files import write_coco
from ..tiny import TinyBackbone
from ..tools.programs import load_program


@pytest.fixture
def diagnose():
    return load_program("diagnose", "benchmarks")


def outputs_of(*layers):
    """Outputs of one image: a proposal layer and decoder layers, each a list of boxes, with equal logits."""
    boxes = torch.tensor(layers)[:, None]  # (N + 1, 1, Q, 4)
    logits = torch.zeros(*boxes.shape[:3], 2)
    return Outputs(LayerOutputs(logits[1:], boxes[1:]), LayerOutputs(logits[:1], boxes[:1]))


def test_objects_that_layers_find_and_match(diagnose):
    """Two objects: proposals find none, layer 1 one, layer 2 both, with its queries the other way round."""
    left, right, nowhere = [0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.2, 0.2], [0.5, 0.05, 0.1, 0.1]
    target = Target(torch.tensor([0, 1]), torch.tensor([left, right]))
    near_right = [0.7, 0.6, 0.2, 0.2]  # overlaps it by less than 0.5
    seen = diagnose.see(outputs_of([nowhere, nowhere], [left, near_right], [right, left]), target, HungarianMatcher())
    assert seen.found.tolist() == [[False, False], [True, False], [True, True]]
    assert seen.matched.tolist() == [[0, 1], [1, 0]]
    figures = diagnose.figures([seen], [seen])
    assert figures["found by proposals"] == 0
    assert (figures["found by layer 1"], figures["found by layer 2"]) == (0.5, 1)
    assert figures["other query in layer 2"] == 1
    assert figures["other query since last"] == 0


def test_a_table_of_two_checkpoints(diagnose, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())
    data = write_coco(tmp_path / "data")
    settings = plain.Settings(device="cpu", size=48, embed_dim=64, layers=2, queries=20)
    for number in range(2):
        torch.manual_seed(number)
        plain.save(tmp_path / f"{number}.pth", plain.build(settings, ["red", "green", "blue"]), settings)
    weights = [str(tmp_path / f"{number}.pth") for number in range(2)]
    output = tmp_path / "figures.json"
    words = ["--json", str(data.annotations), "--images", str(data.images), "--output", str(output)]
    diagnose.main([*weights, *words])
    first, second = json.loads(output.read_text()).values()
    assert second.keys() - first.keys() == {"other query since last"}
    assert all(0 <= value <= 1 for name, value in second.items() if name.startswith(("found", "other")))
    assert all(first[f"gradient of {part}"] > 0 for part in diagnose.PARTS)
    assert np.isfinite([*first.values(), *second.values()]).all()
    assert "found by layer 2" in capsys.readouterr().out
