"""Weights of this and other programs: read without running code, format detected from the keys, converted, loaded.

Each name of `__all__` is imported when it is first used: the list of published weights needs no PyTorch.
"""

import importlib

_MODULES = {
    "addresses": ("SCHEMES", "locate"),
    "checkpoint_formats": ("convert", "recognise"),
    "class_rows": ("same_names",),
    "load_report": ("Report",),
    "loading": ("MIN_BACKBONE", "load_weights"),
    "names": ("resnet_to_detectron2", "resnet_to_torchvision", "to_current_names"),
    "reading": ("read_content", "weights_of"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [
    "MIN_BACKBONE",
    "SCHEMES",
    "Report",
    "convert",
    "load_weights",
    "locate",
    "read_content",
    "recognise",
    "resnet_to_detectron2",
    "resnet_to_torchvision",
    "same_names",
    "to_current_names",
    "weights_of",
]


def __getattr__(name: str):
    """Import a name of `__all__`."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
