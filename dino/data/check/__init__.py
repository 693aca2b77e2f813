"""`dino check`: the issues of a COCO-format data set, found before training."""

from .annotations import find_issues
from .issues import KINDS, Issue, Kind
from .repair import repair

__all__ = ["KINDS", "Issue", "Kind", "find_issues", "repair"]
