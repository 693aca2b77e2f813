"""Checkpoints of a training without Detectron2: the same content as those of the other road."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dino.modeling.detector import Detector
from dino.utils.files import DataError, UserError, write_whole
from dino.utils.run_folder import drop_old, last_whole
from dino.weights import (
    MIN_BACKBONE,
    Report,
    load_weights,
    locate,
    read_content,
    resnet_to_detectron2,
    same_names,
    to_current_names,
)

logger = logging.getLogger("detectron2.dino")


class RunCheckpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        folder: of the run.
        detector: its weights and class names are stored.
        about: plain data on the run, stored with every checkpoint, see `recipe_parts.describe`.
        min_backbone: as of `load_weights`.
    """

    def __init__(
        self, folder: str | Path, detector: Detector, about: Mapping[str, Any], min_backbone: float = MIN_BACKBONE
    ):
        self.folder = Path(folder)
        self.detector = detector
        self.about = dict(about)
        self.min_backbone = min_backbone
        self.source = ""  # the last loaded file
        self.report: Report | None = None  # on its weights

    @property
    def summary(self) -> str:
        """One line on the weights at the start."""
        if self.report is None:
            return "random: train.init_checkpoint is empty"
        return f"{self.source}: {self.report.summary}"

    def save(self, name: str, **parts: Any) -> None:
        """Write `name`.pth, from which the run can continue."""
        self.save_weights(name, **parts)
        write_whole(self.folder / "last_checkpoint", lambda part: part.write_text(f"{name}.pth"))

    def save_weights(self, name: str, **parts: Any) -> None:
        """Write `name`.pth, whole or not at all; the last checkpoint stays the last."""
        detector = self.detector
        described = {"names": detector.names, "category_ids": detector.category_ids, "about": self.about}
        content = {"model": detector.state_dict(), **parts, **described}
        write_whole(self.folder / f"{name}.pth", lambda part: torch.save(content, part))

    def drop_old(self, keep: int | None) -> None:
        """Remove all but the newest numbered checkpoints; None keeps all."""
        if keep:
            drop_old(self.folder, keep)

    def resume(self) -> dict:
        """Load the newest undamaged checkpoint of the run -> its content without the weights; {} without one.

        Raises:
            DataError: all checkpoints are damaged, or do not fit.
        """
        found, damaged = last_whole(self.folder)
        if damaged and not found:
            raise DataError(f"nothing to continue with: {'; '.join(damaged)}. Start in another train.output_dir")
        for damage in damaged:
            logger.warning(f"{damage}: the run continues from {found}")
        return self._load(found, check=refuse_other_engine) if found else {}

    def load_start(self, path: str, parts: str = "all") -> None:
        """Load a file to start a training from: each class gets the rows of its name, other rows start afresh.

        Args:
            path: a file, an address or a name; "" for random weights.
            parts: "all", or "backbone" for the backbone alone, from a file of any detector.
        """
        if path:
            self._load(path, class_rows="name", parts=parts)

    def load_whole(self, path: str) -> dict:
        """Load a file for evaluation -> its content without the weights.

        Raises:
            DataError: a tensor of the detector is missing.
        """
        content = self._load(path)
        self.report.check_whole(path)
        return content

    def load_average(self, content: Mapping) -> None:
        """Load the averaged weights in the content of `load_whole` into the detector."""
        load_weights(
            self.detector, {**content, "model": content["ema"]["model"]}, copy="model", classes=self.detector.names
        )

    def _load(self, path: str, *, check: Callable[..., None] | None = None, **wishes: str) -> dict:
        """Load the weights of a file, in any format that `dino.weights` knows -> the rest of its content."""
        self.source, detector, names = path, self.detector, self.detector.names
        try:
            content = dict(read_content(locate(path)))
            if check:
                check(content["model"], detector, path)
            options = {"copy": "model" if "ema" in content else "auto", "classes": names, "name": path, **wishes}
            self.report = load_weights(detector, content, min_backbone=self.min_backbone, **options)
        except UserError:
            raise
        except Exception as error:  # a broken or foreign file can raise anything
            raise DataError(f"can't use the checkpoint {path}: {str(error)[:500]}") from error
        logger.log(logging.WARNING if self.report.doubts else logging.INFO, f"weights: {self.report}")
        by_name = wishes.get("class_rows") == "name"  # the report says which rows were kept
        if "names" in content and not by_name and not same_names(content["names"], names):
            logger.warning(f"{path} was trained for the classes {content['names']}, the data has {names}")
        content.pop("model", None)
        return content


def refuse_other_engine(state: Mapping, model: nn.Module, path: str) -> None:
    """Raise a DataError if a file has the names that the other engine gives to the tensors of a ResNet.

    Then the order of its parameters is another one too, so that the state of its optimizer does not fit.

    Args:
        state: the file's state dict, or its names.
        model: not wrapped.
        path: the file, for the message.
    """
    theirs, ours = (dict.fromkeys(names) for names in (state, model.state_dict()))
    theirs = to_current_names(theirs)
    if theirs.keys() != ours.keys() and resnet_to_detectron2(theirs).keys() == resnet_to_detectron2(ours).keys():
        raise DataError(
            f"can't continue from {path}: the other engine wrote it (--engine plain or detectron2). Continue with that "
            f"one, or start a new run from its weights: --weights {path}"
        )
