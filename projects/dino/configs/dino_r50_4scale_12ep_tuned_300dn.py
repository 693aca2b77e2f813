"""DINO, ResNet-50, 4 scales, 12 epochs, with detrex's better settings and 300 denoising queries.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_tuned_300dn.py \
        --num-gpus 8

Published for this setting: 50.0 AP on COCO val2017, by detrex. Differs from that run as dino_r50_4scale_12ep_tuned.py,
which it equals but for 300 denoising pairs. The learning rate falls after 11 epochs. Not trained here.

47,650,316 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_r50_4scale_12ep_tuned import dataloader, lr_multiplier, model, optimizer, train

model.network.denoising.num_denoising = 300
