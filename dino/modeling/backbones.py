"""Backbones of torchvision and timm with the interface of Detectron2's, and the padding that a backbone needs.

Feature maps are named by stride, as in Detectron2's ResNet: `res2` has stride 4, `res3` 8, `res4` 16, `res5` 32.
Weights are random at first. Arguments are names and numbers, so that a recipe can be stored as plain text.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TORCHVISION_FAMILIES = re.compile(r"resnet|resnext|convnext|swin|efficientnet")
_BOTTLENECKS = re.compile(r"resnet(50|1\d\d)|resnext")  # torchvision's ResNets whose 3x3 convolutions can be dilated
_DILATABLE = ("res3", "res4", "res5")
_NORMS = ("FrozenBN", "BN")
_MAP_NORMS = ("none", "LN")
_ODD_SIZE = (75, 101)  # pixels; no stride divides either side
# Sides in cells of the coarsest map: networks with windows need a multiple of one of these.
_CELLS = (1, 2, 4, 7, 8, 12, 14, 16)


class FeatureShape(NamedTuple):
    """Channels and stride of a feature map, as a neck needs them."""

    channels: int
    stride: int


class Padding(NamedTuple):
    """Image sizes that a backbone accepts: multiples of `multiple`, and at least `square`, for both sides in pixels."""

    multiple: int
    square: int


class TorchvisionBackbone(nn.Module):
    """A ResNet, ConvNeXt, Swin (v1, v2) or EfficientNet (v1, v2) of torchvision; parameters keep torchvision's names.

    Args:
        name: of `torchvision.models.get_model`, for example `resnet50`, `convnext_tiny` or `swin_v2_t`.
        out_features: names of the maps, finest first. Layers after the last one are dropped.
        norm: `FrozenBN` to fine-tune pre-trained weights as DINO does, `BN` to train from random ones. Changes
            BatchNorm only.
        map_norm: `LN` for a LayerNorm over the channels of each map, as detrex' ConvNeXt and FocalNet have.
        freeze: prefixes of parameter names (`conv1`, `bn1`, `layer1`, `features.0.`, …) that are not trained.
        dilated: names of maps, `["res5"]` for DC5, whose stage dilates its convolutions instead of halving the size:
            strides 8, 16, 16 for `res3` to `res5`. ResNets with bottlenecks only; weights stay the same.

    Raises:
        ValueError: an unknown name, feature, norm, prefix or dilated map, or a network without dilation.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        norm: str = "FrozenBN",
        map_norm: str = "none",
        freeze: Sequence[str] = (),
        dilated: Sequence[str] = (),
    ):
        super().__init__()
        import torchvision  # here, because the network needs torch only

        known = self.names_of_models()
        if name not in known:
            raise ValueError(f"unknown torchvision backbone {name!r}; there are {', '.join(known)}")
        model = torchvision.models.get_model(name, weights=None, **_dilation(name, dilated))
        self.channels_last = "swin" in name
        self.nested = hasattr(model, "features")  # all but ResNets keep their stages there
        layers = dict((model.features if self.nested else model).named_children())
        stages = _find_stages(layers, self.channels_last)
        _check_features(name, out_features, stages)
        self.names = {stages[feature][0]: feature for feature in out_features}
        self._shapes = {feature: stages[feature][1] for feature in out_features}
        last = list(layers).index(stages[out_features[-1]][0])
        kept = nn.Sequential()
        for layer in list(layers)[: last + 1]:
            kept.add_module(layer, layers[layer])
        self.body = nn.ModuleDict({"features": kept}) if self.nested else kept
        _use_norm(self.body, norm)
        self.norms = _make_map_norms(self.body, self._shapes, map_norm)
        _freeze_parameters(self.body, freeze)
        self.size_divisibility = _measure_multiple(self)

    @staticmethod
    def names_of_models() -> list[str]:
        """All that `name` can be."""
        import torchvision

        return [n for n in torchvision.models.list_models(torchvision.models) if _TORCHVISION_FAMILIES.search(n)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name, each (B, channels, H / stride, W / stride)."""
        maps, x = {}, images
        for layer, module in (self.body["features"] if self.nested else self.body).named_children():
            x = module(x)
            if layer in self.names:
                maps[self.names[layer]] = x.permute(0, 3, 1, 2) if self.channels_last else x
        return _norm_maps(maps, self.norms)

    def output_shape(self) -> dict[str, FeatureShape]:
        """Channels and stride of each map."""
        return self._shapes


class TimmBackbone(nn.Module):
    """Any timm model that supports `features_only`.

    Plain ViTs have maps of a single stride, 16 or 14: `out_features=["res4"]`, or `["stride14"]`.

    Args:
        name: of `timm.create_model`, for example `tf_mobilenetv3_small_075`; addresses of a hub are refused.
        out_features: names of the maps, finest first; `stride<n>` for a stride that is no power of two.
        norm, map_norm: as of `TorchvisionBackbone`.
        freeze: prefixes of parameter names that are not trained.
        options: more arguments of `timm.create_model`, plain values, for example `{"drop_path_rate": 0.2}`.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown name, feature, norm or prefix, a model without features, or one of a fixed image size.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        norm: str = "FrozenBN",
        map_norm: str = "none",
        freeze: Sequence[str] = (),
        options: Mapping[str, object] | None = None,
    ):
        super().__init__()
        self.body = _create_timm(name, dict(options or {}))
        indices = _timm_indices(self.body)
        _check_features(name, out_features, indices)
        if indices[out_features[-1]] < max(indices.values()):  # later layers would never get a gradient
            wanted = sorted(indices[feature] for feature in out_features)
            self.body = _create_timm(name, {**(options or {}), "out_indices": wanted})
            indices = _timm_indices(self.body)
        self.indices = {feature: indices[feature] for feature in out_features}
        channels, strides = self.body.feature_info.channels(), self.body.feature_info.reduction()
        self._shapes = {f: FeatureShape(channels[i], strides[i]) for f, i in self.indices.items()}
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        _use_norm(self.body, norm)
        self.norms = _make_map_norms(self.body, self._shapes, map_norm)
        _freeze_parameters(self.body, freeze)
        self.size_divisibility = _measure_multiple(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name, each (B, channels, H / stride, W / stride)."""
        maps = self.body(images)
        named = {f: maps[i].permute(0, 3, 1, 2) if self.channels_last else maps[i] for f, i in self.indices.items()}
        return _norm_maps(named, self.norms)

    def output_shape(self) -> dict[str, FeatureShape]:
        """Channels and stride of each map."""
        return self._shapes

    @property
    def pixel_statistics(self) -> dict[str, tuple[float, ...]]:
        """`pixel_mean` and `pixel_std` (values 0 to 255) that timm's weights of this model expect, as far as stated."""
        return _pixel_statistics(getattr(self.body, "pretrained_cfg", None) or {})


def timm_pixel_statistics(name: str) -> dict[str, tuple[float, ...]]:
    """`TimmBackbone.pixel_statistics` of a name alone; {} where timm is missing or does not know it."""
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:
        return {}
    stated = get_pretrained_cfg(name) if isinstance(name, str) else None
    return _pixel_statistics(stated.to_dict() if stated else {})


def _pixel_statistics(stated: Mapping) -> dict[str, tuple[float, ...]]:
    """From timm's description of weights."""
    return {f"pixel_{k}": tuple(round(255 * x, 3) for x in stated[k]) for k in ("mean", "std") if k in stated}


def _create_timm(name: str, options: dict) -> nn.Module:
    """timm's feature extractor `name` with random weights, for images of any size if the model supports that."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"the backbone {name!r} needs timm: pip install timm") from error
    if not re.fullmatch(r"[\w.-]+", name) or not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0)
        raise ValueError(f"timm has no model {name!r}; the nearest are {', '.join(near)}")
    create = {"features_only": True, "pretrained": False, **options}
    try:
        try:
            return timm.create_model(name, **{"dynamic_img_size": True, **create})
        except TypeError:  # convolutional networks take any size and have no such argument
            return _pad_plainly(timm.create_model(name, **create))
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"timm can't make a backbone of {name!r} with {options}: {error}") from error


class _Conv2dSame(nn.Conv2d):
    """timm's Conv2dSame (TensorFlow's padding "SAME") of stride 2 and an odd kernel, for exported graphs of any size.

    timm's padding depends on the size by a maximum and a rounded quotient; nested over five layers, the size conditions
    of a graph never end. Here both ends of a side get the same number together; an even side ends with a zero that no
    window reaches.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out_channels, ceil(H / 2), ceil(W / 2))."""
        (high, wide), (top, left) = self.kernel_size, (x.shape[2] % 2, x.shape[3] % 2)
        top, left = (high - 3) // 2 + top, (wide - 3) // 2 + left
        padded = F.pad(x, (left, wide - 1 - left, top, high - 1 - top))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _pad_plainly(body: nn.Module) -> nn.Module:
    """Replace timm's Conv2dSame of stride 2 by `_Conv2dSame`, with the same parameters."""
    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            plain = type(child).__name__ == "Conv2dSame" and child.stride == (2, 2) and child.dilation == (1, 1)
            if plain and all(side % 2 and side > 1 for side in child.kernel_size):
                sizes = (child.in_channels, child.out_channels, child.kernel_size)
                conv = _Conv2dSame(*sizes, stride=2, groups=child.groups, bias=child.bias is not None, device="meta")
                conv.weight, conv.bias = child.weight, child.bias
                setattr(parent, name, conv)
    return body


