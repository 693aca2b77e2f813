"""The models of DINO in transformers: construction, loading, losses, outputs and their errors."""

import copy
import socket
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("timm")

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection

from dino.hf import DinoDetrForObjectDetection, DinoDetrModel
from dino.hf.recording import Recorder
from dino.layers import HungarianMatcher, SetCriterion
from dino.modeling import TimmBackbone, TorchvisionBackbone
from dino.modeling.detector import Detector
from dino.structures import Target
from dino.utils.files import UserError
from dino.weights.network_parts import build_network
from tests.hf.tiny_model import TINY, tiny_model
from tests.tiny import random_batch, random_targets, stirred, tiny_network

IS_4 = transformers.__version__.startswith("4.")


def batch(*counts, height=96, width=128, num_classes=3):
    """Images, their mask and labels; all images but the first are padded."""
    images, padding = random_batch(len(counts), height, width)
    targets = random_targets(*counts, num_classes=num_classes)
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    return {"pixel_values": images, "pixel_mask": (~padding).long(), "labels": labels}


def reload(model, folder, **options):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, output_loading_info=True, **options)


def assert_whole(info):
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def assert_same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# Loading and saving


@pytest.mark.parametrize("shared", [True, False])
def test_a_saved_model_is_read_back(shared, tmp_path):
    model = stirred(tiny_model(shared_heads=shared)).eval()
    found, info = reload(model, tmp_path)
    assert_whole(info)
    assert_same_state(model, found)
    heads = found.model.network.decoder.class_heads
    assert (heads[0] is heads[1]) == shared
    assert ("model.network.decoder.class_heads.1.bias" in model.state_dict()) != shared
    inputs = batch(1, 2)
    with torch.no_grad():
        expected, seen = model(**inputs), found(**inputs)
    assert torch.equal(expected.logits, seen.logits)
    assert torch.equal(expected.pred_boxes, seen.pred_boxes)
    assert torch.equal(expected.loss, seen.loss)


def test_a_loaded_neck_has_the_fast_layout(tmp_path):
    found, _ = reload(tiny_model(), tmp_path)
    layouts = [
        x.is_contiguous(memory_format=torch.channels_last) for x in found.model.network.neck.parameters() if x.ndim == 4
    ]
    assert layouts
    assert all(layouts)


@pytest.mark.parametrize("shared", [True, False])
def test_a_state_dict_is_loaded_strictly(shared):
    model, other = (stirred(tiny_model(seed, shared_heads=shared)) for seed in (0, 1))
    other.load_state_dict(model.state_dict())
    assert_same_state(model, other)
    bare = tiny_model(2, shared_heads=shared).model
    bare.load_state_dict(model.model.state_dict())
    assert_same_state(model.model, bare)
    whole = {f"model.network.{name}": x for name, x in other.model.network.state_dict().items()}
    model.load_state_dict(whole)  # of the network itself, with every name


def test_the_auto_classes_know_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    detector, bare = (kind.from_pretrained(tmp_path) for kind in (AutoModelForObjectDetection, AutoModel))
    assert (type(detector), type(bare)) == (DinoDetrForObjectDetection, DinoDetrModel)
    assert_same_state(model, detector)
    assert_same_state(model.model, bare)
    assert type(AutoModelForObjectDetection.from_config(model.config)) is DinoDetrForObjectDetection


def mismatched(info):
    """Names of the tensors; transformers 4 gives no shapes with them."""
    return {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}


