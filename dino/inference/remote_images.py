"""Pictures of addresses, in temporary files that exist as long as something refers to them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import UnidentifiedImageError

from dino.data.images import image_size
from dino.utils.files import DataError, UserError
from dino.weights.addresses import repair
from dino.weights.downloads import cache_folder, cached_path, fetch, safe_name

from .video import VIDEO_SUFFIXES

_LIMIT = 500_000_000  # bytes of a picture
_TYPES = ("image/", "application/octet-stream", "binary/octet-stream")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class _Folder:
    """A temporary folder; it is removed with the last reference to this, or when the program ends."""

    def __init__(self):
        self.path = Path(tempfile.mkdtemp(prefix="dino-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class _Fetched(type(Path())):
    """The path of a picture in a temporary folder, which it keeps."""

    folder: _Folder


def is_remote(source: str | Path) -> bool:
    """Whether an input is the address of a picture."""
    text = repair(os.fspath(source))
    return bool(_ADDRESS.match(text)) and not os.path.exists(text)


def remote_name(path: Path) -> str:
    """HOST/NAME of a picture of `fetch_images`; "" for any other path."""
    return path.relative_to(path.folder.path).as_posix() if isinstance(path, _Fetched) else ""


def fetch_images(addresses: Sequence[str | Path]) -> list[Path]:
    """Download pictures into one temporary folder, which exists as long as one of the returned paths.

    Args:
        addresses: https://; http:// for this machine.

    Raises:
        DataError: one of them can't be fetched, has more than 500 MB, or is no picture.
    """
    folder, paths = _Folder(), []
    for address in map(repair, addresses):
        try:
            path = _Fetched(fetch(address, place=_place(folder.path, address), accept=_TYPES, limit=_LIMIT))
        except UserError as error:
            raise DataError(str(error)) from error
        _check_form(path, address)
        path.folder = folder
        paths.append(path)
    return paths


def _check_form(path: Path, address: str) -> None:
    """Raise a DataError if a file begins like no picture; all else is for the reader, which has limits of its own."""
    try:
        image_size(path)
    except DataError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise DataError(str(error).replace(str(path), address)) from error


def _place(folder: Path, address: str) -> Path:
    """Where a picture goes, under the last part of its address.

    Raises:
        DataError: it is a video.
    """
    long = cached_path(address).relative_to(cache_folder())  # also checks the address
    name = safe_name(unquote(urlsplit(address).path.rstrip("/").rpartition("/")[2]) or "index")
    if Path(name).suffix.lower() in VIDEO_SUFFIXES:
        raise DataError(f"videos are read from files only: download {address} first")
    place = folder / long.parts[0] / name
    return folder / long if place.exists() else place
