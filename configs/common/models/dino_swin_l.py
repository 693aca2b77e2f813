"""DINO with Swin-L for ImageNet-22k weights of 384 pixels, and 4 scales."""

from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

from .dino_r50 import model

model.network.neck.backbone = L(SwinTransformer)(
    pretrain_img_size=384,
    embed_dim=192,
    depths=[2, 2, 18, 2],
    num_heads=[6, 12, 24, 48],
    window_size=12,
    drop_path_rate=0.2,
    out_indices=[1, 2, 3],
)
model.network.neck.in_features = ["p1", "p2", "p3"]
