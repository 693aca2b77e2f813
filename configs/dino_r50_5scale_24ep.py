"""DINO, ResNet-50, 5 scales, 24 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_r50_5scale_24ep.py --num-gpus 8

Published for this setting: 51.3 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO). Differs from that
run: classes are the 80 of the data, not 91 raw ids, in label embeddings and random labels too, and tokens without an
anchor are selected last. It had 16 GPUs with one image each, which were not padded to another one's size and filled
denoising groups alone. Its settings file is not published. Its weights (`checkpoint0022_5scale.pth`) are those of epoch
23 of 24; here the last ones are evaluated. The learning rate falls after 20 epochs (paper, appendix D.3).
Not trained here.

47,247,080 parameters, 826.3 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_r50_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 24
lr_multiplier.milestones = [20]
