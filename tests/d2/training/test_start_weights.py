"""What a run starts from, and what an evaluation takes: class rows by name, and nothing but a backbone if asked for."""

import copy
import logging

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch

from dino.d2.checkpoint import Checkpointer
from dino.d2.training import engine
from dino.utils.files import DataError

from ..recipes import tiny_recipe
from ..tiny import tiny_detector

OURS = ["red", "green", "blue"]
BIAS = "network.decoder.class_heads.0.bias"


def write(path, names, **content):
    """A checkpoint with these classes -> its weights."""
    state = tiny_detector(num_classes=len(names)).state_dict()
    torch.save({"model": state, "names": names, **content}, path)
    return state


def biases(model):
    return model.state_dict()[BIAS]


@pytest.mark.parametrize("names", [["blue", "pink", "Red", "grey"], ["blue", "pink", "Red"]])
def test_a_training_starts_from_the_rows_of_known_classes(tmp_path, names, caplog):
    caplog.set_level(logging.INFO, logger="detectron2.dino")
    theirs, model = write(tmp_path / "a.pth", names)[BIAS], tiny_detector()
    before = biases(model).clone()
    checkpointer = Checkpointer(model, names=OURS)
    checkpointer.load_start(str(tmp_path / "a.pth"))
    assert biases(model).tolist() == [theirs[2], before[1], theirs[0]]
    assert "class rows kept by name: red, blue" in caplog.text
    assert f"{checkpointer.report.summary}\n" in caplog.text
    assert (
        "112 of 119 tensors loaded; afresh: query_selection 2, denoising 1, decoder 4 (the rows of 'green' only)"
        in (caplog.text)
    )


def test_a_run_that_resumes_keeps_its_rows(tmp_path):
    """Even under other names: its optimizer has moments for them."""
    cfg = tiny_recipe(tmp_path, "train.max_iter=1", "train.eval_period=0")
    engine.train(cfg, resume=False)
    path = tmp_path / "run/model_final.pth"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "names": ["pink", "grey", "blue"]}, path)
    model = engine._build_model(cfg)
    for resume, init in ((True, ""), (True, str(path))):
        cfg.train.init_checkpoint = init
        checkpointer = Checkpointer(model, cfg.train.output_dir, names=OURS)
        assert "trainer" in engine._start_weights(cfg, checkpointer, resume)
        assert torch.equal(biases(model), content["model"][BIAS])
    fresh = engine._build_model(cfg)
    before = biases(fresh).clone()
    assert engine._start_weights(cfg, Checkpointer(fresh, names=OURS), resume=False) == {}
    assert biases(fresh).tolist() == [before[0], before[1], content["model"][BIAS][2]]


@pytest.mark.parametrize("resume", [False, True])
def test_the_backbone_alone_is_a_setting(tmp_path, resume):
    """A run that resumes takes all of its own checkpoint."""
    cfg = tiny_recipe(tmp_path, "train.init_parts=backbone")
    model = engine._build_model(cfg)
    source = engine._build_model(cfg)
    path = tmp_path / "run/model_final.pth" if resume else tmp_path / "a.pth"
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": source.state_dict(), "names": OURS}, path)
    cfg.train.init_checkpoint = "" if resume else str(path)
    checkpointer = Checkpointer(model, cfg.train.output_dir, names=OURS)
    engine._start_weights(cfg, checkpointer, resume)
    assert torch.equal(model.network.neck.backbone.res4.weight, source.network.neck.backbone.res4.weight)
    assert torch.equal(model.network.level_embed, source.network.level_embed) == resume
    assert len(checkpointer.report.without_detector) == (0 if resume else checkpointer.report.total - 6)


def test_recipes_from_before_have_no_such_setting(tmp_path):
    cfg = tiny_recipe(tmp_path)
    del cfg.train["init_parts"]
    write(tmp_path / "a.pth", OURS)
    cfg.train.init_checkpoint = str(tmp_path / "a.pth")
    assert engine._start_weights(cfg, Checkpointer(tiny_detector(), names=OURS), resume=False) == {}


def test_another_word_is_refused(tmp_path):
    write(tmp_path / "a.pth", OURS)
    with pytest.raises(DataError, match=r'a\.pth: parts is "all" or "backbone"'):
        Checkpointer(tiny_detector(), names=OURS).load_start(str(tmp_path / "a.pth"), parts="neck")


def test_an_evaluation_needs_a_detector(tmp_path):
    """Weights of a backbone are none, though nothing of them is missing."""
    model = tiny_detector()
    torch.save(dict(model.network.neck.backbone.state_dict()), tmp_path / "backbone.pth")
    with pytest.raises(
        DataError, match=r"backbone\.pth does not fit the recipe: 113 tensors .*\(no detector in the file"
    ):
        Checkpointer(model, names=OURS).load_whole(str(tmp_path / "backbone.pth"))


def test_an_evaluation_of_some_of_the_classes(tmp_path):
    state, model = write(tmp_path / "a.pth", ["pink", "blue", "green", "red"]), tiny_detector()
    Checkpointer(model, names=OURS).load_whole(str(tmp_path / "a.pth"))
    assert torch.equal(biases(model), state[BIAS][[3, 2, 1]])
    with pytest.raises(DataError, match=r"does not fit the recipe: 7 tensors .*\(the rows of 'black' only\)"):
        Checkpointer(model, names=["red", "green", "black"]).load_whole(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("names", [["blue", "red", "green"], ["blue", "pink", "red", "green"]])
def test_averaged_weights_are_evaluated_with_the_rows_of_the_data(tmp_path, monkeypatch, names):
    cfg = tiny_recipe(tmp_path)
    model = engine._build_model(cfg)
    state, rows = copy.deepcopy(model.state_dict()), [OURS.index(name) if name in OURS else 0 for name in names]
    content = {
        key: value[rows] if "class_head" in key or "label_embed" in key else value for key, value in state.items()
    }
    average = {key: value + 1 if value.is_floating_point() else value for key, value in content.items()}
    torch.save({"model": content, "ema": {"model": average, "updates": 9}, "names": names}, tmp_path / "a.pth")
    cfg.train.init_checkpoint = str(tmp_path / "a.pth")
    found = []
    monkeypatch.setattr(
        engine, "_evaluate_weights", lambda _, model, *__, **___: found.append(copy.deepcopy(model.state_dict())) or {}
    )
    engine.evaluate_checkpoint(cfg)
    assert len(found) == 2
    for added, weights in enumerate(found):
        for key, value in weights.items():
            averaged = added if key.startswith("network.") else 0
            assert torch.equal(value, state[key] + averaged), key
