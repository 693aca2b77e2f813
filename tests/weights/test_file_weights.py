import re

import pytest
import torch
from safetensors.torch import save_file, save_model

from dino.utils.files import DataError
from dino.weights import convert, load_weights, read_content
from dino.weights.conversion import convert_file
from dino.weights.detector_backbones import name_any_detector
from dino.weights.file_facts import find_position
from dino.weights.file_weights import read_weights
from dino.weights.mmdetection import classes_of
from dino.weights.reading import average_of, weights_of
from dino.weights.signatures import SIGNATURES

from ..tiny import tiny_network
from .states import detrex_state, equal, mmdetection_state, official_state, randomise
from .test_checkpoint_formats import shared_network
from .test_signatures import states

AVERAGE_NOTE = "loaded: the running average (EMA) of the weights"


def two_states():
    return (randomise(tiny_network()).state_dict() for _ in range(2))


def prefixed(front, state):
    return {front + key: value for key, value in state.items()}


# How programs keep the weights and their average; None leaves one out.
LAYOUTS = {
    "the official program": lambda raw, ema: {"model": raw, "ema_model": ema, "epoch": 11},
    "Detectron2": lambda raw, ema: {"model": raw, "ema_state": ema, "iteration": 7},
    "RT-DETR": lambda raw, ema: {"model": raw, "ema": ema and {"module": ema, "updates": 7}},
    "timm": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema, "arch": "dino"},
    "PyTorch": lambda raw, ema: {"model_state_dict": raw, "model_ema": ema and prefixed("module.", ema)},
    "DeepSpeed": lambda raw, ema: {"module": raw and prefixed("module.", raw), "ema_model": ema, "ds_version": "0.1"},
    "Lightning": lambda raw, ema: {
        "state_dict": prefixed("model.", raw or {}) | prefixed("ema_model.module.", ema or {}),
        "pytorch-lightning_version": "2.5",
    },
    "dicts in dicts": lambda raw, ema: {
        "model": raw and {"state_dict": {"module": prefixed("net.", raw)}},
        "ema": ema and {"state_dict": {"model": prefixed("_orig_mod.", ema)}},
    },
    "mmengine": lambda raw, ema: {
        "meta": {"mmengine_version": "0.10", "cfg": ""},
        "message_hub": {},
        **(
            {"state_dict": ema, "ema_state_dict": prefixed("module.", raw) | {"steps": torch.tensor(7)}}
            if raw and ema
            else {"state_dict": raw, "ema_state_dict": ema}
        ),
    },
}


def content_of(layout, raw, ema):
    return {key: value for key, value in LAYOUTS[layout](raw, ema).items() if value is not None}


def assert_average(content, ema):
    """The average is what a file gives, asked for or not."""
    for copy in ("auto", "ema"):
        found = read_weights(content, copy)
        assert equal(found.state, ema)
        assert found.notes[0] == AVERAGE_NOTE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_copies(layout):
    raw, ema = two_states()
    content = content_of(layout, raw, ema)
    assert_average(content, ema)
    found = read_weights(content, "model")
    assert equal(found.state, raw)
    assert AVERAGE_NOTE not in found.notes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_alone(layout):
    """It is loaded; asking for anything else is an error."""
    _, ema = two_states()
    content = content_of(layout, None, ema)
    assert_average(content, ema)
    assert equal(convert(weights_of(content)), ema)
    for read in (read_weights, average_of):
        with pytest.raises(DataError, match=r"no weights but their running average \(EMA\): copy=model"):
            read(content, "model")
    target = tiny_network()
    assert not load_weights(target, content).problems
    assert equal(target.state_dict(), ema)
    with pytest.raises(DataError, match=r"can't use the weights .*no weights but their running average"):
        load_weights(target, content, copy="model")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_average(layout):
    raw, _ = two_states()
    content = {key: value for key, value in LAYOUTS[layout](raw, None).items() if value is not None}
    for copy in ("auto", "model"):
        assert equal(read_weights(content, copy).state, raw)
        assert AVERAGE_NOTE not in read_weights(content, copy).notes
    with pytest.raises(DataError, match="no running average"):
        read_weights(content, "ema")


def test_an_average_of_parameters_alone():
    """Buffers of the backbone come from the weights themselves."""
    raw, ema = two_states()
    content = {"model": raw | {"neck.backbone.running_mean": torch.ones(3)}, "ema_model": prefixed("module.", ema)}
    assert equal(read_weights(content).state, ema | {"neck.backbone.running_mean": torch.ones(3)})


def test_the_average_of_a_backbone():
    raw, ema = ({"conv1.weight": torch.randn(4, 3), "bn1.bias": torch.randn(4)} for _ in range(2))
    found = read_weights({"state_dict": prefixed("module.", raw), "state_dict_ema": ema})
    assert (found.format, found.notes[0]) == ("backbone", AVERAGE_NOTE)
    assert equal(found.state, ema)
    assert equal(read_weights({"state_dict": prefixed("module.", raw), "state_dict_ema": ema}, "model").state, raw)


