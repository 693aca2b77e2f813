"""The maps of detrex', mmdetection's and transformers' names hold every key, and what they say of ours is true."""

import json
from pathlib import Path

import pytest

from dino.migration import read_map
from dino.training.recipe_reading import read_recipe
from dino.utils.overrides import apply
from dino.weights.published import PUBLISHED
from dino.weights.transformers_folder import ALIASES, FIELDS

from .map_check import ABSENT, faults

# Program -> file -> key -> value, as the files state them; "(required)" has no default. "constructors": arguments that
# no file states. Weights that detrex' file copies for other layers (loss_class_0, ...) are left out.
FILES = json.loads(Path(__file__).with_name("other_keys.json").read_text())
KEYS = {
    program: {k: ABSENT if v == "(required)" else v for keys in files.values() for k, v in keys.items()}
    for program, files in FILES.items()
} | {"transformers": FIELDS}


@pytest.mark.parametrize("program", KEYS)
def test_the_map_is_complete_and_true(program):
    assert not list(faults(read_map(program), KEYS[program]))


@pytest.mark.parametrize(("program", "number"), [("detrex", 161), ("mmdetection", 153), ("transformers", 44)])
def test_numbers_of_settings(program, number):
    assert len(read_map(program).settings) == len(KEYS[program]) == number


@pytest.mark.parametrize("program", KEYS)
def test_a_new_key_and_a_new_default_are_found(program):
    name_map = read_map(program)
    key, default = next((k, v) for k, v in KEYS[program].items() if isinstance(v, float))
    found = list(faults(name_map, {**KEYS[program], "new_key": 1, key: default + 1}))
    assert found == ["new_key is not in the map", f"{key} has the default {default + 1} there, not {default}"]


@pytest.mark.parametrize("program", KEYS)
def test_single_values_are_overrides_of_the_recipe(program):
    """Each is applied to the recipe, which checks its type."""
    name_map = read_map(program)
    values = [value for setting in name_map.settings.values() for value in setting.values]
    for value in values:
        apply(read_recipe(name_map.recipe), value.set)
    assert values


def test_what_has_no_counterpart():
    """Each is a decision: a new one belongs here too."""
    missing = {key for program in KEYS for key, s in read_map(program).settings.items() if s.missing}
    assert missing == {"train_dataloader.dataset.filter_cfg.min_size"}
    never = {key for program in KEYS for key, s in read_map(program).settings.items() if s.never_read}
    assert never == set()


def test_other_names_of_a_field_are_no_fields():
    settings = read_map("transformers").settings
    assert not settings.keys() & ALIASES.keys()
    assert settings.keys() >= set(ALIASES.values())


@pytest.mark.parametrize("program", ["detrex", "mmdetection"])
def test_position_encodings_are_those_of_the_published_weights(program):
    part = "position_embedding" if program == "detrex" else "positional_encoding"
    settings = read_map(program).settings
    entry = PUBLISHED["dino_r50_4scale_12ep" + ("" if program == "detrex" else "_mmdetection")]
    assert entry.owner == program
    stated = (settings[f"model.{part}.temperature"].default, settings[f"model.{part}.offset"].default)
    assert stated == (entry.temperature, entry.offset)


def test_the_tuned_recipe_has_the_settings_of_the_improved_configuration():
    """Those that mmdetection.toml lists in its head."""
    cfg = read_recipe("dino_r50_4scale_12ep_tuned_300dn")
    network = cfg.model.network
    assert network.neck.backbone.freeze_at == 0
    assert (list(network.position_encoding.temperatures), network.position_encoding.offset) == ([10000, 10000], -0.5)
    assert (network.denoising.num_denoising, cfg.model.criterion.criterion.class_weight) == (300, 2.0)
    assert cfg.optimizer.lr == 2e-4
