"""The first lines of a recipe name exactly the settings in which it differs from the run that its figure comes from.

The published settings below are those of the programs' configuration files and scripts, read at these commits: official
program faa8520, detrex e244e6c, Align-DETR ffb5d77, Stable-DINO be8e142, DAC-DETR 4ebbfc1, Relation-DETR 93714c1.
"""

import re

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("timm", reason="timm is not installed")

import torch
from detectron2.config import LazyConfig, instantiate

from .recipes import RECIPES, ROOT

OFFICIAL = {
    "encoding": (20.0, 0.0),
    "norm_decay": True,
    "keeps_empty": True,
    "any_shapes": True,
    "rounding": "cut",
    "frozen": 2,
    "classes": 91,
    "box_noise": 1.0,
    "lr": 1e-4,
    "iterations": 7393,
    "warm_up": False,
    "images_per_process": 2,
}
DETREX = OFFICIAL | {
    "encoding": (10000.0, -0.5),
    "norm_decay": False,
    "keeps_empty": False,
    "any_shapes": False,
    "rounding": "nearest",
    "frozen": 1,
    "classes": 80,
    "iterations": 7500,
}
FIVE = {"images_per_process": 1}  # 16 processes
TUNED = DETREX | {"norm_decay": True, "frozen": 0, "lr": 2e-4}
DESCENDANT = DETREX | {"classes": 91, "iterations": 7393, "rounding": "cut"}
RUNS = {
    **{f"dino_r50_4scale_{n}ep": OFFICIAL for n in (12, 24, 36)},
    **{f"dino_r50_5scale_{n}ep": OFFICIAL | FIVE for n in (12, 24, 36)},
    **{f"dino_swin_l_384_4scale_{n}ep": OFFICIAL | {"drop_path": 0.2} for n in (12, 36)},
    **{f"dino_swin_l_384_5scale_{n}ep": OFFICIAL | FIVE | {"drop_path": 0.2} for n in (12, 36)},
    "dino_r101_4scale_12ep": DETREX,
    **{f"dino_swin_{s}_4scale_12ep": DETREX | {"drop_path": 0.2} for s in ("s_224", "b_384", "l_224")},
    "dino_swin_t_224_4scale_12ep": DETREX | {"drop_path": 0.1},
    **{f"dino_convnext_{s}_4scale_12ep": DETREX | {"drop_path": 0.0} for s in "tsbl"},
    **{f"dino_focalnet_l_fl3_4scale_{n}ep": DETREX | {"drop_path": 0.3} for n in (12, 36)},
    **{f"dino_focalnet_l_fl4_{n}scale_12ep": DETREX | {"drop_path": 0.3} for n in (4, 5)},
    **{f"dino_vitdet_b_4scale_{n}ep": DETREX | {"drop_path": 0.1} for n in (12, 50)},
    **{f"dino_vitdet_l_4scale_{n}ep": DETREX | {"drop_path": 0.4, "warm_up": True} for n in (12, 50)},
    "dino_r50_4scale_12ep_tuned": TUNED,
    "dino_r50_4scale_12ep_tuned_300dn": TUNED,
    "dino_r50_4scale_12ep_align_detr": DETREX,
    "dino_r50_4scale_12ep_stable_dino": DETREX,
    "dino_r50_4scale_12ep_dac": DESCENDANT
    | {"norm_decay": True, "keeps_empty": True, "any_shapes": True, "frozen": 2, "box_noise": 0.4, "lr": 2e-4},
    "dino_r50_4scale_12ep_relation_detr": DESCENDANT | {"frozen": 2},
}
DROPS = {12: 11, 24: 20, 36: 30, 50: 40}  # epoch after which the rate falls
OTHER_DROPS = {"dino_vitdet_l_4scale_12ep": 9.6, "dino_r50_4scale_12ep_relation_detr": 10}
PHRASES = {
    "encoding": "positions( of tokens)? are encoded with temperature 20 and no offset, not 10000 and -0.5",
    "norm_decay": "norms( and biases)? have weight decay",
    "keeps_empty": "images without objects are kept",
    "any_shapes": "images of any shapes meet in a batch",
    "rounding": "sides are cut to whole pixels, not rounded",
    "frozen": "nothing of the backbone but its stem is frozen there; here res2 is too",
    "classes": "classes are the 80 of the data, not 91 raw ids",
    "box_noise": "boxes are noised by 1.0, not 0.4",
    "lr": "learning rates are twice as high there",
    "iterations": "epochs have 7,393 iterations, not 7,500",
    "warm_up": "The rate has no warm-up; there|there it has no warm-up",
    "images_per_process": "16 GPUs with one image each",
    "drop_path": "There no block is left out at random",
    "drop": "falls after 11 epochs; there after four fifths|falls after 10 epochs there",
}


def load(path):
    return LazyConfig.load(str(path))


