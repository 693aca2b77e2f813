"""DINO as a Detectron2 meta-architecture. The only part of the package that imports Detectron2."""

import logging
import warnings

from dino.utils.printable import printable

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "dino.d2 needs Detectron2, which no package index carries. With torch installed, build it from source:\n"
        '  pip install --no-build-isolation "detectron2 @ git+https://github.com/facebookresearch/detectron2.git'
        '@02b5c4e295e990042a714712c21dc79b731e8833"\n'
        f"tools/plain_train.py trains the same network without it. (The import said: {error})"
    ) from error

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Detectron2 about its own use of PyTorch
    import dino.training.recipe_lengths  # noqa: F401 - reads the numbers of iterations of a dumped recipe

    from .config import add_dino_config, build_adamw
    from .meta_arch import DINODetector


def _escape(record: logging.LogRecord) -> bool:
    """A filter: names from files send no control characters to a terminal."""
    record.msg, record.args = printable(record.getMessage(), None, kept="\n\t"), ()
    return True


logging.getLogger("detectron2.dino").addFilter(_escape)

__all__ = ["DINODetector", "add_dino_config", "build_adamw"]
