"""Chain 4 of 5: look forward twice (paper section 3.5), on top of chain 3.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/chain_4_twice.py \
        --train train.json train --val val.json val
"""

from dino.modeling import Decoder

from .chain_3_mixed import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder
