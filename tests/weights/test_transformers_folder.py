import json

import pytest
import torch

from dino.modeling import DINO
from dino.utils.files import DataError
from dino.weights.network_parts import PARTS, build_network
from dino.weights.transformers_folder import ALIASES, FIELDS, describe_fields, describe_folder, fields_of

from . import folders
from .folders import IDS, NAMES, change_json, copy, tiny_detector, write_tiny


def build(fields):
    with torch.device("meta"):
        return build_network({"network": json.loads(json.dumps(describe_fields(fields)))})


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def test_the_defaults_are_the_published_model():
    network = build({"id2label": {label: str(label) for label in range(91)}})
    assert isinstance(network, DINO)
    assert type(network.decoder).__name__ == "SharedHeadsDecoder"
    assert len(network.encoder.layers) == len(network.decoder.layers) == 6
    assert network.query_selection.content.weight.shape == (900, 256)
    assert network.position_encoding.temperatures == (20.0, 20.0)
    assert len(network.decoder.class_heads[0].bias) == 91
    frozen = {name.split(".")[3] for name, x in network.named_parameters() if not x.requires_grad}
    assert frozen == {"conv1", "layer1"}  # norms are frozen as such
    assert not any(name.endswith("num_batches_tracked") for name in network.state_dict())


def test_fields_reach_the_network():
    fields = folders.FIELDS | {"decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 8}
    fields |= {"encoder_n_points": 3, "decoder_n_points": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 40}
    fields |= {
        "num_feature_levels": 5,
        "backbone_kwargs": None,
        "pe_temperature_H": 10,
        "pe_temperature_W": 30,
        "pe_offset": -0.5,
    }
    fields |= {"shared_heads": False, "num_denoising": 7, "label_noise_ratio": 0.25, "box_noise_scale": 0.4}
    network = build(fields)
    assert network.neck.in_features == ["res2", "res3", "res4", "res5"]
    assert (len(network.encoder.layers), len(network.decoder.layers)) == (1, 3)
    assert network.encoder.layers[0].attention.attention_weights.bias.shape == (2 * 5 * 3,)
    assert network.decoder.layers[0].cross_attention.attention_weights.bias.shape == (8 * 5 * 2,)
    assert network.encoder.layers[0].feed_forward.linear1.bias.shape == (24,)
    assert network.decoder.layers[0].feed_forward.linear1.bias.shape == (40,)
    assert (network.position_encoding.temperatures, network.position_encoding.offset) == ((10.0, 30.0), -0.5)
    assert network.decoder.class_heads[0] is not network.decoder.class_heads[1]
    denoising = network.denoising
    assert (denoising.num_denoising, denoising.label_noise, denoising.box_noise) == (7, 0.25, 0.4)


@pytest.mark.parametrize(
    ("other", "fields"),
    [
        ({"hidden_size": 64, "num_attention_heads": 2}, {"d_model": 64, "encoder_attention_heads": 2}),
        ({"num_heads": 2}, {"encoder_attention_heads": 2, "decoder_attention_heads": 2}),
        ({"d_ffn": 24}, {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}),
        ({"use_dn": False}, {"num_denoising": 0}),
        ({"num_classes": 5}, {"num_labels": 5}),
        ({"dn_number": 9}, {"num_denoising": 9}),
        ({"d_model": 32, "hidden_size": 64}, {"d_model": 32}),
        ({}, {"num_labels": 2}),
    ],
)
def test_other_names_of_fields(other, fields):
    assert describe_fields(other) == describe_fields(fields)
    assert set(ALIASES.values()) <= set(FIELDS)


def test_backbones():
    by_timm = build(
        folders.FIELDS | {"backbone": "tf_mobilenetv3_small_075", "use_timm_backbone": True, "backbone_kwargs": None}
    )
    assert type(by_timm.neck.backbone).__name__ == "TimmBackbone"
    assert by_timm.neck.in_features == ["res3", "res4", "res5"]
    random = build(folders.FIELDS | {"use_pretrained_backbone": False})
    assert all(x.requires_grad for x in random.parameters())
    assert any(name.endswith("num_batches_tracked") for name in random.state_dict())
    kwargs = {"out_indices": [3, 4], "freeze": ["conv1"], "norm": "BN"}
    chosen = build(folders.FIELDS | {"backbone_kwargs": kwargs})
    assert chosen.neck.in_features == ["res4", "res5"]
    assert [name for name, x in chosen.named_parameters() if not x.requires_grad] == ["neck.backbone.body.conv1.weight"]
    options = describe_fields({"use_timm_backbone": True, "backbone_kwargs": {"drop_path_rate": 0.2, "in_chans": 3}})
    assert options["neck"]["backbone"]["options"] == {"drop_path_rate": 0.2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 100}, "d_model is 100: a multiple of 32 was expected"),
        ({"d_model": "256"}, "d_model is '256': a whole number from 1"),
        ({"d_model": True}, "d_model is True: a whole number"),
        ({"d_model": 10**9}, "d_model is 1000000000"),
        ({"encoder_layers": 1001}, "encoder_layers is 1001"),
        ({"decoder_layers": 0}, "decoder_layers is 0"),
        ({"decoder_attention_heads": 7}, "decoder_attention_heads is 7: a divisor of d_model, 256, was expected"),
        ({"pe_offset": float("nan")}, "pe_offset is nan: a number"),
        ({"pe_temperature_H": 0}, "pe_temperature_H is 0: a number"),
        ({"class_cost": [2]}, r"class_cost is \[2\]"),
        ({"num_channels": 1}, "num_channels is 1: 3"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type is 'rotary': sine or learned"),
        ({"shared_heads": 1}, "shared_heads is 1: true or false"),
        ({"dropout": 0.1}, "dropout is 0.1: DINO has 0.0 only"),
        ({"two_stage": False}, "two_stage is False: DINO has True only"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu': DINO has 'relu' only"),
        ({"backbone": 5}, "backbone is 5: the name of a network"),
        ({"backbone_kwargs": [1]}, r"backbone_kwargs is \[1\]: a dict"),
        ({"backbone_kwargs": {"out_indices": 3}}, "backbone_kwargs: out_indices is 3"),
        ({"backbone_kwargs": {"in_chans": 4}}, "backbone_kwargs: in_chans must be 3"),
        ({"backbone_kwargs": {"width": 4}}, "backbone_kwargs: 'width' is nothing that a backbone of torchvision has"),
        (
            {"backbone_kwargs": {"pretrained": True}},
            "backbone_kwargs: the argument 'pretrained' would read or download",
        ),
        ({"backbone_kwargs": {"freeze": ["../a"]}}, "backbone_kwargs: '../a' is no plain word"),
        ({"id2label": ["a"]}, r"id2label is \['a'\]: a dict"),
        ({"id2label": {}}, "id2label is 0: a number of labels"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "the numbers of labels differ: num_labels has 3, id2label has 1"),
        ({"network": "dino"}, "network is 'dino': the description of a network was expected"),
        ({"network": {"_target_": "os.system"}}, r"network: 'os\.system' is not on the list"),
        ({"network": {"_target_": "dino.modeling.DINO"}}, "network states no num_classes"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(DataError, match=f"^{message}"):
        describe_fields(fields)


def test_a_network_in_the_fields_follows_the_labels():
    node = describe_fields(folders.FIELDS)
    changed = describe_fields({"network": node, "id2label": {"0": "a", "1": "b"}, "d_model": 64})
    assert changed == describe_fields(folders.FIELDS | {"num_labels": 2})


VARIANT = describe_fields(folders.FIELDS)
VARIANT["query_selection"]["_target_"] = "dino.modeling.variants.DistinctSelection"
ANCHORS = describe_fields(folders.FIELDS)
ANCHORS["query_selection"]["anchor_size"] = 0.1
TINY_GROUPS = describe_fields(folders.FIELDS)
TINY_GROUPS["neck"]["norm_groups"] = 8
ASSEMBLED = {
    "_target_": "dino.modeling.build_dino",
    "backbone": {"_target_": "dino.modeling.TorchvisionBackbone", "name": "resnet18", "norm": "BN"},
    "num_classes": 3,
    "embed_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 12,
}


@pytest.mark.parametrize(
    ("node", "kept"),
    [
        (describe_fields(folders.FIELDS), False),
        (
            describe_fields(
                folders.FIELDS
                | {"shared_heads": False, "num_feature_levels": 5, "pe_offset": -0.5, "backbone_kwargs": None}
            ),
            False,
        ),
        (describe_fields(folders.FIELDS | {"use_pretrained_backbone": False}), False),
        (describe_fields(folders.FIELDS | {"position_embedding_type": "learned"}), False),
        (describe_fields(folders.FIELDS | {"backbone": "convnext_tiny", "backbone_kwargs": {"map_norm": "LN"}}), False),
        (ASSEMBLED, False),
        (VARIANT, True),
        (ANCHORS, True),
        (TINY_GROUPS, True),
    ],
)
def test_fields_of_a_network_are_the_inverse(node, kept):
    fields = json.loads(json.dumps(fields_of({"network": node}, NAMES, IDS)))
    assert (fields["network"] is not None) == kept
    assert (fields["d_model"], fields["num_queries"], fields["category_ids"]) == (32, 12, IDS)
    assert fields["id2label"] == {"0": "red", "1": "green", "2": "blue"}
    assert fields["label2id"] == {"red": 0, "green": 1, "blue": 2}
    with torch.device("meta"):
        network = build_network({"network": node})
    again = build(fields)
    assert shapes(again) == shapes(network)
    assert vars(again.query_selection)["anchor_size"] == network.query_selection.anchor_size
    frozen = [[name for name, x in one.named_parameters() if not x.requires_grad] for one in (network, again)]
    assert frozen[0] == frozen[1]


def test_losses_of_a_recipe():
    matcher = {"_target_": "dino.layers.HungarianMatcher", "class_cost": 3.0, "l1_cost": 4}
    criterion = {"_target_": "dino.layers.SetCriterion", "matcher": matcher, "class_weight": 1.5, "giou_weight": "no"}
    fields = fields_of({"network": ASSEMBLED, "criterion": criterion}, NAMES, IDS)
    assert (fields["class_cost"], fields["bbox_cost"], fields["giou_cost"]) == (3.0, 4, 2.0)
    assert (fields["cls_loss_coefficient"], fields["giou_loss_coefficient"]) == (1.5, 2.0)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "model"
    write_tiny(folder)
    return folder


def test_a_folder_is_described(tmp_path):
    detector = write_tiny(tmp_path / "model")
    found = describe_folder(tmp_path / "model")
    assert (found["names"], found["category_ids"]) == (NAMES, IDS)
    assert found["about"]["preprocessing"] == {
        **detector.preprocessing._asdict(),
        "pixel_mean": [120.0, 110.5, 103.53],
        "pixel_std": [50.0, 57.12, 57.375],
    }
    (tmp_path / "model/preprocessor_config.json").unlink()
    change_json(tmp_path / "model/config.json", category_ids=None)
    found = describe_folder(tmp_path / "model")
    assert found["category_ids"] == [0, 1, 2]  # as in transformers
    assert found["about"]["preprocessing"]["short_side"] == 800


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config", {"d_model": 33}, "config.json: d_model is 33"),
        ("config", {"id2label": {"0": "a", "2": "b", "1": 5}}, "config.json: id2label is .* a dict of the labels 0, 1"),
        ("config", {"id2label": {"1": "a", "2": "b", "3": "c"}}, "config.json: id2label is .* a dict of the labels"),
        ("config", {"category_ids": [1, 2]}, "config.json: category_ids must be 3 different whole numbers"),
        ("config", {"category_ids": [1, 2, 2]}, "config.json: category_ids must be 3"),
        ("config", {"category_ids": "abc"}, "config.json: category_ids must be 3"),
        ("preprocessor_config", {"size": {"height": 3, "width": 4}}, "preprocessor_config.json: size is"),
        ("preprocessor_config", {"image_std": [0.1, float("nan"), 1]}, "preprocessor_config.json: image_std is"),
    ],
)
def test_what_is_wrong_in_a_folder(tmp_path, tiny_folder, file, changes, message):
    copy(tiny_folder, tmp_path / "model")
    change_json(tmp_path / f"model/{file}.json", **changes)
    with pytest.raises(DataError, match=f"can't use .*{message}"):
        describe_folder(tmp_path / "model")


def test_the_tables_name_parts_that_exist():
    kinds = {node["_target_"] for node in describe_fields({}).values() if isinstance(node, dict)}
    assert kinds <= set(PARTS)
    assert tiny_detector().category_ids == IDS
