"""The distribution `dino-detectron2`, which is imported as `dino`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="dino-detectron2",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "dino/__init__.py").read_text()).group(1),
    description="DINO (DETR with Improved DeNoising Anchor Boxes) for Detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dino", "dino.*"]),
    # Detectron2 is a peer dependency: no package index carries it, see README.md.
    install_requires=["torch>=2.10", "torchvision", "scipy", "numpy", "pillow", "pycocotools", "tqdm"],
    extras_require={
        "demo": ["opencv-python-headless"],  # Detectron2's Visualizer needs it
        "test": ["opencv-python-headless", "pytest", "pytest-timeout", "ruff", "safetensors"],
    },
)
