"""Files and addresses of weights."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlparse

from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir

from dino.utils.files import DataError
from dino.weights import SCHEMES, cannot_fetch, locate


def local_file(path: str) -> str:
    """Find the file of a path or an address (detectron2://, https://, torchvision://, timm://, package://).

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
