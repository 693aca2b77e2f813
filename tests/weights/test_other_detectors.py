import pytest
import torch
import torchvision

from dino.modeling.variants import HybridBranch
from dino.weights import convert
from dino.weights.other_detectors import name_detector

from ..tiny import tiny_network
from .test_checkpoint_formats import shared_network

# A few names of tensors of each detector, in the programs that publish it.
KEYS = {
    "Grounding DINO": [
        "transformer.level_embed transformer.tgt_embed.weight transformer.encoder.fusion_layers.0.gamma_v bert.x "
        "transformer.enc_output.weight",
        "level_embed memory_trans_fc.weight dn_query_generator.label_embedding.weight bbox_head.cls_branches.0.bias "
        "encoder.fusion_layers.5.attn.v_proj.weight",
        "model.level_embed model.encoder.layers.0.fusion_layer.vision_param bbox_embed.0.layers.0.weight",
    ],
    "Mask DINO": [
        "sem_seg_head.pixel_decoder.transformer.level_embed sem_seg_head.predictor.label_enc.weight backbone.res2.x"
    ],
    "Mask2Former": [
        "sem_seg_head.pixel_decoder.adapter_1.weight sem_seg_head.predictor.query_feat.weight",
        "panoptic_head.pixel_decoder.input_convs.0.conv.weight panoptic_head.query_feat.weight",
    ],
    "Co-DETR": ["query_head.cls_branches.0.weight query_head.label_embedding.weight rpn_head.rpn_conv.weight"],
    "DDQ DETR": [
        "level_embed memory_trans_fc.weight dn_query_generator.label_embedding.weight query_map.weight "
        "bbox_head.cls_branches.0.weight bbox_head.aux_cls_branches.0.weight"
    ],
    "RT-DETR, D-FINE or DEIM": [
        "decoder.enc_score_head.weight decoder.denoising_class_embed.weight encoder.pan_blocks.0.conv1.conv.weight",
        "model.enc_score_head.weight model.decoder.bbox_embed.0.layers.0.weight",
    ],
    "RF-DETR or LW-DETR": ["refpoint_embed.weight query_feat.weight transformer.enc_output.0.weight"],
    "DETA": ["transformer.level_embeds transformer.pos_trans.weight transformer.pix_trans.weight class_embed.0.bias"],
    "Deformable DETR": [
        "transformer.level_embed query_embed.weight transformer.reference_points.weight class_embed.0.bias",
        "transformer.level_embeds transformer.pos_trans.weight transformer.enc_output.weight class_embed.0.bias",
        "level_embed reference_points_fc.weight query_embedding.weight bbox_head.cls_branches.0.weight",
        "level_embed pos_trans_fc.weight memory_trans_fc.weight bbox_head.cls_branches.0.weight",
        "model.level_embed model.reference_points.weight model.query_position_embeddings.weight",
    ],
    "Focus-DETR": [
        "transformer.level_embeds transformer.tgt_embed.weight transformer.enc_mask_predictor.layer1.0.weight"
    ],
    "DN-DETR": [
        "tgt_embed.weight refpoint_embed.weight label_enc.weight transformer.level_embed",
        "anchor_box_embed.weight denoising_generator.label_encoder.weight class_embed.weight",
    ],
    "DAB-DETR": [
        "refpoint_embed.weight transformer.decoder.layers.0.ca_qcontent_proj.weight",
        "anchor_box_embed.weight class_embed.weight",
        "model.query_refpoint_embeddings.weight",
        "decoder.layers.0.cross_attn.qcontent_proj.weight decoder.ref_anchor_head.layers.0.weight "
        "bbox_head.fc_cls.bias",
    ],
    "Conditional DETR": [
        "query_embed.weight transformer.decoder.layers.0.ca_qcontent_proj.weight",
        "decoder.layers.0.cross_attn.qcontent_proj.weight bbox_head.fc_cls.weight",
    ],
    "DETR": [
        "query_embed.weight transformer.decoder.layers.0.multihead_attn.in_proj_weight bbox_embed.layers.0.weight",
        "model.query_position_embeddings.weight class_labels_classifier.weight bbox_predictor.layers.0.weight",
        "query_embedding.weight decoder.layers.0.cross_attn.attn.in_proj_weight bbox_head.fc_cls.weight",
    ],
    "a DINO of mmdetection 2": ["bbox_head.transformer.level_embeds bbox_head.label_embedding.weight"],
    "YOLOS": ["vit.embeddings.detection_tokens class_labels_classifier.layers.0.weight bbox_predictor.layers.0.weight"],
    "YOLOX": [
        "backbone.backbone.stem.conv.conv.weight head.cls_preds.0.weight head.reg_preds.0.weight head.obj_preds.0.bias"
    ],
    "a YOLO": ["model.22.cv2.0.0.conv.weight model.22.dfl.conv.weight", "model.24.anchors model.24.m.0.weight"],
    "EfficientDet": ["backbone.conv_stem.weight class_net.predict.conv_pw.weight box_net.predict.conv_pw.weight"],
    "Sparse R-CNN or DiffusionDet": ["backbone.bottom_up.stem.conv1.weight head.head_series.0.linear1.weight"],
    "a detector of Detectron2": [
        "backbone.bottom_up.stem.conv1.weight proposal_generator.rpn_head.conv.weight roi_heads.box_predictor.x",
        "backbone.bottom_up.stem.conv1.weight head.cls_score.weight head.bbox_pred.weight",
    ],
    "a detector of mmdetection": [
        "backbone.conv1.weight rpn_head.rpn_conv.weight roi_head.bbox_head.fc_cls.weight",
        "backbone.conv1.weight bbox_head.retina_cls.weight",
    ],
    "another detector": ["backbone.0.body.conv1.weight class_embed.weight bbox_embed.layers.0.weight"],
}


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name in KEYS for keys in KEYS[name]])
def test_detectors_are_named(name, keys, prefix):
    assert name_detector([f"{prefix}{key}" for key in keys.split()]) == name


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detectors_of_torchvision(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    assert name_detector(model.state_dict()) == "a detector of torchvision"


@pytest.mark.parametrize("to", ["own", "official", "detrex", "huggingface"])
def test_a_dino_is_no_other_detector(to):
    assert name_detector(convert(shared_network().state_dict(), to=to)) is None


def test_own_parts_may_have_any_names():
    branch = HybridBranch(num_queries=20, num_classes=3, embed_dim=32)
    assert name_detector(tiny_network(branches={"refpoint_embed": branch}).state_dict()) is None


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "convnext_tiny", "efficientnet_b0", "vit_b_16", "maxvit_t"])
def test_a_backbone_is_no_detector(name):
    with torch.device("meta"):
        keys = torchvision.models.get_model(name, weights=None).state_dict()
    assert name_detector(keys) is None
    assert name_detector([f"module.backbone.{key}" for key in keys]) is None


def test_nothing_is_no_detector():
    assert name_detector([]) is None