def frozen(model):
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def test_frozen_layers_stay_frozen(tmp_path):
    model = tiny_model(backbone_kwargs={"norm": "FrozenBN", "freeze": ["conv_stem", "blocks.0"]})
    assert len(frozen(model)) > 1
    found, info = reload(model, tmp_path)
    assert_whole(info)
    assert frozen(found) == frozen(model)
    found, _ = reload(model, tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert frozen(found) == frozen(model)


@pytest.mark.parametrize("shared", [True, False])
def test_a_head_for_other_labels_begins_as_a_new_one(shared, tmp_path):
    model = stirred(tiny_model(shared_heads=shared, category_ids=[5, 6, 9]))
    found, info = reload(model, tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert {key.split(".")[-2] for key in mismatched(info)} <= {"0", "1", "class_head", "label_embed"}
    network = found.model.network
    for head in (*network.decoder.class_heads, network.query_selection.class_head):
        assert torch.equal(head.bias, torch.full((5,), head.bias[0].item()))
        assert head.bias[0].item() == pytest.approx(-4.59512)
        assert 0 < head.weight.std() < 0.2
    assert len(network.denoising.label_embed.weight) == 5
    assert network.denoising.label_embed.weight.std() > 0.5
    loaded = {name: x for name, x in model.state_dict().items() if name not in mismatched(info)}
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in loaded.items())
    assert (found.config.category_ids, found.config.num_labels) == (None, 5)
    assert found.config.label2id == {name: label for label, name in found.config.id2label.items()}
    found.train()(**batch(1, num_classes=5)).loss.backward()


def test_names_of_other_labels_alone_are_enough(tmp_path):
    names = {0: "cat", 1: "dog"}
    found, _ = reload(tiny_model(), tmp_path, id2label=names, ignore_mismatched_sizes=True)
    assert len(found.model.network.decoder.class_heads[0].bias) == 2
    assert (found.config.id2label, found.config.label2id) == (names, {"cat": 0, "dog": 1})


def test_other_labels_without_leave_are_refused(tmp_path):
    with pytest.raises(RuntimeError):
        reload(tiny_model(), tmp_path, num_labels=5)


def test_what_a_folder_lacks_begins_as_in_a_new_network(tmp_path):
    model = stirred(tiny_model())
    lacking = ("box_heads", "sampling_offsets", "level_embed", "label_embed")
    state = {name: x for name, x in model.state_dict().items() if not any(word in name for word in lacking)}
    absent = model.state_dict().keys() - state.keys()
    model.save_pretrained(tmp_path, state_dict=state)
    found, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert len(absent) > 10
    assert set(info["missing_keys"]) == absent or IS_4  # which takes shared tensors for loaded ones
    network = found.model.network
    assert not network.decoder.box_heads[1][-1].weight.any()
    assert not network.decoder.box_heads[1][-1].bias.any()
    new = tiny_model(1).model.network
    for name in ("encoder.layers.0.attention", "decoder.layers.1.cross_attention"):
        assert torch.equal(
            network.get_submodule(name).sampling_offsets.bias, new.get_submodule(name).sampling_offsets.bias
        )
    assert network.level_embed.std() > 0.5
    assert found.model._new is None


def test_buffers_that_are_not_saved_survive(tmp_path):
    small = {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    model = tiny_model(backbone="swin_tiny_patch4_window7_224", backbone_kwargs=small).eval()
    hidden = [f"{name}.{key}" for name, part in model.named_modules() for key in part._non_persistent_buffers_set]
    hidden = [name for name in hidden if model.get_buffer(name) is not None]
    assert len(hidden) == 5
    found, info = reload(model, tmp_path)
    assert_whole(info)
    for name in hidden:
        assert torch.equal(found.get_buffer(name), model.get_buffer(name))


def test_construction_initialises_once(monkeypatch):
    built = []
    monkeypatch.setattr(
        "dino.hf.modeling_dino_detr.build_network", lambda config: built.append(1) or build_network(config)
    )
    model = tiny_model()
    assert len(built) == 1
    torch.manual_seed(0)
    expected = build_network({"network": model.config.describe()})
    state = model.model.network.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in expected.state_dict().items())


def test_loading_builds_one_network(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    built = []
    monkeypatch.setattr(
        "dino.hf.modeling_dino_detr.build_network", lambda config: built.append(1) or build_network(config)
    )
    DinoDetrForObjectDetection.from_pretrained(tmp_path)
    assert len(built) == 1


def test_labels_that_the_network_lacks_are_not_saved(tmp_path):
    for model in (tiny_model(), tiny_model().model):
        model.config.id2label = {0: "red", 1: "green"}
        with pytest.raises(ValueError, match=r"has 2 labels, but the network 3\. .*ignore_mismatched_sizes=True"):
            model.save_pretrained(tmp_path)
        model.config.id2label = {0: "red", 1: "green", 2: "yellow"}
        model.save_pretrained(tmp_path)
        assert type(model).from_pretrained(tmp_path).config.id2label[2] == "yellow"


def test_no_memory_is_taken_on_the_meta_device():
    with torch.device("meta"):
        model = tiny_model()
    assert all(x.is_meta for x in model.state_dict().values())
    if IS_4:
        return  # it has marked the parameters as initialised
    model.to_empty(device="cpu")
    model.init_weights()
    assert torch.equal(
        model.model.network.decoder.class_heads[1].bias, tiny_model().model.network.decoder.class_heads[1].bias
    )


def test_a_described_network_is_built_and_saved(tmp_path):
    network = copy.deepcopy(tiny_model().config.describe())
    network["encoder"]["_target_"] = "dino.modeling.variants.DenseFusionEncoder"
    model = tiny_model(network=network)
    assert type(model.model.network.encoder).__name__ == "DenseFusionEncoder"
    found, info = reload(model, tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert not info["missing_keys"]
    assert type(found.model.network.encoder).__name__ == "DenseFusionEncoder"
    assert len(found.model.network.decoder.class_heads[0].bias) == 2


def test_an_unknown_backbone_is_one_clear_error():
    with pytest.raises(ValueError, match=r"can't build the network of this config: .*no model 'test_efficientnot'"):
        tiny_model(backbone="test_efficientnot")


def test_a_network_beyond_all_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("dino.hf.modeling_dino_detr._LARGEST", {})  # a smaller bound, for machines of little memory
    with pytest.raises(ValueError, match=r"of this config: .* up to a tensor of shape \(1000000, 256\)"):
        tiny_model(d_model=256, num_queries=1_000_000)


# Weights of a pre-trained backbone


def backbone_file(folder, backbone):
    """A file of the weights of a backbone, and its tensors."""
    with torch.no_grad():
        state = {
            name: torch.rand_like(x) if x.is_floating_point() else x for name, x in backbone.body.state_dict().items()
        }
    torch.save(state, folder / "backbone.pth")
    return folder / "backbone.pth", state


def assert_backbone(model, state):
    body = model.model.network.neck.backbone.body.state_dict()
    assert {name for name in body if not torch.equal(body[name], state[name])} == set()


def test_a_new_model_starts_with_the_weights_of_a_file(tmp_path):
    file, state = backbone_file(tmp_path, TimmBackbone(TINY["backbone"]))
    fields = {"use_pretrained_backbone": True, "backbone_checkpoint": str(file)}
    model = tiny_model(**fields)
    assert_backbone(model, state)
    assert_backbone(AutoModelForObjectDetection.from_config(model.config), state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found, info = reload(model, tmp_path / "saved")
    assert_whole(info)
    assert not any(x.any() for x in found.parameters())  # the file is not read again
    assert (found.config.use_pretrained_backbone, found.config.backbone_checkpoint) == (False, None)
    assert (model.config.use_pretrained_backbone, model.config.backbone_checkpoint) == (True, str(file))
    again = AutoModelForObjectDetection.from_config(AutoConfig.from_pretrained(tmp_path / "saved"))
    assert type(again.model.network.neck.backbone.body.bn1) is type(model.model.network.neck.backbone.body.bn1)


def test_loading_never_fetches_a_backbone(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.use_pretrained_backbone = True  # as a folder of another program can say

    def locate(address):
        raise AssertionError(address)

    monkeypatch.setattr("dino.hf.modeling_dino_detr.locate", locate)
    assert_same_state(DinoDetrForObjectDetection.from_pretrained(tmp_path, config=config), model)
    with pytest.raises(AssertionError, match="timm://test_efficientnet"):
        DinoDetrForObjectDetection(config)


def test_a_file_of_another_network_is_refused(tmp_path):
    file, _ = backbone_file(tmp_path, TimmBackbone("test_resnet"))
    with pytest.raises(ValueError, match=r"backbone.pth.*use_pretrained_backbone=False"):
        tiny_model(use_pretrained_backbone=True, backbone_checkpoint=str(file))


def test_torchvisions_weights_come_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file, state = backbone_file(tmp_path, TorchvisionBackbone("resnet18"))
    file.rename(tmp_path / "checkpoints/resnet18-f37072fd.pth")
    fields = {"backbone": "resnet18", "use_timm_backbone": False, "use_pretrained_backbone": True}
    model = tiny_model(**fields, backbone_kwargs=None)
    assert_backbone(model, state)
    assert any(name.startswith("model.network.neck.backbone.body.layer1") for name in frozen(model))
    found, info = reload(model, tmp_path / "saved")
    assert_whole(info)
    assert frozen(found) == frozen(model)


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch, server):
    def offline(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(
        UserError, match=r"can't fetch http.*resnet18.*backbone_checkpoint=FILE.*use_pretrained_backbone=F"
    ):
        tiny_model(backbone="resnet18", use_timm_backbone=False, use_pretrained_backbone=True, backbone_kwargs=None)


# Losses


def detector_of(model):
    config = model.config
    criterion = SetCriterion(matcher=HungarianMatcher())
    return Detector(model.model.network, names=list(config.id2label.values()), criterion=criterion)


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)])
def test_losses_are_those_of_the_detector(counts):
    model = stirred(tiny_model()).train()
    inputs = batch(*counts)
    detector = detector_of(model).train()
    sizes = inputs["pixel_mask"].sum((1, 2))
    detector.batch = lambda images: (inputs["pixel_values"], inputs["pixel_mask"] == 0)
    targets = [Target(label["class_labels"], label["boxes"]) for label in inputs["labels"]]
    torch.manual_seed(5)
    expected = detector.losses(list(inputs["pixel_values"]), targets)
    torch.manual_seed(5)
    seen = model(**inputs)
    assert len(sizes) == len(counts)
    assert seen.loss_dict.keys() == expected.keys()
    assert len(expected) == 3 * (2 + 1 + 2)
    assert all(torch.equal(seen.loss_dict[name], value) for name, value in expected.items())
    assert torch.equal(seen.loss, sum(expected.values()))
    seen.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_weights_of_the_config_are_those_of_the_losses():
    weights = {"cls_loss_coefficient": 3.0, "bbox_loss_coefficient": 0.0, "giou_loss_coefficient": 4.0}
    costs = {"class_cost": 1.0, "bbox_cost": 0.0, "giou_cost": 9.0, "focal_alpha": 0.4}
    model = tiny_model(**weights, **costs)
    assert model.criterion.weights == {"ce": 3.0, "bbox": 0.0, "giou": 4.0}
    matcher = model.criterion.matcher
    assert (matcher.class_cost, matcher.l1_cost, matcher.giou_cost, matcher.alpha) == (1.0, 0.0, 9.0, 0.4)
    assert model.criterion.class_loss.alpha == 0.4


def test_evaluation_has_losses_without_denoising():
    model = stirred(tiny_model()).eval()
    inputs = batch(2, 0)
    with torch.no_grad():
        first, second = model(**inputs), model(**inputs)
    assert torch.equal(first.loss, second.loss)
    assert not [name for name in first.loss_dict if "_dn" in name]
    assert {"loss_ce", "loss_ce_0", "loss_giou_interm"} <= first.loss_dict.keys()
    del inputs["labels"]
    with torch.no_grad():
        plain = model(**inputs)
    assert not {"loss", "loss_dict", "auxiliary_outputs"} & plain.keys()
    assert torch.equal(plain.logits, first.logits)


def test_without_auxiliary_losses_the_last_layer_remains():
    model = stirred(tiny_model(auxiliary_loss=False, shared_heads=False))
    inputs = batch(2, 1)
    outputs = model.train()(**inputs)
    assert outputs.auxiliary_outputs is None
    kinds = {"loss_ce", "loss_bbox", "loss_giou"}
    assert outputs.loss_dict.keys() == {f"{kind}{end}" for kind in kinds for end in ("", "_interm", "_dn")}
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
    outputs.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_auxiliary_outputs_are_those_of_the_earlier_layers():
    model = tiny_model(decoder_layers=3).eval()
    outputs = model(**batch(1))
    assert len(outputs.auxiliary_outputs) == 2
    for layer, found in enumerate(outputs.auxiliary_outputs):
        assert torch.equal(found["logits"], outputs.intermediate_logits[:, layer])
        assert torch.equal(found["pred_boxes"], outputs.intermediate_reference_points[:, layer])


def test_without_denoising_training_works():
    model = tiny_model(num_denoising=0).train()
    outputs = model(**batch(2, 1))
    assert outputs.logits.shape == (2, 20, 3)
    outputs.loss.backward()


BOX = torch.tensor([[0.5, 0.5, 0.2, 0.2]])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            {"class_labels": torch.tensor([3]), "boxes": BOX},
            r"labels\[1\]: class_labels go from 3 to 3.*0 to 2.*category_ids",
        ),
        ({"class_labels": torch.tensor([-1]), "boxes": BOX}, r"labels\[1\]: class_labels go from -1"),
        (
            {"class_labels": torch.tensor([1.5]), "boxes": BOX},
            r"labels\[1\]: class_labels must be \(G,\) whole numbers",
        ),
        ({"class_labels": torch.tensor([1, 2]), "boxes": BOX}, r"labels\[1\]: .* and \(1, 4\)"),
        ({"class_labels": torch.tensor(1), "boxes": BOX}, r"labels\[1\]"),
        ({"class_labels": torch.tensor([1]), "boxes": BOX * 90}, r"labels\[1\]: boxes go from 18 to 45, .*fractions"),
        ({"class_labels": torch.tensor([1]), "boxes": BOX * float("nan")}, r"labels\[1\]: boxes go from nan"),
        ({"class_labels": torch.tensor([1]), "boxes": -BOX}, r"labels\[1\]: boxes go from -0.5"),
        (
            {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, -0.009]])},
            r"labels\[1\]: boxes go from -0.009",
        ),
        ({"class_labels": ["red"], "boxes": BOX}, r"labels\[1\]: class_labels and boxes must be tensors"),
        ({"class_labels": [1, 1], "boxes": [[0.5, 0.5, 0.1, 0.1], [1]]}, r"labels\[1\]: .* must be tensors"),
        ({"labels": torch.tensor([1]), "boxes": BOX}, r"labels\[1\] must be a dict of class_labels and boxes"),
        (BOX, r"labels\[1\] must be a dict"),
    ],
)
def test_wrong_labels_are_one_clear_error(label, message):
    inputs = batch(1, 1)
    inputs["labels"][1] = label
    for model in (tiny_model().train(), tiny_model().eval()):
        with pytest.raises(ValueError, match=message) as error:
            model(**inputs)
        assert "\n" not in str(error.value)