def _timm_indices(body: nn.Module) -> dict[str, int]:
    """Name of a map -> its index in the output of timm's extractor; of several maps of one stride, the deepest."""
    return {_feature_name(stride): index for index, stride in enumerate(body.feature_info.reduction())}


def _feature_name(stride: int) -> str:
    """`res3` for a stride of 8, as in Detectron2's ResNet; `stride14` for a stride that is no power of two."""
    power = math.log2(stride)
    return f"res{power:.0f}" if power.is_integer() else f"stride{stride}"


def _dilation(name: str, dilated: Sequence[str]) -> dict[str, list[bool]]:
    """The argument of torchvision's ResNets for the names of dilated maps; nothing for no names.

    Raises:
        ValueError: a name of no map, or of a network that torchvision can't dilate.
    """
    unknown = [feature for feature in dilated if feature not in _DILATABLE]
    if unknown:
        raise ValueError(f"unknown dilated maps {unknown} of {name!r}; there are {', '.join(_DILATABLE)}")
    if dilated and not _BOTTLENECKS.search(name):
        raise ValueError(f"{name!r} has no dilated form: ResNets from resnet50 on have one")
    return {"replace_stride_with_dilation": [feature in dilated for feature in _DILATABLE]} if dilated else {}


@torch.no_grad()
def _find_stages(layers: dict[str, nn.Module], channels_last: bool) -> dict[str, tuple[str, FeatureShape]]:
    """Run the layers on a black image: name of a map -> (layer that returns it, its shape).

    Stages are plain Sequentials. A ResNet's keep their names where they are dilated; others are named by their strides.
    Of several with one stride, the last one counts. The last convolution of an EfficientNet belongs to the classifier
    and is no stage.
    """
    size = 64
    x, stages = torch.zeros(1, 3, size, size), {}
    for name, layer in layers.items():
        training = layer.training
        x = layer.eval()(x)
        layer.train(training)
        if type(layer) is nn.Sequential:
            shape = x.permute(0, 3, 1, 2).shape if channels_last else x.shape
            stride = size // shape[2]
            feature = f"res{int(name[-1]) + 1}" if name.startswith("layer") else _feature_name(stride)
            stages[feature] = (name, FeatureShape(shape[1], stride))
        if name in ("7", "layer4"):  # pooling and classification follow
            break
    return stages


