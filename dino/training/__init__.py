"""The plain engine: training and evaluation where Detectron2 is missing."""

from .plain import Settings, evaluate, train

__all__ = ["Settings", "evaluate", "train"]
