"""Fonts for names in any script: DejaVu Sans of matplotlib, else a font of the system that has the letters."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from dino.utils.printable import printable

_MOST_FONTS = 300  # of the system, that are opened in search of a letter
_WIDE = ("noto", "cjk", "droid", "wqy", "unifont", "arial", "msyh", "simsun", "gothic", "pingfang", "nirmala")


def legible(text: object, limit: int | None = None) -> str:
    r"""A name or a file name in one line of at most `limit` columns; None for any length.

    Control characters, and letters that no font of this machine has, become escapes such as \u732b.
    """
    line = printable(text, limit)
    return line if _covering(frozenset(line)) else printable("".join(map(_drawable, str(text))), limit)


def load_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font with all letters of a `legible` text, `size` pixels high."""
    return _open_font(str(_covering(frozenset(text)) or _bundled()), size)


def font_families(texts: list[str]) -> list[str]:
    """Names of fonts for matplotlib that together have all letters of `legible` texts."""
    paths = {_bundled(): None} | {path: None for text in texts if (path := _covering(frozenset(text)))}
    for path in paths:
        font_manager.fontManager.addfont(path)
    return [font_manager.FontProperties(fname=path).get_name() for path in paths]


def _drawable(letter: str) -> str:
    return letter if _covering(frozenset(letter)) else letter.encode("unicode_escape").decode("ascii")


def _bundled() -> Path:
    return Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@lru_cache(maxsize=16)
def _open_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=8192)
def _covering(letters: frozenset[str]) -> Path | None:
    """The first font that has all the letters, or None."""
    codes = {ord(letter) for letter in letters}
    if codes <= _codes_of(_bundled()):
        return _bundled()
    return next((path for path in _system_fonts() if codes <= _codes_of(path)), None)


@lru_cache(maxsize=_MOST_FONTS + 1)
def _codes_of(path: Path) -> frozenset[int]:
    """The letters of a font; none of one that can't be used."""
    try:
        ImageFont.truetype(str(path), 12)
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@lru_cache(maxsize=1)
def _system_fonts() -> list[Path]:
    """Fonts of the machine, those of many scripts first."""
    found = sorted(map(Path, font_manager.findSystemFonts()))
    rank = {path: not any(word in path.name.lower() for word in _WIDE) for path in found}
    return sorted(found, key=rank.__getitem__)[:_MOST_FONTS]
