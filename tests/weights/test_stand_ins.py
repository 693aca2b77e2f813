import argparse
import collections
import datetime
import itertools
import pathlib
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from dino.utils.files import DataError
from dino.weights import read_content, weights_of
from dino.weights.stand_ins import Skipped

STATE = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.zeros(2)}


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in content.items()}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=path.stem != "legacy")
    return path


class Foreign(dict):
    """Becomes a class of another program, which is not installed."""

    @classmethod
    def named(cls, monkeypatch, full, *bases):
        module, _, name = full.rpartition(".")
        made = type(name, bases or (object,), {"__module__": module})
        packages = module.split(".")
        for end in range(1, len(packages) + 1):
            monkeypatch.setitem(sys.modules, ".".join(packages[:end]), types.ModuleType(module))
        setattr(sys.modules[module], name, made)
        return made


EXTRAS = [
    np.float64(1.5),
    np.random.RandomState(0).get_state(),
    random.Random(0).getstate(),
    collections.defaultdict(list, {1: [2]}),
    collections.OrderedDict(a=1),
    pathlib.Path("a") / "b",
    datetime.datetime(2020, 1, 2),
    types.SimpleNamespace(a=1),
]
OF_PYTORCH = [
    argparse.Namespace(lr=1.0),
    [datetime.timedelta(1), frozenset([1]), 2**80, b"bytes", {1, 2}, None, 1j],
]


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        *itertools.product(["a.pth", "legacy.pth", "a.pkl"], EXTRAS),
        *itertools.product(["a.pth", "legacy.pth"], OF_PYTORCH),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_tensors_load_beside_extras(tmp_path, name, extra):
    read = read_content(write(tmp_path / name, {**STATE, "extra": extra}))
    state = weights_of(read)
    for key, value in STATE.items():
        assert torch.equal(state[key], value)


def test_numbers_are_read_as_data(tmp_path):
    generator = torch.Generator().manual_seed(3).get_state()
    numpy_state = np.random.RandomState(0).get_state()
    content = {
        "scalar": np.float32(1.5),
        "flag": np.bool_(True),
        "text": np.str_("abc"),
        "array": np.arange(6).reshape(2, 3).T,
        "big_endian": np.arange(3, dtype=">i4"),
        "generators": [generator, numpy_state],
        "default": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
    }
    read = read_content(write(tmp_path / "a.pth", content))
    assert read["scalar"] == np.float32(1.5)
    assert read["flag"] == np.True_
    assert read["text"] == "abc"
    np.testing.assert_array_equal(read["array"], content["array"])
    np.testing.assert_array_equal(read["big_endian"], [0, 1, 2])
    assert torch.equal(read["generators"][0], generator)
    np.testing.assert_array_equal(read["generators"][1][1], numpy_state[1])
    assert read["default"] == {"a": [1]}
    assert not isinstance(read["default"], collections.defaultdict)
    assert read["counter"] == {"a": 2, "b": 1}


def test_arrays_as_weights(tmp_path):
    arrays = {key: value.numpy() for key, value in STATE.items()}
    for name in ("a.pth", "a.pkl"):
        state = weights_of(read_content(write(tmp_path / name, {"model": arrays})))
        assert torch.equal(state["layer.weight"], STATE["layer.weight"])


def test_settings_of_omegaconf(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    settings = omegaconf.OmegaConf.create(
        {"a": 1, "b": [1, {"c": None, "d": "x"}], "e": "${a}", "f": pathlib.Path("x")}
    )
    read = read_content(write(tmp_path / "a.pth", {"model": STATE, "settings": settings}))
    assert isinstance(read["settings"], Skipped)
    assert vars(read["settings"]) == {}
    assert weights_of(read).keys() == STATE.keys()


@pytest.mark.parametrize("full", ["mmengine.config.config.ConfigDict", "yacs.config.CfgNode", "easydict.EasyDict"])
def test_dicts_of_other_programs(tmp_path, monkeypatch, full):
    made = Foreign.named(monkeypatch, full, dict)
    content = {"model": STATE, "settings": made(a=1, b=made(c=2))}
    path = write(tmp_path / "a.pth", content)
    monkeypatch.setitem(sys.modules, full.rpartition(".")[0], None)
    assert read_content(path)["settings"] == {"a": 1, "b": {"c": 2}}


def test_a_log_with_its_methods(tmp_path, monkeypatch):
    made = Foreign.named(monkeypatch, "mmengine.logging.history_buffer.HistoryBuffer")
    made.mean = made.__init__
    log = made()
    log.values, log.methods = np.arange(3.0), {"mean": _Attribute(made, "mean")}
    path = write(tmp_path / "a.pth", {"state_dict": STATE, "log": {"loss": log}})
    assert isinstance(read_content(path)["log"]["loss"], Skipped)


class _Attribute:
    """Is pickled as protocol 2 pickles a method of a class."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


def test_attributes_of_nothing_else(tmp_path):
    path = write(tmp_path / "a.pth", {"x": _Attribute(collections.OrderedDict, "clear")})
    with pytest.raises(DataError, match=r"the file contains builtins\.getattr, which is not plain data"):
        read_content(path)


def test_an_object_in_the_place_of_weights(tmp_path):
    path = write(tmp_path / "a.pth", {"model": STATE | {"head.weight": pathlib.Path("x")}})
    with pytest.raises(DataError, match=r"a\.pth: 'head\.weight' is an object of another program where weights were"):
        read_content(path)


def test_classes_off_the_list_are_refused(tmp_path, monkeypatch):
    made = Foreign.named(monkeypatch, "ultralytics.nn.tasks.DetectionModel")
    path = write(tmp_path / "a.pth", {"model": made()})
    with pytest.raises(DataError, match=r"contains ultralytics\.nn\.tasks\.DetectionModel, which is not plain data"):
        read_content(path)


def test_attributes_do_not_hide_methods(tmp_path):
    state = collections.OrderedDict(STATE)
    state.get = 5
    tensor = torch.ones(2)
    tensor.tolist = 5
    read = read_content(write(tmp_path / "a.pth", {"model": state, "more": tensor}))
    assert read["model"].get("layer.bias").shape == (2,)
    assert read["more"].tolist() == [1, 1]


def test_parameters_are_read(tmp_path):
    read = read_content(write(tmp_path / "a.pth", {"model": {"w": nn.Parameter(torch.ones(2))}}))
    assert torch.equal(weights_of(read)["w"], torch.ones(2))


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_arrays_of_objects_are_refused(tmp_path, name):
    path = write(tmp_path / name, {"x": np.array([{}, []], dtype=object)})
    with pytest.raises(DataError, match="the file has a NumPy array of 'O8': numbers or texts were expected"):
        read_content(path)
