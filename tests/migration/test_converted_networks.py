"""The networks of converted configurations are those of the official program, counted."""

import re

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("detectron2")

from detectron2.config import instantiate

from dino.d2.recipe import read_recipe
from dino.migration.python_settings import parse_options, read_settings
from dino.migration.recipe_overrides import convert_settings, recipe_text
from dino.modeling.network_cost import count_multiply_adds, count_parameters
from dino.utils.overrides import apply
from dino.utils.recipes import find_recipe

from .official_files import SCRIPT, write_official

FIVE_SCALES = ("num_feature_levels=5", "return_interm_indices=0,1,2,3")
# Parameters of the official program's network, built by its own code with num_classes=80 and dn_labelbook_size=79 (its
# table of labels has one row more), so for the 80 classes of COCO: all, trained.
OFFICIAL = {
    ("DINO_4scale", ()): (46_884_456, 46_662_056),
    ("DINO_5scale", ()): (47_247_080, 47_024_680),
    ("DINO_4scale_swin", ()): (217_221_340, 217_221_340),
    ("DINO_4scale_swin", FIVE_SCALES): (217_567_964, 217_567_964),
    ("DINO_4scale_convnext", ()): (371_581_096, 371_581_096),
}
UNUSED = {"DINO_4scale_convnext": 2 * 256}  # a norm of the map of stride 4 there, which nothing reads
CONVNEXT_XL = (348_151_552, 1_243_244_544_000)  # parameters and multiply-adds at 800 x 1280 of its own module
COSTS = re.compile(r"^([\d,]+) parameters, ([\d.]+) G multiply-adds at 800x1280", re.M)


class OnCpu(TorchFunctionMode):
    """Values that constructors read are computed, though all else is on the device `meta`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        values = {"device": "cpu"} if function is torch.linspace else {}
        return function(*args, **{**(kwargs or {}), **values})


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    folder = write_official(tmp_path_factory.mktemp("official"))

    def convert(name, options):
        return convert_settings({**read_settings(folder / f"{name}.py"), **parse_options([*SCRIPT, *options])})

    return convert


def build(conversion):
    """The network, with memory that nothing fills."""
    cfg = apply(read_recipe(conversion.recipe), conversion.overrides)
    with torch.device("meta"), OnCpu():
        network = instantiate(cfg.model).network
    return network.to_empty(device="cpu")


@pytest.mark.parametrize(("name", "options"), OFFICIAL)
def test_parameters_are_those_of_the_official_program(convert, name, options):
    found = count_parameters(build(convert(name, options)))["total"]
    assert tuple(number + UNUSED.get(name, 0) for number in found) == OFFICIAL[name, options]


@pytest.mark.parametrize(("name", "options"), [key for key in OFFICIAL if key[0] != "DINO_4scale_convnext"])
def test_the_recipe_has_the_same_network(convert, name, options):
    """Nothing of it is changed; tests/d2/test_zoo.py counts what the recipe's first lines state."""
    found = convert(name, options)
    parameters, _ = COSTS.search(find_recipe(found.recipe).read_text()).groups()
    assert found.overrides == []
    assert int(parameters.replace(",", "")) == OFFICIAL[name, options][0]


def test_a_written_recipe_is_read_with_detectron2(convert, tmp_path):
    options = ("focal_alpha=0.3", "dropout=0.1", "param_dict_type=ddetr_in_mmdet", "lr_drop=8")
    (tmp_path / "mine.py").write_text(recipe_text(convert("DINO_4scale", options), "DINO_4scale.py"))
    cfg = read_recipe(str(tmp_path / "mine.py"))
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert model.criterion.matcher.alpha == model.criterion.class_loss.alpha == 0.3
    assert type(model.network.encoder).__name__ == "DropoutEncoder"
    assert cfg.optimizer.params.lr_factor_func("sampling_offsets.weight") == 1.0
    assert cfg.optimizer.params.lr_factor_func("layer.sampling_offsets.weight") == 0.1
    assert list(instantiate(cfg.lr_multiplier)._milestones) == [8]


@pytest.mark.parametrize(
    ("option", "part", "name"),
    [
        ("two_stage_type=no", "network.query_selection", "LearnedQueries"),
        ("embed_init_tgt=false", "network.query_selection", "PureSelection"),
        ("two_stage_learn_wh=true", "network.query_selection", "LearnedSizeSelection"),
        ("two_stage_keep_all_tokens=true", "network.query_selection", "AllTokenSelection"),
        ("two_stage_keep_all_tokens=true", "criterion", "SeparateCriterion"),
        ("aux_loss=false", "criterion", "FinalCriterion"),
        ("use_detached_boxes_dec_out=true", "network.decoder", "LookForwardOnce"),
        ("dec_pred_class_embed_share=false", "network.decoder", "Decoder"),
    ],
)
def test_classes_of_overrides_are_built(convert, option, part, name):
    found = convert("DINO_4scale", (option,))
    with torch.device("meta"):
        model = instantiate(apply(read_recipe(found.recipe), found.overrides).model)
    assert type(model.get_submodule(part)).__name__ == name


def test_dilation_is_of_the_last_stage(convert):
    backbone = build(convert("DINO_4scale", ("dilation=true",))).neck.backbone
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == {
        "res3": 8,
        "res4": 16,
        "res5": 16,
    }


def test_multiply_adds(convert):
    found = convert("DINO_4scale", ())
    _, work = COSTS.search(find_recipe(found.recipe).read_text()).groups()
    assert f"{count_multiply_adds(build(found), 1, 800, 1280)['total'] / 1e9:.1f}" == work


def test_the_backbone_of_convnext(convert):
    pytest.importorskip("timm")
    network = build(convert("DINO_4scale_convnext", ()))
    parameters = count_parameters(network)["neck.backbone"][0] + UNUSED["DINO_4scale_convnext"]
    assert (parameters, count_multiply_adds(network, 1, 800, 1280)["neck.backbone"]) == CONVNEXT_XL
