"""DINO, Swin-L, 4 scales, 36 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_4scale_36ep.py --num-gpus 8 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: 58.0 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO); 58.1 by detrex
(from weights finetuned on ImageNet-1k, with the settings that dino_swin_b_384_4scale_12ep.py names). Differs from that
run: classes are the 80 of the data, not 91 raw ids, in label embeddings and random labels too, and tokens without an
anchor are selected last. Its settings file is not published. Its weights (`checkpoint0029_4scale_swin.pth`) are those
of epoch 30 of 36, so its rate probably fell before that; here the last ones are evaluated. As there, the weights are
ImageNet-22k's of 384 pixels, and activations of the backbone are computed twice (train.activation_checkpointing). The
learning rate falls after 30 epochs (paper, appendix D.3). Not trained here.

217,221,340 parameters, 981.0 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 36
lr_multiplier.milestones = [30]
