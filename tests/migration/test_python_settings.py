"""Configuration files are read as data: anything but plain values is one clear error, and nothing is executed."""

import json
import os

import pytest

from dino.migration.python_settings import parse_options, read_settings
from dino.utils.files import DataError, UsageError
from dino.utils.paths import PathError

from .official_files import KEYS, write_official


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "a.py"


def test_an_official_file_with_its_base(tmp_path):
    settings = read_settings(write_official(tmp_path) / "DINO_5scale.py")
    assert len(settings) == 103
    assert settings["num_feature_levels"] == 5
    assert settings["batch_size"] == 1
    assert settings["data_aug_max_size"] == 1333
    assert settings["fix_refpoints_hw"] == -1
    assert settings == {**KEYS["config/DINO/coco_transformer.py"], **settings}


def test_own_values_replace_those_of_bases(tmp_path):
    path = write(
        tmp_path, a='"""Mine."""\n_base_ = "sub/b.py"\nx = (1, (2,))', sub__b="_base_ = ['c.py']\nx = 0", sub__c="y = 3"
    )
    assert read_settings(path) == {"x": [1, [2]], "y": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nimport os\n", "a.py, line 2: only NAME = VALUE is read"),
        ("x = 1\nx = 2\n", "a.py, line 2: x is set a second time, first in line 1"),
        ("x = 1\ny = x\n", "a.py, line 2: the value of y is no plain number"),
        ("x = print('executed')\n", "a.py, line 1: the value of x is no plain number"),
        ("x = y = 1\n", "a.py, line 1: only NAME = VALUE"),
        ("x['a'] = 1\n", "a.py, line 1: only NAME = VALUE"),
        ("print('executed')\n", "a.py, line 1: only NAME = VALUE"),
        ("x = 9 ** 9 ** 9\n", "the value of x is no plain number"),
        ("x = {[]: 1}\n", "the value of x is no plain number"),
        ("x = (\n", "a.py, line 1: no Python"),
        ("x = 1\0\n", "no Python"),
        (f"x = {'[' * 5000}{']' * 5000}\n", "a.py"),
        (f"x = {'-' * 50000}1\n", "a.py"),
        ("_base_ = ['b.py']\n", "a.py, line 1: _base_ = 'b.py' is no Python file in"),
        ("\n_base_ = ['../b.py']\n", "a.py, line 2: _base_ = '../b.py' leaves the folder"),
        ("_base_ = ['/etc/passwd']\n", "_base_ = '/etc/passwd' leaves the folder"),
        ("_base_ = 'b\\0.py'\n", "a.py, line 1: _base_ = 'b\\\\x00.py' leaves the folder"),
        ("_base_ = [1]\n", "a.py, line 1: _base_ must name files, not 1"),
        ("_base_ = 1\n", "a.py, line 1: _base_ must name files, not 1"),
        ("_base_ = 'a.py'\n", "a.py: its _base_ leads back to itself"),
    ],
)
def test_what_is_refused(tmp_path, capfd, text, message):
    with pytest.raises(DataError) as caught:
        read_settings(write(tmp_path, a=text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(": ")  # a reason
    assert "executed" not in capfd.readouterr().out


def test_bases_that_differ(tmp_path):
    path = write(tmp_path, a="z = 1\n_base_ = ['b.py', 'c.py']", b="x = 1", c="x = 1")
    with pytest.raises(DataError, match=r"a\.py, line 2: x stands in two files of _base_"):
        read_settings(path)


def test_a_circle_of_bases(tmp_path):
    path = write(tmp_path, a="_base_ = 'b.py'", b="_base_ = 'c.py'", c="_base_ = 'b.py'")
    with pytest.raises(DataError, match=r"b\.py: its _base_ leads back to itself, through .*c\.py"):
        read_settings(path)


def test_the_number_of_files_has_a_bound(tmp_path):
    chain = {f"b{n}": f"_base_ = 'b{n + 1}.py'" for n in range(40)}
    with pytest.raises(DataError, match="more than 20 files"):
        read_settings(write(tmp_path, a="_base_ = 'b0.py'", **chain))
    again = {f"b{n}": f"_base_ = {[f'b{n + 1}.py'] * 9}" for n in range(9)}
    with pytest.raises(DataError, match="more than 20 files"):
        read_settings(write(tmp_path, a="_base_ = 'b0.py'", **again, b9=""))


def test_a_link_does_not_leave_the_folder(tmp_path):
    (tmp_path / "secret.py").write_text("x = 1")
    path = write(tmp_path / "own", a="_base_ = 'b.py'")
    (tmp_path / "own/b.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(DataError, match="leaves the folder"):
        read_settings(path)


def test_files_have_a_bound(tmp_path):
    with pytest.raises(DataError, match="larger than 1 MB"):
        read_settings(write(tmp_path, a=f"x = '{'a' * (1 << 20)}'"))


def test_other_files(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no text in UTF-8"):
        read_settings(tmp_path / "a.py")
    with pytest.raises(PathError, match=r"configuration file not found: .*the nearest there is .*DINO_4scale\.py"):
        read_settings(write_official(tmp_path) / "DINO_4scal.py")
    with pytest.raises(PathError, match="can't be the folder"):
        read_settings(tmp_path)
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(DataError, match=r"pipe\.py is no regular file"):
        read_settings(tmp_path / "pipe.py")


def test_json_of_a_run(tmp_path):
    path = tmp_path / "config_args_all.json"
    path.write_text(json.dumps({"modelname": "dino", "world_size": 8, "options": {"a": 1}}))
    assert read_settings(path) == {"modelname": "dino", "world_size": 8, "options": {"a": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"config_file": "x", "lr": 1}', "give the config_args_all.json of the same folder"),
        ('{"a": 1, "a": 2}', "a stands twice"),
        ("[1]", "holds no settings"),
        ("{", "is no JSON"),
        ("[" * 100000, "is no JSON"),
        (f'{{"a": {"1" * 5000}}}', "is no JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_settings(path)
    assert message in str(caught.value)


def test_options_are_read_as_there():
    words = ["a=1", "b=1.5", "c=TRUE", "d=none", "e=x", "f=0,1,x", "g=[0,1]", "h=(1,)", "i=", "j=k=l"]
    expected = {
        "a": 1,
        "b": 1.5,
        "c": True,
        "d": None,
        "e": "x",
        "f": [0, 1, "x"],
        "g": [0, 1],
        "h": [1],
        "i": "",
        "j": "k=l",
    }
    assert parse_options(words) == expected


@pytest.mark.parametrize("word", ["a", "a b=1", "=1", "a=[x]", "a=[1", "a.b=1"])
def test_options_of_another_form(word):
    with pytest.raises(UsageError, match="--options"):
        parse_options([word])
