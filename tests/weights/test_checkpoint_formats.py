import re

import pytest
import torch

from dino.modeling import TorchvisionBackbone, build_dino, share_heads
from dino.modeling.variants import HybridBranch, LearnedQueries, LearnedSizeSelection, PureSelection
from dino.utils.files import DataError
from dino.weights import convert, recognise, resnet_to_detectron2
from dino.weights.checkpoint_formats import COCO_IDS, UNUSED_LABELS, coco_to_contiguous

from ..tiny import tiny_network
from .states import detrex_state, equal, official_state, randomise


def shared_network(**options):
    model = tiny_network(**options)
    share_heads(model.decoder)
    return randomise(model)


def resnet_network(num_levels=4, **options):
    names = ["res2", "res3", "res4", "res5"][4 - (3 if num_levels == 4 else 4) :]
    backbone = TorchvisionBackbone("resnet50", out_features=names)
    return build_dino(backbone=backbone, in_features=names, num_levels=num_levels, **options)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_official_to_own_and_back(prefix):
    model = shared_network()
    official = official_state(model)
    own = convert({f"{prefix}{name}": value for name, value in official.items()})
    assert torch.equal(own.pop(UNUSED_LABELS), official["label_enc.weight"][3:])
    assert equal(own, model.state_dict())
    own[UNUSED_LABELS] = official["label_enc.weight"][3:]
    assert equal(convert(own, to="official"), official)


def test_detrex_to_own_and_back():
    model = randomise(tiny_network())
    detrex = detrex_state(model)
    own = convert(detrex)
    assert equal(own, model.state_dict())
    assert equal(convert(own, to="detrex"), detrex)


@pytest.mark.parametrize(("num_levels", "keys"), [(4, 626), (5, 630)])
def test_the_published_official_model(num_levels, keys):
    """Number of keys and parameters as counted in the official program."""
    model = resnet_network(num_levels, num_classes=91)
    share_heads(model.decoder)
    official = official_state(model)
    parameters = {id(v): v.numel() for v in dict(model.named_parameters()).values()}
    assert len(official) == keys
    assert sum(parameters.values()) + 256 == {4: 46_893_182, 5: 47_255_806}[num_levels]  # 256: the 92nd label
    own = convert(official)
    assert equal(convert(own, to="official"), official)
    assert equal({k: v for k, v in own.items() if k != UNUSED_LABELS}, model.state_dict())
    hugging_face = convert(own, to="huggingface")
    assert recognise(hugging_face) == "huggingface"
    assert "model.transformer.encoder.layers.5.self_attn_layer_norm.weight" in hugging_face
    assert "model.transformer.encoder.layers.5.fc2.bias" in hugging_face
    assert "model.backbone.conv_encoder.model.layer4.2.bn3.running_var" in hugging_face
    assert "model.transformer.decoder.layers.0.norm1.weight" in hugging_face
    assert "model.input_proj.3.0.weight" in hugging_face
    assert equal(convert(hugging_face, to="official"), official)


def test_the_published_detrex_model():
    model = resnet_network(num_classes=80)
    own = model.state_dict()
    detrex = convert(own, to="detrex")
    assert len(detrex) == 634
    assert "backbone.res5.2.conv3.norm.running_var" in detrex
    assert "backbone.stem.conv1.weight" in detrex
    assert sum(p.numel() for p in model.parameters()) == 47_650_316
    assert convert(detrex).keys() == resnet_to_detectron2(own).keys()


def test_separate_heads_have_no_official_format():
    own = randomise(tiny_network()).state_dict()
    with pytest.raises(DataError, match=r"one pair of heads for all decoder layers.*decoder\.(class|box)_heads\.1"):
        convert(own, to="official")


def test_one_of_two_names_is_enough():
    """The running averages of other programs name each tensor once."""
    model = shared_network()
    official = official_state(model)
    once = {name: value for name, value in official.items() if not re.match(r"(bbox|class)_embed", name)}
    assert equal(convert(once), convert(official))


