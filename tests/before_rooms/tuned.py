"""The recipe beside it in float16, with a wrapped criterion and a factor for two kinds of parameters."""

from detectron2.config import LazyCall as L
from dino.d2.optim import tenth_for_backbone_and_offsets

from dino.layers import Reweighting

from .recipe import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401 (the five parts of a recipe)

model.criterion = L(Reweighting)(criterion=model.criterion, factors={"loss_ce_dn": 0.5})
optimizer.params.lr_factor_func = tenth_for_backbone_and_offsets
train.amp.enabled = True
train.amp.dtype = "float16"
train.ema.enabled = False
train.skip_non_finite = False
train.output_dir = "tuned_run"
