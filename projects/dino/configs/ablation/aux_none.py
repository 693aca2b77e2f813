"""DINO with losses of the last decoder layer and of the encoder's proposals only.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/aux_none.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from dino.modeling.variants import FinalCriterion

from .base import dataloader, lr_multiplier, model, optimizer, train

model.criterion._target_ = FinalCriterion
