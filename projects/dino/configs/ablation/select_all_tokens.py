"""DINO whose proposals are those of all tokens, each with losses, instead of those of the selected ones.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/select_all_tokens.py \
        --train train.json train --val val.json val

Two-stage Deformable DETR trains its encoder so.
"""

from dino.modeling.variants import AllTokenSelection, SeparateCriterion

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = AllTokenSelection
model.criterion._target_ = SeparateCriterion