def _check_features(name: str, wanted: Sequence[str], found: Mapping[str, object]) -> None:
    """Raise a ValueError if a map does not exist, or if the maps are not sorted."""
    unknown = [feature for feature in wanted if feature not in found]
    if unknown or not wanted:
        raise ValueError(f"unknown out_features {unknown} of {name!r}; there are {list(found)}")
    if [feature for feature in found if feature in wanted] != list(wanted):
        raise ValueError(f"out_features {list(wanted)} of {name!r} must go from the finest to the coarsest")


def _use_norm(module: nn.Module, norm: str) -> None:
    """Replace every BatchNorm in `module` by a frozen one if `norm` is `FrozenBN`."""
    if norm not in _NORMS:
        raise ValueError(f"unknown norm {norm!r}; there are {', '.join(_NORMS)}")
    if norm == "BN":
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _frozen_norm(child))


def _make_map_norms(body: nn.Module, shapes: Mapping[str, FeatureShape], map_norm: str) -> nn.ModuleDict:
    """The norm of each map, by its name, with the eps of the body's own LayerNorms; empty for `none`."""
    if map_norm not in _MAP_NORMS:
        raise ValueError(f"unknown map_norm {map_norm!r}; there are {', '.join(_MAP_NORMS)}")
    eps = next((module.eps for module in body.modules() if isinstance(module, nn.LayerNorm)), 1e-5)
    named = shapes.items() if map_norm == "LN" else ()
    return nn.ModuleDict({name: nn.LayerNorm(shape.channels, eps) for name, shape in named})


