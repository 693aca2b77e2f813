"""Chain 3 of 5: negatives join the positives (paper section 3.3), on top of chain 2.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_3_contrastive.py \
        --train-json train.json --train-images train --val-json val.json --val-images val
"""

from dino.layers import ContrastiveDenoising

from .chain_2_denoising import dataloader, lr_multiplier, model, optimizer, train

model.network.denoising._target_ = ContrastiveDenoising
