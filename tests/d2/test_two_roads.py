"""Recipes without Detectron2 have the networks, the rates, the schedules and the descriptions of Detectron2's road."""

import json
from itertools import islice

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf

from dino.d2.recipe import complete as d2_complete
from dino.modeling.detector import to_target
from dino.training.parameter_groups import parameter_groups, tenth_for_backbone
from dino.training.recipe_completion import DataFiles
from dino.training.recipe_completion import complete as plain_complete
from dino.training.recipe_nodes import plain
from dino.training.recipe_parts import (
    build_detector,
    build_optimizer,
    build_schedule,
    check_supported,
    describe,
    train_loader,
    val_images,
)
from dino.training.recipe_reading import read_recipe, save_recipe
from dino.training.schedules import warm_up
from dino.utils.files import UserError
from dino.utils.recipes import recipes
from dino.weights import load_weights, resnet_to_detectron2

from ..coco_files import write_coco

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


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
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


@pytest.mark.parametrize("method", ["linear", "constant"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_warm_up(method, rescaled):
    arguments = (CosineParamScheduler(1.0, 0.1), 0.05, 0.2, method, rescaled)
    ours, theirs = warm_up(*arguments), WarmupParamScheduler(*arguments)
    assert [ours(i / 499) for i in range(499)] == [theirs(i / 499) for i in range(499)]


OPTIONS = {
    "nothing": {},
    "decay": {"base_lr": 0.1, "weight_decay": 0.01, "weight_decay_norm": 0.0, "weight_decay_bias": 0.5},
    "biases": {"base_lr": 0.1, "bias_lr_factor": 2.0},
    "overrides": {"base_lr": 0.1, "overrides": {"weight": {"lr": 0.3}}, "lr_factor_func": len},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parameter_groups(options):
    """Also their order, by which a checkpoint's state of the optimizer is read."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4), torch.nn.ReLU())
    model.append(model[2])  # shared
    model[0].bias.requires_grad_(False)
    ours, theirs = parameter_groups(model, **options), get_default_optimizer_params(model, **options)
    assert [[id(p) for p in group["params"]] for group in ours] == [[id(p) for p in g["params"]] for g in theirs]
    settings = [[{k: v for k, v in g.items() if k != "params"} for g in groups] for groups in (ours, theirs)]
    assert settings[0] == settings[1]


WRONG = [
    {"lr_factor_func": len},
    {"bias_lr_factor": 2.0},
    {"weight_decay_bias": 0.1, "overrides": {"bias": {"lr": 1.0}}},
]


@pytest.mark.parametrize("options", WRONG)
def test_wrong_parameter_groups(options):
    for make in (get_default_optimizer_params, parameter_groups):
        with pytest.raises(ValueError, match=r"lr|bias"):
            make(torch.nn.Linear(2, 2), **options)


LOADERS = {
    "order and augmentation": ("dino_r18_small_data", (), {"seed": 5, "start": 0, "parts": 1}),
    "from the middle, in parts": ("dino_r18_small_data", (), {"seed": 5, "start": 7, "parts": 2}),
    "repeated": (
        "dino_r18_small_data",
        ("dataloader.train.repeat_threshold=0.9",),
        {"seed": 6, "start": 3, "parts": 1},
    ),
    "combined": (
        "dino_r50_4scale_12ep_dense_o2o",
        ("train.max_iter=8", "dataloader.train.total_batch_size=2", "dataloader.train.mapper.mosaic.side=64"),
        {"seed": 7, "start": 0, "parts": 1},
    ),
}


@pytest.mark.parametrize(("name", "overrides", "begin"), LOADERS.values(), ids=LOADERS)
def test_training_batches(name, overrides, begin, tmp_path):
    train = write_coco(tmp_path / "train", (2, 0, 3, 1, 2, 1, 4))
    val = write_coco(tmp_path / "val", (1, 2), seed=1)
    batches = []
    for cfg, complete, build in zip(
        of_both(name),
        (d2_complete, plain_complete),
        (lambda cfg: instantiate(cfg.dataloader.train), train_loader),
        strict=True,
    ):
        complete(cfg, ["dataloader.train.num_workers=0", *overrides], DataFiles(*train, *val))
        loader = build(cfg)
        loader.begin(**begin)
        batches.append(list(islice(loader, 6)))
    for theirs, ours in zip(*batches, strict=True):
        for entry, (image, target, info) in zip(theirs, ours, strict=True):
            assert {key: entry[key] for key in info} == info
            torch.testing.assert_close(image, entry["image"], rtol=0, atol=0)
            expected = to_target(entry["instances"].gt_classes, entry["instances"].gt_boxes.tensor, image.shape[1:])
            torch.testing.assert_close(target.labels, expected.labels, rtol=0, atol=0)
            torch.testing.assert_close(target.boxes, expected.boxes, rtol=0, atol=1e-5)


def test_validation_images(tmp_path):
    files = write_coco(tmp_path, (2, 0, 3))
    theirs, ours = of_both("dino_r18_small_data")
    d2_complete(theirs, (), DataFiles(*files, *files))
    plain_complete(ours, (), DataFiles(*files, *files))
    mapper, data = instantiate(theirs.dataloader.test.mapper), val_images(ours)
    for entry, (image, objects, found) in zip(instantiate(theirs.dataloader.test.dataset), data, strict=True):
        torch.testing.assert_close(torch.as_tensor(image), mapper(entry)["image"], rtol=0, atol=0)
        assert found["id"] == entry["image_id"]
        boxes = torch.tensor([a["bbox"] for a in entry["annotations"]]).reshape(-1, 4) * 288 / 64
        torch.testing.assert_close(torch.as_tensor(objects["boxes"]), boxes)


def test_each_road_reads_what_the_other_one_saves(tmp_path):
    theirs, ours = of_both("dino_efficientnet_lite0_small_data")
    LazyConfig.save(theirs, str(tmp_path / "theirs.yaml"))
    save_recipe(ours, tmp_path / "ours.yaml")
    read, loaded = read_recipe(str(tmp_path / "theirs.yaml")), LazyConfig.load(str(tmp_path / "ours.yaml"))
    texts = [json.loads(describe(cfg)["config"]) for cfg in (read, loaded, ours)]  # YAML sorts keys
    assert texts[0] == texts[1] == texts[2]
    assert describe(read)["preprocessing"] == describe(loaded)["preprocessing"] == describe(ours)["preprocessing"]
    assert read.optimizer.params.lr_factor_func is loaded.optimizer.params.lr_factor_func is tenth_for_backbone
    check_supported(read)
    assert [build_schedule(read)(x / 50) for x in range(50)] == [
        instantiate(loaded.lr_multiplier)(x / 50) for x in range(50)
    ]
    assert type(build_detector(read, ["x"] * 80).network) is type(instantiate(loaded.model).network)


def test_weights_travel_between_the_roads():
    """A ResNet is Detectron2's on one road, torchvision's on the other."""
    theirs, ours = of_both("dino_r18_shapes")
    model, detector = instantiate(theirs.model), build_detector(ours, ["x"] * 80)
    for source, target in ((detector, model), (model, detector)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.01)
        report = load_weights(target, {"model": source.state_dict()})
        assert not report.fresh
        first, second = (resnet_to_detectron2(part.state_dict()) for part in (source, target))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
