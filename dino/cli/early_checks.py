"""Checks of paths before anything heavy is imported: a mistyped one is named at once."""

from __future__ import annotations

import os
from pathlib import Path

from dino.utils.files import DataError, UserError
from dino.weights.addresses import locate


def check_data(annotations: str | None, images: str | None) -> None:
    """Raise a DataError if the file of annotations or the folder of images is missing; None is not checked."""
    if annotations is not None and not os.path.exists(annotations):
        raise DataError(f"annotations not found: {annotations}")
    if images is not None and not os.path.isdir(images):
        raise DataError(f"image folder not found: {images}")


def check_weights(weights: str | None) -> None:
    """Find weights by path or name, and fetch published ones; other addresses are left to the program.

    Raises:
        DataError: there is no such file or name.
        UserError: they can't be fetched.
    """
    if weights and "://" not in weights:
        locate(weights)


def check_output(folder: str | None) -> None:
    """Raise a UserError if a folder can't be made or written, as far as its parents show."""
    if not folder:
        return
    path = Path(os.path.abspath(folder))
    place = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not place.is_dir():
        raise UserError(f"can't write into {folder}: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"can't write into {folder}: no permission to write into {place}")


def setting(overrides: list[str], key: str) -> str | None:
    """The last value that overrides give to a key, without quotes; None without one."""
    values = [override.partition("=")[2] for override in overrides if override.startswith(f"{key}=")]
    return values[-1].strip("'\"") if values else None
