"""DINO, ResNet-50, 4 scales, 12 epochs, with DAC-DETR's second pass in training.

    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep_dac.py \
        --num-gpus 8

Published for this setting: 50.9 AP on COCO val2017, by the authors of DAC-DETR (NeurIPS 2023); 50.0 without its class
loss, which is that of Align-DETR. In training, all queries pass the decoder once more without self-attention, and every
object gets up to six predictions of that pass, weighed by their rank. Differs from that run, which is a Deformable DETR
with denoising: position codes of queries stay those of the first boxes there, positions of tokens are encoded with
temperature 20 and no offset, not 10000 and -0.5, boxes are noised by 1.0, not 0.4, the encoder's class loss is focal
and weighs twice there, learning rates are twice as high there, with a tenth of that for sampling offsets, classes are
the 80 of the data, not 91 raw ids, and positives are chosen otherwise, see `ThresholdMatcher`. Inference is that of
DINO. The learning rate falls after 11 epochs. Not trained here.

47,650,316 parameters, 277.5 G multiply-adds at 800x1280; memory: not measured.
"""

from detectron2.config import LazyCall as L

from dino.d2.recipe import add_branch
from dino.layers import IoUAwareLoss
from dino.modeling import Decoder
from dino.modeling.variants import RankedCriterion, SecondPass, ThresholdMatcher

from ....configs.dino_r50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.network.decoder._target_ = Decoder  # a pair of heads for each layer
model.criterion.class_loss = L(IoUAwareLoss)()
add_branch(model, "second", L(SecondPass)(), L(RankedCriterion)(matcher=L(ThresholdMatcher)(), objects_factor=3.0))
