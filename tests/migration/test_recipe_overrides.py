"""Configurations of the official program become the nearest recipe and its overrides."""

import copy
import functools

import pytest

from dino.migration import recipe_overrides
from dino.migration.converted_values import _FUNCTIONS
from dino.migration.name_map import read_map
from dino.migration.python_settings import parse_options, read_settings
from dino.migration.recipe_overrides import convert_settings, recipe_text
from dino.training.recipe_reading import read_recipe
from dino.utils.files import DataError
from dino.utils.overrides import apply

from .official_files import SCRIPT, write_official

READ = functools.cache(read_recipe)
SELECTION = "model.network.query_selection._target_"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def settings(folder):
    return read_settings(folder / "DINO_4scale.py")


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Each recipe's file runs once."""
    monkeypatch.setattr(recipe_overrides, "read_recipe", lambda name: copy.deepcopy(READ(name)))


def convert(settings, *options, **more):
    return convert_settings({**settings, **parse_options([*SCRIPT, *options])}, **more)


@pytest.mark.parametrize(
    ("name", "options", "recipe"),
    [
        ("DINO_4scale", (), "dino_r50_4scale_12ep"),
        ("DINO_4scale", ("epochs=24", "lr_drop=20"), "dino_r50_4scale_24ep"),
        ("DINO_4scale", ("epochs=36", "lr_drop=30"), "dino_r50_4scale_36ep"),
        ("DINO_5scale", (), "dino_r50_5scale_12ep"),
        ("DINO_5scale", ("epochs=24", "lr_drop=20"), "dino_r50_5scale_24ep"),
        ("DINO_4scale_swin", (), "dino_swin_l_384_4scale_12ep"),
        ("DINO_4scale_swin", ("epochs=36", "lr_drop=30"), "dino_swin_l_384_4scale_36ep"),
        ("DINO_4scale_swin", ("num_feature_levels=5", "return_interm_indices=0,1,2,3"), "dino_swin_l_384_5scale_12ep"),
    ],
)
def test_published_runs_need_no_override(folder, name, options, recipe):
    found = convert(read_settings(folder / f"{name}.py"), *options)
    assert (found.recipe, found.overrides, found.additions) == (recipe, [], {})
    assert [remark.text.partition(",")[0] for remark in found.remarks] == [
        "start from train.init_checkpoint=swin_large_patch4_window12_384_22k.pth"
    ] * ("swin" in name)


def test_the_file_alone_has_the_smaller_noise(settings):
    found = convert_settings(settings)
    assert found.overrides == ["model.network.denoising.box_noise=0.4"]
    assert [(r.key, r.kind) for r in found.remarks] == [("dn_box_noise_scale", "note")]
    assert len(found.never_read) == 9


