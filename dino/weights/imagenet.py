"""Names of a backbone's tensors in the files of Detectron2, torchvision, timm and Caffe2, and in this project."""

from __future__ import annotations

import itertools
import re

import torch
from torch import nn

from dino.modeling.detector import IMAGENET_STD

from .names import StateDict, rename, resnet_to_detectron2, resnet_to_torchvision, rules

# Caffe2 · Detectron2. Files in this format (`MSRA/R-50.pkl`) are for BGR images in the range 0 to 255.
_CAFFE2_NAMES = (
    ("conv1_w", "stem.conv1.weight"),
    ("res_conv1_bn_s", "stem.conv1.norm.weight"),
    ("res_conv1_bn_b", "stem.conv1.norm.bias"),
    *(
        (f"res{{i}}_{{i}}_{caffe2}_{blob}", f"res{{i}}.{{i}}.{detectron2}.{leaf}")
        for caffe2, detectron2 in (
            ("branch1", "shortcut"),
            ("branch2a", "conv1"),
            ("branch2b", "conv2"),
            ("branch2c", "conv3"),
        )
        for blob, leaf in (("w", "weight"), ("bn_s", "norm.weight"), ("bn_b", "norm.bias"))
    ),
)
_PYCLS = {"stem.conv.weight", "s1.b1.f.a.weight", "head.fc.weight"}  # keys of a RegNet classifier in pycls' own files
_FRONTS = ("", "body.", "body.model.", "net.", "net.body.", "bottom_up.", "bottom_up.net.body.")  # of our models' keys
_THEIR_FRONTS = re.compile(r"^(backbone|model|encoder|trunk)\.")
# Parts that detectors add to a classifier: its file can't have them.
ADDED = re.compile(r"(^|\.)(simfp_|fpn_|top_block)|rel_pos_[hw]$|^(bottom_up\.|net\.|body\.)?norm\d\.")


def fit_backbone(state: StateDict, backbone: nn.Module) -> StateDict:
    """Rename a backbone's tensors to the names of `backbone`, in the known way that fits the most tensors.

    Keys that fit nothing keep some name.
    """
    if "res_conv1_bn_s" in state:
        state = _from_caffe2(state)
    if state.keys() >= _PYCLS:  # trained on BGR images
        state = {**state, "stem.conv.weight": state["stem.conv.weight"].flip(1)}
    target = {key: value.shape for key, value in backbone.state_dict().items()}
    # timm joins the first words of a name by underscores where it returns features, by dots in its files.
    spellings = {key.replace("_", "."): key for key in target}

    def candidate(names, front: str) -> StateDict:
        named = names({_THEIR_FRONTS.sub("", key): value for key, value in state.items()})
        return {spellings.get((front + key).replace("_", "."), front + key): value for key, value in named.items()}

    def fitting(named: StateDict) -> int:
        return sum(target.get(key) == value.shape for key, value in named.items())

    ways = itertools.product((dict, resnet_to_detectron2, resnet_to_torchvision), _FRONTS)
    return max((candidate(*way) for way in ways), key=fitting)


def _from_caffe2(state: StateDict) -> StateDict:
    """Convert a ResNet of Caffe2 to images that are RGB and divided by their standard deviation."""
    named = rename(state, rules(_CAFFE2_NAMES))
    first = named["stem.conv1.weight"]
    named["stem.conv1.weight"] = first.flip(1) * first.new_tensor(IMAGENET_STD)[:, None, None]
    for key in [key for key in named if key.endswith("norm.weight")]:  # its statistics are merged into weight and bias
        front = key.removesuffix("weight")
        named[f"{front}running_mean"] = torch.zeros_like(named[key])
        named[f"{front}running_var"] = torch.ones_like(named[key])
    return {key: value for key, value in named.items() if not key.endswith("_momentum")}
