"""AdamW as published: weight decay on every parameter, a tenth of the learning rate for the backbone."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from dino.d2.optim import tenth_for_backbone

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", lr_factor_func=tenth_for_backbone),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
    fused=True,  # can leave out a step on the device where a gradient isn't finite
)
