"""Chain 5 of 5: negatives join the positives (paper section 3.3), on top of chain 4. This is DINO.

At most 100 pairs, so twice as many denoising queries.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_5_contrastive.py \
        --train train.json train --val val.json val
"""

from dino.layers import ContrastiveDenoising

from .chain_4_twice import dataloader, lr_multiplier, model, optimizer, train

model.network.denoising._target_ = ContrastiveDenoising
