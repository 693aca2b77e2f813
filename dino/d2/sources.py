"""Files and addresses of weights, with what Detectron2 adds to them."""

from __future__ import annotations

import re

from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import OneDrivePathHandler, PathManager

from dino.utils.files import UserError
from dino.weights import SCHEMES, locate

_HEURISTICS = re.compile(r"\?matching_heuristics=\w+$")  # which Detectron2's recipes append
_CATALOG = "catalog://"
_REFUSED = ("http://", "ftp://")  # Detectron2 itself would fetch these


def local_file(path: str) -> str:
    """Find the file of a name, a path or an address, see `dino.weights.locate`.

    Beside its addresses: catalog:// of Detectron2, and those for which somebody registered a handler with Detectron2's
    PathManager.

    Raises:
        DataError: there is no such file.
        UserError: the address is unknown, or the file can't be fetched. The message says which file to put where.
    """
    path = _HEURISTICS.sub("", path)
    if path.startswith(OneDrivePathHandler.ONE_DRIVE_PREFIX):
        path = OneDrivePathHandler().create_one_drive_direct_download(path)
    try:
        if path.startswith(_CATALOG):
            path = ModelCatalog.get(path.removeprefix(_CATALOG))
        elif "://" in path and not path.startswith((*SCHEMES, *_REFUSED)):
            found = PathManager.get_local_path(path)
            if found != path:  # else nobody registered a handler
                return found
    except Exception as error:  # handlers of others can raise anything
        raise UserError(f"can't fetch {path}: {error}") from error
    return locate(path)
