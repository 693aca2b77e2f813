"""The config of DINO as a model of transformers."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from dino.utils.files import DataError
from dino.weights.transformers_folder import ALIASES, FIELDS, MODEL_TYPE, complete_fields, describe_fields

from .remote_code_saving import SavesRemoteCode

_OTHER_NAMES = {*ALIASES, "num_heads", "d_ffn", "use_dn", "num_classes"}
_ELSEWHERE = {"use_pretrained_backbone", "backbone_checkpoint", "num_channels"}  # not in the description of a network
_OF_NETWORK = {*tuple(FIELDS)[: tuple(FIELDS).index("auxiliary_loss")]} - _ELSEWHERE


def _of_both(end: str) -> property:
    """A name for the encoder's field with this end; setting it sets the decoder's too."""

    def set_both(config: DinoDetrConfig, value: Any) -> None:
        for part in ("encoder", "decoder"):
            setattr(config, f"{part}_{end}", value)

    return property(lambda config: getattr(config, f"encoder_{end}"), set_both)


def _check_kinds(kind: type, fields: Mapping[str, Any]) -> None:
    """Raise a DataError for a method's name among the fields, or for labels that transformers can't count."""
    method = next((name for name in fields if callable(getattr(kind, name, None))), None)
    if method is not None:
        raise DataError(f"{method!r:.100} is no field of a config, but a method")
    names, count = fields.get("id2label"), fields.get("num_labels")
    if names is not None and (not isinstance(names, Mapping) or {*map(str, names)} != {*map(str, range(len(names)))}):
        raise DataError(f"id2label is {reprlib.repr(names)}: a dict of the labels 0, 1, … -> names was expected")
    if not isinstance(fields.get("label2id"), Mapping | None):
        raise DataError(f"label2id is {reprlib.repr(fields['label2id'])}: a dict of name -> label was expected")
    if count is not None and type(count) is not int:
        raise DataError(f"num_labels is {reprlib.repr(count)}: a whole number was expected")


class DinoDetrConfig(SavesRemoteCode, PretrainedConfig):
    """Settings of a DINO, under the names of transformers' Deformable DETR and RT-DETR.

    Defaults are those of the published 4-scale model. Other programs' names (`hidden_size`, `num_heads`, `d_ffn`,
    `num_classes`, `dn_number`, …) are understood too.

    Args:
        backbone: name of a network of torchvision, or of timm with `use_timm_backbone=True`.
        use_pretrained_backbone: start a new model with the backbone's published weights. `from_pretrained` never
            fetches them.
        backbone_checkpoint: file or address of the backbone's weights, for machines without a network. Never saved.
        backbone_kwargs: further arguments of the backbone. `out_indices` are timm's: number i has stride 2^(i+1).
        d_model: E, width of encoder and decoder.
        num_feature_levels: L, levels of the pyramid.
        encoder_layers, decoder_layers: number of layers; `encoder_attention_heads`, `encoder_ffn_dim`,
            `encoder_n_points` and those of the decoder are their sizes.
        num_queries: Q, candidates of an image.
        position_embedding_type: "sine" or "learned". `pe_temperature_H`, `pe_temperature_W` and `pe_offset` are the
            constants of the sine encoding.
        shared_heads: one pair of heads for all decoder layers, as in the official program.
        num_denoising: budget of denoising queries, 0 for none; `label_noise_ratio` and `box_noise_scale`: see
            `ContrastiveDenoising`.
        auxiliary_loss: losses of all decoder layers, not only of the last one. The losses of the encoder's proposals
            (`loss_*_interm`) stay in any case: without them, nothing trains the selection of queries.
        class_cost, bbox_cost, giou_cost: weights of the matching costs.
        cls_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient, focal_alpha: weights of the losses.
        category_ids: ids of the classes in the data set, by label.
        network: a whole network, as a checkpoint of this project describes it, in place of the fields.
        fields: all other fields of `dino.weights.transformers_folder.FIELDS`, and those of every config: `id2label`,
            `num_labels`, ….

    Raises:
        ValueError: a field has a value that no DINO has. The message names the field.
    """

    model_type = MODEL_TYPE
    _saved_as = CONFIG_NAME
    attribute_map = {**ALIASES, "num_classes": "num_labels"}  # noqa: RUF012
    # What Trainer does not gather. `loss_dict` stays: metrics for DETR read logits and boxes as batch[1] and batch[2].
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "auxiliary_outputs",
        "init_reference_points",
        "last_hidden_state",
        "intermediate_hidden_states",
        "intermediate_reference_points",
        "intermediate_logits",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "enc_outputs_class",
        "enc_outputs_coord_logits",
    ]

    def __init__(self, **fields: Any):
        _check_kinds(type(self), fields)
        others = {name: value for name, value in fields.items() if name not in FIELDS and name not in _OTHER_NAMES}
        if "num_classes" in fields:
            others.setdefault("num_labels", fields["num_classes"])
        values = complete_fields(fields)
        for name, value in values.items():
            setattr(self, name, value)
        super().__init__(is_encoder_decoder=values["is_encoder_decoder"], **others)
        if fields.get("id2label") and fields.get("num_labels") not in (None, len(fields["id2label"])):
            self.follow_labels()  # `from_pretrained(…, num_labels=…)`
        self.describe()
        self._check_ids()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field.

        Raises:
            ValueError: `network` describes the network, so that another value would change nothing.
        """
        field = ALIASES.get(name, name)
        held = vars(self)
        if field in _OF_NETWORK and held.get("network") is not None and held.get(field, value) != value:
            raise DataError(
                f"{field}={value!r:.100} would change nothing: the config's `network` describes the network. Set "
                "network=None before to build it from the fields"
            )
        super().__setattr__(name, value)

    num_heads = _of_both("attention_heads")
    d_ffn = _of_both("ffn_dim")

    @property
    def use_dn(self) -> bool:
        """Whether there is denoising; False sets `num_denoising` to 0."""
        return self.num_denoising > 0

    @use_dn.setter
    def use_dn(self, value: bool) -> None:
        if not value:
            self.num_denoising = 0

    def _check_ids(self) -> None:
        """Raise a DataError unless there is one id for each label."""
        ids, count = self.category_ids, self.num_labels
        if ids is None:
            return
        whole = isinstance(ids, list | tuple) and all(type(number) is int for number in ids)
        if not whole or not len(ids) == len(set(ids)) == count:
            raise DataError(f"category_ids must be {count} different whole numbers, one for each label, or None")

    def describe(self) -> dict[str, Any]:
        """Check the fields that make the network, and describe it, see `dino.weights.description`.

        Raises:
            ValueError: a field has a value that no DINO has. The message names the field.
        """
        fields = self.to_dict()
        described = describe_fields({**fields, "network": None})
        return described if self.network is None else describe_fields(fields)

    def follow_labels(self) -> None:
        """Drop what belongs to other labels, after `num_labels` or `id2label` alone were set."""
        if self.category_ids is not None and len(self.category_ids) != self.num_labels:
            self.category_ids = None
        if set((self.label2id or {}).values()) != set(self.id2label):
            self.label2id = {name: label for label, name in self.id2label.items()}

    def without_pretrained_backbone(self) -> dict[str, Any]:
        """Changes to the fields after which they describe the same network, but no weights of its backbone."""
        changes: dict[str, Any] = {"use_pretrained_backbone": False, "backbone_checkpoint": None}
        if self.use_pretrained_backbone and self.network is None:  # that also decides what is frozen
            node = self.describe()["neck"]["backbone"]
            frozen = {"norm": node["norm"], "freeze": node.get("freeze", [])}
            changes["backbone_kwargs"] = {**(self.backbone_kwargs or {}), **frozen}
        return changes

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> Any:
        """A config of a file's fields, see transformers. The file can't name a `backbone_checkpoint`; `options` can."""
        fields = {name: value for name, value in config_dict.items() if name != "backbone_checkpoint"}
        return super().from_dict(fields, **options)

    def to_dict(self) -> dict[str, Any]:
        """All fields but `backbone_checkpoint`, which is a file of this machine."""
        fields = super().to_dict()
        fields.pop("backbone_checkpoint", None)
        return fields
