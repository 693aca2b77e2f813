"""DINO, ResNet-50, 5 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_5scale_12ep.py --num-gpus 8

Published for this setting: 49.4 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO). Differs from that
run: classes are the 80 of the data, not 91 raw ids, in label embeddings and random labels too, and tokens without an
anchor are selected last. It had 16 GPUs with one image each, which were not padded to another one's size and filled
denoising groups alone. The learning rate falls after 11 epochs. Not trained here.

47,247,080 parameters, 826.3 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.backbone.out_features = ["res2", "res3", "res4", "res5"]
model.network.neck.num_levels = 5
