"""Names of a backbone's tensors in other programs' files and in this project, and files that only seem to fit."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dino.modeling.detector import IMAGENET_STD
from dino.utils.files import DataError

from .load_report import shorten
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
# efficientnet_pytorch and the EfficientNet-Lites that follow it · timm. Both pad as TensorFlow does ("SAME").
_EFFICIENTNET_ENDS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_ANY_BLOCK = {"_depthwise_conv": "conv_dw", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_PLAIN_BLOCK = {**_ANY_BLOCK, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDING_BLOCK = {
    **_ANY_BLOCK,
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# A ConvNeXt under its authors' names, as in detrex, which adds norms of the maps.
_CONVNEXT = "downsample_layers.0.0.weight"
_CONVNEXT_BLOCK = (  # in its authors' file · torchvision · timm
    ("dwconv.*", "block.0.*", "conv_dw.*"),
    ("norm.*", "block.2.*", "norm.*"),
    ("pwconv1.*", "block.3.*", "mlp.fc1.*"),
    ("pwconv2.*", "block.5.*", "mlp.fc2.*"),
    ("gamma", "layer_scale", "gamma"),
)
_CONVNEXT_V2_BLOCK = (("grn.gamma", "mlp.grn.weight"), ("grn.beta", "mlp.grn.bias"))  # in its authors' file · timm
_MAP_NORMS = tuple((f"norm{stage}.*", f"norms.res{stage + 2}.*") for stage in range(4))
_CONVNEXT_TO_TORCHVISION = rules(
    (
        *_MAP_NORMS,
        *((f"downsample_layers.{stage}.*", f"features.{2 * stage}.*") for stage in range(4)),
        *(
            (f"stages.{stage}.{{i}}.{theirs}", f"features.{2 * stage + 1}.{{i}}.{ours}")
            for stage in range(4)
            for theirs, ours, _ in _CONVNEXT_BLOCK
        ),
    )
)
_CONVNEXT_TO_TIMM = rules(
    (
        *_MAP_NORMS,
        ("downsample_layers.0.*", "stem.*"),
        ("downsample_layers.{i}.*", "stages.{i}.downsample.*"),
        *(
            (f"stages.{{i}}.{{i}}.{theirs}", f"stages.{{i}}.blocks.{{i}}.{ours}")
            for theirs, *_, ours in (*_CONVNEXT_BLOCK, *_CONVNEXT_V2_BLOCK)
        ),
    )
)
# A FocalNet under its authors' names, as in detrex · timm. A stage ends with its downsampling there, and begins with it
# in timm. Norms that follow the parts of a block have other names in timm than those that precede them.
_FOCALNET = "layers.0.blocks.0.modulation.f.weight"
_FOCALNET_TO_TIMM = rules(
    (
        *_MAP_NORMS,
        ("patch_embed.*", "stem.*"),
        *((f"layers.{stage}.downsample.*", f"layers.{stage + 1}.downsample.*") for stage in range(3)),
        ("layers.{i}.blocks.{i}.gamma_{i}", "layers.{i}.blocks.{i}.ls{i}.gamma"),
    )
)
_BLOCK_NORM = re.compile(r"(layers\.\d+\.blocks\.\d+\.norm\d)\.")
_TIMM_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.(\d+)\.")
_EFFICIENTNET = {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_blocks.1._expand_conv.weight"}
_TIMM_EFFICIENTNETS = re.compile(r"(?<![a-z0-9])(?:tf_)?(?:efficientnet|mixnet|mobilenetv3)\w*")
_ADVPROP = re.compile(r"(?<![a-z])(adv|advprop|ap)(?![a-z])")
_PYCLS = {"stem.conv.weight", "s1.b1.f.a.weight", "head.fc.weight"}  # keys of a RegNet classifier in pycls' own files
_FRONTS = ("", "body.", "body.model.", "net.", "net.body.", "bottom_up.", "bottom_up.net.body.")  # of our models' keys
_MAP_NORM = re.compile(r"((?:.+\.)?)body\.(norms\.res\d\..+)")  # these lie beside the body
_THEIR_FRONTS = re.compile(r"^(backbone|model|encoder|trunk)\.")
# Parts that detectors add to a classifier: its file can't have them.
ADDED = re.compile(
    r"(^|\.)(simfp_|fpn_|top_block)|rel_pos_[hw]$|^(bottom_up\.|net\.|body\.)?norm\d\.|^(bottom_up\.net\.)?norms\.res\d"
)


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

    def candidate(named: StateDict, front: str) -> StateDict:
        keys = {_MAP_NORM.sub(r"\1\2", front + key): value for key, value in named.items()}
        spelt = {spellings.get(key.replace("_", "."), key): value for key, value in keys.items()}
        return {key: _as_convolution(value, target.get(key)) for key, value in spelt.items()}

    def fitting(named: StateDict) -> int:
        return sum(target.get(key) == value.shape for key, value in named.items())

    plain = _without_front(state)
    named = [table(plain) for table in _tables(plain, backbone, target)]
    return max((candidate(*way) for way in itertools.product(named, _FRONTS)), key=fitting)


def _tables(state: StateDict, backbone: nn.Module, target: Iterable[str]) -> list[Callable[[StateDict], StateDict]]:
    """The known ways to rename a backbone's tensors that come into question for this file and model."""
    tables = [dict, resnet_to_detectron2, resnet_to_torchvision]
    if _pads_like_tensorflow(backbone):
        tables.append(functools.partial(_efficientnet_to_timm, target=target))
    if _CONVNEXT in state:
        tables += [functools.partial(rename, table=table) for table in (_CONVNEXT_TO_TORCHVISION, _CONVNEXT_TO_TIMM)]
    if _FOCALNET in state:
        tables += [functools.partial(_focalnet_to_timm, ending=ending) for ending in ("", "_post")]
    return tables


