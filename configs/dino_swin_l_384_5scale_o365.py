"""DINO, Swin-L, 5 scales, trained on Objects365 to be fine-tuned on COCO by dino_swin_l_384_5scale_o365_coco.py.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_5scale_o365.py \
        --num-gpus 8 --num-machines 8 --machine-rank 0 --dist-url tcp://HOST:PORT \
        --train all.json objects365 --val held_out.json objects365/val \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: none on Objects365 itself. Objects365 is given as files in COCO format: 365 classes. As in
the paper, the first 5,000 of its 80,000 validation images are for validation, and all others are trained on:

    dino data split objects365/val.json objects365/val rest.json held_out.json --val-first 5000
    dino data merge objects365/train.json objects365/train rest.json objects365/val all.json

Set as stated by the paper (appendix D.2): the backbone, its ImageNet-22k weights, the data, 26 epochs, 64 images in a
batch (64 A100 with one each), activation checkpointing, mixed precision, 1000 denoising queries. Not stated, and chosen
here: 5 scales, the learning rates (1e-4, not scaled to the batch), the epoch of their drop (24), the augmentation and
900 queries as for COCO; float16, and the backbone's blocks alone recomputed, as the official program offers.
The learning rate falls after 24 epochs. Not trained here.

217,787,414 parameters, 1535.5 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 26
lr_multiplier.milestones = [24]
train.amp.enabled, train.amp.dtype = True, "float16"
model.num_classes = 365
# 1000 queries: 500 positives and 500 negatives. The paper's table 7 counts queries of DN (1000, 200, 100) apart from
# pairs of CDN (100, which are 200 queries). Read as pairs, it would be num_denoising=1000.
model.network.denoising.num_denoising = 500
dataloader.train.total_batch_size = 64
dataloader.train.dataset.name = "objects365_train"  # replaced by the files of the command line
dataloader.test.dataset.name = dataloader.evaluator.dataset_name = "objects365_val"
