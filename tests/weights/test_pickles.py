import collections
import os
import pickle

import numpy as np
import pytest

from dino.utils.files import DataError
from dino.weights.pickles import read_pickle


class Malicious:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def dump(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_and_arrays(tmp_path, protocol):
    arrays = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "count": np.array([3], dtype=np.int64),
        "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "number": np.float32(1.5),
    }
    content = {"model": collections.OrderedDict(arrays), "__author__": "someone", "more": [1, 2.5, None, (True, "x")]}
    read = read_pickle(dump(tmp_path / "weights.pkl", content, protocol))
    assert read["__author__"] == "someone"
    assert read["more"] == content["more"]
    assert list(read["model"]) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read["model"][name], array)
        assert read["model"][name].dtype == array.dtype


def test_arrays_of_old_numpy(tmp_path):
    """Published files name numpy's modules as they were called before numpy 2."""
    path = dump(tmp_path / "old.pkl", {"weight": np.ones(2)}, protocol=2)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in path.read_bytes()
    np.testing.assert_array_equal(read_pickle(path)["weight"], np.ones(2))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x}, lambda x: {"model": {"w": [x]}}])
def test_code_is_refused_and_not_run(tmp_path, wrap):
    trace = tmp_path / "trace"
    path = dump(tmp_path / "evil.pkl", wrap(Malicious(f"touch {trace}")))
    with pytest.raises(DataError, match=r"can't read the weights .*evil\.pkl: the file contains posix\.system"):
        read_pickle(path)
    assert not trace.exists()


def test_the_file_would_have_run(tmp_path):
    """The test above means something only if ordinary unpickling does run the command."""
    pickle.loads(pickle.dumps(Malicious(f"touch {tmp_path / 'trace'}")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("thing", [print, getattr, pickle.loads, np.load, collections.Counter("a")])
def test_other_names_are_refused(tmp_path, thing):
    with pytest.raises(DataError, match="not plain data"):
        read_pickle(dump(tmp_path / "other.pkl", {"x": thing}))


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02}q\x00X\x01\x00\x00", b"(lp0\nI1\n"])
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "broken.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"can't read the weights .*broken\.pkl"):
        read_pickle(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"weights not found: .*absent\.pkl"):
        read_pickle(tmp_path / "absent.pkl")


def test_other_content_is_named(tmp_path):
    with pytest.raises(DataError, match=r"list\.pkl: a dict was expected, not list"):
        read_pickle(dump(tmp_path / "list.pkl", [1, 2]))
