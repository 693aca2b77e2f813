"""Files and addresses of weights, and a check of the pixel statistics that they expect."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlparse

from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir
from torch import nn

from dino.utils.files import DataError, UserError
from dino.weights import SCHEMES, cannot_fetch, locate


def local_file(path: str) -> str:
    """Find the file of a path or an address (detectron2://, https://, torchvision://, timm://).

    Raises:
        DataError: there is no such file.
        UserError: the file can't be fetched. The message says which file to put where.
    """
    if path.startswith(SCHEMES):
        return locate(path)
    bare = path.partition("?")[0]  # Detectron2's recipes append ?matching_heuristics=True
    if "://" not in bare and not os.path.isfile(bare):
        raise DataError(f"weights not found: {path}")
    try:
        return PathManager.get_local_path(bare)
    except Exception as error:  # the errors of a download are documented nowhere
        url = bare.replace("detectron2://", Detectron2Handler.S3_DETECTRON2_PREFIX)
        place = Path(get_cache_dir()) / urlparse(url).path.lstrip("/")
        raise cannot_fetch(url, str(place), error) from error


def check_pixels(model: nn.Module) -> None:
    """Raise a UserError where timm's weights of a backbone expect other pixel statistics than the model has."""
    body = getattr(model.network.neck.backbone, "body", None)
    expected = getattr(body, "pretrained_cfg", None) or {}
    ours = {name: getattr(model, name).flatten().tolist() for name in ("pixel_mean", "pixel_std")}
    theirs = {f"pixel_{key}": [round(255 * x, 3) for x in expected[key]] for key in ("mean", "std") if key in expected}
    if any(abs(a - b) > 0.1 for name in theirs for a, b in zip(ours[name], theirs[name], strict=True)):
        words = " ".join(f"model.{name}={values}" for name, values in theirs.items())
        raise UserError(f"the backbone's weights expect other pixel statistics than the model's {ours}: write {words}")