def test_other_backbones(settings):
    found = convert(settings, "backbone=resnet101")
    decoder = "model.network.decoder._target_=dino.modeling.SharedHeadsDecoder"
    assert found.recipe == "dino_r101_4scale_12ep"
    weights = "train.init_checkpoint=torchvision://resnet101/IMAGENET1K_V1"
    assert found.overrides == ["model.network.neck.backbone.freeze_at=2", weights, decoder]
    found = convert(settings, "backbone=swin_B_224_22k", "use_checkpoint=true")
    assert found.recipe == "dino_swin_b_384_4scale_12ep"
    backbone = "model.network.neck.backbone"
    assert found.overrides == [f"{backbone}.pretrain_img_size=224", f"{backbone}.window_size=7", decoder]


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        (["hidden_dim=128", "nheads=4"], ["model.network.neck.out_channels=128", "model.network.encoder.num_heads=4"]),
        (["use_dn=false"], ["model.network.denoising.num_denoising=0"]),
        (["two_stage_type=no", "embed_init_tgt=false"], [f"{SELECTION}=dino.modeling.variants.LearnedQueries"]),
        (["embed_init_tgt=false"], [f"{SELECTION}=dino.modeling.variants.PureSelection"]),
        (["two_stage_learn_wh=true"], [f"{SELECTION}=dino.modeling.variants.LearnedSizeSelection"]),
        (["two_stage_keep_all_tokens=true"], [
            f"{SELECTION}=dino.modeling.variants.AllTokenSelection",
            "model.criterion._target_=dino.modeling.variants.SeparateCriterion",
        ]),
        (["aux_loss=false"], ["model.criterion._target_=dino.modeling.variants.FinalCriterion"]),
        (
            ["dec_pred_bbox_embed_share=false", "dec_pred_class_embed_share=false"],
            ["model.network.decoder._target_=dino.modeling.Decoder"],
        ),
        (["epochs=50", "lr_drop=40"], ["train.epochs=50", "lr_multiplier.milestones=[40]"]),
        (
            ["epochs=50", "lr_drop=20"],
            ["train.epochs=50", "lr_multiplier.milestones=[20,40]", "lr_multiplier.values=[1.0,0.1,0.01]"],
        ),
        (
            ["epochs=40", "multi_step_lr=true"],
            ["train.epochs=40", "lr_multiplier.milestones=[33]"],
        ),
        (["pe_temperatureW=10000"], ["model.network.position_encoding.temperatures=[20.0,10000.0]"]),
        (["amp=true"], ["train.amp.enabled=True", "train.amp.dtype=float16", "train.amp.evaluation=True"]),
        (["return_interm_indices=[3]"], ["model.network.neck.backbone.out_features=[res5]"]),
        (["data_aug_max_size=1000"], [f"dataloader.{place}.max_size=1000" for place in (
            "train.mapper.augmentations.1.branches.0.0",
            "train.mapper.augmentations.1.branches.1.2",
            "test.mapper.augmentations.0",
        )]),
        (["dilation=true"], [
            "model.network.neck.backbone.stages._target_=dino.d2.detectron2_backbones.dilated_stages"
        ]),
        (["use_ema=true", "ema_decay=0.999"], ["train.ema.enabled=True", "train.ema.decay=0.999"]),
    ],
)  # fmt: skip
def test_overrides(settings, options, overrides):
    found = convert(settings, *options)
    assert found.recipe.startswith("dino_r50_4scale")
    recipe = read_recipe(found.recipe)
    assert set(overrides) <= set(found.overrides) | {f"train.epochs={recipe.train.epochs}"}
    assert len(found.overrides) <= len(overrides)
    apply(recipe, found.overrides)


def test_the_batch_of_all_gpus_keeps_the_learning_rate(settings):
    found = convert(settings, gpus=4)
    assert found.overrides == ["dataloader.train.total_batch_size=8", "optimizer.lr=0.0001"]
    assert convert(settings, gpus=8).overrides == []
    of_a_run = convert_settings(
        {**settings, **parse_options(SCRIPT), "world_size": 1, "config_file": "x", "options": None}
    )
    assert of_a_run.overrides == ["dataloader.train.total_batch_size=2", "optimizer.lr=0.0001"]
    assert of_a_run.remarks == []
    assert [r.key for r in convert(settings, "batch_size=4").remarks] == ["batch_size"]


@pytest.mark.parametrize(
    ("option", "kind", "text"),
    [
        ("pre_norm=true", "left out", "adds one LayerNorm after the encoder"),
        ("masks=true", "left out", "boxes only"),
        ("ema_epoch=5", "missing", "later epoch"),
        ("clip_max_norm=0", "missing", "without clipping"),
        ("num_classes=5", "by hand", "from the data"),
        ("lr_backbone=0.0001", "by hand", "a tenth"),
        ("interm_loss_coef=0.5", "by hand", "dino.layers.LossScaling"),
        ("matcher_type=SimpleMinsumMatcher", "left out", "two objects"),
        ("dec_pred_bbox_embed_share=false", "left out", "one shared head"),
        ("use_detached_boxes_dec_out=true", "missing", "LookForwardOnce"),
        ("dilation=true backbone=swin_L_384_22k", "left out", "patch merging"),
        ("transformer_activation=glu", "left out", "glu is an error"),
        ("mine=1", "no setting of that program", "no file"),
    ],
)
def test_what_is_not_carried_over_is_said(settings, option, kind, text):
    remark = convert(settings, *option.split()).remarks[0]
    assert (remark.key, remark.kind) == (option.partition("=")[0], kind)
    assert text in remark.text


def test_what_no_override_can_change_is_a_recipe(settings, tmp_path):
    found = convert(settings, "focal_alpha=0.3", "param_dict_type=ddetr_in_mmdet", "data_aug_scales=480,512")
    rate = "dino.training.parameter_groups.tenth_for_backbone_and_offsets"
    assert found.additions == {
        "optimizer.params.lr_factor_func": rate,
        "model.criterion.alpha": 0.3,
        "model.criterion.matcher.alpha": 0.3,
    }
    (tmp_path / "mine.py").write_text(recipe_text(found, 'odd"""name.py'))
    recipe = read_recipe(str(tmp_path / "mine.py"))
    assert recipe.model.criterion.alpha == recipe.model.criterion.matcher.alpha == 0.3
    assert recipe.optimizer.params.lr_factor_func("a.sampling_offsets.b") == 0.1
    assert recipe.dataloader.test.mapper.augmentations[0].sizes == [512]
    assert recipe.model.network.encoder.embed_dim == 256


