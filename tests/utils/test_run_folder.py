import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dino.utils.files import UsageError, UserError
from dino.utils.run_folder import (
    checkpoints,
    claim_run,
    drop_old,
    hold_folder,
    last_whole,
    new_folder,
    note_start,
    run_files,
    started_by_same,
)

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from dino.cli import report_errors
from dino.utils.run_folder import claim_run, hold_folder

def work():
    with claim_run(sys.argv[1]):
        note = Path(sys.argv[1], f"model_{os.getpid():07d}.pth")
        note.write_text("precious")
        if "fork" in sys.argv[2:]:
            if not os.fork():  # a data loader's worker, which outlives a killed process by seconds
                time.sleep(60)
                os._exit(0)
        print("holds", flush=True)
        sys.stdin.read()

sys.exit(report_errors(work))
"""


def start(folder, *words):
    """A process that claims the folder, writes a checkpoint, and holds the folder until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "mine"
    (folder / "inference").mkdir(parents=True)
    for name in ("config.yaml", "log.txt", "model_final.pth", "last_checkpoint", "inference/results.json", "notes.md"):
        (folder / name).write_text(f"precious {name}")
    return folder


def claim(folder, **flags):
    """Claim and give back -> whether to continue."""
    with claim_run(folder, **flags) as again:
        return again


# Used folders


def test_a_new_folder_is_made_and_held(tmp_path):
    with claim_run(tmp_path / "deep/run") as again:
        assert again is False
        (tmp_path / "deep/run/log.txt").touch()
    assert {path.name for path in (tmp_path / "deep/run").iterdir()} == {"log.txt", "run.lock", "started_by"}


def test_files_of_other_people_are_no_run(tmp_path):
    for name in ("photo.png", "train.json", "nohup.out", "config.yml", "model.pth.part"):
        (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    with claim_run(tmp_path) as again:
        assert again is False
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "log.txt", "metrics.json", "model_0000001.pth", "model.pth", "curves.png", "evaluations.json"],
)
def test_any_file_of_a_run_counts(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError) as caught, claim_run(tmp_path):
        pass
    ways = "add --resume, choose another folder (--output), or add --overwrite, which moves it to"
    assert str(caught.value) == f"{tmp_path} holds a run ({name}): {ways} {tmp_path}.1"
    assert content(tmp_path) == {name: b"precious"}


def test_a_refused_start_changes_nothing(run):
    before = content(run)
    with pytest.raises(UserError, match=r"\(config\.yaml, log\.txt, model_final\.pth, last_checkpoint, …\)"):
        claim(run)
    assert content(run) == before


def test_names_in_the_message_do_no_harm_to_a_terminal(tmp_path):
    (tmp_path / "\x1b[2Jevil.pth").touch()
    with pytest.raises(UserError, match=r"holds a run \(\\x1b\[2Jevil\.pth\)"):
        claim(tmp_path)


def test_overwrite_moves_the_run_aside_and_leaves_what_is_no_run(run, capsys):
    before = content(run)
    for number in (1, 2):
        with claim_run(run, overwrite=True) as again:
            assert again is False
            assert run_files(run) == []
            (run / "log.txt").write_text(f"start {number}")
        assert f"moved the earlier run to {run}.{number}" in capsys.readouterr().out
    moved = content(run.with_name("mine.1"))
    assert {name: moved.get(name) for name in before if name != "notes.md"} == {
        name: text for name, text in before.items() if name != "notes.md"
    }
    assert content(run)["notes.md"] == before["notes.md"]
    assert content(run.with_name("mine.2"))["log.txt"] == b"start 1"


def test_overwrite_finds_a_free_name_and_follows_links(run, tmp_path):
    (tmp_path / "mine.1").write_text("a file")
    link = tmp_path / "elsewhere/link"
    link.parent.mkdir()
    link.symlink_to(run)
    with claim_run(link, overwrite=True):
        pass
    assert (tmp_path / "mine.2/model_final.pth").read_text() == "precious model_final.pth"
    assert (tmp_path / "mine.1").read_text() == "a file"


def test_overwrite_of_nothing_is_a_start(tmp_path, capsys):
    with claim_run(tmp_path / "run", overwrite=True) as again:
        assert again is False
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_resume_continues(run):
    with claim_run(run, resume=True) as again:
        assert again is True
    assert (run / "model_final.pth").read_text() == "precious model_final.pth"


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no checkpoint\. Leave out --resume to start a new training"):
        claim(tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()
    (tmp_path / "log.txt").touch()
    with pytest.raises(UserError, match=r"holds no checkpoint \(log\.txt\). Add --overwrite instead"):
        claim(tmp_path, resume=True)


def test_resume_and_overwrite_exclude_each_other(run):
    with pytest.raises(UsageError, match="--resume continues the run, --overwrite starts anew"):
        claim(run, resume=True, overwrite=True)


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't make the folder .*file"):
        claim(tmp_path / "file")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="can't write into the folder"):
        claim(tmp_path)


