import json
import math

import pytest

from dino.training.evaluation_record import EvaluationRecord
from dino.utils.files import DataError


def record(folder, values=(), period=1, **options):
    """A record of so many evaluations, one after each iteration."""
    found = EvaluationRecord(folder, period, **options)
    for completed, value in enumerate(values, 1):
        found.note(completed, {"bbox/AP": value})
    return found


def test_the_best_of_raw_and_averaged_weights(tmp_path):
    ours = record(tmp_path)
    assert ours.best_ap is None
    assert ours.note(1, {"bbox/AP": 1.0, "ema/bbox/AP": 4.0}) == (True, False)
    assert ours.describe_best() == {"weights": "averaged", "iteration": 0, "metric": "bbox/AP", "value": 4.0}
    assert ours.note(2, {"bbox/AP": 2.0, "ema/bbox/AP": 3.0}) == (False, False)
    assert ours.note(3, {"bbox/AP": 5.0, "ema/bbox/AP": 3.0}) == (True, False)
    assert ours.describe_best()["weights"] == "raw"
    assert ours.best_ap == 5.0


def test_less_can_be_better(tmp_path):
    ours = record(tmp_path, [3.0], mode="min")
    assert ours.note(2, {"bbox/AP": 1.0}) == (True, False)
    assert ours.describe_best()["value"] == 1.0


def test_an_undefined_value_is_never_the_best(tmp_path):
    ours = record(tmp_path)
    assert ours.note(1, {"bbox/AP": math.nan}) == (False, False)
    assert json.loads(ours.path.read_text()) == [{"iteration": 1, "bbox/AP": None}]
    assert ours.best_ap is None


def test_early_stopping(tmp_path):
    ours = record(tmp_path, [1.0, 3.0, 2.0], patience=2)
    assert ours.note(4, {"bbox/AP": 3.0}) == (False, True)
    assert ours.reason_to_stop == "2 evaluations without a better bbox/AP: training stops early"


def test_a_resumed_run_continues_the_record(tmp_path):
    record(tmp_path, [1.0, 3.0, 9.0])
    ours = record(tmp_path)
    ours.read(2)
    assert [entry["iteration"] for entry in ours.entries] == [1, 2]
    assert ours.note(3, {"bbox/AP": 2.0}) == (False, False)
    assert ours.best_ap == 3.0


def test_when_an_evaluation_is_due(tmp_path):
    ours = record(tmp_path, [1.0], period=2)
    assert [n for n in range(7) if ours.due(n, length=6)] == [2, 4]  # the last one is no matter of the period
    assert ours.missed(2, 6)
    ours.note(2, {"bbox/AP": 1.0})
    assert not ours.missed(2, 6)
    assert not any(record(tmp_path, period=0).due(n, 6) for n in range(7))


@pytest.mark.parametrize(
    "text", ['[{"iter', "{}", '[{"iteration": "3"}]', '[{"iteration": 1, "bbox/AP": "x"}]', "[" * 9999]
)
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "evaluations.json").write_text(text)
    with pytest.raises(DataError, match=r"evaluations\.json is damaged"):
        record(tmp_path).read(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "train.best.mode='best': write max or min"),
        ({"patience": 2, "period": 0}, "train.best.patience counts evaluations"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        record(tmp_path, **options)


def test_a_metric_that_was_not_measured(tmp_path):
    with pytest.raises(DataError, match=r"train\.best\.metric='bbox/mAP' was not measured; there are bbox/AP"):
        record(tmp_path, [1.0], metric="bbox/mAP")