def test_labels_of_other_forms_are_read():
    model = tiny_model().eval()
    inputs = batch(1, 0)
    expected = model(**inputs).loss
    inputs["labels"][0]["class_labels"] = inputs["labels"][0]["class_labels"].int()
    inputs["labels"][0]["boxes"] = inputs["labels"][0]["boxes"].double()
    inputs["labels"][1] = {"class_labels": torch.tensor([]), "boxes": torch.tensor([]), "image_id": torch.tensor([7])}
    assert torch.equal(model(**inputs).loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": []}, "labels must be a list of 2 dicts"),
        ({"labels": {"class_labels": 1}}, "labels must be a list of 2 dicts"),
        ({"pixel_values": torch.zeros(2, 1, 96, 128)}, r"pixel_values must be \(B, 3, H, W\), not \(2, 1, 96, 128\)"),
        ({"pixel_values": torch.zeros(3, 64, 96)}, r"pixel_values must be"),
        ({"pixel_values": torch.zeros(0, 3, 64, 96)}, r"pixel_values must be .* not \(0, 3, 64, 96\)"),
        ({"pixel_values": torch.zeros(2, 3, 0, 96)}, r"pixel_values must be .* not \(2, 3, 0, 96\)"),
        ({"pixel_values": torch.zeros(2, 3, 96, 128).byte()}, r"pixel_values .* torch.uint8: normalised images"),
        ({"pixel_values": [torch.zeros(3, 96, 128)] * 2}, r"pixel_values must be .* not list: .*return_tensors=.pt."),
        ({"pixel_mask": [[1]]}, r"pixel_mask must be \(2, 96, 128\), as pixel_values, not list"),
        ({"pixel_mask": torch.zeros(2, 96, 128)}, r"pixel_mask is 0 all over an image: it must be 1 in the image"),
        (
            {"pixel_mask": torch.ones(2, 128, 96)},
            r"pixel_mask must be \(2, 96, 128\), as pixel_values, not \(2, 128, 96\)",
        ),
    ],
)
def test_wrong_inputs_are_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**batch(1, 1), **change})