# Restarts by torchrun and Slurm


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_restart_continues_what_the_same_launch_started(tmp_path, monkeypatch, flags):
    """Before its first checkpoint too, and with the flags of the first start: nothing is moved aside again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    note_start(tmp_path)
    (tmp_path / "log.txt").write_text("precious")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with claim_run(tmp_path, **flags) as again:
        assert again is True
    assert (tmp_path / "log.txt").read_text() == "precious"
    assert not tmp_path.with_name(f"{tmp_path.name}.1").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(UserError, match="holds a run"):
        claim(tmp_path)


@pytest.mark.parametrize("note", [b"", b"\xff\xfe\x00", b"x" * 100_000])
def test_a_damaged_note_is_no_launch(tmp_path, note):
    (tmp_path / "started_by").write_bytes(note)
    assert not started_by_same(tmp_path)


# Several processes at once


def test_the_holder_is_named(tmp_path):
    message = rf"is in use by another process \(.+, process {os.getpid()}\): wait until"
    with claim_run(tmp_path), pytest.raises(UserError, match=message):
        claim(tmp_path, overwrite=True)


@pytest.mark.parametrize("count", [2, 10])
def test_of_starts_at_once_exactly_one_runs(tmp_path, count):
    folder = tmp_path / "run"
    processes = [start(folder) for _ in range(count)]
    refused = []
    winner = None
    for process in processes:
        if process.stdout.readline() == "holds\n":
            assert winner is None
            winner = process
        else:
            refused.append(process)
    assert winner is not None
    for process in refused:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert "is in use by another process" in error or "holds a run" in error
    winner.communicate(timeout=60)
    assert winner.returncode == 0
    written = [path.name for path in folder.glob("*.pth")]
    assert written == [f"model_{winner.pid:07d}.pth"]


@pytest.mark.parametrize("words", [(), ("fork",)])
def test_kill_9_frees_the_folder(tmp_path, words):
    """At once, also while workers of the killed process still live."""
    holder = start(tmp_path, *words)
    try:
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(UserError, match="is in use"):
            claim(tmp_path, overwrite=True)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with pytest.raises(UserError, match="holds a run"):
            claim(tmp_path)
        with claim_run(tmp_path, overwrite=True):
            assert not list(tmp_path.glob("*.pth"))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)  # the worker
        for stream in (holder.stdin, holder.stdout, holder.stderr):
            stream.close()


def test_results_of_one_program_at_a_time(tmp_path):
    folder = tmp_path / "out"
    with hold_folder(folder):
        (folder / "a.png").write_text("a")
        with pytest.raises(UserError, match=r"out is in use by another process .*or choose another --output"):
            hold_folder(folder).__enter__()
    assert {path.name for path in folder.iterdir()} == {"a.png"}
    with hold_folder(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()


def test_new_folders_of_programs_at_once_differ(tmp_path):
    with new_folder(tmp_path / "out") as first, new_folder(tmp_path / "out") as second:
        Path(second, "a.png").touch()
        assert (Path(first).name, Path(second).name) == ("out", "out.1")
    assert [path.name for path in tmp_path.iterdir()] == ["out.1"]


# Checkpoints


def save(folder, *names):
    for age, name in enumerate(names):
        torch.save({"model": {}}, folder / name)
        os.utime(folder / name, (age, age))


def test_the_noted_checkpoint_comes_first_then_the_newest(tmp_path):
    save(tmp_path, "model_final.pth", "model_0000001.pth", "model_0000003.pth", "model_best.pth", "other.pth")
    (tmp_path / "model_0000009.pth").mkdir()
    (tmp_path / "model_0000008.pth").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in checkpoints(tmp_path)] == [
        "model_0000003.pth",
        "model_0000001.pth",
        "model_final.pth",
    ]
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth\n")
    assert checkpoints(tmp_path)[0].name == "model_0000001.pth"


def damaged(seed):
    draw = random.Random(seed)
    known = [b"model_0000001.pth", b"/etc/passwd", b"../x", b"\x00", b"\xff\xfe", b"\n", b"\x1b[2J", b"a" * 5000]
    return b"".join(draw.choice([draw.randbytes(draw.randrange(9)), draw.choice(known)]) for _ in range(3))


def test_a_damaged_note_of_the_last_checkpoint_is_no_obstacle(tmp_path):
    save(tmp_path, "model_0000001.pth", "model_0000003.pth")
    for seed in range(100):
        (tmp_path / "last_checkpoint").write_bytes(damaged(seed))
        assert len(checkpoints(tmp_path)) == 2
        assert last_whole(tmp_path)[0].endswith(".pth")


def test_damaged_checkpoints_of_any_bytes(tmp_path):
    save(tmp_path, "model_0000001.pth", "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    whole, draw = (tmp_path / "model_0000003.pth").read_bytes(), random.Random(0)
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "model_0000003.pth").write_bytes(content[: draw.randrange(len(content) + 1)])
        found, problems = last_whole(tmp_path)
        assert len(problems) == (not found.endswith("3.pth"))


def test_old_checkpoints_and_stumps_of_the_run_go_and_nothing_else(tmp_path):
    save(tmp_path, *(f"model_000000{n}.pth" for n in range(4)), "model_final.pth", "model_best.pth")
    stumps = ["model_0000005.pth.0123abcd.part", "metrics.json.0123abcd.part", "model_0000004.pth.part"]
    mine = ["r50.pth.part", "model_final.pth.part", "photo.png.0123abcd.part", "model_0000005.pth.0123ABCD.part"]
    for name in [*stumps, *mine]:
        (tmp_path / name).write_text("half")
    drop_old(tmp_path, 2)
    kept = {"model_0000002.pth", "model_0000003.pth", "model_final.pth", "model_best.pth", *mine}
    assert {path.name for path in tmp_path.iterdir()} == kept
