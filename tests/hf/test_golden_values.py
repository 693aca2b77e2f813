"""The model of transformers with official weights against the official program's numbers."""

import pytest
import torch

pytest.importorskip("transformers")

from dino.hf import DinoDetrConfig, DinoDetrForObjectDetection
from dino.modeling import ChannelMapper
from dino.weights import load_weights
from tests.golden.golden import GoldenFile
from tests.golden.network import RecordedBackbone, RecordedDenoising, check_losses, layer_parts, read_noise

golden = GoldenFile("07")
OFFICIAL, CASES = golden.config["config"], golden.config["train_cases"]
MASK = (~golden["in/image_mask"]).long()
IMAGES = torch.zeros(len(MASK), 3, *MASK.shape[1:])  # the recorded backbone does not look at them


def read_config():
    """The official configuration in the fields of transformers."""
    official = OFFICIAL
    both = {"attention_heads": "nheads", "ffn_dim": "dim_feedforward"}
    sizes = {f"{part}_{ours}": official[theirs] for part in ("encoder", "decoder") for ours, theirs in both.items()}
    return DinoDetrConfig(
        backbone="resnet18",  # replaced by recorded feature maps
        use_pretrained_backbone=False,
        num_labels=official["num_classes"],
        d_model=official["hidden_dim"],
        num_feature_levels=official["num_feature_levels"],
        encoder_layers=official["enc_layers"],
        decoder_layers=official["dec_layers"],
        encoder_n_points=official["enc_n_points"],
        decoder_n_points=official["dec_n_points"],
        num_queries=official["num_queries"],
        num_denoising=official["dn_number"],
        label_noise_ratio=official["dn_label_noise_ratio"],
        box_noise_scale=official["dn_box_noise_scale"],
        pe_temperature_H=official["pe_temperatureH"],
        pe_temperature_W=official["pe_temperatureW"],
        class_cost=official["set_cost_class"],
        bbox_cost=official["set_cost_bbox"],
        giou_cost=official["set_cost_giou"],
        cls_loss_coefficient=official["cls_loss_coef"],
        bbox_loss_coefficient=official["bbox_loss_coef"],
        giou_loss_coefficient=official["giou_loss_coef"],
        focal_alpha=official["focal_alpha"],
        **sizes,
    )


@pytest.fixture
def model():
    """A model with recorded feature maps, recorded noise and the official weights."""
    model = DinoDetrForObjectDetection(read_config())
    network, width = model.model.network, OFFICIAL["hidden_dim"]
    backbone = RecordedBackbone(golden.numbered("in/feat"), MASK.shape[1:])
    levels = {"out_channels": width, "num_levels": OFFICIAL["num_feature_levels"]}
    network.neck = ChannelMapper(backbone=backbone, in_features=list(backbone.output_shape()), **levels)
    network.denoising = RecordedDenoising(
        num_classes=OFFICIAL["num_classes"],
        embed_dim=width,
        num_denoising=OFFICIAL["dn_number"],
        label_noise=OFFICIAL["dn_label_noise_ratio"],
        box_noise=OFFICIAL["dn_box_noise_scale"],
    )
    assert not load_weights(network, golden.below("state_dict/")).problems
    return model


def read_labels(case):
    return [{"class_labels": target.labels, "boxes": target.boxes} for target in golden.targets(case)]


def check_predictions(case, found):
    """Compare the predictions of the decoder's layers and of the encoder's proposals."""
    parts = layer_parts("", OFFICIAL["dec_layers"])
    layers = zip(found.intermediate_logits.unbind(1), found.intermediate_reference_points.unbind(1), strict=True)
    layers = dict(zip(parts, layers, strict=True))
    layers["interm"] = (found.enc_outputs_class, found.enc_outputs_coord_logits.sigmoid())
    names = [name for name in golden.below(f"{case}/out/") if not name.startswith("dn_")]
    assert names or case != "eval"
    for name in names:
        part, kind = name.split("/")
        golden.check(f"{case}/out/{name}", layers[part][kind == "pred_boxes"])


@torch.no_grad()
def test_evaluation(model):
    found = model.eval()(IMAGES, MASK, read_labels("eval"))
    check_predictions("eval", found)
    golden.check("eval/memory", found.encoder_last_hidden_state)
    golden.check("eval/hs1", found.last_hidden_state)
    golden.check("eval/reference0", found.init_reference_points)
    check_losses(golden, "eval", found.loss_dict, golden.config["weight_dict"])


@pytest.mark.parametrize("case", CASES)
def test_training(model, case):
    where, groups, labels = f"train/{case}", CASES[case]["num_dn_group"], read_labels(f"train/{case}")
    objects = sum(len(one["boxes"]) for one in labels)
    noise = read_noise(golden, where, 2 * groups, objects, OFFICIAL["dn_label_noise_ratio"])
    model.model.network.denoising.recall(groups, noise)
    found = model.train()(IMAGES, MASK, labels)
    check_predictions(where, found)
    check_losses(golden, where, found.loss_dict, golden.config["weight_dict"])
    golden.check(f"{where}/total", found.loss)
