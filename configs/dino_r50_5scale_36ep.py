"""DINO, ResNet-50, 5 scales, 36 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_5scale_36ep.py --num-gpus 8

Published for this setting: 51.2 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO). Differs from that
run: classes are the 80 of the data, not 91 raw ids, in label embeddings and random labels too, and tokens without an
anchor are selected last. It had 16 GPUs with one image each, which were not padded to another one's size and filled
denoising groups alone. Its settings file is not published. Its weights (`checkpoint0031_5scale.pth`) are those of epoch
32 of 36; here the last ones are evaluated. The learning rate falls after 30 epochs (paper, appendix D.3).
Not trained here.

47,247,080 parameters, 826.3 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_r50_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 36
lr_multiplier.milestones = [30]
