"""DINO that selects tokens by whether they hold any object, as two-stage Deformable DETR does.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/select_objectness.py \
        --train train.json train --val val.json val

Contents stay learned. deformable_detr.py goes all the way.
"""

from dino.modeling.variants import ObjectnessCriterion

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection.num_classes = 1
model.criterion._target_ = ObjectnessCriterion
