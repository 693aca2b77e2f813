import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from dino.modeling.detector import Detector
from dino.modeling.variants import SecondPass, SharedHybridBranch

from ..tiny import tiny_network
from .programs import ROOT, assert_one_error, load_program, run_here

R50 = ROOT / "configs/dino_r50_4scale_12ep.py"
SMALL = ROOT / "projects/dino/configs/dino_r18_small_data.py"

analyze_model = load_program("analyze_model")


def test_costs_of_a_recipe(capsys):
    analyze_model.main(["--config-file", str(R50), "--size", "256", "320"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("1 image of 256x320")
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:9]}
    assert rows["total"][:2] == ["46,884,456", "46,662,056"]
    assert rows["neck.backbone"][:2] == ["23,454,912", "23,232,512"]
    assert float(rows["total"][2]) == pytest.approx(sum(float(row[2]) for row in rows.values()) / 2, abs=0.05)
    assert lines[9].startswith("activations of the backward pass: ")


def test_branches_are_for_training_only(capsys, monkeypatch):
    network = tiny_network(branches={"again": SecondPass(), "more": SharedHybridBranch(num_queries=7, embed_dim=32)})
    monkeypatch.setattr(analyze_model, "load_model", lambda *_: Detector(network))
    analyze_model.main(["--config-file", str(R50), "--size", "64", "64"])
    printed = capsys.readouterr().out
    assert "inference runs no branches: again, more are for training only\n" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[2:10]}
    assert rows["branches"] == ["224", "224", "0.00"]


def test_overrides_and_measurements(capsys):
    words = ["--config-file", str(SMALL), "--size", "64", "96", "--batch", "2", "--device", "cpu"]
    words += ["model.num_classes=7", "model.network.encoder.num_layers=1", "--measure", "inference", "training"]
    analyze_model.main(words)
    *_, inference, training = capsys.readouterr().out.splitlines()
    assert inference.startswith("inference: ")
    assert training.startswith("forward and backward: ")
    assert "images/s" in inference


def test_errors():
    result = run_here("analyze_model", "--config-file", "absent.py")
    assert_one_error(result, "recipe not found: 'absent.py'", code=2)
    result = run_here("analyze_model", "--config-file", SMALL, "model.num_class=3")
    assert_one_error(result, "no key 'model.num_class'; the nearest is 'model.num_classes'", code=2)


def test_sizes_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        analyze_model.main(["--config-file", str(R50), "--batch", "0"])
    assert "must be positive" in capsys.readouterr().err