def words(path):
    """The first lines without line breaks; of a recipe that names another one for its differences, that one's too."""
    text = " ".join(path.read_text().split('"""')[1].split())
    other = re.search(r"Differs from that run as (\w+)\.py", text)
    return text + " " + words(path.with_stem(other.group(1))) if other else text


def drop_path(backbone):
    """Chance to leave out the last block."""
    if backbone.get("name", "").startswith("convnext"):
        with torch.device("meta"):
            return max(part.p for part in instantiate(backbone).modules() if type(part).__name__ == "StochasticDepth")
    return (backbone.get("options") or backbone).get("drop_path_rate")


def drop_of(cfg):
    """Epochs after which the rate falls, and whether it rises at the start."""
    multiplier = cfg.lr_multiplier
    scheduler = multiplier.get("scheduler", multiplier)
    return scheduler.milestones[0] / scheduler.num_updates * cfg.train.epochs, scheduler is not multiplier


def settings(cfg):
    """What `RUNS` states, of a recipe."""
    network, backbone = cfg.model.network, cfg.model.network.neck.backbone
    drop, warm_up = drop_of(cfg)
    encoding = network.position_encoding
    return {
        "encoding": (encoding.temperatures[0], encoding.offset),
        "norm_decay": cfg.optimizer.params.get("weight_decay_norm") is None,
        "keeps_empty": not cfg.dataloader.train.dataset.get("filter_empty", False),
        "any_shapes": cfg.dataloader.train.sorted_batches == 1,
        "rounding": "cut",  # as tests/data has it
        "frozen": backbone.get("freeze_at"),
        "classes": cfg.model.num_classes,
        "box_noise": network.denoising.box_noise,
        "lr": cfg.optimizer.lr,
        "iterations": 7393 if cfg.train.max_iter is None else None,
        "warm_up": warm_up,
        "images_per_process": cfg.dataloader.train.total_batch_size // 8,  # of the stated command
        "drop_path": drop_path(backbone),
        "drop": drop,
    }


@pytest.mark.parametrize("name", RUNS)
def test_the_stated_differences_are_those_of_the_settings(name):
    (path,) = [path for path in RECIPES if path.stem == name]
    cfg = load(path)
    ours, text = settings(cfg), words(path)
    published = {**RUNS[name], "drop": OTHER_DROPS.get(name, DROPS[cfg.train.epochs])}
    if ours["frozen"] is None:
        published.pop("frozen")  # no ResNet: nothing is frozen in both
    different = {key for key, value in published.items() if ours[key] != pytest.approx(value)}
    differences = text[text.rindex("Differs from that run") :]
    stated = {key for key, phrase in PHRASES.items() if re.search(phrase, differences, re.IGNORECASE)}
    assert stated == different


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_published_figure_has_its_differences(path):
    text = words(path)
    published = re.search(r"Published for this setting: [\d.]+ AP", text)
    assert bool(published) == (path.stem in RUNS or path.stem == "dino_swin_l_384_5scale_o365_coco")
    if published:
        assert "Differs from that run" in text
        assert f"learning rate falls after {drop_of(load(path))[0]:g} epochs" in text
        assert "not checked" not in text
    for number in re.findall(r"here the last one is with a chance of ([\d.]+)", text):
        assert float(number) == pytest.approx(drop_path(load(path).model.network.neck.backbone))


def test_the_epochs_of_released_files():
    """The number in the official program's file names counts epochs from zero."""
    released = dict(re.findall(r'_of_official\(\s*"(\w+)",\s*"checkpoint(\d+)_', published_source()))
    assert len(released) == 10
    for name, number in released.items():
        epochs = load(ROOT / f"configs/{name}.py").train.epochs
        stated = re.search(r"are those of epoch (\d+) of (\d+)", words(ROOT / f"configs/{name}.py"))
        found = stated.groups() if stated else (str(epochs), str(epochs))
        assert found == (str(int(number) + 1), str(epochs)), name


def published_source():
    return (ROOT / "dino/weights/published.py").read_text()


def test_objects365_as_the_paper_states_it():
    """Appendix D.2: 64 and 16 images in a batch, 26 and 18 epochs, mixed precision, checkpointing, 1000 queries."""
    first, second = (load(ROOT / f"configs/dino_swin_l_384_5scale_{name}.py") for name in ("o365", "o365_coco"))
    assert [cfg.dataloader.train.total_batch_size for cfg in (first, second)] == [64, 16]
    assert [cfg.train.epochs for cfg in (first, second)] == [26, 18]
    for cfg in (first, second):
        assert 2 * cfg.model.network.denoising.num_denoising == 1000
        assert cfg.train.amp.enabled
        assert "backbone" in cfg.train.activation_checkpointing
    whole, cropped = second.dataloader.train.mapper.augmentations[1].branches
    assert (min(whole[0].sizes), max(whole[0].sizes), whole[0].max_size) == (720, 1200, 2000)
    assert (min(cropped[2].sizes), max(cropped[2].sizes), cropped[2].max_size) == (720, 1200, 2000)
