"""The folder of a run: held by one process at a time, never mixed with another run, and what it continues from."""

from __future__ import annotations

import os
import platform
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from .files import UsageError, UserError, finished_name, free_name, make_folder, make_free_folder, write_whole
from .printable import printable

_LOCK = "run.lock"
_RESULTS_LOCK = ".dino.lock"  # of a folder that is no run's; removed at the end
_STARTER = "started_by"
_NUMBERED = re.compile(r"model_\d{7,}\.pth")
_RUN_FILES = (
    *("config.yaml", "log.txt", "metrics.json", "*.pth", "last_checkpoint", "log.txt.rank*", "evaluations.json"),
    *("results.json", "curves.png", "train_batch*.png", "val_predictions.png", "inference"),
    *("events.out.tfevents.*", "wandb_id"),
)
_MOVED = (*_RUN_FILES, _STARTER, "evaluation", "evaluation.*", "wandb")  # aside, with a run
_LISTED = 4  # files that a message names
_NOTE = 4096  # bytes of a note that are read
_PATIENCE = 0.3  # seconds that a start waits for the lock
_WAYS = "choose another folder (--output)"


@contextmanager
def claim_run(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[bool]:
    """Hold the folder of a run within the block, on the process that writes into it; make it if it is missing.

    The lock is the kernel's: it ends with the process, however that ends. A folder in which nothing was written is left
    as it was.

    Args:
        folder: of the run, which must hold no file of an earlier one.
        resume: continue the run in the folder instead.
        overwrite: move the files of the run aside instead, to `folder.1`, `folder.2`, …

    Yields:
        whether to continue from the last checkpoint: on request, or because torchrun or Slurm restarts the run that it
        started (which may not have come to a first checkpoint).

    Raises:
        UserError: the folder holds a run or is in use, or there is nothing to resume, or it can't be written.
        UsageError: resume and overwrite exclude each other.
    """
    if resume and overwrite:
        raise UsageError("--resume continues the run, --overwrite starts anew: give one of them")
    with _locked(Path(folder), _LOCK, _WAYS) as path:
        again = restarted() and started_by_same(path)
        if not again:
            _check_use(path, resume, overwrite)
        note_start(path)
        yield resume or again


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder of results within the block: no other program of this project writes into it. Make it if needed.

    Raises:
        UserError: another process holds the folder, or it can't be written.
    """
    with _locked(folder, _RESULTS_LOCK, "choose another --output"):
        try:
            yield
        finally:
            (folder / _RESULTS_LOCK).unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[str]:
    """Make a folder of a free name, see `make_free_folder`; remove it at the end of the block if it is empty."""
    folder = make_free_folder(path)
    try:
        yield str(folder)
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _locked(folder: Path, name: str, advice: str) -> Iterator[Path]:
    """Hold the lock `name` in a folder; where no other file was added by the end, leave the folder as it was."""
    made, before = not folder.exists(), _names(folder)
    lock = _acquire(folder, name, advice)
    try:
        yield folder
    finally:
        with suppress(OSError):
            added = _names(folder) - before
            if added <= {name, _STARTER}:
                for own in added:
                    (folder / own).unlink()
                if made:
                    folder.rmdir()
        lock.release()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _acquire(folder: Path, name: str, advice: str) -> FileLock:
    """Acquire the lock `name` in a folder, which is made if it is missing.

    Raises:
        UserError: another process holds the lock, or the folder can't be written.
    """
    lock = FileLock(folder / name)
    for _ in range(100):
        make_folder(folder)
        try:
            lock.acquire(timeout=_PATIENCE, poll_interval=0.02)
            break
        except Timeout:
            holder = f" ({text})" if (text := _read_note(folder / name)) else ""
            raise UserError(f"{folder} is in use by another process{holder}: wait until it ends, or {advice}") from None
        except FileNotFoundError:  # another start has just removed a folder in which it wrote nothing
            continue
        except (OSError, NotImplementedError) as error:
            raise UserError(f"can't write into the folder {folder}: {error}") from error
    if isinstance(lock, FileLock):  # else the file system has no locks, and the file's content is filelock's own
        with suppress(OSError):
            (folder / name).write_text(f"{printable(platform.node())}, process {os.getpid()}")
    return lock


def _check_use(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise a UserError if the folder does not fit the wish; move the files of an earlier run aside if that is it."""
    found = run_files(folder)
    names = ", ".join(printable(name) for name in found[:_LISTED]) + ", …" * (len(found) > _LISTED)
    if resume and not checkpoints(folder):
        there = f" ({names}). Add --overwrite instead" if found else ". Leave out --resume"
        raise UserError(f"nothing to resume: {folder} holds no checkpoint{there} to start a new training")
    if resume or not found:
        return
    if not overwrite:
        aside = free_name(_plain(folder))
        raise UserError(
            f"{folder} holds a run ({names}): add --resume, {_WAYS}, or add --overwrite, which moves it to {aside}"
        )
    _move_aside(folder)


def _move_aside(folder: Path) -> None:
    """Move the files of a run into a new folder beside its own."""
    aside = make_free_folder(_plain(folder))
    for path in sorted(folder.iterdir()):
        if _matches(path.name, _MOVED):
            path.rename(aside / path.name)
    print(f"moved the earlier run to {printable(aside, None)}")


def _plain(folder: Path) -> Path:
    """The folder by a name of its own, so that another name beside it is on the same disk."""
    return folder.resolve() if folder.is_symlink() or folder.name in ("", "..") else folder


def run_files(folder: Path) -> list[str]:
    """Names in a folder that the files of a run have, the telling ones first; none where there is no folder."""
    names = sorted(_names(folder))
    return [name for pattern in _RUN_FILES for name in names if fnmatch(name, pattern)]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def restarted() -> bool:
    """Whether torchrun or Slurm has restarted this process."""
    return any(int(os.environ.get(key) or 0) > 0 for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _launch_id() -> str:
    """An id that a restart by torchrun or Slurm keeps, and another run does not."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return given if given != "none" else os.environ.get("SLURM_JOB_ID", f"{platform.node()} {os.getppid()}")


def note_start(folder: Path) -> None:
    """Write the id of this launch into the folder of a run."""
    write_whole(folder / _STARTER, lambda part: part.write_text(_launch_id()))


def started_by_same(folder: Path) -> bool:
    """Whether the same launch has called `note_start` for this folder."""
    return _read_note(folder / _STARTER) == _launch_id()


def _read_note(path: Path) -> str:
    """The start of a small text file, whatever its bytes are; "" where there is none."""
    try:
        with open(path, "rb") as file:
            return printable(file.read(_NOTE).decode(errors="replace").strip(), None)
    except OSError:
        return ""


# Checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """The files in the folder of a run from which it could continue, the noted one first, then the newest."""
    names = (path for path in folder.glob("*.pth") if _NUMBERED.fullmatch(path.name) or path.name == "model_final.pth")
    files = [path for path in names if path.is_file()]
    noted = _read_note(folder / "last_checkpoint")
    return sorted(files, key=lambda path: (path.name == noted, path.stat().st_mtime), reverse=True)


def last_whole(folder: Path) -> tuple[str, list[str]]:
    """The newest undamaged checkpoint of a run ("" where there is none), and what is wrong with newer ones."""
    damaged = []
    for path in checkpoints(folder):
        damage = _damage_of(path)
        if not damage:
            return str(path), damaged
        damaged.append(f"{path} {damage}")
    return "", damaged


def _damage_of(path: Path) -> str:
    """How a file in torch's format is damaged; "" for an undamaged one."""
    try:
        with zipfile.ZipFile(path) as file:
            return "was altered since it was written" if file.testzip() else ""
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, zlib.error):
        return "is cut short or no checkpoint"
    except OSError as error:
        return f"can't be read: {error}"


def drop_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` numbered checkpoints, and unfinished files of the run that a kill has left.

    Only the process that holds the folder may call this.
    """
    names = sorted(_names(folder))
    numbered = [name for name in names if _NUMBERED.fullmatch(name)]
    unfinished = [name for name in names if _matches(finished_name(name), _RUN_FILES)]
    earlier = [name for name in names if name.endswith(".part") and _NUMBERED.fullmatch(name[: -len(".part")])]
    for name in [*numbered[:-keep], *unfinished, *earlier]:  # `earlier`: as earlier versions named them
        (folder / name).unlink(missing_ok=True)
