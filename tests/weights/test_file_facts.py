import argparse
import json

import pytest
import torch

from dino.modeling import share_heads
from dino.utils.files import DataError
from dino.weights import file_facts
from dino.weights.file_facts import FileFacts, Position, facts_of, read_facts

from ..tiny import tiny_network
from .states import detrex_state, official_state, randomise

BASES = ("Decoder", "SharedHeadsDecoder")


def own_state(network):
    return network.state_dict()


def state_of(change=lambda decoder: decoder, form=own_state, **options):
    network = randomise(tiny_network(**options))
    change(network.decoder)
    return form(network)


def describe(position=None, decoder="Decoder", **preprocessing):
    """The `about` of a checkpoint, as far as facts are in it."""
    network = {"decoder": {"_target_": f"dino.modeling.{decoder}"}}
    if position is not None:
        network["position_encoding"] = position
    return {"config": json.dumps({"network": network}), "preprocessing": preprocessing}


def test_heads_are_shared_where_all_layers_have_the_same():
    separate, shared = state_of(), state_of(share_heads)
    assert facts_of(separate).shared_heads is False
    assert facts_of(state_of(form=detrex_state)).shared_heads is False
    for form in (own_state, official_state, detrex_state):
        assert facts_of({"model": state_of(share_heads, form)}).shared_heads is True
    box = {**shared, "decoder.box_heads.1.4.bias": shared["decoder.box_heads.1.4.bias"] + 1}
    assert facts_of(box).shared_heads is False
    other = {**shared, "decoder.class_heads.1.bias": shared["decoder.class_heads.1.bias"].double()}
    assert facts_of(other).shared_heads is False
    assert facts_of(state_of(num_layers=1)).shared_heads is None


@pytest.mark.parametrize("decoder", BASES)
def test_a_training_says_what_it_trains(decoder):
    """Layers that are trained apart can have equal heads at the start."""
    content = {"model": state_of(share_heads), "about": describe(decoder=decoder)}
    assert facts_of(content).shared_heads is True
    assert facts_of({**content, "trainer": {}}).shared_heads is (decoder == "SharedHeadsDecoder")
    assert facts_of({**content, "trainer": {}, "about": describe(decoder="Other")}).shared_heads is True


def test_an_own_checkpoint_describes_positions_and_pixels():
    about = describe({"temperatures": [30, 40.5], "offset": -0.25}, pixel_mean=[1, 2, 3.5], pixel_std=(4, 5, 6))
    facts = facts_of({"model": state_of(), "about": about})
    assert facts == FileFacts("own", False, Position((30.0, 40.5), -0.25), (1.0, 2.0, 3.5), (4.0, 5.0, 6.0))


@pytest.mark.parametrize(
    "about",
    [
        5,
        {},
        {"config": 5, "preprocessing": []},
        {"config": "[" * 100_000, "preprocessing": {"pixel_mean": [1, 2], "pixel_std": [0, 1, 1]}},
        {"config": '{"network": []}', "preprocessing": {"pixel_mean": [float("nan"), 1, 1], "pixel_std": "abc"}},
        describe({"temperatures": [0, 1], "offset": 0}, pixel_mean=[10**400, 1, 1]),
        describe({"temperatures": [20, 20], "offset": True}, pixel_mean=None, pixel_std=[1, 1, -1]),
        describe({"temperatures": 20, "offset": 0}, pixel_mean={"a": 1}),
        describe([20, 20]),
    ],
)
def test_a_description_that_makes_no_sense_says_nothing(about):
    assert facts_of({"model": state_of(), "about": about}) == FileFacts("own", False)


def test_the_official_program_stores_its_temperatures():
    options = argparse.Namespace(pe_temperatureH=20, pe_temperatureW=30)
    state = state_of(share_heads, official_state)
    assert facts_of({"model": state, "args": options}) == FileFacts("official", True, Position((20.0, 30.0), 0.0))
    for args in (None, argparse.Namespace(), argparse.Namespace(pe_temperatureH="x", pe_temperatureW=1), {}):
        assert facts_of({"model": state, "args": args}).position is None


def test_a_published_file_is_known_by_its_name(tmp_path):
    path = tmp_path / "dino_r50_4scale_12ep_49_2AP.pth"
    state = state_of(form=detrex_state)
    torch.save({"model": state}, path)
    assert read_facts(path) == FileFacts("detrex", False, Position((10000.0, 10000.0), -0.5))
    assert facts_of({"model": state}, tmp_path / "mine.pth").position is None
    assert facts_of({"model": state_of()}, path).position is None  # an own file of that name


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, (20, 0)),
        ({"meta": 5}, (20, 0)),
        ({"meta": {"cfg": "model = dict(positional_encoding=dict(offset=0.0, temperature=20))"}}, (20, 0)),
        (
            {"meta": {"cfg": "positional_encoding=dict(\n  normalize=True, offset=-0.5, temperature=10000)"}},
            (10000, -0.5),
        ),
        ({"meta": {"cfg": "positional_encoding=dict(num_feats=128)"}}, (10000, 0)),  # its class' default
        ({"meta": {"cfg": "positional_encoding=dict(temperature=1.2.3, offset=0)"}}, (20, 0)),
    ],
)
def test_positions_of_mmdetection(monkeypatch, content, expected):
    monkeypatch.setattr(file_facts, "recognise", lambda state: "mmdetection")
    facts = facts_of({"model": state_of(), **content})
    assert facts.position == Position((expected[0],) * 2, expected[1])


def test_weights_of_a_backbone_say_nothing():
    assert facts_of({"layer1.0.conv1.weight": torch.zeros(1)}) == FileFacts()
    with pytest.raises(DataError, match="has no weights"):
        facts_of({"names": ["a"]})


@pytest.mark.parametrize("old_form", [False, True])
def test_files_of_both_forms_of_pytorch_are_read(tmp_path, old_form):
    path = tmp_path / "file.pth"
    torch.save({"model": state_of(share_heads)}, path, _use_new_zipfile_serialization=not old_form)
    assert read_facts(path).shared_heads is True
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"can't read the weights .*file\.pth"):
        read_facts(path)


def test_tensors_are_mapped_not_read(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    torch.save({"model": state_of()}, path)
    used = []
    load = torch.load
    monkeypatch.setattr(
        torch,
        "load",
        lambda *words, **options: used.append(file_facts.serialization.load.mmap) or load(*words, **options),
    )
    assert read_facts(path).format == "own"
    assert used == [True]
    assert file_facts.serialization.load.mmap is False
