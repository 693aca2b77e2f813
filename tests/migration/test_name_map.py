"""The map of the official program's names holds every key of it, and what it says of ours is true."""

import json
from pathlib import Path

import pytest

from dino.migration import read_map
from dino.utils.files import DataError

from .map_check import ABSENT, fault_of_flag, faults

FILES = json.loads(Path(__file__).with_name("official_keys.json").read_text())
EARLIER = ("config/DINO/DINO_4scale.py", "config/DINO/coco_transformer.py", "main.py")  # whose values are the defaults


def official_keys():
    """Key -> default, of every file; the first that states a key has its default."""
    keys = {key: default for file in (*EARLIER, *FILES) for key, default in reversed(FILES[file].items())}
    for file in reversed((*EARLIER, *FILES)):
        keys |= FILES[file]
    del keys["_base_"]
    return {key: ABSENT if default == "(required)" else default for key, default in keys.items()}


KEYS = official_keys()


@pytest.fixture(scope="module")
def official():
    return read_map("official")


def change(name_map, key, **fields):
    """A copy with other fields of one setting."""
    changed = name_map.settings[key]._replace(**fields)
    changed = changed._replace(stated=changed.stated | set(fields))
    return name_map._replace(settings={**name_map.settings, key: changed})


def test_the_map_is_complete_and_true(official):
    assert not list(faults(official, KEYS))


def test_the_keys_are_those_of_the_files(official):
    config = {key for file in FILES if file.startswith("config/") for key in FILES[file]} - {"_base_"}
    by_group = {group: {k for k, s in official.settings.items() if s.group == group} for group in official.groups}
    assert len(config) == 103
    assert by_group["config"] == config
    assert by_group["arguments"] == set(FILES["main.py"])
    assert by_group["cluster"] == set(FILES["run_with_submitit.py"])


def test_nine_configuration_keys_are_never_read(official):
    never = {key for key, setting in official.settings.items() if setting.never_read and setting.group == "config"}
    assert never == {
        "batch_norm_type",
        "dabdetr_deformable_decoder",
        "dabdetr_deformable_encoder",
        "dabdetr_yolo_like_anchor_update",
        "ddetr_lr_param",
        "enc_loss_coef",
        "pdetr3_bbox_embed_diff_each_layer",
        "pdetr3_refHW",
        "two_stage_default_hw",
    }


def test_what_is_read_says_where(official):
    assert [key for key, s in official.settings.items() if bool(s.read) == s.never_read] == []


def test_a_new_key_of_the_program_is_found(official):
    assert list(faults(official, {**KEYS, "new_key": 1})) == ["new_key is not in the map"]


def test_a_key_that_the_program_lacks_is_found(official):
    keys = {key: default for key, default in KEYS.items() if key != "nheads"}
    assert list(faults(official, keys)) == ["nheads is no key of the official program"]


@pytest.mark.parametrize(
    ("key", "fields", "fault"),
    [
        ("enc_layers", {"ours": ("model.network.encoder.layers",)}, "no key model.network.encoder.layers"),
        ("focal_alpha", {"ours": ("model.criterion.beta",)}, "no key model.criterion.beta"),
        ("resume", {"ours": ("dino train --again",)}, "no argument --again of dino train"),
        ("resume", {"ours": ("dino learn --resume",)}, "no verb learn"),
        ("interm_loss_coef", {"ours": ("dino.layers.Scaling",)}, "no class or function dino.layers.Scaling"),
        ("enc_layers", {"default": 7}, "default 6 there, not 7"),
        ("aux_loss", {"default": 1}, "default True there, not 1"),
        ("enc_layers", {"ours_default": 5}, "model.network.encoder.num_layers is 6 in the recipe, not 5"),
        ("dn_box_noise_scale", {"ours_default": 0.4}, "box_noise is 1.0 in the recipe, not 0.4"),
        ("focal_alpha", {"ours_default": [0.25, 0.3]}, "model.criterion.matcher.alpha is 0.25 in the recipe, not 0.3"),
        ("embed_init_tgt", {"ours_default": "dino.modeling.Decoder"}, "is 'dino.modeling.QuerySelection'"),
    ],
)
def test_planted_faults_are_found(official, key, fields, fault):
    found = list(faults(change(official, key, **fields), KEYS))
    assert any(line.startswith(key) and fault in line for line in found), found


def test_a_value_that_sets_an_unknown_key_is_found(official):
    value = official.settings["amp"].values[1]._replace(set=("train.half=True",))
    assert list(faults(change(official, "amp", values=(value,)), KEYS)) == ["amp: no key train.half in the recipe"]


def test_flags_of_verbs_within_verbs():
    assert fault_of_flag("dino data merge") is None
    assert fault_of_flag("dino train RECIPE") is None
    assert fault_of_flag("dino data merge --absent")


HEAD = '[program]\nname = "a"\naddress = "b"\nrecipe = "c"\n[groups]\nconfig = "d"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[config", "is no TOML"),
        ("[other.lr]\nours = 'x'", "no heading in [groups] for other"),
        ("[config.lr]\ndefault = 1", "lr: needs one of ours, left_out, missing, never_read, not none"),
        ("[config.lr]\nours = 'x'\nmissing = 'y'", "not ours and missing"),
        ("[config.lr]\nour = 'x'\nmissing = 'y'", "unknown field our"),
        ("[config.lr]\nours = 'x'\nvalues = [{ theirs = 1 }]", "an item of values needs theirs and one of"),
    ],
)
def test_a_broken_file(text, message):
    with pytest.raises(DataError) as caught:
        read_map("official", text=HEAD + text)
    assert message in str(caught.value)


def test_a_key_in_two_groups():
    text = HEAD + 'more = "e"\n[config.lr]\nours = "x"\n[more.lr]\nours = "x"\n'
    with pytest.raises(DataError, match="lr stands in two groups"):
        read_map("official", text=text)


def test_none_is_written_as_a_word():
    found = read_map("official", text=f"{HEAD}[config.lr]\nours = 'x'\ndefault = 'None'\nours_default = ['None', 1]\n")
    assert found.settings["lr"].default is None
    assert found.settings["lr"].ours_default == [None, 1]
