"""The config of DINO in transformers: what it accepts, refuses, saves and reads."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from transformers import AutoConfig

from dino.hf import DinoDetrConfig
from dino.weights.network_parts import build_network
from dino.weights.transformers_folder import FIELDS
from tests.hf.tiny_model import TINY


def tiny_config(**fields):
    return DinoDetrConfig(**{**TINY, "num_labels": 3, **fields})


def test_defaults_are_those_of_the_published_model():
    config = DinoDetrConfig()
    assert {name: getattr(config, name) for name in FIELDS} == FIELDS
    assert (config.num_queries, config.d_model, config.encoder_layers, config.encoder_ffn_dim) == (900, 256, 6, 2048)
    assert config.describe()["decoder"]["_target_"] == "dino.modeling.SharedHeadsDecoder"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"hidden_size": 64}, {"d_model": 64}),
        ({"num_encoder_layers": 3, "num_decoder_layers": 2}, {"encoder_layers": 3, "decoder_layers": 2}),
        ({"num_heads": 4}, {"encoder_attention_heads": 4, "decoder_attention_heads": 4}),
        ({"d_ffn": 512}, {"encoder_ffn_dim": 512, "decoder_ffn_dim": 512}),
        ({"num_classes": 7}, {"num_labels": 7}),
        ({"dn_number": 50, "dn_label_noise_ratio": 0.2}, {"num_denoising": 50, "label_noise_ratio": 0.2}),
        ({"denoising_box_noise_scale": 0.4}, {"box_noise_scale": 0.4}),
        ({"use_dn": False}, {"num_denoising": 0}),
    ],
)
def test_other_names_are_understood(given, expected):
    config = DinoDetrConfig(**given)
    assert {name: getattr(config, name) for name in expected} == expected
    assert not given.keys() & vars(config).keys()  # nothing is saved twice


def test_other_names_can_be_read_and_set():
    config = DinoDetrConfig(d_model=64)
    assert (config.hidden_size, config.num_attention_heads) == (64, 8)
    config.num_classes = 5
    assert (config.num_labels, len(config.id2label)) == (5, 5)


def test_a_saved_config_is_read_back(tmp_path):
    names = {0: "cat", 1: "dog", 2: "jar"}
    config = tiny_config(
        id2label=names, label2id={"cat": 0, "dog": 1, "jar": 2}, category_ids=[3, 7, 9], num_queries=17
    )
    config.save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(found, DinoDetrConfig)
    assert {name: getattr(found, name) for name in FIELDS} == {name: getattr(config, name) for name in FIELDS}
    assert (found.id2label, found.category_ids, found.num_queries) == (names, [3, 7, 9], 17)
    assert found.to_diff_dict().keys() == config.to_diff_dict().keys()


def test_a_file_of_this_machine_is_never_saved(tmp_path):
    config = tiny_config(backbone_checkpoint="/home/me/secret.pth")
    config.save_pretrained(tmp_path)
    assert "secret" not in (tmp_path / "config.json").read_text()
    assert "secret" not in config.to_json_string(use_diff=False)
    assert config.backbone_checkpoint == "/home/me/secret.pth"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_queries", -1),
        ("num_queries", 10**9),
        ("num_queries", "many"),
        ("d_model", 250),
        ("d_model", True),
        ("encoder_attention_heads", 7),
        ("decoder_layers", 0),
        ("decoder_layers", 10**6),
        ("num_feature_levels", 2.5),
        ("activation_function", "gelu"),
        ("dropout", 0.1),
        ("attention_dropout", 0.5),
        ("dilation", True),
        ("two_stage", False),
        ("with_box_refine", False),
        ("is_encoder_decoder", False),
        ("position_embedding_type", "fourier"),
        ("pe_temperature_H", 0),
        ("pe_temperature_W", float("nan")),
        ("label_noise_ratio", 2),
        ("bbox_cost", "high"),
        ("focal_alpha", -1),
        ("backbone", 50),
        ("backbone", "../../etc/passwd"),
        ("backbone", "hf_hub:someone/net"),
        ("backbone_kwargs", {"checkpoint_path": "/tmp/x.pth"}),
        ("backbone_kwargs", {"out_indices": "all"}),
        ("num_channels", 4),
        ("shared_heads", "yes"),
        ("auxiliary_loss", 1),
        ("category_ids", [1, 2]),
        ("category_ids", [1, 1, 2]),
        ("category_ids", "abc"),
        ("network", "dino.modeling.DINO"),
        ("network", {"_target_": "os.system", "command": "ls"}),
    ],
)
def test_other_values_are_refused_in_one_line(name, value):
    with pytest.raises(ValueError, match=name) as error:
        tiny_config(**{name: value})
    assert "\n" not in str(error.value)


def test_values_that_are_set_later_are_refused_when_the_model_is_built(tmp_path):
    from dino.hf import DinoDetrForObjectDetection

    config = tiny_config()
    config.num_queries = 0
    with pytest.raises(ValueError, match="num_queries is 0"):
        DinoDetrForObjectDetection(config)


def test_a_described_network_is_checked():
    network = tiny_config().describe()
    config = tiny_config(network=network, num_labels=4)
    assert config.describe()["decoder"]["num_classes"] == 4  # it follows the labels
    assert len(build_network({"network": config.describe()}).decoder.class_heads[0].bias) == 4
    for key, value in {"pretrained": "x", "num_layers": 10**7, "name": "/etc/passwd"}.items():
        bad = json.loads(json.dumps(network))
        bad["neck"]["backbone" if key != "num_layers" else "lateral"] = {key: value}
        with pytest.raises(ValueError, match=f"network: .*{key if key != 'name' else 'passwd'}"):
            tiny_config(network=bad)


def test_a_field_beside_a_described_network_can_not_be_changed(tmp_path):
    config = tiny_config(network=tiny_config().describe())
    for name in ("num_queries", "hidden_size", "backbone"):
        with pytest.raises(ValueError, match=f"{'d_model' if name == 'hidden_size' else name}=.* would change nothing"):
            setattr(config, name, 64)
    config.num_queries = config.num_queries
    config.bbox_cost = 3.0
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_queries=5 would change nothing"):
        AutoConfig.from_pretrained(tmp_path, num_queries=5)
    config.network = None
    config.num_queries = 5
    assert config.describe()["query_selection"]["num_queries"] == 5


def test_a_file_can_not_name_another_file(tmp_path):
    DinoDetrConfig(**TINY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "backbone_checkpoint": "https://example.com/x.pth"}))
    assert AutoConfig.from_pretrained(tmp_path).backbone_checkpoint is None
    assert AutoConfig.from_pretrained(tmp_path, backbone_checkpoint="mine.pth").backbone_checkpoint == "mine.pth"


def test_the_lines_of_a_saved_folder_ask_for_no_weights():
    """Norms and frozen layers stay those of the pre-trained backbone."""
    config = DinoDetrConfig(backbone_checkpoint="x.pth")
    before = config.describe()["neck"]["backbone"]
    assert (before["norm"], before["freeze"]) == ("FrozenBN", ["conv1", "bn1", "layer1"])
    config.update(config.without_pretrained_backbone())
    assert config.describe()["neck"]["backbone"] == before
    assert (config.use_pretrained_backbone, config.backbone_checkpoint) == (False, None)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_package_alone_imports_no_transformers():
    result = run_python("import sys, dino, dino.api; print('transformers' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_without_transformers_one_line_names_the_extra():
    result = run_python("import sys; sys.modules['transformers'] = None\nimport dino.hf")
    assert result.stderr.strip().splitlines()[-1] == (
        'ImportError: dino.hf needs transformers: pip install "dino-detectron2[hf]"'
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"num_heads": 4}, {"encoder_attention_heads": 4, "decoder_attention_heads": 4}),
        ({"d_ffn": 64}, {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}),
        ({"use_dn": False}, {"num_denoising": 0}),
        ({"dn_number": 7}, {"num_denoising": 7}),
    ],
)
def test_other_names_change_a_saved_config(tmp_path, names, expected):
    DinoDetrConfig(backbone="resnet18").save_pretrained(tmp_path)
    changed = DinoDetrConfig.from_pretrained(tmp_path, **names)
    assert {name: getattr(changed, name) for name in expected} == expected
    assert not {"num_heads", "d_ffn", "use_dn"} & changed.to_dict().keys()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"id2label": ["red"]}, "id2label is .*: a dict of the labels 0, 1, … -> names was expected"),
        ({"id2label": {"red": 0}}, "id2label is "),
        ({"id2label": {"0": "red", "5": "green"}}, "id2label is "),
        ({"label2id": 3}, "label2id is 3: a dict of name -> label was expected"),
        ({"num_labels": "3"}, "num_labels is '3': a whole number was expected"),
        ({"to_dict": 3}, "'to_dict' is no field of a config, but a method"),
    ],
)
def test_fields_of_other_kinds_are_named(field, message):
    with pytest.raises(ValueError, match=message):
        DinoDetrConfig(**{**TINY, **field})
