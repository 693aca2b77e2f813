import os

import pytest
import torch

from dino.utils.files import DataError, UserError, counted, free_name, message_of, resolve_inside, write_whole


def test_errors_of_data_are_errors_of_the_user():
    assert issubclass(DataError, UserError)
    assert issubclass(UserError, ValueError)


def test_names_inside_the_folder(tmp_path):
    assert resolve_inside(tmp_path, "a.jpg") == tmp_path / "a.jpg"
    assert resolve_inside(tmp_path, "deep/er/a..b.jpg") == tmp_path / "deep/er/a..b.jpg"
    assert resolve_inside(str(tmp_path), "./a.jpg") == tmp_path / "a.jpg"


def test_one_is_no_plural():
    assert [counted(n, "picture") for n in (0, 1, 2000)] == ["0 pictures", "1 picture", "2,000 pictures"]
    assert [counted(n, "box", "boxes") for n in (1, 2)] == ["1 box", "2 boxes"]


OUTSIDE = [
    "",
    "/etc/passwd",
    "../secret.jpg",
    "a/../../secret.jpg",
    "a/..",
    "..\\secret.jpg",
    "a\\..\\..\\secret.jpg",
    "C:\\secret.jpg",
    "C:/secret.jpg",
    "\\\\server\\share\\secret.jpg",
    "//server/share/secret.jpg",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(DataError) as caught:
        resolve_inside(tmp_path, name)
    assert repr(name) in str(caught.value)
    assert "leaves the image folder" in str(caught.value)


def test_message_of_an_error_from_a_worker():
    """A data loader re-raises an error of its worker with the whole traceback as the text."""
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File …\n"
    assert (
        message_of(DataError(text + "dino.data.images.DataError: image not found: a.jpg\n")) == "image not found: a.jpg"
    )
    assert message_of(DataError("a.jpg: plain")) == "a.jpg: plain"


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "results.json"
    write_whole(str(path), lambda part: part.write_text("content"))
    assert path.read_text() == "content"
    write_whole(path, lambda part: part.write_text("newer"))
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write", "torch.save", "os.fsync", "os.replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "model.pth"
    path.write_text("precious")

    def fail(*_):
        raise OSError("no space left on device")

    def write(part):
        part.write_text("half")
        if step == "write":
            fail()
        if step == "torch.save":
            torch.save({}, part / "no folder.pth")  # its own kind of error

    if step.startswith("os."):
        monkeypatch.setattr(os, step.partition(".")[2], fail)
    with pytest.raises(UserError, match=r"can't write .*model\.pth: "):
        write_whole(path, write)
    monkeypatch.undo()
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_can_not_be_written_are_named(tmp_path):
    with pytest.raises(UserError, match=r"can't write .*absent/model\.pth"):
        write_whole(tmp_path / "absent/model.pth", lambda part: part.write_text("content"))


def test_free_names_are_counted(tmp_path):
    path = tmp_path / "run"
    assert free_name(path) == path
    path.mkdir()
    assert free_name(path) == tmp_path / "run.1"
    (tmp_path / "run.1").write_text("a file")
    assert free_name(path) == tmp_path / "run.2"


def test_names_in_messages_do_no_harm_to_a_terminal():
    assert message_of(DataError("a\x1b[2J.png:\n\tbroken")) == "a\\x1b[2J.png:\n\tbroken"
