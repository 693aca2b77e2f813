import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from dino.training.recipe_completion import use_epochs
from dino.training.recipe_lengths import count_iterations, iterations, leave_open
from dino.utils.files import DataError


def entries(count):
    """A data set."""
    if count < 0:
        raise DataError("no data")
    return [{}] * count


def recipe(count, batch=4, **train):
    loader = {"dataset": {"_target_": f"{__name__}.entries", "count": count}, "total_batch_size": batch}
    lengths = {
        "max_iter": iterations("train.epochs"),
        "eval_period": iterations("train.eval_epochs", least=0),
        "checkpointer": {"period": iterations("train.eval_epochs")},
    }
    settings = {"epochs": 3, "eval_epochs": 0.5, **lengths, **train}
    return OmegaConf.create({"dataloader": {"train": loader}, "train": settings})


def lengths(cfg):
    return cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period


def test_lengths_follow_from_the_data():
    assert lengths(recipe(40)) == (30, 5, 5)
    assert lengths(recipe(41)) == (33, 6, 6)  # an unfinished batch counts
    assert lengths(recipe(40, epochs=0.25, eval_epochs=0)) == (2, 0, 1)
    assert lengths(recipe(40, max_iter=7)) == (7, 5, 5)


def test_data_that_is_not_there_leaves_them_open():
    assert lengths(recipe(-1)) == (None, None, None)
    assert OmegaConf.create({"train": {"epochs": 1, "max_iter": iterations("train.epochs")}}).train.max_iter is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -3}, "a number of epochs can't be -3"),
        ({"epochs": float("nan")}, "a number of epochs can't be nan"),
        ({"epochs": float("inf")}, "a number of epochs can't be inf"),
        ({"batch": 0}, "total_batch_size can't be 0"),
    ],
)
def test_numbers_without_sense(change, message):
    with pytest.raises(InterpolationResolutionError, match=message):
        lengths(recipe(40, **change))


@pytest.mark.parametrize("count", [1, 39, 40])
def test_dino_train_counts_alike(count):
    cfg = recipe(count)
    expected = lengths(cfg)
    leave_open(cfg)
    assert lengths(cfg) == (None, None, None)
    use_epochs(cfg, count)
    assert lengths(cfg) == expected


def test_stated_lengths_stay():
    cfg = recipe(40, max_iter=7, eval_period="${.max_iter}")
    leave_open(cfg)
    assert lengths(cfg) == (7, 7, None)
    leave_open(OmegaConf.create({"train": {"max_iter": 3}}))


def test_an_epoch_has_an_iteration():
    assert count_iterations(5, 0, 16) == 5
