"""Recipes without Detectron2 have the networks, the rates, the schedules and the descriptions of Detectron2's road."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from dino.training.recipe_nodes import plain
from dino.training.recipe_parts import build_detector, build_optimizer, build_schedule, check_supported, describe
from dino.training.recipe_reading import read_recipe
from dino.utils.files import UserError
from dino.utils.recipes import recipes
from dino.weights import resnet_to_detectron2

OF_DETECTRON2 = {  # recipe: what it needs of Detectron2
    **dict.fromkeys(("faster_rcnn_r18_fpn", "retinanet_r18_fpn"), "detectron2.model_zoo"),
    **{name: "SwinTransformer" for name in recipes() if "swin" in name},
    **{name: "vitdet" for name in recipes() if "vitdet" in name},
    "dino_mvitv2_t_4scale_12ep": "MViT",
    "dino_regnetx_4gf_4scale_12ep": "regnet",
}
READABLE = [name for name in recipes() if name not in OF_DETECTRON2]
SMALL = ["dino_efficientnet_lite0_small_data", "dino_r18_shapes", "dino_r18_small_data", "relation_detr"]
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in READABLE if name not in SMALL]


def of_both(name):
    """The recipe as Detectron2's road reads it, and as the plain one does; both on the CPU."""
    both = LazyConfig.load(str(recipes()[name])), read_recipe(name)
    for cfg in both:
        cfg.train.device = "cpu"
    return both


@pytest.mark.parametrize("name", OF_DETECTRON2)
def test_what_needs_detectron2_is_refused(name):
    with pytest.raises(UserError, match=f"{OF_DETECTRON2[name]}.*needs Detectron2") as refused:
        check_supported(read_recipe(name))
    assert "\n" not in str(refused.value)


OTHER_PATHS = {  # the path of an import: the shortest one, which Detectron2 writes
    "detectron2.solver.build.get_default_optimizer_params": "detectron2.solver.get_default_optimizer_params",
}


@pytest.mark.parametrize("name", READABLE)
def test_settings(name):
    theirs, ours = (plain(OmegaConf.to_container(cfg, resolve=True)) for cfg in of_both(name))
    ours["optimizer"]["params"]["_target_"] = OTHER_PATHS[ours["optimizer"]["params"]["_target_"]]
    assert ours == theirs


def shapes(detector):
    """Name -> shape of every tensor; torchvision's ResNets by Detectron2's names."""
    state = {name: value for name, value in detector.state_dict().items() if not name.startswith("criterion.")}
    return {name: tuple(value.shape) for name, value in resnet_to_detectron2(state).items()}


def rates(optimizer, detector):
    """Settings -> the names of the parameters that have them."""
    marked = {name: torch.tensor(number) for number, (name, _) in enumerate(detector.named_parameters())}
    names = dict(zip(detector.parameters(), resnet_to_detectron2(marked), strict=True))
    return {
        tuple(sorted((k, str(v)) for k, v in group.items() if k != "params")): {names[p] for p in group["params"]}
        for group in optimizer.param_groups
    }


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_parts(name):
    theirs, ours = of_both(name)
    check_supported(ours)
    assert describe(ours) == describe(theirs)
    model, detector = instantiate(theirs.model), build_detector(ours, ["x"] * 80)
    assert shapes(detector) == shapes(model)
    assert detector.preprocessing[:2] == model.preprocessing[:2]
    assert detector.preprocessing.max_detections == model.preprocessing.max_detections
    theirs.optimizer.params.model = model
    assert rates(build_optimizer(ours, detector), detector) == rates(instantiate(theirs.optimizer), model)
    expected, schedule = instantiate(theirs.lr_multiplier), build_schedule(ours)
    assert [schedule(i / 997) for i in range(997)] == [expected(i / 997) for i in range(997)]
