import io
import pickle

import pytest

from dino.utils.files import DataError
from dino.weights.pickle_check import BoundedFile, PickleCheck

ALLOWED = {"collections.OrderedDict", "builtins.set", "_codecs.encode", "builtins.complex"}
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def check(data):
    PickleCheck(ALLOWED).run(io.BytesIO(data))


def nested(depth, make=lambda inner: (inner,)):
    value = 0
    for _ in range(depth):
        value = make(value)
    return value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_pass(protocol):
    values = {"a": [1, 2.5, None, True, (1, 2, 3, 4), b"bytes", "text"], (1, "x"): {2**70, 1 + 2j}, "again": {}}
    values["again"]["a"] = values["a"]
    check(pickle.dumps(values, protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("thing", [print, io.StringIO, pickle.loads])
def test_other_names_are_refused(protocol, thing):
    with pytest.raises(DataError, match=rf"the file contains \w+\.{thing.__name__}, which is not plain data"):
        check(pickle.dumps([thing], protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("make", [lambda x: (x,), lambda x: [x], lambda x: {"a": x}, lambda x: (x, 1, 2, 3)])
def test_depth(protocol, make):
    check(pickle.dumps(nested(150, make), protocol))
    with pytest.raises(DataError, match="nests values more than 200 deep"):
        check(pickle.dumps(nested(250, make), protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_values_are_counted_as_often_as_they_are_mentioned(protocol):
    check(pickle.dumps(nested(20, lambda x: (x, x)), protocol))
    with pytest.raises(DataError, match="an object of more than 10,000,000 values"):
        check(pickle.dumps(nested(30, lambda x: (x, x)), protocol))


def test_number_of_instructions():
    check(pickle.dumps(list(range(400_000))))
    with pytest.raises(DataError, match="more than 500,000 pickled values"):
        check(pickle.dumps(list(range(600_000))))


def test_pickles_of_a_file_share_the_bound():
    shared, data = PickleCheck(ALLOWED), pickle.dumps(list(range(300_000)))
    shared.run(io.BytesIO(data))
    with pytest.raises(DataError, match="more than 500,000"):
        shared.run(io.BytesIO(data))


def test_the_position_after_the_pickle():
    file = io.BytesIO(pickle.dumps([1]) + b"rest")
    PickleCheck(ALLOWED).run(file)
    assert file.read() == b"rest"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", "numbers a pickled value 2,147,483,647"),
        (b"\x80\x02\x82\x01.", "a pickle with EXT1"),
        (b"\x80\x02\x8b\xd0\x07\x00\x00" + b"\x7f" * 2000 + b".", "a whole number of 15,999 bits"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.", "encodes bytes by 'hex'"),
        (b"(c__builtin__\neval\nX\x01\x00\x00\x001o.", r"contains builtins\.eval"),
        (b"(X\x01\x00\x00\x001ios\nsystem\n.", r"contains os\.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"contains os\.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.", r"contains os\.system"),
    ],
)
def test_instructions_that_data_do_not_need(data, message):
    with pytest.raises(DataError, match=message):
        check(data)


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02", b"no pickle", b"\x80\x02h\x05.", b"\x80\x02s.", b"\x80\x02t.", b"q\x00"]
)
def test_no_pickles(data):
    with pytest.raises(ValueError, match=r"."):
        check(data)


def test_parts_of_a_file_are_bounded(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    with BoundedFile(tmp_path / "a", 50) as file:
        assert len(file.read(50)) == 50
        assert len(file.read()) == 50
        file.seek(0)
        assert len(file.readline()) == 50
        for size in (51, -1, None):
            file.seek(0)
            with pytest.raises(DataError, match="the file has a part of"):
                file.read(size)