# Outputs


def test_predictions_are_those_of_the_network():
    model = stirred(tiny_model()).eval()
    inputs = batch(1, 1)
    del inputs["labels"]
    with torch.no_grad():
        outputs = model(**inputs)
        expected = model.model.network(inputs["pixel_values"], inputs["pixel_mask"] == 0)
    assert torch.equal(outputs.logits, expected.decoder.logits[-1])
    assert torch.equal(outputs.pred_boxes, expected.decoder.boxes[-1])
    assert torch.equal(outputs.intermediate_logits, expected.decoder.logits.transpose(0, 1))
    assert torch.equal(outputs.enc_outputs_class, expected.proposals.logits[0])
    torch.testing.assert_close(outputs.enc_outputs_coord_logits.sigmoid(), expected.proposals.boxes[0])
    decoder = model.model.network.decoder  # the heads read the intermediate states
    read = torch.stack(
        [head(outputs.intermediate_hidden_states[:, i]) for i, head in enumerate(decoder.class_heads)], 1
    )
    torch.testing.assert_close(read, outputs.intermediate_logits)
    assert torch.equal(outputs.last_hidden_state, outputs.intermediate_hidden_states[:, -1])


def test_a_mask_without_padding_changes_nothing():
    model = stirred(tiny_model()).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        plain, masked = model(images), model(images, torch.ones(2, 64, 96))
    assert torch.equal(plain.logits, masked.logits)


