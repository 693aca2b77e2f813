"""Set-up of a run on Detectron2's road; takes the place of Detectron2's `default_setup`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig

from dino.training.recipe_reading import save_recipe
from dino.training.run_log import run_log

logger = logging.getLogger("detectron2")


@contextmanager
def run_setup(cfg: DictConfig, job: Any) -> Iterator[None]:
    """Within the block, log into `train.output_dir`, see `run_log`.

    Writes config.yaml, sets the seed and `train.cudnn_benchmark`, and logs environment, arguments and recipe.

    Args:
        cfg: a complete recipe.
        job: with `config_file` and `eval_only`; logged as the arguments.

    Raises:
        UserError: the folder can't be written.
    """
    with run_log(cfg.train.output_dir):
        _set_up(cfg, job, Path(cfg.train.output_dir), comm.get_rank())
        yield


def _set_up(cfg: DictConfig, job: Any, folder: Path, rank: int) -> None:
    """Log what a bug report needs, write the recipe, and set the seed."""
    logger.info("engine: Detectron2")
    logger.info(f"process {rank} of {comm.get_world_size()}")
    logger.info(f"environment:\n{collect_env_info()}")
    logger.info(f"arguments: {job}")
    if job.config_file:
        logger.info(f"contents of {job.config_file}:\n{Path(job.config_file).read_text(encoding='utf-8')}")
    if not rank:
        save_recipe(cfg, folder / "config.yaml")
    seed = cfg.train.get("seed", -1)
    seed_all_rng(None if seed < 0 else seed + rank)
    if not job.eval_only:
        torch.backends.cudnn.benchmark = cfg.train.get("cudnn_benchmark", False)
