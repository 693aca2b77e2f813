"""File names that match no file as they are written: backslashes, %20, addresses, other folders, other letters."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from dino.utils.files import DataError, resolve_inside

_HASH = re.compile(r"^[0-9a-f]{8}-")  # that Label Studio puts before the name of an upload


def match_names(images: list[Any], folder: str | Path) -> dict[int, str]:
    """The file that each image without one probably means: index in the list -> name relative to the folder.

    A name counts as a match if it is the only one of the folder that agrees: with other slashes, without the leading
    folders, with %20 and the like decoded, in other letters (case, or combined accents), at last by its base name.

    Args:
        images: entries of the file, sound or not.
        folder: of the images, searched with its sub-folders.
    """
    missing = [
        (i, e["file_name"]) for i, e in enumerate(images) if _is_named(e) and not _exists(folder, e["file_name"])
    ]
    if not missing:
        return {}
    by_path, by_name = _index(folder)
    found = {index: _match(name, by_path, by_name) for index, name in missing}
    return {index: name for index, name in found.items() if name}


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("file_name"), str)


def _exists(folder: str | Path, name: str) -> bool:
    """Whether the folder holds the file."""
    try:
        return os.path.isfile(resolve_inside(folder, name))
    except (DataError, ValueError):  # it leaves the folder, or can be no name of a file
        return False


def _index(folder: str | Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The files of a folder, by key of their relative name, and by key of their base name."""
    by_path, by_name = defaultdict(list), defaultdict(list)
    for directory, _, names in os.walk(folder):
        for name in names:
            relative = Path(directory, name).relative_to(folder).as_posix()
            by_path[_key(relative)].append(relative)
            by_name[_key(name)].append(relative)
    return by_path, by_name


def _key(name: str) -> str:
    """What names of one file have in common."""
    return unicodedata.normalize("NFC", name).casefold()


def _match(name: str, by_path: dict[str, list[str]], by_name: dict[str, list[str]]) -> str | None:
    """The only file that a name can mean."""
    for path in _variants(name):
        parts = [part for part in path.split("/") if part not in ("", ".")]
        for start in range(len(parts)):
            found = by_path.get(_key("/".join(parts[start:])), ())
            if len(found) == 1:
                return found[0]
    for path in _variants(name):
        base = path.rpartition("/")[2]
        for key in (_key(base), _key(_HASH.sub("", base))):
            if len(by_name.get(key, ())) == 1:
                return by_name[key][0]
    return None


def _variants(name: str) -> Iterator[str]:
    """A name with slashes, then as the path of an address, each as it is and decoded."""
    text = name.replace("\\", "/")
    yield text
    yield _decoded(text)
    try:
        address = urlsplit(text)
    except ValueError:
        return
    for path in [*parse_qs(address.query).get("d", []), address.path]:  # ?d=… is an address of Label Studio
        yield path
        yield _decoded(path)


def _decoded(path: str) -> str:
    """A path with %20 and the like decoded; Windows writes its backslashes as %5C."""
    return unquote(path).replace("\\", "/")