def test_padding_is_masked():
    model = stirred(tiny_model()).eval()
    small = torch.randn(1, 3, 64, 96)
    padded = torch.zeros(1, 3, 64, 128)
    padded[..., :96] = small
    mask = torch.zeros(1, 64, 128)
    mask[..., :96] = 1
    with torch.no_grad():
        masked, wrong = model(padded, mask), model(padded)
    assert (masked.pred_boxes - wrong.pred_boxes).abs().max() > 1e-3


STATES = ("encoder_hidden_states", "decoder_hidden_states")
ATTENTIONS = ("encoder_attentions", "decoder_attentions", "cross_attentions")


@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_and_attentions_where_asked_for(training):
    model = stirred(tiny_model(encoder_layers=2)).train(training)
    inputs = batch(2, 1)
    plain = model(**inputs)
    assert not {*STATES, *ATTENTIONS} & plain.keys()
    found = model(**inputs, output_attentions=True, output_hidden_states=True)
    tokens = found.encoder_last_hidden_state.shape[1]
    assert [tuple(x.shape) for x in found.encoder_hidden_states] == [(2, tokens, 32)] * 3
    assert [tuple(x.shape) for x in found.decoder_hidden_states] == [(2, 20, 32)] * 3
    assert [tuple(x.shape) for x in found.encoder_attentions] == [(2, tokens, 4, 4, 2)] * 2
    assert [tuple(x.shape) for x in found.cross_attentions] == [(2, 20, 4, 4, 2)] * 2
    assert [tuple(x.shape) for x in found.decoder_attentions] == [(2, 4, 20, 20)] * 2
    for weights in (*found.encoder_attentions, *found.cross_attentions):
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones(weights.shape[:3]))
    for weights in found.decoder_attentions:  # matching queries read no denoising queries
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert torch.equal(found.encoder_hidden_states[-1], found.encoder_last_hidden_state)
    network = model.model.network
    torch.testing.assert_close(network.decoder.norm(found.decoder_hidden_states[-1]), found.last_hidden_state)
    assert torch.equal(found.decoder_hidden_states[0], network.query_selection.content.weight.expand(2, -1, -1))
    assert found.logits.shape == (2, 20, 3)