def test_dropout_is_another_class(settings):
    """The class alone would have its own dropout, so the command must not name it without the numbers."""
    found = convert(settings, "dropout=0.0", "transformer_activation=gelu")
    assert found.overrides == []
    classes = {"encoder": "DropoutEncoder", "decoder": "SharedHeadsDropoutDecoder"}
    assert found.additions == {
        f"model.network.{part}.{name}": value
        for part, chosen in classes.items()
        for name, value in (
            ("_target_", f"dino.modeling.variants.{chosen}"),
            ("dropout", 0.0),
            ("activation", "gelu"),
        )
    }


def test_text_of_a_file_is_never_code(settings, tmp_path):
    """Values are written as literals, whatever they say."""
    odd = "dino.utils; open('executed', 'w')"
    found = convert_settings({**settings, "device": odd, "dropout": 0.5})
    text = recipe_text(found, "a.py")
    assert f"train.device = {odd!r}" in text
    assert [line for line in text.splitlines() if "import" in line] == [
        "from dino.training.recipe_reading import read_recipe"
    ]


@pytest.mark.parametrize("value", [None, "x", -1, 10**400, float("inf"), float("nan"), [1], True])
@pytest.mark.parametrize("key", ["focal_alpha", "enc_layers", "weight_decay", "set_cost_giou", "num_select", "seed"])
def test_numbers_are_numbers(settings, key, value):
    with pytest.raises(DataError, match=rf"^{key}=.*: a (whole )?number from 0 to [\d,]+ was expected"):
        convert_settings({**settings, key: value})


def test_counts_are_whole_and_seeds_large(settings):
    with pytest.raises(DataError, match=r"^dec_layers=3\.5: a whole number"):
        convert_settings({**settings, "dec_layers": 3.5})
    assert convert(settings, "seed=20221129").overrides == ["train.seed=20221129"]


@pytest.mark.parametrize("key", ["use_dn", "aux_loss", "two_stage_learn_wh", "multi_step_lr", "dilation", "use_ema"])
def test_truth_values(settings, key):
    default = settings.get(key, False)
    assert convert_settings({**settings, key: int(default)}).overrides == convert_settings(settings).overrides
    for value in ("x", None, [], 2):
        with pytest.raises(DataError, match=rf"^{key}=.*: True or False was expected"):
            convert_settings({**settings, key: value})


def test_weight_decay_as_large_wd(settings):
    found = convert(settings, "param_dict_type=large_wd")
    assert found.additions["optimizer.params.weight_decay_norm"] == 0.0
    assert found.additions["optimizer.params.overrides"]["in_proj_bias"] == {"weight_decay": 0.0}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lr=fast", "lr=fast: a number from 0"),
        ("weight_decay=high", "weight_decay=high: a number"),
        ("enc_layers=6,6", "enc_layers=[6, 6]: a whole number"),
        ("backbone=vgg", "backbone='vgg': the official program has resnet50"),
        ("backbone=1", "backbone='1'"),
        ("lr_drop=0", "lr_drop=0: a whole number from 1"),
        ("epochs=many", "epochs=many: a number"),
        ("epochs=1e300", "epochs=1e+300: a number from 1 to 1,000,000"),
        ("epochs=1000000", "lr_drop: 90,909 drops"),
        ("dn_number=-1", "dn_number=-1"),
        ("data_aug_scales=480", "data_aug_scales=480: a list of numbers"),
        ("return_interm_indices=1,2", "return_interm_indices=[1, 2]"),
        ("two_stage_type=early", "two_stage_type='early'"),
        ("batch_size=none", "batch_size=None: a whole number"),
    ],
)
def test_values_of_another_type(settings, option, message):
    with pytest.raises(DataError) as caught:
        convert(settings, option)
    assert message in str(caught.value)


def test_files_of_other_programs():
    with pytest.raises(DataError, match="no key is a setting of the official program"):
        convert_settings({"model": {"type": "DINO"}, "default_scope": "mmdet"})


def test_every_function_of_the_map_exists():
    named = {setting.convert for setting in read_map("official").settings.values()}
    assert named - {"copy", "none"} == set(_FUNCTIONS)
