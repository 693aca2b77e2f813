"""A training or an evaluation without Detectron2, from the name of a recipe to the closing lines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from dino.inference.cpu import keep_freed_memory
from dino.utils.environment import environment_lines
from dino.utils.files import UserError
from dino.utils.recipes import find_recipe
from dino.utils.run_folder import claim_run, new_folder

from .file_settings import follow_facts, log_messages, read_start
from .memory_saving import OutOfMemory
from .recipe_completion import NO_FILES, DataFiles, complete, scale_to_batch
from .recipe_reading import read_recipe
from .recipe_training import evaluate_checkpoint, train
from .run_log import run_log

logger = logging.getLogger("detectron2.dino")


class RecipeJob(NamedTuple):
    """What to train or evaluate.

    Args:
        recipe: name or file.
        overrides: of the recipe, each key=value.
        files: data that replaces the recipe's.
        eval_only: evaluate `train.init_checkpoint`, train nothing.
        resume: continue the run in `train.output_dir`.
        overwrite: move a run that is there aside.
    """

    recipe: str
    overrides: Sequence[str] = ()
    files: DataFiles = NO_FILES
    eval_only: bool = False
    resume: bool = False
    overwrite: bool = False


def run(job: RecipeJob) -> dict[str, dict]:
    """Do a job -> the results of the last evaluation, see `recipe_evaluation.evaluate`.

    Raises:
        UserError: recipe, data, weights or folder can't be used, or memory ran out.
        FloatingPointError: a loss or gradient is not finite, and is not to be skipped.
        Stopped: Ctrl-C or SIGTERM ended the training, after a checkpoint.
    """
    keep_freed_memory()
    cfg = read_recipe(job.recipe)
    cfg = complete(cfg, job.overrides, job.files, eval_only=job.eval_only)
    try:
        return _evaluate(cfg, job) if job.eval_only else _train(cfg, job)
    except OutOfMemory as error:
        raise UserError(str(error)) from error


def _train(cfg: DictConfig, job: RecipeJob) -> dict[str, dict]:
    """Train in the folder of the run."""
    folder = cfg.train.output_dir
    with claim_run(folder, resume=job.resume, overwrite=job.overwrite) as resume:
        messages = follow_facts(cfg, job.overrides, *read_start(cfg, resume=resume))
        with run_log(folder):
            _log_job(job)
            log_messages(messages)
            scale_to_batch(cfg, job.overrides)
            torch.backends.cudnn.benchmark = cfg.train.cudnn_benchmark
            return train(cfg, resume=resume, recipe=Path(job.recipe).stem)


def _evaluate(cfg: DictConfig, job: RecipeJob) -> dict[str, dict]:
    """Evaluate in a new folder below that of the run."""
    if not cfg.train.init_checkpoint:
        raise UserError("--eval-only needs weights: give --weights CHECKPOINT")
    with new_folder(Path(cfg.train.output_dir) / "evaluation") as cfg.train.output_dir:
        messages = follow_facts(cfg, job.overrides, *read_start(cfg, resume=False))
        with run_log(cfg.train.output_dir):
            _log_job(job)
            log_messages(messages)
            return evaluate_checkpoint(cfg)


def _log_job(job: RecipeJob) -> None:
    """Log what a bug report needs."""
    path = find_recipe(job.recipe)
    logger.info("engine: plain, without Detectron2")
    logger.info("\n".join(["environment:", *environment_lines()]))
    logger.info(f"arguments: {job}")
    logger.info(f"contents of {path}:\n{path.read_text(encoding='utf-8')}")
