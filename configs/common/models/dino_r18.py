"""DINO for small data: ResNet-18 with trainable BatchNorm, 3 + 3 layers of width 128, 100 queries."""

from .dino_r50 import model

backbone = model.network.neck.backbone
backbone.stem.norm = "BN"
backbone.stages = dict(_target_=backbone.stages._target_, depth=18, norm="BN")
backbone.freeze_at = 0
del backbone  # a recipe's names are its keys, and an override of this one would change nothing
model.network.neck.out_channels = 128
model.network.encoder.num_layers = 3
model.network.encoder.hidden_dim = 512
model.network.decoder.num_layers = 3
model.network.query_selection.num_queries = 100
model.max_detections = 100