def _norm_maps(maps: dict[str, Tensor], norms: nn.ModuleDict) -> dict[str, Tensor]:
    """Maps (B, channels, H, W) by name -> the same, normalised over their channels where there are norms."""
    return {n: norms[n](x.movedim(1, 3)).movedim(3, 1) if n in norms else x for n, x in maps.items()}


def _frozen_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """The frozen form of a BatchNorm of torch, or of timm's, which includes an activation."""
    if type(norm) is not nn.BatchNorm2d:
        from timm.layers import freeze_batch_norm_2d

        return freeze_batch_norm_2d(norm)
    from torchvision.ops import FrozenBatchNorm2d

    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
    state = norm.state_dict()
    frozen.load_state_dict({key: state.get(key, value) for key, value in frozen.state_dict().items()})
    return frozen


def _freeze_parameters(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze all parameters whose name begins with one of `prefixes`."""
    for prefix in prefixes:
        chosen = [p for name, p in module.named_parameters() if name.startswith(prefix)]
        if not chosen and not any(name.startswith(prefix) for name, _ in module.named_buffers()):
            raise ValueError(f"nothing to freeze: no parameter begins with {prefix!r}")
        for parameter in chosen:
            parameter.requires_grad_(False)


@torch.no_grad()
def _measure_multiple(backbone: nn.Module) -> int:
    """Find the number that both sides of an image must be a multiple of, by running `backbone` on black images.

    0 if any size gives maps of ceil(H / stride) rows, as with a ResNet. Others drop the last rows of an odd image, or
    refuse it.

    Raises:
        ValueError: no number works.
    """
    training = backbone.training
    backbone.eval()
    coarsest = max(shape.stride for shape in backbone.output_shape().values())
    sizes = [(0, _ODD_SIZE), *((n * coarsest, (n * coarsest, 2 * n * coarsest)) for n in _CELLS)]
    try:
        for multiple, size in sizes:
            try:
                maps = backbone(torch.zeros(1, 3, *size))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = error
                continue
            if _has_every_cell(backbone, maps, size):
                return multiple
            reason = f"maps of {[tuple(m.shape) for m in maps.values()]} for an image of {size}"
    finally:
        backbone.train(training)
    raise ValueError(f"can't use this network for images of any size, even if padded: {reason}")


def _has_every_cell(backbone: nn.Module, maps: dict[str, Tensor], size: tuple[int, int]) -> bool:
    """Whether all maps have ceil(side / stride) cells along both sides, and the channels of `output_shape`."""
    return all(
        maps[name].shape[1:] == (channels, *(-(-side // stride) for side in size))
        for name, (channels, stride) in backbone.output_shape().items()
    )


def padding_of(backbone: nn.Module) -> Padding:
    """The image sizes that `backbone` accepts.

    Handles two oddities of Detectron2: `size_divisibility` of its Swin Transformer raises an AttributeError (it needs
    none), and SimpleFeaturePyramid has only `padding_constraints`, with a misspelt key.
    """
    try:
        multiple = backbone.size_divisibility
    except AttributeError:
        multiple = 0
    constraints = getattr(backbone, "padding_constraints", None) or {}
    stated = [constraints.get(key, 0) for key in ("size_divisibility", "size_divisiblity")]
    return Padding(max(1, multiple, *stated), constraints.get("square_size", 0))


def extract(backbone: nn.Module, images: Tensor, padding: Padding) -> dict[str, Tensor]:
    """Run `backbone` on images padded with zeros to an accepted size, and crop its maps to the images' own size.

    An image larger than `padding.square` is padded to a multiple only, never cropped.

    Args:
        backbone: images -> dict of maps.
        images: (B, 3, H, W).
        padding: from `padding_of`.

    Returns:
        maps by name, each (B, channels, ceil(H / stride), ceil(W / stride)) if `padding` requires anything.
    """
    if padding == Padding(1, 0):
        return backbone(images)
    size = images.shape[-2:]
    height, width = (-(-max(side, padding.square) // padding.multiple) * padding.multiple for side in size)
    maps = backbone(F.pad(images, (0, width - size[1], 0, height - size[0])))
    shapes = backbone.output_shape()
    return {
        name: m[..., : -(-size[0] // shapes[name].stride), : -(-size[1] // shapes[name].stride)]
        for name, m in maps.items()
    }
