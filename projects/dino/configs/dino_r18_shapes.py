"""The demonstration: the recipe for small data on synthetic shapes of 192x160 pixels, a few minutes on two CPU cores.

    make demo

writes the data, runs this recipe and draws its predictions. By hand:

    python tools/make_shapes.py datasets/shapes
    python tools/lazyconfig_train_net.py --config-file projects/dino/configs/dino_r18_shapes.py \
        --train-json datasets/shapes/train.json --train-images datasets/shapes/train \
        --val-json datasets/shapes/val.json --val-images datasets/shapes/val train.output_dir=output/shapes
"""

from .dino_r18_small_data import dataloader, lr_multiplier, model, optimizer, train

for mapper in (dataloader.train.mapper, dataloader.test.mapper):
    mapper.augmentations[-1].sizes = [160]
del mapper  # or it would become a key of the recipe
del dataloader.train.mapper.augmentations[1]  # triangles stand upright
model.network.neck.out_channels = 64
model.network.encoder.hidden_dim = 256
model.network.query_selection.num_queries = 50
model.max_detections = 50

train.epochs = 6
train.eval_epochs = 6
