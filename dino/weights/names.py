"""Names of a DINO's tensors in this project and in other programs, one row for each group of tensors.

In a row, `{i}` stands for a number and `*` for the rest of the key, in the same order in all columns. The first row
that fits a key renames it. Keys that fit no row keep their name: loading reports them as unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor

StateDict = dict[str, Tensor]
_Rules = list[tuple[re.Pattern, str]]

# own · official (IDEA-Research/DINO) · detrex. Four things are more than names, see `checkpoint_formats.py`: which
# projections of the official neck make extra levels ("extra" here), the second names of heads, the number of detrex'
# encoder head ("last" here), and rows of the label embedding that belong to no class.
DINO_NAMES = (
    ("neck.backbone.*", "backbone.0.*", "backbone.*"),
    ("neck.lateral.{i}.0.*", "input_proj.{i}.0.*", "neck.convs.{i}.conv.*"),
    ("neck.lateral.{i}.1.*", "input_proj.{i}.1.*", "neck.convs.{i}.norm.*"),
    ("neck.extra_levels.{i}.0.*", "input_proj.extra.{i}.0.*", "neck.extra_convs.{i}.conv.*"),
    ("neck.extra_levels.{i}.1.*", "input_proj.extra.{i}.1.*", "neck.extra_convs.{i}.norm.*"),
    ("level_embed", "transformer.level_embed", "transformer.level_embeds"),
    *(
        (
            f"encoder.layers.{{i}}.{own}.*",
            f"transformer.encoder.layers.{{i}}.{official}.*",
            f"transformer.encoder.layers.{{i}}.{detrex}.*",
        )
        for own, official, detrex in (
            ("attention", "self_attn", "attentions.0"),
            ("norm", "norm1", "norms.0"),
            ("feed_forward.linear1", "linear1", "ffns.0.layers.0.0"),
            ("feed_forward.linear2", "linear2", "ffns.0.layers.1"),
            ("feed_forward.norm", "norm2", "norms.1"),
        )
    ),
    *(
        (
            f"decoder.layers.{{i}}.{own}.*",
            f"transformer.decoder.layers.{{i}}.{official}.*",
            f"transformer.decoder.layers.{{i}}.{detrex}.*",
        )
        for own, official, detrex in (
            ("self_attention", "self_attn", "attentions.0.attn"),
            ("self_norm", "norm2", "norms.0"),  # the official numbers do not follow the order of use
            ("cross_attention", "cross_attn", "attentions.1"),
            ("cross_norm", "norm1", "norms.1"),
            ("feed_forward.linear1", "linear1", "ffns.0.layers.0.0"),
            ("feed_forward.linear2", "linear2", "ffns.0.layers.1"),
            ("feed_forward.norm", "norm3", "norms.2"),
        )
    ),
    ("decoder.norm.*", "transformer.decoder.norm.*", "transformer.decoder.norm.*"),
    # Linear layers of an MLP are counted with the ReLUs between them here, without them there.
    (
        "decoder.position.0.*",
        "transformer.decoder.ref_point_head.layers.0.*",
        "transformer.decoder.ref_point_head.layers.0.*",
    ),
    (
        "decoder.position.2.*",
        "transformer.decoder.ref_point_head.layers.1.*",
        "transformer.decoder.ref_point_head.layers.1.*",
    ),
    ("query_selection.content.*", "transformer.tgt_embed.*", "transformer.tgt_embed.*"),
    ("query_selection.project.0.*", "transformer.enc_output.*", "transformer.enc_output.*"),
    ("query_selection.project.1.*", "transformer.enc_output_norm.*", "transformer.enc_output_norm.*"),
    ("query_selection.class_head.*", "transformer.enc_out_class_embed.*", "class_embed.last.*"),
    ("query_selection.box_head.0.*", "transformer.enc_out_bbox_embed.layers.0.*", "bbox_embed.last.layers.0.*"),
    ("query_selection.box_head.2.*", "transformer.enc_out_bbox_embed.layers.1.*", "bbox_embed.last.layers.1.*"),
    ("query_selection.box_head.4.*", "transformer.enc_out_bbox_embed.layers.2.*", "bbox_embed.last.layers.2.*"),
    ("decoder.class_heads.{i}.*", "class_embed.{i}.*", "class_embed.{i}.*"),
    ("decoder.box_heads.{i}.0.*", "bbox_embed.{i}.layers.0.*", "bbox_embed.{i}.layers.0.*"),
    ("decoder.box_heads.{i}.2.*", "bbox_embed.{i}.layers.1.*", "bbox_embed.{i}.layers.1.*"),
    ("decoder.box_heads.{i}.4.*", "bbox_embed.{i}.layers.2.*", "bbox_embed.{i}.layers.2.*"),
    ("denoising.label_embed.*", "label_enc.*", "label_enc.*"),
)

# official · the port to Hugging Face transformers, after the conversion script and the model of its proposal: no file
# in this format has been released. Earlier states of the proposal kept the official `tgt_embed`.
HUGGING_FACE_NAMES = (
    ("transformer.encoder.layers.{i}.norm1.*", "model.transformer.encoder.layers.{i}.self_attn_layer_norm.*"),
    ("transformer.encoder.layers.{i}.norm2.*", "model.transformer.encoder.layers.{i}.final_layer_norm.*"),
    ("transformer.encoder.layers.{i}.linear1.*", "model.transformer.encoder.layers.{i}.fc1.*"),
    ("transformer.encoder.layers.{i}.linear2.*", "model.transformer.encoder.layers.{i}.fc2.*"),
    ("backbone.0.body.*", "model.backbone.conv_encoder.model.*"),
    ("transformer.tgt_embed.*", "model.transformer.content_query_embeddings.*"),
    ("*", "model.*"),
)

# torchvision · Detectron2
_RESNET_NAMES = (
    *(
        (f"layer{stage}.{{i}}.{torchvision}", f"res{stage + 1}.{{i}}.{detectron2}")
        for stage in range(1, 5)
        for torchvision, detectron2 in (
            ("conv{i}.weight", "conv{i}.weight"),
            ("bn{i}.*", "conv{i}.norm.*"),
            ("downsample.0.weight", "shortcut.weight"),
            ("downsample.1.*", "shortcut.norm.*"),
        )
    ),
    ("conv1.weight", "stem.conv1.weight"),
    ("bn1.*", "stem.conv1.norm.*"),
)


def _pattern(template: str) -> str:
    """The regular expression of a template of the tables."""
    return re.escape(template).replace(r"\{i\}", r"(\d+)").replace(r"\*", r"(.+)")


def _replacement(template: str, first: int = 1) -> str:
    """The replacement of `re.sub` for a template; `first` is the number of its first group."""
    parts = re.split(r"\{i\}|\*", template)
    return "".join(f"\\g<{n}>{part}" if n >= first else part for n, part in enumerate(parts, first - 1))


_OF_DINO = [re.compile(_pattern(own)) for own, _, _ in DINO_NAMES]


def is_of_dino(name: str) -> bool:
    """Whether DINO itself has a tensor of this name (in own format), and not only a variant of its parts."""
    return any(pattern.fullmatch(name) for pattern in _OF_DINO)


def renumber(
    state_dict: StateDict, prefix: str, name: Callable[[int], str], new_prefix: str | None = None
) -> StateDict:
    """Replace the number n after `prefix` by `name(n)`, in every key with such a number."""

    def new(match: re.Match) -> str:
        return f"{prefix if new_prefix is None else new_prefix}{name(int(match[1]))}."

    return {re.sub(rf"^{re.escape(prefix)}(\d+)\.", new, key): value for key, value in state_dict.items()}


def count_parts(keys: Iterable[str], front: str) -> int:
    """Count the different numbers that follow `front` at the beginning of keys."""
    found = (re.match(rf"{re.escape(front)}(\d+)\.", key) for key in keys)
    return len({match[1] for match in found if match})


def rules(pairs: Iterable[tuple[str, str]]) -> _Rules:
    """(from, to) templates -> rules for `rename`."""
    return [(re.compile(_pattern(old)), _replacement(new)) for old, new in pairs]


def rename(state_dict: StateDict, table: _Rules) -> StateDict:
    """Rename every key by the first rule that fits it; the values stay.

    Raises:
        ValueError: two keys would get the same name.
    """
    renamed: StateDict = {}
    for old, value in state_dict.items():
        new = next((rule.sub(to, old) for rule, to in table if rule.fullmatch(old)), old)
        if new in renamed:
            raise ValueError(f"two keys of the state dict would be called {new!r}, the second is {old!r}")
        renamed[new] = value
    return renamed


_FORMER_NAMES: _Rules = [(re.compile(r"((?:.*\.)?neck\.)coarser(\.\d+\..*)"), r"\1extra_levels\2")]


def to_current_names(state_dict: StateDict) -> StateDict:
    """Rename own keys of earlier versions, with or without a prefix: `neck.coarser.` is `neck.extra_levels.` now."""
    return rename(state_dict, _FORMER_NAMES)


# The prefix of a ResNet's keys: `neck.backbone.`, or nothing. A number at its end would be that of a block; after
# `stem`, the name is Detectron2's already.
_FRONT = r"((?:.*?(?<!\d)(?<!stem)\.)??)"
_TO_DETECTRON2 = [
    (re.compile(f"{_FRONT}(?:body\\.)?{_pattern(a)}"), rf"\1{_replacement(b, 2)}") for a, b in _RESNET_NAMES
]
_TO_TORCHVISION = [(re.compile(f"{_FRONT}{_pattern(b)}"), rf"\1body.{_replacement(a, 2)}") for a, b in _RESNET_NAMES]


def resnet_to_detectron2(state_dict: StateDict) -> StateDict:
    """Rename a ResNet's keys from torchvision's names to Detectron2's, with any prefix.

    `neck.backbone.body.layer1.0.bn1.weight` becomes `neck.backbone.res2.0.conv1.norm.weight`. Other keys stay.
    """
    return rename(state_dict, _TO_DETECTRON2)


def resnet_to_torchvision(state_dict: StateDict) -> StateDict:
    """Rename a ResNet's keys from Detectron2's names to those of `TorchvisionBackbone`, with any prefix.

    `neck.backbone.res2.0.conv1.norm.weight` becomes `neck.backbone.body.layer1.0.bn1.weight`. Other keys stay.
    """
    return rename(state_dict, _TO_TORCHVISION)