def _as_convolution(value: Tensor, shape: torch.Size | None) -> Tensor:
    """A weight (O, I) as that of a 1x1 convolution, a scale (C,) as (C, 1, 1), where the model has these shapes.

    ConvNeXt V2's authors write the scales of a norm as (1, 1, 1, C).
    """
    fits = shape is not None and (shape == (*value.shape, 1, 1) or value.shape == (1, 1, 1, *shape))
    return value.reshape(shape) if fits else value


def _focalnet_to_timm(state: StateDict, ending: str) -> StateDict:
    """Rename a FocalNet from its authors' names to timm's; `ending` is that of the blocks' norms there."""
    named = rename(state, _FOCALNET_TO_TIMM)
    return {_BLOCK_NORM.sub(rf"\1{ending}.", key): value for key, value in named.items()}


def check_network(state: StateDict, fitted: StateDict, backbone: nn.Module) -> None:
    """Refuse a file of another network whose tensors fit `backbone` all the same: its features would be wrong.

    Args:
        state: the file's tensors.
        fitted: the same by `fit_backbone`.
        backbone: the model's.

    Raises:
        DataError: the file's network pads as TensorFlow does or has squeeze-and-excitation, and the backbone does not.
    """
    if _without_front(state).keys() >= _EFFICIENTNET and not _pads_like_tensorflow(backbone):
        squeezes = any("._se_reduce." in key for key in state)
        family, name = ("", "tf_efficientnet_b0") if squeezes else ("-Lite", "tf_efficientnet_lite0")
        raise DataError(
            f"the file is an EfficientNet{family} with TensorFlow's padding (\"SAME\"). The model's backbone pads in "
            "another way, so its features would be wrong. Name timm's model of the same size whose name begins with "
            f"tf_, such as {name}"
        )
    blocks = {key.partition(".se.")[0] for key in fitted if ".se." in key}
    if lacking := sorted(block for block in blocks if _has_without_squeezing(backbone, block)):
        raise DataError(
            f"the file has squeeze-and-excitation in {shorten(lacking, 3)}, and the model's backbone has none there: "
            "the file is of another network, such as an EfficientNet instead of an EfficientNet-Lite. Name its backbone"
        )


