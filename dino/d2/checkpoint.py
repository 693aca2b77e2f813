"""Checkpoints: written whole or not at all, read without running what they contain."""

from __future__ import annotations

import logging
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer

from dino.files import DataError, write_whole
from dino.weights import MIN_BACKBONE, load_weights, read_content

from .sources import check_pixels, local_file

logger = logging.getLogger("detectron2.dino")


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that writes files whole or not at all, runs no pickled code, and keeps the class names.

    Args:
        names: class names, stored with every checkpoint.
        about: plain data on the run, stored too; see `dino.d2.describe`.
        min_backbone: as of `load_weights`.
    """

    def __init__(
        self,
        model,
        save_dir: str = "",
        *,
        names: list[str],
        about: dict | None = None,
        min_backbone: float = MIN_BACKBONE,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.names = names
        self.about = about or {}
        self.min_backbone = min_backbone
        self.source = ""  # the last loaded file
        self.problems: list[str] = []  # tensors that it lacked or held in another shape, by the network's names

    def save(self, name: str, **kwargs) -> None:
        """Write `name`.pth whole or not at all."""
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **parts, "names": self.names, "about": self.about, **kwargs}
        write_whole(path, lambda part: torch.save(content, part))
        self.tag_last_checkpoint(f"{name}.pth")

    def load(self, path: str, *args, **kwargs) -> dict:
        """Load a file, or what an address stands for, in any form that `dino.weights` knows.

        Raises:
            DataError: it is missing, broken, of another model, or holds more than plain data.
        """
        if not path:
            return super().load(path, *args, **kwargs)
        self.source = path
        try:
            extra = super().load(local_file(path), *args, **kwargs)
        except DataError:
            raise
        except Exception as error:  # a broken or foreign file can raise anything
            raise DataError(f"can't use the checkpoint {path}: {str(error)[:500]}") from error
        finally:
            self._parsed_url_during_load = None  # where loading failed, Detectron2 leaves it set and refuses to go on
        if extra.get("names", self.names) != self.names:
            logger.warning(f"{path} was trained for the classes {extra['names']}, the data has {self.names}")
        return extra

    def load_whole(self, path: str) -> dict:
        """As `load`, for evaluation: raises a DataError unless the file holds every tensor of the model."""
        extra = self.load(path, checkpointables=[])
        if self.problems:
            some = ", ".join(self.problems[:5])
            raise DataError(
                f"{path} does not fit the recipe: {len(self.problems)} tensors are missing or of another shape, among "
                f"them {some}"
            )
        return extra

    def _load_file(self, filename: str) -> dict:
        return read_content(filename)

    def _load_model(self, checkpoint: dict) -> None:
        """Own running averages are left to who asked for the file; those of other programs are what they publish."""
        copy = "model" if "ema" in checkpoint else "auto"
        report = load_weights(self.model, checkpoint, min_backbone=self.min_backbone, copy=copy, name=self.source)
        logger.info(f"weights: {report}")
        if report.form == "backbone":
            check_pixels(self.model)
        self.problems = report.problems
        checkpoint.pop("model", None)


def read_names(path: str) -> list[str]:
    """The class names that a checkpoint of this project carries.

    Raises:
        DataError: the file is missing, broken, holds more than plain data, or has no names.
    """
    names = read_content(path).get("names")
    if not names:
        raise DataError(f"{path} carries no class names: it was not written by tools/lazyconfig_train_net.py")
    return names
