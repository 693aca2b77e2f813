"""Read and complete a recipe for Detectron2's road, and choose the folder of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig

from dino.d2.training.parallel import from_main, restarted, started_by_same
from dino.training import recipe_completion
from dino.training.recipe_completion import NO_FILES, DataFiles, scale_to_batch, use_epochs
from dino.training.recipe_nodes import add_branch
from dino.training.recipe_reading import check_recipe
from dino.utils.files import UserError, free_name
from dino.utils.recipes import find_recipe

from .data_loading import class_names

__all__ = [
    "DataFiles",
    "add_branch",
    "check_recipe",
    "choose_output",
    "complete",
    "load_recipe",
    "names_of",
    "scale_to_batch",
    "use_epochs",
]


def load_recipe(
    config_file: str, overrides: Sequence[str] = (), files: DataFiles = NO_FILES, *, eval_only: bool = False
) -> DictConfig:
    """Read a recipe and complete it, see `complete`.

    Args:
        config_file: name or file of the recipe.

    Raises:
        UserError: the recipe is missing or incomplete; see `complete`.
    """
    path = str(find_recipe(config_file))
    cfg = LazyConfig.load(path)
    check_recipe(cfg, path)
    return complete(cfg, overrides, files, eval_only=eval_only)


def complete(
    cfg: DictConfig, overrides: Sequence[str] = (), files: DataFiles = NO_FILES, *, eval_only: bool = False
) -> DictConfig:
    """As `dino.training.recipe_completion.complete`, with the data sets of Detectron2's catalog too."""
    return recipe_completion.complete(
        cfg,
        overrides,
        files,
        eval_only=eval_only,
        names_of=names_of,
        schedule_of=lambda cfg: instantiate(cfg.lr_multiplier),
    )


def names_of(node: DictConfig) -> list[str]:
    """Class names of the data set in a recipe's `L(dataset)(…)`."""
    if "name" not in node:
        raise UserError("the recipe's data sets must be written as L(dino.d2.data_loading.dataset)(name=…)")
    return class_names(node.name, node.get("annotations"), node.get("images"))


def choose_output(cfg: DictConfig, *, eval_only: bool = False, resume: bool = False) -> bool:
    """Keep runs apart: an evaluation gets a folder of its own below `train.output_dir`, a new training a fresh one.

    Returns:
        whether the training resumes: on request, or because torchrun or Slurm restarts the run that it started.

    Raises:
        UserError: the folder holds another run, or there is nothing to evaluate.
    """
    folder = Path(cfg.train.output_dir)
    if eval_only:
        if not cfg.train.init_checkpoint:
            raise UserError("--eval-only needs weights: write train.init_checkpoint=PATH")
        cfg.train.output_dir = from_main(str(free_name(folder / "evaluation")))
        return False
    again = restarted() and started_by_same(folder)
    resume, used = from_main((resume or again, any(folder.glob("*.pth"))))
    if used and not resume:
        raise UserError(f"{folder} holds the checkpoints of a run: add --resume, or choose another train.output_dir")
    return resume
