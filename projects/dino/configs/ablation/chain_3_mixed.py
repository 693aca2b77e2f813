"""Chain 3 of 5: mixed query selection (paper section 3.4), on top of chain 2.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_3_mixed.py \
        --train train.json train --val val.json val
"""

from dino.modeling import QuerySelection

from .chain_2_pure import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = QuerySelection
