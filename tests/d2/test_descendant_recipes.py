"""The recipes of DINO's descendants at a tiny size: their checkpoints, and how their parts go together."""

import copy
import io
from functools import cache

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate

from dino.d2.recipe import add_branch
from dino.export.export_formats import FORMATS, write
from dino.export.export_wrapper import ExportWrapper, Fixed
from dino.layers import IoUAwareLoss, deform_attn_implementation
from dino.modeling.detector import Detector
from dino.modeling.variants import (
    LearnedQueries,
    MixedMatchingCriterion,
    RankedCriterion,
    SecondPass,
    ThresholdMatcher,
)
from dino.utils.files import DataError, UserError
from dino.weights import convert, load_weights
from dino.weights.names import is_of_dino

from ..tiny import random_batch, random_targets
from ..weights.states import randomise
from .processes import assert_same
from .recipes import DESCENDANTS, ROOT
from .test_ablation_recipes import NAMES, load

CHANGED = ("relation_detr", "stable_dino")  # those whose inference is not DINO's
NEW_PARTS = {  # with weights of their own
    "hybrid": {"branches"},
    "relation_detr": {"encoder", "decoder", "branches"},
    "stable_dino": {"encoder"},
}


@cache
def recipe(name):
    """With fewer queries, whose number is not what these recipes are about."""
    cfg = load(name)
    cfg.model.network.query_selection.num_queries = 12
    cfg.model.network.encoder.num_layers = cfg.model.network.decoder.num_layers = 2
    cfg.model.max_detections = 20
    return cfg


def build(name, num_classes=3):
    """The detector of a recipe."""
    torch.manual_seed(0)
    cfg = copy.deepcopy(recipe(name))
    cfg.model.num_classes = num_classes
    return instantiate(cfg.model)


@pytest.fixture(scope="module")
def dino():
    """The weights of a trained DINO."""
    return randomise(build("base").network).state_dict()


def test_every_descendant_has_recipes_of_both_sizes():
    for name in DESCENDANTS:
        assert (ROOT / f"projects/dino/configs/dino_r50_4scale_12ep_{name}.py").is_file()
        assert (ROOT / f"projects/dino/configs/ablation/{name}.py").is_file()


@pytest.mark.parametrize("name", DESCENDANTS)
def test_a_checkpoint_of_dino_starts_them(name, dino):
    """Only what DINO does not have is new, and the log says so."""
    network = build(name).network
    report = load_weights(network, dino)
    new = [key for key in network.state_dict() if not is_of_dino(key)]
    assert report.missing == report.new == new
    assert (report.reinitialised, report.unexpected) == ({}, [])
    assert {key.split(".")[0] for key in new} == NEW_PARTS.get(name, set())
    lines = [line.strip() for line in str(report).splitlines()]
    assert [line.startswith("new, as initialised: ") for line in lines].count(True) == bool(new)
    assert not any(line.startswith("missing: ") for line in lines)


def test_what_a_dino_lacks_itself_is_missing(dino):
    """And not called new."""
    state = {key: value for key, value in dino.items() if key != "decoder.norm.bias"}
    report = load_weights(build("relation_detr").network, state)
    assert "decoder.norm.bias" in report.missing
    assert "decoder.norm.bias" not in report.new
    assert "missing: decoder.norm.bias" in str(report)


@pytest.mark.parametrize("name", DESCENDANTS)
def test_they_are_fine_tuned_for_other_classes(name):
    """Of a descendant's file, only what depends on the classes is new: also in branches."""
    source, target = randomise(build(name).network), build(name, num_classes=5).network
    report = load_weights(target, source.state_dict())
    assert (report.missing, report.unexpected) == ([], [])
    assert set(report.reinitialised.values()) == {"5 classes instead of 3"}
    heads = [key for key, value in target.state_dict().items() if value.shape[:1] == (5,)]
    assert set(report.reinitialised) == set(heads)
    assert any(key.startswith("branches.") for key in heads) == (name == "relation_detr")


@pytest.mark.parametrize("name", ["hybrid", "relation_detr"])
def test_branches_may_have_other_numbers_of_queries(name):
    source, target = build(name).network, build(name).network
    target.branches.hybrid.content = torch.nn.Embedding(7, 64)
    report = load_weights(target, source.state_dict())
    assert report.reinitialised == {"branches.hybrid.content.weight": "7 queries instead of 150"}


@pytest.mark.parametrize("name", DESCENDANTS)
def test_other_programs_get_what_they_can_run(name, dino):
    """The files of those that differ in training only; the branches stay here."""
    state = randomise(build(name).network).state_dict()
    if name in CHANGED:
        with pytest.raises(
            DataError, match=r"its encoder is not DINO's: only this project has encoders with the tensor"
        ):
            convert(state, to="detrex")
    else:
        assert convert(state, to="detrex").keys() == convert(dino, to="detrex").keys()


