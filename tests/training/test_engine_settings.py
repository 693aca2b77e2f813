from omegaconf import OmegaConf

from dino.training.engine_settings import only_dino_train
from dino.training.recipe_reading import read_recipe


def test_the_recipes_of_the_project():
    assert only_dino_train(read_recipe("dino_r50_4scale_12ep").train) == ["train.clip_norm=0.1"]
    assert only_dino_train(read_recipe("dino_r18_small_data").train) == [
        "train.clip_norm=0.1",
        "train.ema.enabled=True",
    ]


def test_recipes_that_lack_the_keys():
    assert only_dino_train({}) == []
    assert only_dino_train({"output_dir": "x", "amp": {"enabled": True}}) == []


def test_the_dtype_matters_where_mixed_precision_does():
    for enabled, expected in ((False, []), (True, ["train.amp.dtype=bfloat16"])):
        settings = {"amp": {"enabled": enabled, "dtype": "bfloat16", "evaluation": False}}
        assert only_dino_train(settings) == only_dino_train(OmegaConf.create(settings)) == expected


def test_every_setting_is_named():
    settings = {"compile": True, "parallel": "fsdp", "best": {"patience": 3}, "activation_checkpointing": ["encoder"]}
    assert only_dino_train(settings) == [
        "train.activation_checkpointing=['encoder']",
        "train.compile=True",
        "train.parallel=fsdp",
        "train.best.patience=3",
    ]
