"""A page of docs that a tool writes from the project's own files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dino.utils.files import UserError, write_whole


def markdown_table(rows: Iterable[Iterable[str]]) -> str:
    """Rows of cells, the first two the head and its line, as Markdown."""
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in rows)


def write_page(path: Path, text: str, tool: str, *, check: bool) -> None:
    """Write a page, or only compare it.

    Args:
        tool: the program that makes the page, for the message.
        check: write nothing.

    Raises:
        UserError: the page that is there is another one, with `check`.
    """
    if not check:
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path} is out of date: run python tools/{tool}")