def test_another_decoder_is_not_written_for_other_programs(dino):
    state = build("relation_detr").network.state_dict()
    added = {key: value for key, value in state.items() if key.startswith("decoder.") and not is_of_dino(key)}
    with pytest.raises(DataError, match="its decoder is not DINO's"):
        convert({**dino, **added}, to="official")


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("form", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_they_are_exported(name, form):
    """The others run DINO's own network."""
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = randomise(build(name)).eval()
    detector = Detector(model.network, model.preprocessing, NAMES).eval()
    run = FORMATS[form].run(write(form, ExportWrapper(detector).eval(), Fixed(1, 64, 96), {}))
    images = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    _, scores, _ = run(images.numpy(), np.array([[64, 96]]))
    with torch.no_grad(), deform_attn_implementation("reference"):
        logits = model.network(*detector.pad(images, torch.tensor([[64, 96]]))).decoder.logits[-1, 0]
    expected = logits.sigmoid().flatten().sort(descending=True).values[: scores.shape[1]]
    np.testing.assert_allclose(scores[0], expected.numpy(), atol=2e-4)


@pytest.mark.parametrize("name", DESCENDANTS)
def test_inference_differs_only_where_that_is_said(name, dino):
    """With the weights of a DINO, those that change the training alone predict the same to the bit."""
    networks = [build(part).network.eval() for part in ("base", name)]
    for network in networks:
        load_weights(network, dino)
    with torch.no_grad():
        batch = random_batch(2)
        ours, theirs = (network(*batch).decoder for network in networks)
    assert torch.equal(ours.logits, theirs.logits) == (name not in CHANGED)


def steps(model, optimizer, numbers):
    """Train steps of these numbers; each has its own batch and noise."""
    for number in numbers:
        torch.manual_seed(number)
        batch, targets = random_batch(2), random_targets(3, 1)
        losses = model.criterion(model.network(*batch, targets), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", DESCENDANTS)
def test_they_resume_to_the_last_bit(name):
    """From the state of the model and of the optimiser alone."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer, [0, 1])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(model, optimizer, [2, 3])
    file.seek(0)
    content = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    again = instantiate(recipe(name).model)
    again.load_state_dict(content["model"])
    resumed = torch.optim.AdamW(again.parameters(), lr=1e-3)
    resumed.load_state_dict(content["optimizer"])
    steps(again, resumed, [2, 3])
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


def test_parts_of_several_descendants_go_together():
    """Relations, fused states and a hybrid branch with the losses of Align-DETR, and a second pass beside them."""
    model = copy.deepcopy(recipe("relation_detr").model)
    main = model.criterion.criterion
    main._target_, main.class_loss = MixedMatchingCriterion, L(IoUAwareLoss)()
    losses = L(RankedCriterion)(matcher=L(ThresholdMatcher)(), l1_weight=1.0)
    add_branch(model, "second", L(SecondPass)(), losses)
    detector = instantiate(model)
    second = detector.criterion.branches["second"]
    assert second.weights == {"ce": 1.0, "bbox": 1.0, "giou": 2.0}  # its own, and those of the main losses
    assert isinstance(second.class_loss, IoUAwareLoss)
    assert isinstance(second.matcher, ThresholdMatcher)
    batch, targets = random_batch(2), random_targets(2, 3)
    losses = detector.criterion(detector.network(*batch, targets), targets)
    assert {"loss_ce", "loss_ce_hybrid", "loss_ce_interm_hybrid", "loss_ce_second", "loss_giou_dn_second"} <= set(
        losses
    )
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def without_losses(model):
    model.criterion = model.criterion.criterion


def without_branch(model):
    del model.network.branches.hybrid


def static_queries(model):
    model.network.query_selection._target_ = LearnedQueries


def one_object_each(model):
    model.criterion.branches.hybrid.matcher = L(ThresholdMatcher)()


def focal(model):
    model.criterion.criterion._target_ = MixedMatchingCriterion
    model.criterion.criterion.class_loss = L(torch.nn.Identity)()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_losses, r"the network has the branches \['hybrid'\], but the criterion losses for \[\]"),
        (without_branch, r"the network has the branches \[\], but the criterion losses for \['hybrid'\]"),
        (static_queries, "SharedHybridBranch selects tokens by the network's query selection, but LearnedQueries"),
        (one_object_each, "ThresholdMatcher decides how many predictions an object gets: it takes no `copies`"),
        (focal, "Identity has no quality to rank the predictions"),
    ],
)
def test_what_does_not_go_together_is_refused_when_it_is_built(change, reason):
    model = copy.deepcopy(recipe("hybrid").model)
    change(model)
    with pytest.raises(UserError, match=reason):
        instantiate(model)
