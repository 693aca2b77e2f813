"""DINO that looks forward once (paper section 3.5, figure 6 a).

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/look_once.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import LookForwardOnce

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = LookForwardOnce