def test_attention_weights_are_those_that_the_layers_use():
    """What queries read of each other's values, weighted by them, is what the layer reads."""
    model = stirred(tiny_model()).eval()
    attention, seen = model.model.network.decoder.layers[0].self_attention, []
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    weights = model(**batch(1), output_attentions=True).decoder_attentions[0]
    x, expected = seen[0]
    weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    values = nn.functional.linear(x, weight, bias).unflatten(-1, (4, -1)).transpose(1, 2)  # (B, M, Q, D)
    read = attention.out_proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(read, expected)


def test_the_config_can_ask_for_them():
    model = tiny_model(output_hidden_states=True, output_attentions=True).eval()
    assert {*STATES, *ATTENTIONS} <= model(**batch(1)).keys()
    assert not {*STATES, *ATTENTIONS} & model(**batch(1), output_attentions=False, output_hidden_states=False).keys()


def test_without_return_dict_a_tuple_comes():
    model = tiny_model().eval()
    inputs = batch(1)
    outputs, plain = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], outputs.loss)
    assert torch.equal(plain[2], outputs.logits)
    assert len(plain) == len(outputs.to_tuple())


def test_ignored_keys_leave_logits_and_boxes():
    model = tiny_model().eval()
    outputs = model(**batch(1), output_attentions=True, output_hidden_states=True)
    left = [name for name in outputs if name not in model.config.keys_to_ignore_at_inference and name != "loss"]
    assert left == ["loss_dict", "logits", "pred_boxes"]


