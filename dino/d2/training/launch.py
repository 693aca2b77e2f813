"""Train or evaluate a LazyConfig recipe, in one process or several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.multiprocessing import ProcessRaisedException

from dino.d2 import follow_file, recipe
from dino.inference.cpu import keep_freed_memory
from dino.training.memory_saving import OutOfMemory
from dino.utils.files import UserError
from dino.utils.library_warnings import quiet_children
from dino.utils.recipes import find_recipe

from . import engine, parallel
from .run_setup import run_setup


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


def run(job: Job, processes: parallel.Processes) -> dict:
    """Do a job -> the results of the last evaluation, {} of several processes.

    Raises:
        UserError: recipe, data or weights are missing or don't fit; see `launch`.
    """
    return launch(_work, processes, job) or {}


def _work(job: Job) -> dict:
    """One process."""
    keep_freed_memory()
    logging.raiseExceptions = False  # a full disk that takes no more of log.txt is no reason for tracebacks
    job = job._replace(config_file=str(find_recipe(job.config_file)))
    cfg = recipe.load_recipe(job.config_file, job.overrides, job.files, eval_only=job.eval_only)
    with recipe.claim_output(cfg, eval_only=job.eval_only, resume=job.resume, overwrite=job.overwrite) as resume:
        messages = follow_file.follow(cfg, job.overrides, resume=resume)
        with run_setup(cfg, job):
            follow_file.log(messages)
            if job.eval_only:
                return engine.evaluate_checkpoint(cfg)
            recipe.scale_to_batch(cfg, job.overrides)
            return engine.train(cfg, resume, job.config_file)


def launch(function: Callable, processes: parallel.Processes, *args: Any) -> Any:
    """Call `function(*args)` in each process -> its value; None of several processes.

    Raises:
        UserError: memory ran out, or one of several processes failed; the message is the last line of its error.
    """
    try:
        with quiet_children():
            return parallel.launch(function, processes, *args)
    except OutOfMemory as error:
        raise UserError(str(error)) from error
    except ProcessRaisedException as error:
        raise UserError(str(error).rstrip().splitlines()[-1]) from error
