"""Checkpoints: written whole or not at all, read without running code that they contain."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer

from dino.d2.training.parallel import from_main
from dino.training.shards import whole
from dino.utils.files import DataError, UserError, write_whole
from dino.utils.run_folder import drop_old, last_whole
from dino.weights import MIN_BACKBONE, Report, load_weights, read_content, same_names

from .sources import local_file

logger = logging.getLogger("detectron2.dino")


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that writes files whole or not at all, runs no pickled code, and stores the class names.

    Args:
        names: class names, stored with every checkpoint.
        category_ids: of the classes in the data set, label -> id, stored too; 1, 2, … by default.
        about: plain data on the run, stored with every checkpoint; see `dino.d2.recipe_description`.
        min_backbone: as of `load_weights`.
    """

    def __init__(
        self,
        model,
        save_dir: str = "",
        *,
        names: list[str],
        category_ids: list[int] | None = None,
        about: dict | None = None,
        min_backbone: float = MIN_BACKBONE,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.names = names
        self.category_ids = category_ids or list(range(1, len(names) + 1))
        self.about = about or {}
        self.min_backbone = min_backbone
        self.source = ""  # the last loaded file
        self.report: Report | None = None  # on its weights
        self.problems: list[str] = []  # names of tensors that it lacked or had in another shape
        self.state: dict = {}  # names of the tensors of the last loaded file
        self._wishes: dict[str, str] = {}  # further arguments of `load_weights`

    def add_about(self, **about) -> None:
        """Add plain data on the run to what every checkpoint stores."""
        self.about = {**self.about, **about}

    def save(self, name: str, **kwargs) -> None:
        """Write `name`.pth, from which the run can continue. All processes of a sharded model must call this."""
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        self.write(name, {**parts, **kwargs})
        if self.save_dir and self.save_to_disk:
            self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **kwargs) -> None:
        """Write `name`.pth without what a run needs to continue; the last checkpoint stays the last."""
        self.write(name, kwargs)

    def write(self, name: str, parts: dict) -> None:
        """Write the model and `parts` as `name`.pth, whole or not at all."""
        described = {"names": self.names, "category_ids": self.category_ids, "about": self.about}
        content = whole({"model": self.model.state_dict(), **parts, **described})
        if self.save_dir and self.save_to_disk:
            write_whole(os.path.join(self.save_dir, f"{name}.pth"), lambda part: torch.save(content, part))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note the file to continue with."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_whole(path, lambda part: part.write_text(last_filename_basename))

    def last_whole(self) -> str:
        """Find the newest undamaged checkpoint, the same one on all processes; "" where there are no checkpoints.

        Raises:
            DataError: all checkpoints are damaged.
        """
        found, damaged = from_main(last_whole(Path(self.save_dir)) if self.save_to_disk else None)
        if damaged and not found:
            raise DataError(f"nothing to continue with: {'; '.join(damaged)}. Start in another train.output_dir")
        for damage in damaged:
            logger.warning(f"{damage}: the run continues from {found}")
        return found

    def keep(self, number: int) -> None:
        """Remove all but the newest `number` of the numbered checkpoints, and files that a kill left incomplete."""
        drop_old(Path(self.save_dir), number)

    def load(self, path: str, *args, **kwargs) -> dict:
        """Load a file or an address, in any format that `dino.weights` knows.

        Raises:
            DataError: the file is missing, broken, of another model, or holds more than plain data.
            UserError: the address is unknown or can't be fetched.
        """
        if not path:
            return super().load(path, *args, **kwargs)
        self.source = path
        try:
            extra = super().load(local_file(path), *args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # a broken or foreign file can raise anything
            raise DataError(f"can't use the checkpoint {path}: {str(error)[:500]}") from error
        finally:
            self._parsed_url_during_load = None  # after an error Detectron2 leaves it set, and refuses the next load
        by_name = self._wishes.get("class_rows") == "name"  # the report says which rows were kept
        if "names" in extra and not by_name and not same_names(extra["names"], self.names):
            logger.warning(f"{path} was trained for the classes {extra['names']}, the data has {self.names}")
        return extra

    def load_start(self, path: str, parts: str = "all") -> dict:
        """Load a file to start a training from: each class gets the rows of its name, other rows start afresh.

        Args:
            path: as of `load`.
            parts: "all", or "backbone" for the backbone alone, from a file of any detector.
        """
        self._wishes = {"class_rows": "name", "parts": parts}
        try:
            return self.load(path, checkpointables=[])
        finally:
            self._wishes = {}

    def load_whole(self, path: str) -> dict:
        """Load a file for evaluation; raises a DataError unless it has every tensor of the model."""
        extra = self.load(path, checkpointables=[])
        self.report.check_whole(path)
        return extra

    def _load_file(self, filename: str) -> dict:
        return read_content(filename)

    def _load_model(self, checkpoint: dict) -> None:
        """Leave own running averages to the caller of `load`; other programs publish theirs as the weights."""
        copy = "model" if "ema" in checkpoint else "auto"
        self.state = dict.fromkeys(checkpoint.get("model") or ())
        self.report = load_weights(
            self.model,
            checkpoint,
            min_backbone=self.min_backbone,
            copy=copy,
            name=self.source,
            classes=self.names,
            **self._wishes,
        )
        logger.log(logging.WARNING if self.report.doubts else logging.INFO, f"weights: {self.report}")
        self.problems = self.report.problems
        checkpoint.pop("model", None)


def read_names(path: str) -> list[str]:
    """Read the class names of a checkpoint of this project.

    Raises:
        DataError: the file is missing or broken, holds more than plain data, or has no names.
    """
    names = read_content(path).get("names")
    if not names:
        raise DataError(f"{path} has no class names: only checkpoints of this project have them")
    return names