def test_threads_do_not_mix_their_states():
    model = stirred(tiny_model()).eval()
    images = [torch.randn(1, 3, 96, 96 + 32 * i) for i in range(4)]
    with torch.no_grad():
        expected = [model(image, output_hidden_states=True).encoder_hidden_states[0] for image in images]
    found, ready = {}, threading.Barrier(4)

    def run(i):
        ready.wait()
        for _ in range(5):
            with torch.no_grad():
                found[i] = model(images[i], output_hidden_states=True).encoder_hidden_states[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_a_copy_is_independent():
    model = stirred(tiny_model()).eval()
    other = copy.deepcopy(model)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = model(images, output_attentions=True)
        stirred(model)
        found = other(images, output_attentions=True)
        model(images)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.encoder_attentions[0], expected.encoder_attentions[0])


# Ways to run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = stirred(tiny_model())
    found, info = reload(model, tmp_path, dtype=dtype)
    assert_whole(info)
    assert found.dtype == dtype
    assert {x.dtype for x in found.parameters()} == {dtype}
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        outputs = found(images)
        moved = model.to(dtype).eval()(images)
    assert (outputs.logits.dtype, outputs.pred_boxes.dtype) == (dtype, torch.float32)
    assert torch.equal(outputs.logits, moved.logits)
    found.train()(**batch(1, 2)).loss.backward()


