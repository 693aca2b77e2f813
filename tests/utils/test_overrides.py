"""Settings by key: any text as a value, types of the recipe, the nearest key."""

import os

import pytest
from omegaconf import OmegaConf

from dino.utils.files import UsageError
from dino.utils.overrides import SHORT_NAMES, apply, find_setting, is_override, resolve_key

RECIPE = {
    "train": {
        "output_dir": "./output",
        "epochs": 12,
        "max_iter": None,
        "checkpointer": {"period": None},
        "amp": {"enabled": False},
        "parts": [],
        "wandb": {"name": None},
        "other": None,
    },
    "optimizer": {"lr": 1e-4, "params": {"base_lr": "${optimizer.lr}"}, "betas": [0.9, 0.999]},
    "dataloader": {"train": {"total_batch_size": 16}, "test": {"size": 1}, "other": {"size": 1}},
    "model": {"width": "${train.epochs}", "part": {"_target_": "dino.modeling.Decoder", "size": 3}},
}


@pytest.fixture
def cfg():
    return OmegaConf.create(RECIPE)


TEXTS = [
    *(
        "output/run (1), test [a]",
        "run 1",
        "a=b",
        "#5",
        "run#5 # x",
        "[a",
        "{b",
        "a: b",
        "x, y",
        "ä 日本 🦝",
        "12",
        "1e-4",
    ),
    *(
        "1e-4",
        "it's",
        'say "x" y',
        "",
        "true",
        "a\nb\n",
        "*.x",
        "&a",
        "!b",
        "%c",
        "@d",
        "`e`",
        "a\\b",
        "${HOME}/run",
        "\\${x}",
    ),
    *("$(x)", "a${train.epochs}b", "${train", "- a", "? b", "|", ">", "'", '"'),
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_a_value(cfg, text):
    assert apply(cfg, [f"train.output_dir={text}"]).train.output_dir == text
    again = OmegaConf.create(OmegaConf.to_yaml(cfg))  # as in a run's config.yaml
    assert again.train.output_dir == text


def test_text_as_people_write_it(cfg):
    assert apply(cfg, ["train.output_dir=~/run"]).train.output_dir == os.path.expanduser("~/run")
    assert apply(cfg, ["train.output_dir='a, b'"]).train.output_dir == "a, b"
    assert apply(cfg, ['train.output_dir="a, b"']).train.output_dir == "a, b"
    assert apply(cfg, ["train.output_dir=null"]).train.output_dir is None
    assert apply(cfg, ["train.wandb.name=2024"]).train.wandb.name == "2024"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=3", 3),
        ("train.epochs=0.5", 0.5),
        ("train.epochs=2e3", 2000),
        ("train.max_iter=7", 7),
        ("train.max_iter=null", None),
        ("train.epochs=None", None),
        ("optimizer.lr=1e-5", 1e-5),
        ("optimizer.lr=1", 1),
        ("train.amp.enabled=yes", True),
        ("train.amp.enabled=False", False),
        ("train.amp.enabled=1", True),
        ("train.amp={enabled: true}", {"enabled": True}),
        ('train.amp={"enabled": true}', {"enabled": True}),
        ("train.parts=[backbone,encoder]", ["backbone", "encoder"]),
        ('train.parts=["a, b", no]', ["a, b", "no"]),
        ("optimizer.betas=[0.5,1e-1]", [0.5, 0.1]),
        ("optimizer.betas.1=0.5", 0.5),
        ("model.width=4", 4),
        ("model.part._target_=mine.Part", "mine.Part"),
        ("model.part.size=${train.epochs}", 12),
        ("train.other=5", 5),
        ("train.other=[1,a]", [1, "a"]),
        ("train.other={a: 1}", {"a": 1}),
        ("train.other=a: 1", "a: 1"),
        ("train.other=a, b # c", "a, b # c"),
    ],
)
def test_values_have_the_type_of_the_recipe(cfg, override, value):
    key = override.partition("=")[0]
    found = OmegaConf.select(apply(cfg, [override]), key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value
    assert type(found) is type(value) or OmegaConf.is_config(found)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=three", "train.epochs must be a number, not 'three'"),
        ("train.epochs=True", "train.epochs must be a number, not 'True'"),
        ("train.epochs=nan", "train.epochs must be a number, not 'nan'"),
        ("train.max_iter=many", "train.max_iter must be a number, not 'many'"),
        ("train.amp.enabled=maybe", "train.amp.enabled must be True or False, not 'maybe'"),
        ("train.amp=True", "train.amp holds several settings: write train.amp.enabled=..., not 'True'"),
        ("train.parts=backbone", "train.parts must be a list: write train.parts=[backbone]"),
        ("optimizer.betas=0.9,0.95", "optimizer.betas must be a list: write optimizer.betas=[0.9,0.95]"),
        ("optimizer.betas=[a,b]", "optimizer.betas must be a list of numbers, not '[a,b]'"),
        ("train.output_dir=???", "train.output_dir can't be '???', which omegaconf reads as a missing value"),
        ("train.epochs", "'train.epochs' is no override: write key=value"),
        ("+train.new=1", "'+train.new': an override changes a key; to add or remove one, write a recipe of your own"),
        ("lr=1", "the recipe has no key 'lr'; the nearest is 'optimizer.lr'"),
        ("epochs=1", "the recipe has no key 'epochs'; the nearest is 'train.epochs'"),
        ("train.lr=1", "the recipe has no key 'train.lr'; the nearest is 'optimizer.lr'"),
        ("Train.Epochs=1", "the recipe has no key 'Train.Epochs'; the nearest is 'train.epochs'"),
        ("train.max-iter=1", "the recipe has no key 'train.max-iter'; the nearest is 'train.max_iter'"),
        ("batch_size=1", "the recipe has no key 'batch_size'; the nearest is 'dataloader.train.total_batch_size'"),
        ("SOLVER.BASE_LR=1", "the recipe has no key 'SOLVER.BASE_LR'; the nearest is 'optimizer.lr'"),
        ("betas.0=1", "the recipe has no key 'betas.0'; the nearest is 'optimizer.betas.0'"),
        ("optimizer.betas.2=1", "the recipe has no key 'optimizer.betas.2'; the nearest is 'optimizer.betas.0'"),
        ("train..epochs=1", "the recipe has no key 'train..epochs'; the nearest is 'train.epochs'"),
        ("train.epochs.now=1", "the recipe has no key 'train.epochs.now'; the nearest is 'train.epochs'"),
    ],
)
def test_mistakes_are_named(cfg, override, message):
    before = OmegaConf.to_yaml(cfg)
    with pytest.raises(UsageError) as caught:
        apply(cfg, [override])
    assert str(caught.value) == message
    assert OmegaConf.to_yaml(cfg) == before


