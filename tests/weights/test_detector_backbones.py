"""Files of other detectors whose backbone alone fits a model."""

import copy

import pytest
import torch
import torchvision

from dino.utils.files import DataError
from dino.weights import load_weights, resnet_to_detectron2
from dino.weights.detector_backbones import name_any_detector

from ..tiny import tiny_network
from .states import equal, randomise
from .test_load_report import classifier, resnet18

HEAD = {"fc.weight", "fc.bias"}
HEADS = {  # of detectors, around the backbone
    "a detector of Detectron2": ("backbone.bottom_up.", ["proposal_generator.rpn_head.conv", "roi_heads.box_head.fc1"]),
    "a detector of torchvision": ("backbone.body.", ["backbone.fpn.inner.0", "rpn.head.cls_logits"]),
    "a detector of mmdetection": ("backbone.", ["neck.convs.0", "bbox_head.retina_cls"]),
    "DETR": ("backbone.0.body.", ["query_embed", "transformer.decoder.layers.0.multihead_attn.out_proj"]),
    "Deformable DETR": ("backbone.0.body.", ["transformer.reference_points", "class_embed.0"]),
    "another detector": ("model.backbone.conv_encoder.model.", ["model.query", "bbox_predictor.layers.0"]),
    "a detector": ("backbone.", ["anchors.0", "cls_subnet.0"]),
}


def detector_of(name, backbone=None):
    """A state dict as this detector has it, with random numbers."""
    front, heads = HEADS[name]
    state = {key: value for key, value in (backbone or classifier()).items() if key not in HEAD}
    state = resnet_to_detectron2(state) if "Detectron2" in name else state
    return {f"{front}{key}": value for key, value in state.items()} | {
        f"{head}.weight": torch.rand(3) for head in heads
    }


def backbone_of(network):
    return {k.removeprefix("body."): v for k, v in network.neck.backbone.state_dict().items()}


@pytest.mark.parametrize("name", HEADS)
def test_the_backbone_alone_must_be_asked_for(name):
    model, state = resnet18(), detector_of(name)
    before = copy.deepcopy(model.state_dict())
    message = (
        rf"some\.pth: the file is {name}, no DINO in a known format: only its backbone fits the model \(100 of 100 "
        r"tensors\)\. .*ask for it: train\.init_parts=backbone \(in Python parts=\"backbone\"\)"
    )
    for share in (0.95, 0):
        with pytest.raises(DataError, match=message):
            load_weights(model, state, name="some.pth", min_backbone=share)
    assert equal(before, model.state_dict())
    report = load_weights(model, state, parts="backbone")
    assert equal(backbone_of(model), {key: value for key, value in classifier().items() if key in backbone_of(model)})
    assert report.unexpected == [key for key in state if not key.startswith(HEADS[name][0])]
    assert set(report.without_detector) == {k for k in model.state_dict() if not k.startswith("neck.backbone.")}
    assert f"the file is {name}: its backbone alone is used, as asked for" in report.notes


def test_a_backbone_that_does_not_fit_is_refused_too():
    state = detector_of("DETR", {k: v for k, v in classifier().items() if "layer4" not in k})
    for parts, known in (("all", "DETR, no DINO"), ("backbone", "no DINO")):
        with pytest.raises(DataError, match=rf"the file is {known} .* has only 75 of the 100 tensors of the model's"):
            load_weights(resnet18(), state, parts=parts)


def test_the_backbone_of_a_dino_can_be_asked_for():
    source, target = randomise(tiny_network()), tiny_network(num_classes=7, num_levels=3)
    before = copy.deepcopy(target.state_dict())
    report = load_weights(target, {"model": source.state_dict()}, parts="backbone")
    for name, value in target.state_dict().items():
        expected = source.state_dict() if name.startswith("neck.backbone.") else before
        assert torch.equal(value, expected[name])
    assert report.format == "own"
    assert report.summary.startswith(f"6 of {len(before)} tensors loaded; afresh: ")


def test_a_file_of_a_backbone_needs_no_asking():
    for parts in ("all", "backbone"):
        assert load_weights(resnet18(), classifier(), parts=parts).format == "backbone"
    with pytest.raises(ValueError, match='parts is "all" or "backbone"'):
        load_weights(resnet18(), classifier(), parts="neck")


# Names of tensors beside those of a backbone in files of pretraining: a classifier, MAE with its decoder, DINOv2, MoCo,
# CLIP, BEiT, and a segmentation.
@pytest.mark.parametrize(
    "keys",
    [
        "head.fc.weight head.norm.weight",
        "mask_token decoder_pos_embed decoder_embed.weight decoder_blocks.0.attn.qkv.weight decoder_pred.bias",
        "cls_token register_tokens mask_token dino_head.mlp.0.weight ibot_head.last_layer.weight_v",
        "encoder_q.fc.0.weight encoder_k.fc.0.weight queue queue_ptr predictor.0.weight",
        "visual.proj text_projection logit_scale transformer.resblocks.0.attn.in_proj_weight token_embedding.weight",
        "rel_pos_bias.relative_position_bias_table lm_head.weight",
        "decode_head.conv_seg.weight auxiliary_head.conv_seg.weight",
    ],
)
def test_files_of_pretraining_are_no_detectors(keys):
    assert name_any_detector(dict.fromkeys(keys.split(), torch.zeros(1))) is None


def test_detectors_of_torchvision():
    with torch.device("meta"):
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    assert name_any_detector(model.state_dict()) == "a detector of torchvision"
