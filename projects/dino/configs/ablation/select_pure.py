"""DINO with contents from the encoder's tokens, as their boxes are: pure query selection (paper section 3.4).

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/select_pure.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import PureSelection

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = PureSelection