def gradients(model, inputs, **options):
    torch.manual_seed(4)
    model.zero_grad()
    outputs = model(**inputs, **options)
    outputs.loss.backward()
    names = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    return outputs.loss.detach(), {name: grad.clone() for name, grad in names.items()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable`:FutureWarning")
def test_recomputed_activations_give_the_same(tmp_path):
    model = stirred(tiny_model()).train()
    inputs = batch(2, 1)
    loss, expected = gradients(model, inputs)
    names = list(model.state_dict())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = [name for name, _ in model.named_modules() if name.endswith("_checkpoint_wrapped_module")]
    assert {name.split(".")[2] for name in wrapped} == {"neck", "encoder", "decoder"}
    for options in ({}, {"output_attentions": True, "output_hidden_states": True}):
        seen_loss, seen = gradients(model, inputs, **options)
        assert torch.equal(seen_loss, loss)
        assert all(torch.equal(seen[name], grad) for name, grad in expected.items())
    assert list(model.state_dict()) == names
    found, info = reload(model, tmp_path)
    assert_whole(info)
    assert_same_state(found, model)
    model.gradient_checkpointing_enable()  # twice is once
    model.gradient_checkpointing_disable()
    assert not [name for name, _ in model.named_modules() if "_checkpoint_wrapped_module" in name]
    assert torch.equal(gradients(model, inputs)[0], loss)


def test_blocks_are_really_recomputed():
    model = tiny_model().train()
    runs = []
    model.model.network.encoder.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model._set_gradient_checkpointing()
    model(**batch(1)).loss.backward()
    assert len(runs) == 2
    with pytest.raises(ValueError, match="every_n_layers must be 1"):
        model._set_gradient_checkpointing(every_n_layers=2)


@pytest.mark.slow
def test_a_compiled_graph_has_the_same_outputs():
    model = stirred(tiny_model()).eval()
    inputs = {**batch(1, 1), "output_attentions": True, "output_hidden_states": True}
    del inputs["labels"]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected, found = model(**inputs), compiled(**inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_an_image_does_not_depend_on_the_batch():
    model = stirred(tiny_model()).eval()
    inputs = batch(1, 1)
    del inputs["labels"]
    with torch.no_grad():
        together = model(**inputs)
        alone = model(inputs["pixel_values"][1:], inputs["pixel_mask"][1:])
    torch.testing.assert_close(together.logits[1:], alone.logits, atol=1e-4, rtol=1e-4)


def test_the_recorder_keeps_nothing_outside_of_a_run():
    network = tiny_network()
    recorder = Recorder(network)
    images, padding = random_batch(1)
    network(images, padding)
    with recorder.record(False) as run:
        network(images, padding)
    kept = {name: len(values) for name, values in run.items()}
    network(images, padding)
    assert {name: len(values) for name, values in run.items()} == kept
    assert kept["decoder_states"] == 2


def test_pixel_statistics_of_another_kind_are_named(tmp_path, monkeypatch):
    file, _ = backbone_file(tmp_path, TimmBackbone(TINY["backbone"]))
    stated = {"pixel_mean": (127.5,) * 3, "pixel_std": (127.5,) * 3}
    monkeypatch.setattr(TimmBackbone, "pixel_statistics", stated)
    records = []
    monkeypatch.setattr("dino.hf.modeling_dino_detr._logger.warning", records.append)
    tiny_model(use_pretrained_backbone=True, backbone_checkpoint=str(file))
    assert "give the image processor image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]" in records[0]
