"""DINO with ViT-B, windows but in four blocks, and 4 scales of a simple feature pyramid."""

from detectron2.config import LazyCall as L

from dino.d2.detectron2_backbones import vitdet

from .dino_r50 import model

model.network.neck.backbone = L(vitdet)(
    embed_dim=768, depth=12, num_heads=12, global_blocks=[2, 5, 8, 11], drop_path_rate=0.1
)
model.network.neck.in_features = ["p3", "p4", "p5", "p6"]
