import os
import subprocess
import sys

import pytest

from dino.cli import main
from dino.cli.early_checks import check_output, setting
from dino.utils.files import UserError


@pytest.fixture
def words(tmp_path):
    """The arguments of a training whose files are there."""
    (tmp_path / "images").mkdir()
    for name in ("train.json", "val.json", "file"):
        (tmp_path / name).touch()
    data = []
    for split in ("train", "val"):
        data += [f"--{split}", str(tmp_path / f"{split}.json"), str(tmp_path / "images")]
    return ["train", "dino_r18_small_data", *data]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.json": "nope.json"}, "annotations not found: {folder}/nope.json"),
        ({"images": "nope"}, "image folder not found: {folder}/nope"),
        ({"dino_r18_small_data": "dino_r18_smal_data"}, "recipe not found: 'dino_r18_smal_data'"),
        ({"": "--weights={folder}/nope.pth"}, "weights not found: {folder}/nope.pth"),
        ({"": "train.init_checkpoint={folder}/nope.pth"}, "weights not found: {folder}/nope.pth"),
        ({"": "--output={folder}/file/mine"}, "can't write into {folder}/file/mine: {folder}/file is no folder"),
        ({"": "train.output_dir='{folder}/file'"}, "can't write into {folder}/file: {folder}/file is no folder"),
    ],
)
def test_a_mistyped_path_is_named_before_torch_is_imported(words, changes, message, tmp_path, capsys, monkeypatch):
    (old, new), *_ = changes.items()
    line = [word.replace(old, new) if old else word for word in words] + (
        [new.format(folder=tmp_path)] if not old else []
    )
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of torch would fail
    assert main(line) == 1
    assert capsys.readouterr().err.startswith("error: " + message.format(folder=tmp_path))
    assert not (tmp_path / "mine").exists()


def test_a_mistyped_path_takes_no_time(words):
    program = "import sys; from dino.cli import main; main(sys.argv[1:]); print({'torch', 'numpy'} & set(sys.modules))"
    line = [word.replace("val.json", "nope.json") for word in words]
    done = subprocess.run([sys.executable, "-c", program, *line], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert "annotations not found" in done.stderr


def test_a_new_folder_is_fine_and_not_made(tmp_path):
    check_output(str(tmp_path / "a/b"))
    check_output(None)
    assert not (tmp_path / "a").exists()


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"no permission to write into {tmp_path}$"):
        check_output(str(tmp_path / "mine"))


def test_the_last_override_counts():
    assert setting(["a=1", "ab=3", "a='x y'"], "a") == "x y"
    assert setting(["b=1"], "a") is None
