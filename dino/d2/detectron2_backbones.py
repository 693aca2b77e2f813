"""Detectron2's backbones whose constructors take classes and functions, built from names and numbers alone.

Recipes name ResNet, Swin and MViTv2 directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, ResNet, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from dino.modeling.backbones import extract, padding_of


def dilated_stages(*, depth: int, norm: str = "BN", stride_in_1x1: bool = False) -> list[list[nn.Module]]:
    """The stages of a ResNet whose last one dilates its convolutions instead of halving the size ("DC5" of DETR).

    `res5` has stride 16 then. Parameters are those of `ResNet.make_default_stages`. As in torchvision, the dilation of
    2 begins at the second block of the stage. (`RES5_DILATION` of Detectron2's former recipes dilates the first too.)

    Args:
        depth, norm, stride_in_1x1: as of `ResNet.make_default_stages`; the depth is 50, 101 or 152.

    Raises:
        ValueError: a depth whose blocks are no bottlenecks.
    """
    if depth not in (50, 101, 152):
        raise ValueError(f"a ResNet of depth {depth} has no dilated form: those of depth 50, 101 and 152 have one")
    *stages, last = ResNet.make_default_stages(depth, norm=norm, stride_in_1x1=stride_in_1x1)
    count = len(last)
    dilated = ResNet.make_stage(
        BottleneckBlock,
        count,
        in_channels=last[0].in_channels,
        out_channels=last[0].out_channels,
        bottleneck_channels=last[0].out_channels // 4,
        dilation_per_block=[1, *[2] * (count - 1)],
        norm=norm,
        stride_in_1x1=stride_in_1x1,
    )
    return [*stages, dilated]


def vitdet(
    *,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    global_blocks: Sequence[int] = (2, 5, 8, 11),
    drop_path_rate: float = 0.1,
    img_size: int = 1024,
    window_size: int = 14,
    out_channels: int = 256,
    scale_factors: Sequence[float] = (2.0, 1.0, 0.5),
    square_pad: int = 0,
) -> SimpleFeaturePyramid:
    """Build a plain ViT of patches of 16 pixels with windows, and the simple pyramid of ViTDet (arXiv 2203.16527).

    Args:
        embed_dim, depth, num_heads: of the ViT; the defaults are ViT-B's.
        drop_path_rate: chance to leave out a block in training, that of the last one.
        global_blocks: blocks that attend to the whole image; the others attend within windows.
        window_size: side of a window in cells of 16 pixels.
        img_size: side in pixels for which relative positions are stored; other images are interpolated.
        out_channels: of the maps.
        scale_factors: of the maps, relative to the ViT's stride of 16, finest first: 2.0 is `p3`, 4.0 `p2`. One more
            map of half the coarsest size follows.
        square_pad: images are padded to squares of this side in pixels unless they are larger; 0 for no squares.
    """
    net = ViT(
        img_size=img_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window_size,
        window_block_indexes=[i for i in range(depth) if i not in global_blocks],
    )
    return SimpleFeaturePyramid(
        net, "last_feat", out_channels, list(scale_factors), LastLevelMaxPool(), square_pad=square_pad
    )


def regnet(
    *,
    depth: int,
    w_a: float,
    w_0: int,
    w_m: float,
    group_width: int,
    se_ratio: float = 0.0,
    out_features: Sequence[str] = ("s2", "s3", "s4"),
    norm: str = "FrozenBN",
    freeze_at: int = 2,
) -> RegNet:
    """Build a RegNetX, or with `se_ratio` a RegNetY (arXiv 2003.13678, section 3.3), from the numbers that define it.

    Args:
        depth, w_a, w_0, w_m: number of blocks; slope, start and quantisation of their widths.
        group_width: channels of a group of the convolutions.
        se_ratio: channels of the squeeze-and-excitation, as a share of a block's input; 0 for none.
        out_features: some of `s1` (stride 4) to `s4` (stride 32).
        norm: as of Detectron2's layers.
        freeze_at: 1 to train all but the stem, 2 all but the stem and `s1`, and so on.
    """
    return RegNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=depth,
        w_a=w_a,
        w_0=w_0,
        w_m=w_m,
        group_width=group_width,
        se_ratio=se_ratio,
        freeze_at=freeze_at,
        norm=norm,
        out_features=list(out_features),
    )


class AsBackbone(Backbone):
    """Adapts a `TorchvisionBackbone` or `TimmBackbone` to parts that accept Detectron2's class only, such as FPN.

    Args:
        net: images -> dict of maps, with `output_shape()`.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.padding = padding_of(net)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name, each (B, channels, ceil(H / stride), ceil(W / stride))."""
        return extract(self.net, images, self.padding)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return {name: ShapeSpec(channels=s.channels, stride=s.stride) for name, s in self.net.output_shape().items()}
