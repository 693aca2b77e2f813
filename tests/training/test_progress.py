"""The rules that tell why a training goes wrong."""

from collections import Counter

import numpy as np
import pytest

from dino.training.progress import Objects, Progress


def progress(losses, length=300, doubts=()):
    return Progress(length, dict(losses), "optimizer.lr", 4e-4, doubts)


def test_a_short_training_is_named_as_a_cause():
    assert "100 iterations are few" in progress({}, length=100).zero_ap(100, 0.0, 0.0)
    assert "iterations are few" not in progress({}).zero_ap(200, 0.0, 0.0)


def test_a_loss_that_fell_a_little_is_not_said_to_rise():
    text = progress({n: 20 - n / 200 for n in range(200)}).zero_ap(200, 0.0, 0.0)
    assert "the total loss has hardly fallen (20 at the start, 19 now)" in text


def falling(n):
    return n, 20 - n / 20


def rising(n):
    return n, 20 + n / 20


def test_a_loss_that_rises():
    """Medians of the first 15 iterations, 20.35, and of the last 15 of the first 100, 24.6."""
    losses = map(rising, range(100))
    assert progress(losses).rising_loss(100) == (
        "the total loss rises: 20.4 at the start, 24.6 after 100 of 300 iterations. "
        "The learning rate optimizer.lr=0.0004 is probably too high"
    )


@pytest.mark.parametrize("completed", [1, 99, 101, 300])
def test_the_loss_is_judged_once(completed):
    assert progress(map(rising, range(100))).rising_loss(completed) is None


def test_losses_that_do_not_rise():
    assert progress(map(falling, range(100))).rising_loss(100) is None
    assert progress((n, 7.0) for n in range(100)).rising_loss(100) is None
    spike = dict(map(falling, range(100))) | {99: 1000.0}
    assert progress(spike).rising_loss(100) is None  # one bad batch
    assert progress({}).rising_loss(100) is None
    assert progress({80: 1.0, 90: 2.0}).rising_loss(100) is None  # too close to each other


def test_few_logged_losses_are_enough():
    assert "5 at the start, 9 after 100" in progress({19: 5.0, 39: 6.0, 99: 9.0}).rising_loss(100)


def test_no_ap():
    text = progress(map(falling, range(300)), doubts=["half of it is odd"]).zero_ap(300, 0.0009, 0.0)
    assert text == (
        "AP and AP50 are 0 after 300 of 300 iterations. Likely causes: half of it is odd; the total loss fell from "
        "19.6 to 5.4, so the training may be too short; boxes or classes that do not fit the images (see `dino check`)"
    )
    text = progress((n, 20.0) for n in range(200)).zero_ap(200, 0.0, 0.0)
    assert "the total loss has not fallen (20 at the start, 20 now), so optimizer.lr=0.0004 may be too high" in text
    assert "Likely causes: optimizer.lr=0.0004 may not fit; " in progress({}).zero_ap(200, 0.0, 0.0)


@pytest.mark.parametrize(
    ("completed", "ap", "ap50"),
    [(99, 0, 0), (300, 0.001, 0.0), (300, 0.0, 0.001), (300, -1, -1), (300, float("nan"), float("nan"))],
    ids=["early", "some AP", "some AP50", "undefined", "undefined in Detectron2"],
)
def test_no_warning_where_none_is_due(completed, ap, ap50):
    assert progress({}).zero_ap(completed, ap, ap50) is None


def test_the_first_warning_is_due_after_a_third():
    assert progress({}).zero_ap(100, 0, 0)


def objects(sizes=(50.0,), shares=(0.1,), train="ab", val="ab"):
    return Objects(np.array(sizes), np.array(shares), Counter(train), Counter(val))


def test_data_that_look_right_raise_no_doubts():
    assert objects().doubts() == []
    assert objects(sizes=(), shares=(), train="", val="").doubts() == []
    assert objects(sizes=(3.0, 9.0, 9.0), shares=(0.95, 0.1, 0.1), val="aaabbb").doubts() == []


def test_doubts():
    (doubt,) = objects(sizes=(3.0, 7.0, 90.0)).doubts()
    assert doubt == "half of the objects are smaller than 8 pixels: try larger images or tiles"
    (doubt,) = objects(shares=(0.95, 1.0, 0.1)).doubts()
    assert doubt == "half of the training boxes cover more than 90% of their image: are they boxes of objects?"
    (doubt,) = objects(train="a", val="abbcc").doubts()
    assert doubt == "4 of 5 validation objects are of classes that no training object has: b, c"
    assert objects(train="a", val="aab").doubts() == []
    assert len(objects((1.0,), (1.0,), "a", "b").doubts()) == 3


def test_predictions_given_as_annotations_are_named():
    (doubt,) = objects()._replace(scores=3).doubts()
    assert doubt.startswith("3 training annotations have a score, as predictions have: scores are ignored")
    (doubt,) = objects()._replace(scores=1).doubts()
    assert doubt.startswith("1 training annotation has a score")
