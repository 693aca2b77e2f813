"""As two-stage Deformable DETR: no denoising, contents and boxes from class-agnostic proposals, look forward once.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/ablation/deformable_detr.py \
        --train train.json train --val val.json val

Network, losses and training are otherwise DINO's, so that the two can be compared.
"""

from dino.modeling.variants import LookForwardOnce, ObjectnessCriterion, PureSelection

from .base import dataloader, lr_multiplier, model, optimizer, train

model.network.query_selection._target_ = PureSelection
model.network.query_selection.num_classes = 1
model.criterion._target_ = ObjectnessCriterion
model.network.denoising.num_denoising = 0
model.network.decoder._target_ = LookForwardOnce
