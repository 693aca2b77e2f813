"""Yacs configs: with `add_dino_config`, Detectron2's own DefaultTrainer and DefaultPredictor build a DINODetector.

cfg = get_cfg()
add_dino_config(cfg)
cfg.MODEL.DINO.NUM_CLASSES = 3
"""

from __future__ import annotations

import functools

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.solver.build import _generate_optimizer_class_with_gradient_clipping, get_default_optimizer_params
from torch import nn

from dino.d2.training.optimizer import tenth_for_backbone
from dino.layers import HungarianMatcher, SetCriterion
from dino.modeling.assembly import build_dino
from dino.modeling.detector import IMAGENET_MEAN, IMAGENET_STD
from dino.modeling.transformer import HIDDEN_DIM


def add_dino_config(cfg: CfgNode) -> None:
    """Add `MODEL.DINO` and set what DINO needs elsewhere: R50 without pre-trained weights, 4 scales, RGB images.

    The keys hold the published 4-scale settings; see `build_dino` for their meaning. There is no key for AdamW:
    DefaultTrainer uses SGD unless `build_adamw` overrides its `build_optimizer`.
    """
    cfg.MODEL.META_ARCHITECTURE = "DINODetector"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.PIXEL_MEAN = list(IMAGENET_MEAN)
    cfg.MODEL.PIXEL_STD = list(IMAGENET_STD)
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.BASE_LR = 1e-4
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    cfg.MODEL.DINO = CfgNode(
        {
            "NUM_CLASSES": 80,
            "NUM_LEVELS": 4,
            "NUM_QUERIES": 900,
            "NUM_DENOISING": 100,
            "EMBED_DIM": 256,
            "NUM_HEADS": 8,
            "HIDDEN_DIM": HIDDEN_DIM,
            "ENCODER_LAYERS": 6,
            "DECODER_LAYERS": 6,
            "MAX_DETECTIONS": 300,
            "SCORE_THRESH_TEST": 0.0,  # lowest score of a returned detection; AP needs 0
        }
    )


def build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW as published, from the keys of `SOLVER`: a tenth of the learning rate for the backbone, and the norm
    of all gradients together clipped to `CLIP_GRADIENTS.CLIP_VALUE`.

        class Trainer(DefaultTrainer):
            build_optimizer = staticmethod(build_adamw)
    """
    params = get_default_optimizer_params(model, base_lr=cfg.SOLVER.BASE_LR, lr_factor_func=tenth_for_backbone)
    clip = functools.partial(nn.utils.clip_grad_norm_, max_norm=cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE)
    adamw = _generate_optimizer_class_with_gradient_clipping(torch.optim.AdamW, global_clipper=clip)
    return adamw(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)


def parts_from_config(cfg: CfgNode) -> dict:
    """Constructor arguments of `DINODetector` from a yacs config."""
    dino = cfg.MODEL.DINO
    backbone = build_backbone(cfg)
    network = build_dino(
        backbone=backbone,
        in_features=sorted(backbone.output_shape(), key=lambda name: backbone.output_shape()[name].stride),
        num_classes=dino.NUM_CLASSES,
        num_levels=dino.NUM_LEVELS,
        num_queries=dino.NUM_QUERIES,
        num_denoising=dino.NUM_DENOISING,
        embed_dim=dino.EMBED_DIM,
        num_heads=dino.NUM_HEADS,
        hidden_dim=dino.HIDDEN_DIM,
        encoder_layers=dino.ENCODER_LAYERS,
        decoder_layers=dino.DECODER_LAYERS,
    )
    return {
        "network": network,
        "criterion": SetCriterion(matcher=HungarianMatcher()),
        "num_classes": dino.NUM_CLASSES,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "max_detections": dino.MAX_DETECTIONS,
        "score_thresh": dino.get("SCORE_THRESH_TEST", 0.0),  # configs saved before the key was there lack it
    }
