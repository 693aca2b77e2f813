"""Predictions given as annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino.utils.files import counted


def count_scores(annotations: Sequence[dict]) -> int:
    """How many annotations have a score, as predictions do."""
    return sum("score" in a for a in annotations)


def scores_ignored(where: str | Path, scores: int) -> str | None:
    """One line about a data set of which `scores` annotations have a score; None where none has."""
    if not scores:
        return None
    return (
        f"{where}: {counted(scores, 'annotation')} with a score, as predictions have. Scores are ignored: each box is "
        "an object. For surer ones, predict again with a higher --score-thresh"
    )
