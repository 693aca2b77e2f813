"""The recipe beside a checkpoint of Detectron2's own programs. `tests/d2/test_lazyconfig_program.py` trains one."""

import json

import pytest

from dino.utils.files import DataError
from dino.weights.detectron2_run import describe_run

RECIPE = """model:
  max_detections: 7
  num_classes: 3
  network: {_target_: dino.modeling.DINO, neck: {in_features: '${.backbone.out}', backbone: {out: [a, b]}}, deep: %s}
dataloader: {test: {mapper: {augmentations: [{sizes: !!python/tuple [48, 32]}, {other: 1}]}}}
optimizer: {factor: !!python/object/apply:os.system [touch %s]}
"""


def described(folder, deep, other="x"):
    (folder / "config.yaml").write_text(RECIPE % (deep, other))
    return describe_run(folder / "model_final.pth")


def test_a_recipe_is_read_as_plain_data(tmp_path):
    about = described(tmp_path, "'${..num_classes}'", tmp_path / "made")["about"]
    network = json.loads(about["config"])["network"]
    assert network["deep"] == 3
    assert network["neck"]["in_features"] == ["a", "b"]
    assert about["preprocessing"]["short_side"] == 48
    assert about["preprocessing"]["max_detections"] == 7
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("deep", "message"),
    [
        ("'${model.network.deep}'", "no plain value"),
        ("'${.neck}'", "no plain value"),
        ("'${.absent}'", "has no 'absent'"),
        ("'${oc.env:HOME}'", "no plain value"),
        ("'${dino.iterations:1,1}'", "no plain value"),
        ("'a${.neck.in_features}'", "no plain value"),
        ("[&a [1], *a]", "aliases"),
        ("[", "describes no model"),
        ("[" * 5000 + "]" * 5000, "describes no model"),
        ("!!python/object/apply:os.system [ls]", None),
        ("!unknown x", "describes no model"),
    ],
)
def test_hostile_recipes(tmp_path, deep, message):
    if message is None:
        assert json.loads(described(tmp_path, deep)["about"]["config"])["network"]["deep"] == ["ls"]
    else:
        with pytest.raises(DataError, match=message) as refused:
            described(tmp_path, deep)
        assert len(str(refused.value)) < 1000


def test_other_files_of_this_name_are_refused(tmp_path):
    assert describe_run(tmp_path / "model_final.pth") == {}
    for text in ("site_name: a", "- a", "", "a" * (2 << 20)):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(DataError, match=r"config\.yaml, describes no model"):
            describe_run(tmp_path / "model_final.pth")


def test_long_numbers_are_refused_at_once(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1" + ":1" * 500_000)
    with pytest.raises(DataError, match="a number of more than 100 digits"):
        describe_run(tmp_path / "model_final.pth")


def test_yacs_has_its_own_predictor(tmp_path):
    (tmp_path / "config.yaml").write_text("MODEL: {META_ARCHITECTURE: DINODetector}")
    with pytest.raises(DataError, match="yacs: predict by DefaultPredictor"):
        describe_run(tmp_path / "model_final.pth")


def test_classes_come_from_the_evaluation(tmp_path):
    assert "names" not in described(tmp_path, "1")
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference/classes.json").write_text('{"names": ["a"], "category_ids": [3], "other": 1}')
    found = described(tmp_path, "1")
    assert (found["names"], found["category_ids"]) == (["a"], [3])
    assert "other" not in found
    (tmp_path / "inference/classes.json").write_text("[")
    with pytest.raises(DataError, match=r"classes\.json: it is no JSON"):
        described(tmp_path, "1")
