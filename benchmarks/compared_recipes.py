"""The recipes that benchmarks/compare_detectors.py trains: one recipe, and the same with a detector of torchvision."""

from __future__ import annotations

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import DictConfig

from dino.utils.recipes import find_recipe

CLOCK = "processor_clock.jsonl"  # in the folder of a run
DINO = "dino"
DETECTORS = {
    DINO: "DINO",
    "faster_rcnn": "Faster R-CNN (torchvision)",
    "retinanet": "RetinaNet (torchvision)",
    "fcos": "FCOS (torchvision)",
}
# Torchvision's rates are 0.02, 0.01 and 0.01 for 16 images.
RATE_PER_IMAGE = {"faster_rcnn": 0.02 / 16, "retinanet": 0.01 / 16, "fcos": 0.01 / 16}
# Torchvision's smallest anchors have 8, 4 and 1 strides of their maps (Faster R-CNN's finest map has stride 4 there, 8
# here). At 3 and 4, at least half (Faster R-CNN) and 95 % (RetinaNet) of the objects of BCCD and raccoons at 288 pixels
# have an anchor of IoU 0.7; at 2, none and a third.
ANCHOR_SCALE = {"faster_rcnn": 4.0, "retinanet": 3.0, "fcos": 1.0}
# As in the recipes for small images: 128 regions of an image are trained on, not 512, so that steps are cheaper.
OPTIONS = {"faster_rcnn": {"box_batch_size_per_image": 128}}
WARM_UP = 0.05  # of the training; torchvision: 1000 iterations
LEAST_FACTOR = 0.001  # of the rate, at the start of the warm-up


def step_schedule() -> DictConfig:
    """Torchvision's: a tenth after 16 of 26 parts, a hundredth after 22."""
    return L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[16, 22], num_updates=26)


def cosine_schedule() -> DictConfig:
    """Half a cosine down to 0."""
    return L(CosineParamScheduler)(start_value=1.0, end_value=0.0)


SCHEDULES = {"step": step_schedule, "cosine": cosine_schedule}


def recipe_for(detector: str, config_file: str, schedule: str) -> DictConfig:
    """Make the recipe of a detector. All but model, optimiser, schedule and clipping is the same for all detectors.

    Args:
        detector: a key of DETECTORS.
        config_file: DINO's recipe, by name or file.
        schedule: a key of SCHEDULES, of torchvision's detectors.

    Raises:
        UserError: there is no such recipe.
    """
    cfg = LazyConfig.load(str(find_recipe(config_file)))
    if detector != DINO:
        _use_torchvision(cfg, detector, schedule)
    cfg.train.ema.enabled = True
    for node, name in ((cfg.dataloader.train, "ClockedLoader"), (cfg.dataloader.evaluator, "ClockedEvaluator")):
        node["_target_"] = f"processor_clock.{name}"
        node["clock"] = f"${{train.output_dir}}/{CLOCK}"
    cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    return cfg


def _use_torchvision(cfg: DictConfig, detector: str, schedule: str) -> None:
    """Put a detector of torchvision, with its usual optimiser, into DINO's recipe."""
    cfg.model = dict(
        _target_="torchvision_detectors.TorchvisionDetector",
        kind=detector,
        backbone=cfg.model.network.neck.backbone,
        num_classes=1,  # the data's, as soon as they are read
        pixel_mean=cfg.model.pixel_mean,
        pixel_std=cfg.model.pixel_std,
        max_detections=cfg.model.max_detections,
        anchor_scale=ANCHOR_SCALE[detector],
        weights=cfg.train.init_checkpoint,
        options=OPTIONS.get(detector, {}),
    )
    cfg.train.init_checkpoint = ""  # the engine loads weights into a DINO only
    cfg.train.clip_norm = float("inf")
    cfg.optimizer = L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(base_lr="${..lr}"),
        lr=RATE_PER_IMAGE[detector] * cfg.dataloader.train.total_batch_size,
        momentum=0.9,
        weight_decay=1e-4,
    )
    cfg.lr_multiplier = L(WarmupParamScheduler)(
        scheduler=SCHEDULES[schedule](), warmup_factor=LEAST_FACTOR, warmup_length=WARM_UP, warmup_method="linear"
    )
