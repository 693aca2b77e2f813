"""DINO, Swin-L, 5 scales, 12 epochs.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_5scale_12ep.py --num-gpus 8 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: 57.3 AP on COCO val2017, by the authors of the paper (IDEA-Research/DINO); 57.5 by detrex
(from weights finetuned on ImageNet-1k, with the settings that dino_swin_b_384_4scale_12ep.py names). Differs from that
run: classes are the 80 of the data, not 91 raw ids, in label embeddings and random labels too, and tokens without an
anchor are selected last. It had 16 GPUs with one image each, which were not padded to another one's size and filled
denoising groups alone. As there, the weights are ImageNet-22k's of 384 pixels, and activations of the backbone are
computed twice (train.activation_checkpointing). The learning rate falls after 11 epochs. Not trained here.

217,567,964 parameters, 1528.8 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.neck.backbone.out_indices = [0, 1, 2, 3]
model.network.neck.in_features = ["p0", "p1", "p2", "p3"]
model.network.neck.num_levels = 5
