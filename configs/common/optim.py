"""AdamW as published: weight decay on every parameter, a tenth of the learning rate for the backbone."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from dino.d2.training.optimizer import tenth_for_backbone

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(  # which parameters are trained, in groups of one learning rate each
        base_lr="${..lr}",  # of the parameters whose factor is 1
        lr_factor_func=tenth_for_backbone,  # name of a parameter -> factor of its learning rate
    ),
    lr=1e-4,  # learning rate for train.reference_batch images per step
    betas=(0.9, 0.999),  # decay of the averages of gradients and of their squares
    weight_decay=1e-4,  # of every parameter, norms and biases too
    fused=True,  # can leave out a step on the device where a gradient isn't finite
)
