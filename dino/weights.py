"""Names of weights in other programs, and the way from them to the names of `dino.modeling.DINO`.

Every format is one table of (regular expression, replacement) pairs. All pairs are applied to a key, in their order,
so a later pair sees what the earlier ones made of it; a key of which nothing is left is dropped. Keys that no pair
knows keep their name: loading reports them as unexpected.
"""

from __future__ import annotations

import re

from torch import Tensor

Rules = tuple[tuple[str, str], ...]

OFFICIAL_TO_OWN: Rules = (
    (r"^module\.", ""),
    (r"^backbone\.0\.", "neck.backbone."),
    (r"^input_proj\.", "neck.lateral."),  # the 3x3 ones move on to neck.coarser, see `split_projections`
    (r"^label_enc\.", "denoising.label_embed."),
    (r"^bbox_embed\.", "decoder.box_heads."),
    (r"^class_embed\.", "decoder.class_heads."),
    (r"^transformer\.decoder\.(bbox|class)_embed\..*", ""),  # other names of the heads above
    (r"^transformer\.decoder\.ref_point_head\.", "decoder.position."),
    (r"^transformer\.enc_out_bbox_embed\.", "query_selection.box_head."),
    (r"^transformer\.enc_out_class_embed\.", "query_selection.class_head."),
    (r"^transformer\.enc_output\.", "query_selection.project.0."),
    (r"^transformer\.enc_output_norm\.", "query_selection.project.1."),
    (r"^transformer\.tgt_embed\.", "query_selection.content."),
    (r"^transformer\.level_embed$", "level_embed"),
    (r"^transformer\.(encoder|decoder)\.", r"\1."),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(encoder\.layers\.\d+)\.norm1\.", r"\1.norm."),
    (r"^(encoder\.layers\.\d+)\.norm2\.", r"\1.feed_forward.norm."),
    (r"^(decoder\.layers\.\d+)\.(self|cross)_attn\.", r"\1.\2_attention."),
    (r"^(decoder\.layers\.\d+)\.norm2\.", r"\1.self_norm."),  # the official numbers do not follow the order of use
    (r"^(decoder\.layers\.\d+)\.norm1\.", r"\1.cross_norm."),
    (r"^(decoder\.layers\.\d+)\.norm3\.", r"\1.feed_forward.norm."),
    (r"^((?:encoder|decoder)\.layers\.\d+)\.linear(\d)\.", r"\1.feed_forward.linear\2."),
    # Linear layers of an MLP are counted without the ReLUs between them there, with them here.
    (r"^(decoder\.position|decoder\.box_heads\.\d+|query_selection\.box_head)\.layers\.0\.", r"\1.0."),
    (r"^(decoder\.position|decoder\.box_heads\.\d+|query_selection\.box_head)\.layers\.1\.", r"\1.2."),
    (r"^(decoder\.position|decoder\.box_heads\.\d+|query_selection\.box_head)\.layers\.2\.", r"\1.4."),
)

# torchvision's names stand behind `body.`, or alone in the files that torchvision offers.
TORCHVISION_TO_DETECTRON2: Rules = (
    (r"\b(?:body\.)?layer1\.(\d+)\.", r"res2.\1."),
    (r"\b(?:body\.)?layer2\.(\d+)\.", r"res3.\1."),
    (r"\b(?:body\.)?layer3\.(\d+)\.", r"res4.\1."),
    (r"\b(?:body\.)?layer4\.(\d+)\.", r"res5.\1."),
    (r"\b(res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"\b(res\d\.\d+)\.downsample\.0\.", r"\1.shortcut."),
    (r"\b(res\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
    (r"\b(?:body\.)?(?<!\d\.)conv1\.", "stem.conv1."),  # without a block's number in front, it is the stem's
    (r"\b(?:body\.)?(?<!\d\.)bn1\.", "stem.conv1.norm."),
)

DETECTRON2_TO_TORCHVISION: Rules = (
    (r"\bstem\.conv1\.norm\.", "body.bn1."),
    (r"\bstem\.conv1\.", "body.conv1."),
    (r"\b(res\d\.\d+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"\b(res\d\.\d+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"\b(res\d\.\d+)\.shortcut\.", r"\1.downsample.0."),
    (r"\bres2\.(\d+)\.", r"body.layer1.\1."),
    (r"\bres3\.(\d+)\.", r"body.layer2.\1."),
    (r"\bres4\.(\d+)\.", r"body.layer3.\1."),
    (r"\bres5\.(\d+)\.", r"body.layer4.\1."),
)


def rename(state_dict: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Apply a table to every key; the values stay as they are.

    Raises:
        ValueError: two keys would get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for old, value in state_dict.items():
        new = old
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(f"two keys of the state dict would be called {new!r}, the second is {old!r}")
        if new:
            renamed[new] = value
    return renamed


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the official program (IDEA-Research/DINO, the part under "model") -> of `dino.modeling.DINO`.

    Heads that all decoder layers share there stand under a name for each layer, so they load into separate heads, too.
    The label embedding loses the rows that belong to no class.
    """
    own = split_projections(rename(state_dict, OFFICIAL_TO_OWN))
    labels, bias = "denoising.label_embed.weight", "query_selection.class_head.bias"
    if labels in own and bias in own:
        own[labels] = own[labels][: len(own[bias])]
    return own


def split_projections(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tell the neck's 3x3 projections, which make the coarser levels, from the 1x1 ones by their kernels."""
    coarser = sorted(
        int(key.split(".")[2])
        for key, value in state_dict.items()
        if re.fullmatch(r"neck\.lateral\.\d+\.0\.weight", key) and value.shape[-1] == 3
    )
    return rename(
        state_dict, tuple((rf"^neck\.lateral\.{old}\.", f"neck.coarser.{new}.") for new, old in enumerate(coarser))
    )


def resnet_to_detectron2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's keys from torchvision's names to Detectron2's, whatever stands in front of them.

    `neck.backbone.body.layer1.0.bn1.weight` becomes `neck.backbone.res2.0.conv1.norm.weight`. Other keys stay.
    """
    return rename(state_dict, TORCHVISION_TO_DETECTRON2)


def resnet_to_torchvision(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's keys from Detectron2's names to those of `TorchvisionBackbone`, whatever stands in front of them.

    `neck.backbone.res2.0.conv1.norm.weight` becomes `neck.backbone.body.layer1.0.bn1.weight`. Other keys stay.
    """
    return rename(state_dict, DETECTRON2_TO_TORCHVISION)
