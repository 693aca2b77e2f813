"""Chain 2 of 5: pure query selection (boxes and contents from the encoder, whose proposals have losses), on chain 1.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_2_pure.py \
        --train train.json train --val val.json val
"""

from dino.modeling.variants import PureSelection

from .chain_1_denoising import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = PureSelection
