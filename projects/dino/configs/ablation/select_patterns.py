"""DINO with three learned patterns at each of a third of the boxes: 99 queries in all.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/select_patterns.py \
        --train train.json train --val val.json val

The paper compares with ancestors of 300 x 3 queries, where it has 900.
"""

from dino.modeling.variants import PatternSelection, SeparateCriterion

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = PatternSelection
model.network.query_selection.num_queries //= 3
model.criterion._target_ = SeparateCriterion
