"""The learning rate falls to a tenth once, after `milestones` epochs of `train.epochs`. No warm-up."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

lr_multiplier = L(MultiStepParamScheduler)(
    values=[1.0, 0.1],  # factors of the learning rate, one more than there are milestones
    milestones=[11],  # where the next factor begins, in units of which the training has num_updates
    num_updates="${train.epochs}",  # so they are epochs here
)
