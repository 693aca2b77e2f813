"""DINO, Swin-L, 5 scales, trained on Objects365 to be fine-tuned on COCO by dino_swin_l_384_5scale_o365_coco.py.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_5scale_o365.py --num-gpus 8 \
        --train objects365_train.json objects365 --val objects365_val.json objects365 \
        train.init_checkpoint=swin_large_patch4_window12_384_22k.pth

Published for this setting: none on Objects365 itself. Objects365 is given as files in COCO format: 365 classes.

Known from the sources: the backbone, its ImageNet-22k weights and the data. From memory of the paper, not checked: 26
epochs. Unknown, and chosen here as for COCO: 5 scales, batch, learning rates, the epoch of their drop (24), the
augmentation, 900 queries, 100 denoising pairs. Not trained here.

217,787,414 parameters, 1533.0 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 26
lr_multiplier.milestones = [24]
model.num_classes = 365
dataloader.train.dataset.name = "objects365_train"  # replaced by the files of the command line
dataloader.test.dataset.name = dataloader.evaluator.dataset_name = "objects365_val"