def test_bare_words(cfg):
    found = {word: find_setting(cfg, word) for word in ("epochs", "lr", "batch", "max_iter", "train.epochs", "period")}
    assert found == {
        "epochs": "train.epochs",
        "lr": "optimizer.lr",
        "batch": "dataloader.train.total_batch_size",
        "max_iter": "train.max_iter",
        "train.epochs": "train.epochs",
        "period": "train.checkpointer.period",
    }
    with pytest.raises(UsageError, match=r"no setting 'epohcs'; the nearest is 'train\.epochs'"):
        find_setting(cfg, "epohcs")
    with pytest.raises(UsageError, match=r"several settings: write one of dataloader\.test\.size, "):
        find_setting(cfg, "size")
    assert resolve_key(cfg, "optimizer.betas.0") == "optimizer.betas.0"


def test_other_words_for_settings_are_settings_of_the_recipes():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import LazyConfig

    from ..d2.recipes import SMALL

    small = LazyConfig.load(str(SMALL))
    assert {word: find_setting(small, word) for word in SHORT_NAMES} == SHORT_NAMES
    for word in ("scale", "seeds"):
        with pytest.raises(UsageError, match="the nearest is"):
            find_setting(small, word)


@pytest.mark.parametrize(
    ("word", "whether"),
    [("a=b", True), ("a.b-c=", True), ("a=\n", True), ("=b", False), ("a/b=c", False), ("a", False), ("a b=c", False)],
)
def test_what_has_the_form_of_an_override(word, whether):
    assert is_override(word) is whether
