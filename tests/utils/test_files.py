import os
import random
import resource

import pytest
import torch
from PIL import Image

from dino.utils.files import (
    DataError,
    UserError,
    clean_up,
    counted,
    free_name,
    make_free_folder,
    message_of,
    resolve_inside,
    write_new,
    write_picture,
    write_whole,
)


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
    with pytest.raises(UserError, match=r"can't write .*absent/model\.pth: \[Errno 2\] No such file or directory$"):
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


def test_unfinished_files_of_other_programs_are_left_alone(tmp_path):
    """Firefox and other programs name theirs so too."""
    (tmp_path / "model.pth.part").write_text("theirs")
    write_whole(tmp_path / "model.pth", lambda part: part.write_text("mine"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"model.pth": "mine", "model.pth.part": "theirs"}
    with pytest.raises(UserError):
        write_whole(tmp_path / "model.pth", lambda part: (tmp_path / "absent/x").write_text(""))
    assert (tmp_path / "model.pth.part").read_text() == "theirs"


def test_writers_of_one_file_at_once_do_not_meet(tmp_path):
    def write(part):
        part.write_text("outer, first half, ")
        write_whole(tmp_path / "a.json", lambda other: other.write_text("inner"))
        with open(part, "a") as file:
            file.write("second half")

    write_whole(tmp_path / "a.json", write)
    assert (tmp_path / "a.json").read_text() == "outer, first half, second half"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a" * 252, "a" * 255, "é" * 126, "日" * 84, "x" * 251 + "é"])
def test_the_longest_names(tmp_path, name):
    seen = []

    def write(part):
        seen.append(len(os.fsencode(part.name)))
        part.write_text("content")

    write_whole(tmp_path / name, write)
    assert (tmp_path / name).read_text() == "content"
    assert seen[0] <= len(os.fsencode(name))


def test_files_are_readable_as_other_new_files_are(tmp_path):
    write_whole(tmp_path / "a", lambda part: part.write_text(""))
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError, SystemExit])
def test_an_interrupted_write_leaves_no_stump(tmp_path, error):
    def write(part):
        part.write_text("half")
        raise error

    with pytest.raises(error):
        write_whole(tmp_path / "a.json", write)
    assert not list(tmp_path.iterdir())


def test_a_new_file_replaces_none_not_even_one_that_has_just_come(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match=r"model\.onnx exists: choose another name"):
        write_new(path, lambda part: (part.write_text("late"), path.write_text("first")))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"model.onnx": "first"}
    write_new(tmp_path / "b.onnx", lambda part: part.write_text("b"))
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "b.onnx"}


def test_new_files_where_there_are_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    write_new(tmp_path / "a", lambda part: part.write_text("a"))
    with pytest.raises(UserError, match="exists"):
        write_new(tmp_path / "a", lambda part: part.write_text("b"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "a"}


@pytest.fixture
def full_disk():
    """A function: from now on, the kernel takes no more than so many bytes for a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("missing", [1, 1000])
def test_a_picture_on_a_full_disk_leaves_no_stump(tmp_path, full_disk, form, missing):
    """Pillow alone writes a truncated JPEG without an error."""
    noise = Image.frombytes("RGB", (100, 100), random.Random(0).randbytes(30_000))
    write_picture(tmp_path / "whole", noise, format=form)
    size = (tmp_path / "whole").stat().st_size
    full_disk(size - missing)
    with pytest.raises(UserError, match=r"can't write .*picture: \[Errno 27\] File too large"):
        write_picture(tmp_path / "picture", noise, format=form)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_free_folders_of_a_broken_link(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert make_free_folder(tmp_path / "out") == tmp_path / "out.1"
    assert make_free_folder(tmp_path / "out") == tmp_path / "out.2"


def test_an_error_at_the_end_does_not_hide_the_first():
    def fail(error):
        raise error

    with pytest.raises(KeyError, match="second"):
        clean_up(fail, KeyError("second"))

    def fail_twice():
        try:
            fail(ValueError("first"))
        finally:
            clean_up(fail, KeyError("second"))

    with pytest.raises(ValueError, match="first"):
        fail_twice()


def test_a_new_file_can_be_read_by_those_that_may_read_others(tmp_path):
    """safetensors makes files for their owner alone."""

    def write(part):
        part.unlink()
        part.touch(mode=0o600)

    (tmp_path / "other").touch()
    write_whole(tmp_path / "model.safetensors", write)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
