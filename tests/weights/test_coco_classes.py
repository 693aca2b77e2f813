import subprocess
import sys

import pytest
import torchvision

from dino.weights import checkpoint_formats
from dino.weights.coco_classes import COCO_IDS, RAW_COCO_CLASSES, coco_ids, coco_names

RAW = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]


def test_names_are_torchvisions():
    assert coco_names(91) == RAW
    assert coco_names(80) == [name for name in RAW if name not in ("__background__", "N/A")]
    assert coco_names(80) == [RAW[number] for number in COCO_IDS]


@pytest.mark.parametrize("classes", [0, 1, 79, 81, 90, 92])
def test_other_numbers_have_no_names(classes):
    assert coco_names(classes) is None


def test_ids():
    assert coco_ids(80) == [number for number, name in enumerate(RAW) if name not in ("__background__", "N/A")]
    assert coco_ids(91) == list(range(RAW_COCO_CLASSES))
    assert checkpoint_formats.COCO_IDS is COCO_IDS


def test_lists_are_copies():
    coco_names(80).clear()
    coco_ids(80).clear()
    assert len(coco_names(80)) == len(coco_ids(80)) == 80


def test_the_file_imports_nothing():
    """Run by itself, without the package, whose import needs PyTorch."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert not {'torch', 'torchvision'} & set(sys.modules)"
    path = sys.modules["dino.weights.coco_classes"].__file__
    subprocess.run([sys.executable, "-c", code, path], check=True)
