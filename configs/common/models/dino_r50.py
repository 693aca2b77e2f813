"""DINO with Detectron2's ResNet-50 and 4 scales. `num_classes` is stated here and nowhere else."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem

from dino.d2 import DINODetector
from dino.layers import ContrastiveDenoising, HungarianMatcher, SetCriterion, SinePositionEncoding
from dino.modeling import DINO, ChannelMapper, Decoder, Encoder, QuerySelection
from dino.modeling.detector import IMAGENET_MEAN, IMAGENET_STD
from dino.modeling.transformer import HIDDEN_DIM

model = L(DINODetector)(
    num_classes=80,  # replaced by the number of classes of the data
    network=L(DINO)(
        neck=L(ChannelMapper)(
            backbone=L(ResNet)(
                stem=L(BasicStem)(  # the first convolution
                    in_channels=3,  # of the images
                    out_channels=64,  # of the stem
                    norm="FrozenBN",  # BN to train from random weights
                ),
                stages=L(ResNet.make_default_stages)(  # the blocks after it
                    depth=50,  # 18, 34, 50, 101 or 152
                    stride_in_1x1=False,  # True for weights from Caffe2, whose blocks halve the size one layer earlier
                    norm="FrozenBN",  # BN to train from random weights
                ),
                out_features=["res3", "res4", "res5"],  # maps that it returns: strides 8, 16 and 32
                freeze_at=2,  # not trained: 2 is the stem and res2, as in the official program; 0 is nothing
            ),
            in_features="${.backbone.out_features}",
            out_channels=256,
            num_levels=4,
        ),
        position_encoding=L(SinePositionEncoding)(
            embed_dim="${..neck.out_channels}", temperatures=[20.0, 20.0], offset=0.0
        ),
        encoder=L(Encoder)(
            num_layers=6,
            embed_dim="${..neck.out_channels}",
            num_heads=8,
            num_levels="${..neck.num_levels}",
            num_points=4,
            hidden_dim=HIDDEN_DIM,
        ),
        query_selection=L(QuerySelection)(
            num_queries=900, num_classes="${...num_classes}", embed_dim="${..neck.out_channels}"
        ),
        denoising=L(ContrastiveDenoising)(
            num_classes="${...num_classes}",
            embed_dim="${..neck.out_channels}",
            num_denoising=100,
            label_noise=0.5,
            box_noise=1.0,
        ),
        decoder=L(Decoder)(
            num_classes="${...num_classes}",
            num_layers=6,
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
    pixel_mean=list(IMAGENET_MEAN),
    pixel_std=list(IMAGENET_STD),
    max_detections=300,
    input_range=None,
)
