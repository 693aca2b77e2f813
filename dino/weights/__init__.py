"""Weights of this and other programs: read without running code, format detected from the keys, converted, loaded."""

from .addresses import SCHEMES, locate
from .checkpoint_formats import convert, recognise
from .class_rows import same_names
from .load_report import Report
from .loading import MIN_BACKBONE, compare_weights, load_weights
from .names import resnet_to_detectron2, resnet_to_torchvision, to_current_names
from .reading import read_content, weights_of

__all__ = [
    "MIN_BACKBONE",
    "SCHEMES",
    "Report",
    "compare_weights",
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