@pytest.mark.parametrize("name", ["own", "official", "detrex", "huggingface", "mmdetection"])
def test_each_format(name):
    own, files = states()
    found = read_weights({"model": files[name]})
    found.state.pop("denoising.unused_labels", None)
    assert equal(found.state, own)
    assert found.format == name
    assert bool(found.notes) == (name == "mmdetection")
    found = read_weights(prefixed("lit._orig_mod.", files[name]))
    front = "lit.model." if name == "huggingface" else "lit."
    assert found.notes[0] == f"prefixes removed from the names of tensors: _orig_mod., {front}"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_files_there_and_back(tmp_path, name, suffix):
    own, _ = states()
    torch.save({"model": own}, tmp_path / "own.pth")
    convert_file(tmp_path / "own.pth", tmp_path / f"theirs{suffix}", to=name)
    found = read_weights(read_content(tmp_path / f"theirs{suffix}"))
    assert found.format == name
    convert_file(tmp_path / f"theirs{suffix}", tmp_path / "back.pth", to="own")
    for state in (found.state, read_content(tmp_path / "back.pth")["model"]):
        assert equal(state, own)


def test_what_files_of_mmdetection_tell():
    meta = {
        "cfg": "model=dict(positional_encoding=dict(num_feats=128, offset=-0.5, temperature=10000))",
        "dataset_meta": {"classes": ("cat", "dog", "cow")},
    }
    content = {"state_dict": mmdetection_state(tiny_network()), "meta": meta}
    assert find_position(content, "mmdetection", "a.pth") == ((10000, 10000), -0.5)
    assert classes_of(content) == ["cat", "dog", "cow"]
    found = read_weights(content)
    assert found.notes == ["the config in the file says: position encoding of temperature 10000, offset -0.5"]


def test_other_detectors_have_a_name():
    found = read_weights(
        {"model": {"model.22.cv2.0.0.conv.weight": torch.zeros(3), "model.22.dfl.conv.weight": torch.ones(1)}}
    )
    assert (found.format, name_any_detector(found.state)) == ("backbone", "a YOLO")
    assert name_any_detector(read_weights({"model": {"conv1.weight": torch.zeros(3)}}).state) is None


def test_joined_parameters():
    state = {
        "_fsdp_wrapped_module._flat_param": torch.zeros(9),
        "encoder._fsdp_wrapped_module._flat_param": torch.ones(9),
    }
    with pytest.raises(DataError, match=r"joined parameters of FSDP \(_flat_param\): save the model with "):
        read_weights({"model": state})


class Official(torch.nn.Module):
    """Has the official program's names, and tensors with several names."""

    def __init__(self, state):
        super().__init__()
        first = {}  # address -> parameter
        for name, value in state.items():
            head = re.sub(r"^(transformer\.decoder\.)?((?:class|bbox)_embed\.)\d+\.", r"\2", name)
            parameter = first.setdefault(head, torch.nn.Parameter(value, requires_grad=False))
            *path, leaf = name.split(".")
            part = self
            for word in path:
                if word not in part._modules:
                    part.add_module(word, torch.nn.Module())
                part = part._modules[word]
            part.register_parameter(leaf, parameter)


def test_files_of_safetensors(tmp_path):
    """Its `save_model` stores a tensor under one of its names, and notes the others."""
    model = shared_network()
    official = official_state(model)
    save_model(Official(official), tmp_path / "a.safetensors")
    stored = read_content(tmp_path / "a.safetensors")["model"]
    assert equal(stored, official)
    assert equal(convert(stored), convert(official))


HEADS = re.compile(
    r"(?:model\.)?(?:transformer\.decoder\.)?((?:class|bbox)_embed)\.\d+\..+|(decoder\.(?:class|box)_heads)\..+"
)


@pytest.mark.parametrize("name", ["own", "official", "huggingface"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("front", ["", "transformer.decoder."])
def test_one_of_many_names(tmp_path, name, layer, front):
    """As other programs write such files: nothing says which names were left out."""
    own, files = states()
    kept = {
        key: value
        for key, value in files[name].items()
        if not HEADS.fullmatch(key)
        or (
            re.search(rf"(heads|embed)\.{layer}\.", key)
            and (name == "own" or ("transformer.decoder." in key) == bool(front))
        )
    }
    assert len(kept) < len(files[name])
    save_file({key: value.clone().contiguous() for key, value in kept.items()}, tmp_path / "a.safetensors")
    found = read_weights(read_content(tmp_path / "a.safetensors"))
    found.state.pop("denoising.unused_labels", None)
    assert equal(found.state, own)


def test_detrex_needs_one_of_two_names():
    detrex = detrex_state(randomise(tiny_network()))
    for front in (
        "class_embed.",
        "bbox_embed.",
        ("transformer.decoder.class_embed.", "transformer.decoder.bbox_embed."),
    ):
        assert equal(convert({k: v for k, v in detrex.items() if not k.startswith(front)}), convert(detrex))


def test_separate_heads_are_not_made_up():
    """Two of three layers have heads: the file is damaged, and the third layer's are missing."""
    model = randomise(tiny_network(num_layers=3))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("decoder.class_heads.1.")}
    assert load_weights(tiny_network(num_layers=3), state).missing == [
        "decoder.class_heads.1.weight",
        "decoder.class_heads.1.bias",
    ]


def test_heads_stored_once_fit_shared_and_separate_heads():
    model = shared_network()
    state = {k: v for k, v in model.state_dict().items() if ".class_heads.0" not in k and ".box_heads.0" not in k}
    for target in (tiny_network(), shared_network()):
        assert not load_weights(target, state).problems
        assert equal(target.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["class_embed", "transformer.decoder.layers", "label_enc"])
def test_damaged_files(name):
    state = {key: value for key, value in official_state(shared_network()).items() if name not in key}
    if name == "class_embed":
        with pytest.raises(DataError, match=r"its tensor decoder\.class_heads\.0\.bias is missing"):
            convert(state)
    else:
        assert load_weights(tiny_network(), state).missing
