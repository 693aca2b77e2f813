"""Train or evaluate a LazyConfig recipe, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.multiprocessing import ProcessRaisedException

from dino.d2 import follow_file, recipe
from dino.inference.cpu import keep_freed_memory
from dino.utils.files import UserError
from dino.utils.library_warnings import quiet_children
from dino.utils.recipes import find_recipe

from . import engine, parallel
from .memory_saving import OutOfMemory
from .run_log import run_log


class Job(NamedTuple):
    """What to train or evaluate.

    Args:
        config_file: recipe, by name or file.
        overrides: of the recipe, each key=value.
        files: data that replaces the recipe's.
        eval_only: evaluate `train.init_checkpoint`, train nothing.
        resume: continue the run in `train.output_dir`.
        overwrite: move a run that is in `train.output_dir` aside.
    """

    config_file: str
    overrides: Sequence[str] = ()
    files: recipe.DataFiles = recipe.NO_FILES
    eval_only: bool = False
    resume: bool = False
    overwrite: bool = False


def run(job: Job, processes: parallel.Processes) -> None:
    """Do a job.

    Raises:
        UserError: recipe, data or weights are missing or don't fit; see `launch`.
    """
    launch(_work, processes, job)


def _work(job: Job) -> None:
    """One process."""
    keep_freed_memory()
    job = job._replace(config_file=str(find_recipe(job.config_file)))
    cfg = recipe.load_recipe(job.config_file, job.overrides, job.files, eval_only=job.eval_only)
    resume = recipe.choose_output(cfg, eval_only=job.eval_only, resume=job.resume)
    messages = follow_file.follow(cfg, job.overrides, resume=resume)
    with run_log(cfg, job):
        follow_file.log(messages)
        if job.eval_only:
            engine.evaluate_checkpoint(cfg)
        else:
            recipe.scale_to_batch(cfg, job.overrides)
            engine.train(cfg, resume, Path(job.config_file).stem)


def launch(function: Callable, processes: parallel.Processes, *args: Any) -> None:
    """Call `function(*args)` in each process.

    Raises:
        UserError: memory ran out, or one of several processes failed; the message is the last line of its error.
    """
    try:
        with quiet_children():
            parallel.launch(function, processes, *args)
    except OutOfMemory as error:
        raise UserError(str(error)) from error
    except ProcessRaisedException as error:
        raise UserError(str(error).rstrip().splitlines()[-1]) from error
