"""The demonstration: the recipe for small data on synthetic shapes of 192x160 pixels, a few minutes on two CPU cores.

    make demo

writes the data, runs this recipe and draws its predictions. By hand:

    python tools/make_shapes.py datasets/shapes
    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r18_shapes.py \
        --train datasets/shapes/train.json datasets/shapes/train \
        --val datasets/shapes/val.json datasets/shapes/val train.output_dir=output/shapes
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from dino.d2.data_loading import ShortSide

from .dino_r18_small_data import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.mapper.augmentations = [L(T.RandomFlip)(), L(ShortSide)(sizes=[160])]
dataloader.test.mapper.augmentations = [L(ShortSide)(sizes=[160])]
model.network.neck.out_channels = 64
model.network.encoder.hidden_dim = 256
model.network.query_selection.num_queries = 50
model.max_detections = 50

dataloader.train.total_batch_size = 4
dataloader.train.sorted_batches = 1  # all images have one shape
lr_multiplier = lr_multiplier.scheduler  # no warm-up
train.ema.decay = 0.998
train.epochs = train.eval_epochs = 6
train.max_iter = train.eval_period = train.checkpointer.period = None
