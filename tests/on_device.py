"""A pytest plugin, `-p tests.on_device`: tests that name no device run on DINO_TEST_DEVICE, by default the GPU.

New tensors and modules are made there, golden arrays are loaded to it. TensorFloat-32 is off: it would be compared
with float32. Where torchvision is not installed an empty stand-in takes its place; only tests that use its backbones
need it.
"""

import importlib.util
import os
import sys
from unittest.mock import MagicMock

import torch

if importlib.util.find_spec("torchvision") is None:
    for module in ("torchvision", "torchvision.models", "torchvision.models.feature_extraction", "torchvision.ops"):
        sys.modules[module] = MagicMock()

from .golden.golden import GoldenFile

DEVICE = torch.device(os.environ.get("DINO_TEST_DEVICE", "cuda:0"))

torch.set_default_device(DEVICE)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

_load, _check = GoldenFile.__init__, GoldenFile.check


def _load_to_device(self, number):
    _load(self, number)
    self.arrays = {name: x.to(DEVICE) for name, x in self.arrays.items()}


def _check_on_device(self, name, actual):
    _check(self, name, torch.as_tensor(actual).to(DEVICE))


GoldenFile.__init__, GoldenFile.check = _load_to_device, _check_on_device