def test_two_names_with_different_tensors_are_refused():
    official = official_state(shared_network())
    official["transformer.decoder.class_embed.0.bias"] = official["class_embed.0.bias"] + 1
    with pytest.raises(DataError, match=r"class_embed\.0\.bias and transformer\..* are two names of one tensor"):
        convert(official)


def test_unknown_keys_stay():
    official = official_state(shared_network()) | {"something.else": torch.zeros(1)}
    assert "something.else" in convert(official)


def test_other_files_are_refused():
    with pytest.raises(DataError, match=r"no DINO in a known format .*its keys are something\.else"):
        convert({"something.else": torch.zeros(1)})


def test_names_must_not_collide():
    own = tiny_network().state_dict()
    with pytest.raises(ValueError, match="two keys"):
        convert(own | {"network.level_embed": own["level_embed"]})


@pytest.mark.parametrize("to", ["official", "detrex", "huggingface"])
def test_formats_are_recognised(to):
    own = shared_network().state_dict()
    assert recognise(own) == "own"
    assert recognise({f"module.network.{key}": value for key, value in own.items()}) == "own"
    assert recognise(convert(own, to=to)) == to
    assert recognise({"conv1.weight": torch.zeros(1)}) is None


def test_raw_coco_ids_become_contiguous_classes():
    assert len(COCO_IDS) == 80
    assert (COCO_IDS[0], COCO_IDS[11], COCO_IDS[-1]) == (1, 13, 90)
    model = shared_network(num_classes=91)
    own = convert(official_state(model))
    few = coco_to_contiguous(own)
    assert UNUSED_LABELS not in few
    for name in ("decoder.class_heads.1.weight", "query_selection.class_head.bias", "denoising.label_embed.weight"):
        assert len(few[name]) == 80
        assert torch.equal(few[name][11], own[name][13])
    assert torch.equal(few["decoder.box_heads.0.4.bias"], own["decoder.box_heads.0.4.bias"])


@pytest.mark.parametrize("variant", [LearnedQueries, PureSelection])
def test_variants_are_not_written_for_other_programs(variant):
    network = tiny_network()
    network.query_selection = variant(num_queries=12, num_classes=3, embed_dim=32)
    assert set(convert(network.state_dict())) == set(network.state_dict())
    with pytest.raises(DataError, match="only this project has it"):
        convert(network.state_dict(), to="detrex")


def test_learned_sizes_are_written_for_the_official_program_alone():
    network = shared_network()
    network.query_selection = randomise(LearnedSizeSelection(num_queries=12, num_classes=3, embed_dim=32))
    own = network.state_dict()
    official = convert(own, to="official")
    assert torch.equal(official["transformer.two_stage_wh_embedding.weight"], own["query_selection.size.weight"])
    assert equal(convert(official), own)
    for to in ("detrex", "huggingface", "mmdetection"):
        with pytest.raises(DataError, match="its anchors have learned sizes"):
            convert(own, to=to)


@pytest.mark.parametrize("to", ["official", "detrex", "huggingface"])
def test_branches_stay_in_own_files(to):
    """Only training uses them, so the model for another program is complete without."""
    model = shared_network(branches={"many": HybridBranch(num_queries=20, num_classes=3, embed_dim=32)})
    own = model.state_dict()
    without = {name: value for name, value in own.items() if not name.startswith("branches.")}
    assert len(own) - len(without) == 9
    assert equal(convert(own), own)
    assert equal(convert(own, to=to), convert(without, to=to))
    assert not [name for name in convert(own, to=to) if "branches" in name]


def test_rows_of_classes_in_branches_are_chosen_too():
    own = tiny_network(branches={"many": HybridBranch(num_queries=20, num_classes=91, embed_dim=32)}, num_classes=91)
    few = coco_to_contiguous(own.state_dict())
    for name in ("weight", "bias"):
        rows = own.branches["many"].class_head.state_dict()[name]
        assert torch.equal(few[f"branches.many.class_head.{name}"], rows[list(COCO_IDS)])
