import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dino.utils.files import DataError
from dino.weights import read_content, weights_of
from dino.weights.reading import average_of

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}


class Malicious:
    """Leaves a file behind when it is unpickled the ordinary way."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.pyth", "a.bin", "legacy.pth"])
@pytest.mark.parametrize(
    "wrap", [dict, lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: {"model_state": s}]
)
def test_files_of_pytorch(tmp_path, name, wrap):
    torch.save(wrap(STATE), tmp_path / name, _use_new_zipfile_serialization=name != "legacy.pth")
    state = weights_of(read_content(tmp_path / name))
    assert state.keys() == STATE.keys()
    assert torch.equal(state["weight"], STATE["weight"])


def test_the_official_file_with_its_arguments(tmp_path):
    args = argparse.Namespace(lr=1e-4, backbone="resnet50", lr_drop_list=[33, 45], nested={"a": None})
    content = {"model": STATE, "optimizer": {"state": {}}, "epoch": 11, "args": args, "ema_model": STATE}
    read = read_content(write(tmp_path / "checkpoint0011_4scale.pth", content))
    assert read["args"].lr_drop_list == [33, 45]
    assert average_of(read).keys() == STATE.keys()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # let through for that one call
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "checkpoint0011_4scale.pth", weights_only=True)


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", metadata={"names": '["a"]'})
    read = read_content(tmp_path / "a.safetensors")
    assert read["names"] == ["a"]
    assert torch.equal(weights_of(read)["weight"], STATE["weight"])


def test_pickled_arrays(tmp_path):
    arrays = {key: value.numpy() for key, value in STATE.items()}
    state = weights_of(read_content(write(tmp_path / "a.pkl", {"model": arrays, "__author__": "torchvision"})))
    assert torch.equal(state["weight"], STATE["weight"])


@pytest.mark.parametrize("key", ["ema_model", "ema_state", "ema"])
@pytest.mark.parametrize("form", [dict, lambda s: {"module": s, "decay": 0.9}, lambda s: {"model": s}])
def test_running_averages(key, form):
    assert average_of({"model": {}, key: form(STATE)}).keys() == STATE.keys()
    assert average_of({"model": {}, key: form(STATE)}, "model") is None
    assert average_of({"model": STATE}) is None
    with pytest.raises(DataError, match="no running average"):
        average_of({"model": STATE}, "ema")


@pytest.mark.parametrize("name", ["evil.pth", "evil.pyth", "evil.pkl", "legacy.pth"])
@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"model": STATE | {"x": x}}, lambda x: {"args": argparse.Namespace(a=x)}]
)
def test_code_is_refused_and_not_run(tmp_path, name, wrap):
    trace = tmp_path / "trace"
    path, content = tmp_path / name, wrap(Malicious(trace))
    if name == "evil.pkl":
        write(path, {"model": Malicious(trace)})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name != "legacy.pth")
    with pytest.raises(
        DataError, match=rf"can't read the weights .*{name}: the file contains posix\.system, which is not plain"
    ):
        read_content(path)
    assert not trace.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_the_files_would_have_run(tmp_path):
    """The test above means something only if ordinary reading does run the command."""
    path = write(tmp_path / "evil.pth", Malicious(tmp_path / "trace"))
    torch.load(path, weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("thing", [print, np.random.default_rng(0), slice(1)])
def test_other_objects_are_refused(tmp_path, thing):
    with pytest.raises(DataError, match="which is not plain data"):
        read_content(write(tmp_path / "a.pth", {"model": STATE, "more": thing}))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.pkl", "a.pyth"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_files_that_are_cut_short(tmp_path, name, share):
    path = tmp_path / name
    if name == "a.safetensors":
        save_file(STATE, path)
    else:
        write(path, {key: value.numpy() if name == "a.pkl" else value for key, value in STATE.items()})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"can't read the weights .*{name}: ") as caught:
        read_content(path)
    assert len(str(caught.value)) < 200 + len(str(tmp_path))
    assert "weights_only" not in str(caught.value)


def test_altered_numbers_are_noticed(tmp_path):
    path = write(tmp_path / "a.pth", {"model": {"x": torch.full((1000,), 7.0)}})
    content = path.read_bytes()
    place = content.index(torch.full((9,), 7.0).numpy().tobytes())
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    with pytest.raises(DataError, match=r"a\.pth: the file was altered since it was written"):
        read_content(path)


def test_missing_files_and_other_content(tmp_path):
    with pytest.raises(DataError, match=r"weights not found: .*absent\.pth"):
        read_content(tmp_path / "absent.pth")
    with pytest.raises(DataError, match=r"weights not found: "):
        read_content(tmp_path)
    with pytest.raises(DataError, match="a dict was expected, not list"):
        read_content(write(tmp_path / "list.pth", [1, 2]))
    with pytest.raises(DataError, match="the file has no weights: its entries are epoch, names"):
        weights_of({"epoch": 1, "names": ["a"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><title>Google Drive</title>", "it is a web page, such as one that asks to confirm"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a pointer of git-lfs"),
        (b"", "it is empty"),
    ],
)
def test_what_people_have_in_place_of_weights(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(DataError, match=f"can't read the weights .*a.pth: {message}"):
        read_content(tmp_path / "a.pth")
