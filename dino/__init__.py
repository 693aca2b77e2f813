"""DINO (DETR with Improved DeNoising Anchor Boxes, arXiv 2203.03605) for Detectron2.

The package imports nothing by itself: `dino.layers` and `dino.modeling` need torch only, `dino.d2` needs Detectron2.
"""

from .utils import moved

__version__ = "0.1.0"

moved.install()
