"""`dino check`: looks a COCO-format data set over before anybody trains."""

from .annotations import find_faults
from .issues import KINDS, Fault, Kind
from .repair import repair

__all__ = ["KINDS", "Fault", "Kind", "find_faults", "repair"]
