"""Detectors other than DINO, known by the names of their tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

from dino.utils.files import DataError

_DINO = ""  # stands for DINO itself in the table
_MOST, _LONGEST = 100_000, 500  # keys and characters that are looked at: files are not trusted
# Name of a detector, and groups of fragments. Keys that have all fragments of one group are the detector's. A fragment
# begins with a word of a key, and `{i}` stands for a number. The first row that fits counts: families come last.
_DETECTORS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    (_DINO, (("query_selection.box_head.",),)),  # in own format, where parts can have any names
    ("Grounding DINO", (("encoder.fusion_layers.{i}.",), ("encoder.layers.{i}.fusion_layer.",))),
    ("Mask DINO", (("pixel_decoder.", "predictor.label_enc."),)),
    ("Mask2Former", (("pixel_decoder.", "query_feat."),)),
    ("Co-DETR", (("query_head.",),)),
    ("DDQ DETR", (("query_map.", "bbox_head."),)),
    ("RT-DETR, D-FINE or DEIM", (("enc_score_head.",),)),
    ("RF-DETR or LW-DETR", (("refpoint_embed.", "query_feat."),)),
    ("DETA", (("pix_trans.",),)),
    (
        "Deformable DETR",
        (("reference_points.weight",), ("pos_trans.weight",), ("reference_points_fc.",), ("pos_trans_fc.",)),
    ),
    ("Focus-DETR", (("enc_mask_predictor.", "level_embeds"),)),
    ("DN-DETR", (("refpoint_embed.", "label_enc."), ("denoising_generator.label_encoder.",))),
    (
        "DAB-DETR",
        (("refpoint_embed.",), ("query_refpoint_embeddings.",), ("anchor_box_embed.",), ("ref_anchor_head.",)),
    ),
    ("Conditional DETR", (("ca_qcontent_proj.",), ("cross_attn.qcontent_proj.",))),
    (
        "DETR",
        (
            ("query_embed.weight", "decoder.layers.{i}.multihead_attn."),
            ("query_position_embeddings.", "class_labels_classifier."),
            ("query_embedding.", "decoder.layers.{i}.cross_attn.attn."),
        ),
    ),
    ("a DINO of mmdetection 2", (("bbox_head.transformer.", "bbox_head.label_embedding."),)),
    (
        _DINO,
        (
            ("level_embed", "tgt_embed.", "enc_output."),
            ("level_embed", "content_query_embeddings.", "enc_output."),
            ("level_embeds", "tgt_embed."),
            ("level_embed", "memory_trans_fc.", "dn_query_generator."),
        ),
    ),
    ("YOLOS", (("detection_tokens", "class_labels_classifier."),)),
    ("YOLOX", (("cls_preds.", "reg_preds.", "obj_preds."),)),
    ("a YOLO", (("model.{i}.cv2.{i}.{i}.",), ("model.{i}.dfl.",), ("model.{i}.anchors",))),
    ("EfficientDet", (("box_net.", "class_net."),)),
    ("Sparse R-CNN or DiffusionDet", (("head.head_series.",),)),
    ("a detector of Detectron2", (("proposal_generator.",), ("backbone.bottom_up.", "head.bbox_pred."))),
    ("a detector of torchvision", (("rpn.head.",), ("head.classification_head.", "head.regression_head."))),
    ("a detector of mmdetection", (("bbox_head.",), ("rpn_head.",), ("roi_head.",))),
    ("another detector", (("bbox_embed.",), ("bbox_predictor.",), ("bbox_pred.",), ("box_predictor.",))),
)
_BACKBONES = (  # that published DINOs have and this project lacks
    ("InternImage", (("levels.{i}.blocks.{i}.dcn.",),)),
    ("EVA", (("net.blocks.{i}.attn.q_bias", "simfp_{i}."),)),
)


class _Fragment(NamedTuple):
    """A fragment of the table, for a text with one key a line."""

    beginning: str  # without numbers: quick to look for
    pattern: re.Pattern

    @classmethod
    def of(cls, text: str) -> _Fragment:
        """Read it from the table."""
        pattern = r"(?m)(?:^|\.)" + re.escape(text).replace(r"\{i\}", r"\d+")
        return cls(text.partition("{i}")[0], re.compile(pattern))

    def is_in(self, keys: str) -> bool:
        """Whether a key has it."""
        return self.beginning in keys and bool(self.pattern.search(keys))


def _read_table(table: tuple) -> list[tuple[str, list[list[_Fragment]]]]:
    return [(name, [[_Fragment.of(part) for part in group] for group in groups]) for name, groups in table]


_OF_DETECTORS, _OF_BACKBONES = _read_table(_DETECTORS), _read_table(_BACKBONES)


def name_detector(keys: Iterable[str]) -> str | None:
    """Name the detector whose tensors have these names, with or without the prefixes of wrappers.

    Returns:
        such as "Deformable DETR" or "a detector of torchvision"; None for a DINO in any known format, for a backbone
        alone and for anything else.
    """
    return _find_first(_OF_DETECTORS, keys) or None


def name_missing_backbone(keys: Iterable[str]) -> str | None:
    """Name the backbone of a published DINO that this project lacks, such as "InternImage"; None for any other."""
    return _find_first(_OF_BACKBONES, keys)


def refuse_missing_backbone(keys: Iterable[str]) -> None:
    """Raise a DataError where a file with these names of tensors has a backbone that this project lacks."""
    backbone = name_missing_backbone(keys)
    if backbone:
        raise DataError(
            f"its backbone is {backbone}, which this project does not have: use detrex for this file. The rest of it "
            "can start a training with another backbone: train.init_checkpoint with train.min_backbone=0"
        )


def _find_first(table: list[tuple[str, list[list[_Fragment]]]], keys: Iterable[str]) -> str | None:
    """The first name of a table whose fragments these keys have."""
    text = "\n".join(key[:_LONGEST] for key in itertools.islice(keys, _MOST))
    found = (name for name, groups in table if any(all(part.is_in(text) for part in group) for group in groups))
    return next(found, None)
