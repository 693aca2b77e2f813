"""DINO, MViTv2-T, 4 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_mvitv2_t_4scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=MViTv2_T_in1k.pyth

Published for this setting: none. The file is Detectron2's. Not trained here.

44,078,316 parameters, 297.7 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling import MViT

from dino.modeling import Decoder

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.network.neck.backbone = L(MViT)(
    embed_dim=96,
    depth=10,
    num_heads=1,
    last_block_indexes=[0, 2, 7, 9],
    drop_path_rate=0.2,
    out_features=["scale3", "scale4", "scale5"],
)
train.init_checkpoint = ""
