"""A batch in parts has the losses and gradients of the whole batch, whatever the recipe's criterion.

For an exact comparison all images have one size, and either all parts have an equally full image and denoising adds no
noise, or the parts get their denoising queries, with noise, from those of the whole batch.
"""

from functools import cache

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch

from dino.layers.matching_metrics import MatchingMetrics
from dino.modeling import compile_network
from dino.training.memory_saving import checkpoint_activations

from ..in_parts import (
    ABLATIONS,
    BASE,
    RECIPES,
    PartOfWhole,
    assert_equal_steps,
    groups,
    images,
    in_float64,
    make_trainer,
    skip_a_step,
    step,
    tiny_model,
)

GROUPS = list(groups())
TUNED = "projects/dino/configs/dino_r50_4scale_12ep_tuned.py"
DEFAULT = "configs/dino_r50_4scale_12ep.py"
EVEN, HALVES, UNEVEN = (2, 2, 2, 2), (3, 1, 2, 3), (3, 0, 1, 0)  # objects of four images


@cache
def whole_step(recipe, counts, **options):
    return step(recipe, counts, (4,), **options)


def test_every_recipe_is_compared():
    """By one of its like; those that differ in their losses are there."""
    compared = [path for paths in groups().values() for path in paths]
    assert sorted(compared) == sorted([*RECIPES, BASE, *ABLATIONS])
    kinds = {type(tiny_model(name).criterion).__name__ for name in GROUPS}
    assert kinds == {
        *("SetCriterion", "LossScaling", "FinalCriterion", "SeparateCriterion", "ObjectnessCriterion"),
        *("MixedMatchingCriterion", "CombinedCriterion"),
    }
    assert TUNED in GROUPS


@pytest.mark.parametrize(("counts", "stops"), [(HALVES, (2, 4)), (EVEN, (1, 2, 3, 4))])
@pytest.mark.parametrize("recipe", GROUPS)
def test_equally_full_parts_equal_the_whole_batch(recipe, counts, stops):
    assert_equal_steps(step(recipe, counts, stops), whole_step(recipe, counts))


@pytest.mark.parametrize("recipe", GROUPS)
def test_wrapped_uneven_parts_equal_the_whole_batch(recipe):
    """Two of the four parts have no object. Two wrappers around the criterion pass the normaliser through."""
    options = {"wrapper": "own", "own_denoising": False, "change": in_float64}
    assert_equal_steps(step(recipe, UNEVEN, (1, 2, 3, 4), **options), whole_step(recipe, UNEVEN, **options))


@pytest.mark.parametrize("recipe", GROUPS)
def test_metrics_of_parts_are_those_of_the_whole_batch(recipe):
    """Whatever the criterion, and through wrappers; losses and gradients are those without metrics."""
    options = {"wrapper": "own", "own_denoising": False, "change": in_float64}
    found, expected = (step(recipe, UNEVEN, stops, **options, log_matching=True) for stops in ((1, 2, 3, 4), (4,)))
    assert found["metrics"].keys() == expected["metrics"].keys() == set(MatchingMetrics.NAMES)
    for name, value in expected["metrics"].items():
        torch.testing.assert_close(found["metrics"][name], value)
    alone = whole_step(recipe, UNEVEN, **options)
    assert alone["metrics"] == {}
    assert_equal_steps(expected, alone)


@pytest.mark.parametrize("wrapper", ["plain", "scaled"])
@pytest.mark.parametrize("counts", [UNEVEN, (0, 0, 0, 5), (9, 30, 0, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("stops", [(1, 4), (3, 4)])
def test_parts_of_other_sizes(stops, counts, wrapper):
    """Also with more objects than queries or than the budget of denoising, and without any object."""
    options = {"wrapper": wrapper, "own_denoising": False}
    assert_equal_steps(step(DEFAULT, counts, stops, **options), whole_step(DEFAULT, counts, **options))


def test_matching_losses_do_not_depend_on_the_denoising_of_parts():
    """Each part denoises by itself, in other groups than the whole batch; all losses without denoising are the same."""
    found, expected = (step(DEFAULT, UNEVEN, stops)["losses"] for stops in ((1, 2, 3, 4), (4,)))
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        if "_dn" not in name:
            torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-6, msg=name)
    assert sum("_dn" in name for name in found) == 6
    assert all(loss.isfinite() for loss in found.values())


def test_without_the_common_normaliser_it_is_another_loss():
    """The comparison can fail: two parts with normalisers of their own give about twice the loss."""
    model = tiny_model(TUNED)
    model.network.denoising = PartOfWhole(model.network.denoising, images(HALVES), 0)
    alone = [sum(model(part).values()).item() for part in (images(HALVES)[:2], images(HALVES)[2:])]
    expected = sum(step(TUNED, HALVES, (2, 4), own_denoising=False)["losses"].values()).item()
    assert sum(alone) == pytest.approx(2 * expected, rel=0.2)
    assert sum(alone) > 1.5 * expected


CHANGES = {
    "checkpointing": lambda model: checkpoint_activations(model, ["encoder", "decoder"]),
    "compiled": lambda model: compile_network(model.network, backend="eager"),
}


@pytest.mark.parametrize("change", ["checkpointing", pytest.param("compiled", marks=pytest.mark.slow)])
def test_parts_of_a_changed_network(change):
    found = step(TUNED, UNEVEN, (2, 4), own_denoising=False, change=CHANGES[change])
    expected = whole_step(TUNED, UNEVEN, own_denoising=False)
    found["gradients"] = {
        name.replace("_checkpoint_wrapped_module.", ""): value for name, value in found["gradients"].items()
    }
    assert_equal_steps(found, expected)


@pytest.mark.parametrize(("wrapper", "parts"), [("plain", 1), ("own", 2)])
@pytest.mark.parametrize("recipe", GROUPS)
def test_a_non_finite_step_is_skipped_and_counted(recipe, wrapper, parts, tmp_path):
    assert skip_a_step(recipe, wrapper, tmp_path, parts=parts) == (1, True, True)
    assert (tmp_path / "non_finite_batch_0.pth").is_file()


class Other(torch.nn.Module):
    """A detector that is no DINO: losses are means over its batch, and take no options."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, batch):
        means = torch.stack([x["image"].float().mean() / 255 for x in batch])
        return {"loss_a": (self.weight[0] - means).square().mean(), "loss_b": (self.weight * means.mean()).sum()}


@pytest.mark.parametrize("skip_non_finite", [False, True])
def test_losses_of_other_detectors_are_averaged_over_the_parts(skip_non_finite):
    batch, results = images(EVEN), []
    for parts in ([batch], [batch[:2], batch[2:]], [[x] for x in batch]):
        model = Other()
        trainer = make_trainer(model, grad_accum_steps=len(parts), skip_non_finite=skip_non_finite)
        losses = {name: loss for name, loss in trainer.accumulate(parts).items() if name == "loss_b"}
        results.append({"losses": losses, "gradients": {"weight": model.weight.grad}})
    for result in results[1:]:
        assert_equal_steps(result, results[0])
