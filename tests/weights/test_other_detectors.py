import pytest
import torch
import torchvision

from dino.modeling.variants import HybridBranch
from dino.utils.files import DataError
from dino.weights import convert, load_weights
from dino.weights.inferred_description import describe_content
from dino.weights.other_detectors import name_detector, name_missing_backbone

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


# Names of tensors of detrex' backbones that this project lacks, as in its models.
MISSING_BACKBONES = {
    "InternImage": "patch_embed.conv1.weight levels.0.blocks.0.dcn.offset.weight levels.3.blocks.4.gamma1",
    "EVA": "net.pos_embed net.blocks.0.attn.q_bias net.blocks.0.attn.qkv.weight simfp_2.0.weight",
}


def file_with(backbone):
    """A file of detrex with another backbone: names, and projections of other channels."""
    state = convert(shared_network().state_dict(), to="detrex")
    state["neck.convs.0.conv.weight"] = torch.zeros(32, 5, 1, 1)
    rest = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    return {"model": rest | {f"backbone.{key}": torch.zeros(3) for key in MISSING_BACKBONES[backbone].split()}}


@pytest.mark.parametrize("backbone", MISSING_BACKBONES)
def test_a_file_with_a_backbone_that_is_missing_here(backbone):
    """Says so in every place, before it asks for the position encoding or compares shapes."""
    content, message = file_with(backbone), f"its backbone is {backbone}, which this project does not have"
    assert name_missing_backbone(content["model"]) == backbone
    with pytest.raises(DataError, match=message):
        describe_content(content, "renamed.pth")
    with pytest.raises(DataError, match=message):
        load_weights(tiny_network(), content)
    report = load_weights(tiny_network(), content, min_backbone=0)  # the rest may start a training
    assert any(name.startswith("encoder.") for name in report.loaded)
    assert not any(name.startswith("neck.backbone.") for name in report.loaded)


def test_a_model_with_that_backbone_loads_its_own_file():
    """Somebody's own InternImage, inside this project's network."""
    network = tiny_network()
    network.neck.backbone.levels = torch.nn.ModuleDict({"0": torch.nn.Module()})
    block = torch.nn.Module()
    block.dcn = torch.nn.Linear(2, 2)
    network.neck.backbone.levels["0"].blocks = torch.nn.ModuleList([block])
    assert name_missing_backbone(network.state_dict()) == "InternImage"
    assert load_weights(network, network.state_dict()).problems == []


@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny", "vit_b_16"])
def test_backbones_that_are_here_are_not_missing(name):
    with torch.device("meta"):
        assert name_missing_backbone(torchvision.models.get_model(name, weights=None).state_dict()) is None
