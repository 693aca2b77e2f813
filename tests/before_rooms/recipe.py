"""A person's recipe: every name that recipes import from `dino`, and a network of a few thousand weights."""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.modeling import SwinTransformer
from detectron2.solver.build import get_default_optimizer_params
from dino.d2.backbones import AsBackbone, regnet, vitdet
from dino.d2.data import Evaluator, OneOf, ShortSide, TestMapper, TrainMapper, dataset
from dino.d2.optim import layerwise_params, tenth_for_backbone, tenth_for_backbone_and_offsets
from dino.d2.sampler import TrainLoader
from dino.d2.tiles import TiledDetector
from dino.d2.tta import AugmentedDetector
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

from dino.d2 import DINODetector
from dino.layers import ContrastiveDenoising, HungarianMatcher, Reweighting, SetCriterion, SinePositionEncoding
from dino.modeling import (
    DINO,
    ChannelMapper,
    Decoder,
    Encoder,
    QuerySelection,
    TimmBackbone,
    TorchvisionBackbone,
    build_dino,
)
from dino.modeling.variants import (
    FinalCriterion,
    LearnedPositionEncoding,
    LearnedQueries,
    LookForwardOnce,
    ObjectnessCriterion,
    PatternSelection,
    PlacedEncoder,
    PositiveDenoising,
    PureSelection,
    SeparateCriterion,
    ShiftDenoising,
)

_others = (AsBackbone, AugmentedDetector, FinalCriterion, LearnedPositionEncoding, LearnedQueries, LookForwardOnce)
_others += (ObjectnessCriterion, PatternSelection, PlacedEncoder, PositiveDenoising, PureSelection, Reweighting)
_others += (
    SeparateCriterion,
    ShiftDenoising,
    TiledDetector,
    TimmBackbone,
    TorchvisionBackbone,
    build_dino,
    layerwise_params,
    regnet,
)
_others += (tenth_for_backbone_and_offsets, vitdet)

model = L(DINODetector)(
    num_classes=3,
    network=L(DINO)(
        neck=L(ChannelMapper)(
            backbone=L(SwinTransformer)(
                embed_dim=4, depths=[1, 1, 1], num_heads=[1, 1, 2], window_size=2, out_indices=[1, 2], patch_norm=False
            ),
            in_features=["p1", "p2"],
            out_channels=8,
            num_levels=3,
            norm_groups=4,
        ),
        position_encoding=L(SinePositionEncoding)(
            embed_dim="${..neck.out_channels}", temperatures=[20.0, 20.0], offset=0.0
        ),
        encoder=L(Encoder)(
            num_layers=1,
            embed_dim="${..neck.out_channels}",
            num_heads=2,
            num_levels="${..neck.num_levels}",
            num_points=2,
            hidden_dim=8,
        ),
        query_selection=L(QuerySelection)(
            num_queries=12, num_classes="${...num_classes}", embed_dim="${..neck.out_channels}"
        ),
        denoising=L(ContrastiveDenoising)(
            num_classes="${...num_classes}",
            embed_dim="${..neck.out_channels}",
            num_denoising=6,
            label_noise=0.5,
            box_noise=1.0,
        ),
        decoder=L(Decoder)(
            num_classes="${...num_classes}",
            num_layers=2,
            embed_dim="${..neck.out_channels}",
            num_heads="${..encoder.num_heads}",
            num_levels="${..neck.num_levels}",
            num_points="${..encoder.num_points}",
            hidden_dim="${..encoder.hidden_dim}",
        ),
    ),
    criterion=L(SetCriterion)(
        matcher=L(HungarianMatcher)(class_cost=2.0, l1_cost=5.0, giou_cost=2.0),
        class_weight=1.0,
        l1_weight=5.0,
        giou_weight=2.0,
    ),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    max_detections=10,
)

dataloader = OmegaConf.create()
dataloader.train = L(TrainLoader)(
    dataset=L(dataset)(name="before_train", annotations="data/annotations.json", images="data"),
    mapper=L(TrainMapper)(
        augmentations=[
            L(T.RandomFlip)(),
            L(OneOf)(
                branches=[
                    [L(ShortSide)(sizes=[40, 48], max_size=96)],
                    [
                        L(ShortSide)(sizes=[56, 64]),
                        L(T.RandomCrop)(crop_type="absolute_range", crop_size=(40, 64)),
                        L(ShortSide)(sizes=[40, 48], max_size=96),
                    ],
                ]
            ),
        ]
    ),
    total_batch_size=2,
    repeat_threshold=0.1,
    num_workers=0,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(dataset)(name="before_val", annotations="data/annotations.json", images="data"),
    mapper=L(TestMapper)(augmentations=[L(ShortSide)(sizes=[48], max_size=96)]),
    num_workers=0,
)
dataloader.evaluator = L(Evaluator)(
    dataset_name="before_val", output_dir="${train.output_dir}/inference", max_dets_per_image=10
)

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", lr_factor_func=tenth_for_backbone),
    lr=2e-3,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
    fused=True,
)
lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[5], num_updates=6)

train = dict(
    output_dir="run",
    init_checkpoint="",
    min_backbone=0.95,
    epochs=1,
    eval_epochs=1,
    max_iter=6,
    reference_batch=None,
    grad_accum_steps=1,
    clip_norm=0.1,
    amp=dict(enabled=False, dtype="bfloat16", evaluation=False),
    float32_precision="high",
    compile=False,
    cuda_graphs=0,
    cudnn_benchmark=False,
    activation_checkpointing=[],
    ema=dict(enabled=True, decay=0.9997),
    skip_non_finite=True,
    parallel="ddp",
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=3, max_to_keep=3),
    best=dict(metric="bbox/AP", mode="max", patience=0),
    eval_period=3,
    log_period=1,
    wandb=dict(enabled=False, project="dino", name=None),
    device="cuda",
    seed=42,
    deterministic=False,
)