def doubts_of_name(path: str, backbone: nn.Module) -> list[str]:
    """What the names of a file and its folders say against loading it into a timm backbone, as sentences.

    timm's networks with and without `tf_` have the same tensors, but another padding and another eps of BatchNorm.
    """
    ours = (getattr(getattr(backbone, "body", None), "pretrained_cfg", None) or {}).get("architecture", "")
    names = _TIMM_EFFICIENTNETS.findall(path.lower())
    doubts = [
        f"the file's path names {theirs}, the model's backbone is {ours}: the tensors are the same, padding and eps of "
        f"BatchNorm are not. If the path is right, the features are wrong: name the backbone "
        f"{'' if ours.startswith('tf_') else 'tf_'}{ours.removeprefix('tf_')}"
        for theirs in dict.fromkeys(names)
        if _differs_in_padding(theirs, ours)
    ]
    if _ADVPROP.search(path.lower()) and ours.startswith("tf_efficientnet") and _expects_imagenet_pixels(backbone):
        doubts.append(
            "the file's path names AdvProp, whose weights expect pixels of mean 127.5 and deviation 127.5: name the "
            f"backbone {ours}.ap_in1k, which states them"
        )
    return doubts


def _differs_in_padding(theirs: str, ours: str) -> bool:
    """Whether two of timm's names differ in `tf_` and are else the same, but for further words of `theirs`."""
    plain, other = ours.removeprefix("tf_"), theirs.removeprefix("tf_")
    same = bool(ours) and (other == plain or other.startswith(f"{plain}_"))
    return same and theirs.startswith("tf_") != ours.startswith("tf_")


def _expects_imagenet_pixels(backbone: nn.Module) -> bool:
    """Whether the weights that timm itself has for this name expect ImageNet's statistics."""
    return max(map(abs, (x - 127.5 for x in backbone.pixel_statistics.get("pixel_mean", (127.5,))))) > 1


def _has_without_squeezing(backbone: nn.Module, block: str) -> bool:
    """Whether the backbone has this block, without squeeze-and-excitation."""
    names = [name for name in backbone.state_dict() if name.startswith(f"{block}.")]
    return bool(names) and not any(name.startswith(f"{block}.se.") for name in names)


def _without_front(state: StateDict) -> StateDict:
    """Drop the prefixes under which a program keeps its backbone: `backbone.`, and of DETR `backbone.0.body.`."""
    plain = {_THEIR_FRONTS.sub("", key): value for key, value in state.items()}
    for front in ("0.", "body."):
        if all(key.startswith(front) for key in plain):
            plain = {key.removeprefix(front): value for key, value in plain.items()}
    return plain


def _pads_like_tensorflow(backbone: nn.Module) -> bool:
    """Whether strided convolutions pad by timm's layer for "SAME", which puts more on the right and at the bottom."""
    return any("Conv2dSame" in type(module).__name__ for module in backbone.modules())


def _efficientnet_to_timm(state: StateDict, target: Iterable[str]) -> StateDict:
    """Rename an EfficientNet from efficientnet_pytorch's names to timm's.

    Blocks have one running number there, and a stage and a number here: the stages are those of the keys `target`.
    """
    places = dict.fromkeys(found.groups() for found in map(_TIMM_BLOCK.search, target) if found)
    layers = dict(_EFFICIENTNET_ENDS)
    for number, (stage, block) in enumerate(places):
        names = _EXPANDING_BLOCK if f"_blocks.{number}._expand_conv.weight" in state else _PLAIN_BLOCK
        layers |= {f"_blocks.{number}.{theirs}": f"blocks.{stage}.{block}.{ours}" for theirs, ours in names.items()}
    split = {key: key.rpartition(".") for key in state}
    return {f"{layers.get(layer, layer)}.{leaf}": state[key] for key, (layer, _, leaf) in split.items()}


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
