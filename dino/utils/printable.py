"""Text from files, made safe for a terminal: no control characters, no endless names."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode's categories of what is no visible letter
_JOINERS = "\u200c\u200d"  # parts of words in Persian and Hindi, and of emoji


def printable(text: object, limit: int | None = 60, *, columns: int = 0, kept: str = "") -> str:
    r"""A name from a file in one line of a terminal; a control character becomes an escape such as \x1b.

    A longer text keeps its start and its end around "…".

    Args:
        text: anything; its `str`.
        limit: most columns, at least 3; a wide letter, as in Chinese, takes two. None for any length.
        columns: shorter texts are filled with spaces to so many.
        kept: control characters that stay.
    """
    whole = str(text)
    if limit is None:
        return "".join(letter if letter in kept else _visible(letter) for letter in whole)
    shown = _take(map(_visible, whole), limit)
    if len(shown) < len(whole):
        start = _take(shown, (limit - 1) // 2)
        end = _take(map(_visible, reversed(whole[-limit:])), limit - 1 - (limit - 1) // 2)
        shown = [*start, "…", *reversed(end)]
    line = "".join(shown)
    return line + " " * (columns - _columns(line))


def _take(letters: Iterable[str], limit: int) -> list[str]:
    """The first letters, or escapes, that fit into `limit` columns; of those without width as many."""
    taken: list[str] = []
    columns = marks = 0
    for letter in letters:
        width = _columns(letter)
        columns, marks = columns + width, marks + (not width)
        if max(columns, marks) > limit:
            break
        taken.append(letter)
    return taken


def _visible(letter: str) -> str:
    """The letter; for one that a terminal does not show as a letter, its escape."""
    if unicodedata.category(letter) not in _HIDDEN or letter in _JOINERS:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def _columns(text: str) -> int:
    """How many columns of a terminal a text of visible letters takes."""
    return sum(map(_columns_of_letter, text))


def _columns_of_letter(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me") or letter in _JOINERS:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
