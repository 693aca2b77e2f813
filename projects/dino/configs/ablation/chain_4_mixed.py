"""Chain 4 of 5: mixed query selection (paper section 3.4), on top of chain 3.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_4_mixed.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from dino.modeling import QuerySelection

from .chain_3_contrastive import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = QuerySelection
