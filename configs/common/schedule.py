"""The learning rate falls to a tenth once, after `milestones` epochs of `train.epochs`. No warm-up."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[11], num_updates="${train.epochs}")
