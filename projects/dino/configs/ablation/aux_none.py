"""DINO without the losses of decoder layers but the last; the encoder's proposals keep theirs.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/aux_none.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import FinalCriterion

from .base import dataloader, lr_multiplier, model, optimizer, train

model.criterion._target_ = FinalCriterion
