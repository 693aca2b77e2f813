"""DINO (DETR with Improved DeNoising Anchor Boxes, arXiv 2203.03605) for Detectron2.

Importing the package imports no other library. `dino.layers` and `dino.modeling` need torch only, `dino.d2` needs
Detectron2. Each name of `__all__` is imported when it is first used.
"""

import importlib

from .utils import moved

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "Predictor", "evaluate", "load", "train"]

_LAZY = {
    "Detections": ("dino.inference.detections", "Detections"),
    "Detector": ("dino.modeling.detector", "Detector"),
    "Predictor": ("dino.inference.predictor", "Predictor"),
    "evaluate": ("dino.api", "evaluate"),
    "load": ("dino.weights.description", "detector_from_checkpoint"),
    "train": ("dino.api", "train"),
}

moved.install()


def __getattr__(name: str):
    """Import a name of `__all__`."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
