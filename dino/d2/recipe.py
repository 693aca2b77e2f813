"""Read and complete a recipe for Detectron2's road, and choose the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig

from dino.d2.training.parallel import entered_by_main
from dino.training import recipe_completion
from dino.training.recipe_completion import NO_FILES, DataFiles, scale_to_batch, use_epochs
from dino.training.recipe_lengths import leave_open
from dino.training.recipe_nodes import add_branch
from dino.training.recipe_reading import check_recipe
from dino.utils.files import UserError
from dino.utils.recipes import find_recipe
from dino.utils.run_folder import claim_run, new_folder

from .data_loading import class_names

__all__ = [
    "DataFiles",
    "add_branch",
    "check_recipe",
    "claim_output",
    "complete",
    "load_recipe",
    "names_of",
    "read_recipe",
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
    return complete(read_recipe(config_file), overrides, files, eval_only=eval_only)


def read_recipe(config_file: str) -> DictConfig:
    """Read a recipe by its name or file.

    Raises:
        UserError: the recipe is missing or lacks a part.
    """
    path = str(find_recipe(config_file))
    cfg = LazyConfig.load(path)
    check_recipe(cfg, path)
    leave_open(cfg)
    return cfg


def complete(
    cfg: DictConfig, overrides: Sequence[str] = (), files: DataFiles = NO_FILES, *, eval_only: bool = False
) -> DictConfig:
    """As `dino.training.recipe_completion.complete`, with the data sets of Detectron2's catalog too."""
    road = recipe_completion.Road(names_of, lambda cfg: instantiate(cfg.lr_multiplier), lambda cfg: None)
    return recipe_completion.complete(cfg, overrides, files, eval_only=eval_only, road=road)


def names_of(node: DictConfig) -> list[str]:
    """Class names of the data set in a recipe's `L(dataset)(…)`."""
    if "name" not in node:
        raise UserError("the recipe's data sets must be written as L(dino.d2.data_loading.dataset)(name=…)")
    return class_names(node.name, node.get("annotations"), node.get("images"))


@contextmanager
def claim_output(
    cfg: DictConfig, *, eval_only: bool = False, resume: bool = False, overwrite: bool = False
) -> Iterator[bool]:
    """Keep runs apart: hold the folder of a training, and give an evaluation a new folder below `train.output_dir`.

    All processes must enter the block together; the main one holds the folder, see `claim_run`.

    Yields:
        whether the training resumes: on request, or because torchrun or Slurm restarts the run that it started.

    Raises:
        UserError: the folder holds another run or is in use, or there is nothing to evaluate or to resume.
    """
    if eval_only and not cfg.train.init_checkpoint:
        raise UserError("--eval-only needs weights: write train.init_checkpoint=PATH, a file or the folder of a run")
    folder = cfg.train.output_dir
    if eval_only:
        with entered_by_main(lambda: new_folder(Path(folder, "evaluation"))) as cfg.train.output_dir:
            yield False
    else:
        with entered_by_main(lambda: claim_run(folder, resume=resume, overwrite=overwrite)) as again:
            yield again
