"""DINO, Swin-L, 5 scales, fine-tuned on COCO after Objects365, on images of 1.5 times the usual size.

    python tools/lazyconfig_train_net.py --config-file configs/dino_swin_l_384_5scale_o365_coco.py --num-gpus 8 \
        train.init_checkpoint=output/objects365/model_final.pth

Published for this setting: 63.1 AP on COCO val2017 without test-time augmentation, 63.2 with, by the authors of the
paper (IDEA-Research/DINO), who have not published these weights.
Class heads and label embeddings start anew, for the classes are others.

Known from the sources: the backbone, the data, and that test-time augmentation joined its views one to one. From memory
of the paper, not checked: 18 epochs, images of 1.5 times the size. Unknown, and chosen here as for COCO: 5 scales,
batch, learning rates, the epoch of their drop (15), 900 queries, 100 denoising pairs, the sizes, weights and IoU
threshold of test-time augmentation. Not trained here.

217,567,964 parameters, 1526.3 G multiply-adds at 800x1280; memory: not measured.
"""

from .dino_swin_l_384_5scale_12ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 18
lr_multiplier.milestones = [15]

SIZES = [720, 768, 816, 864, 912, 960, 1008, 1056, 1104, 1152, 1200]
whole, cropped = dataloader.train.mapper.augmentations[1].branches
for resize in (whole[0], cropped[2]):
    resize.sizes, resize.max_size = SIZES, 2000
cropped[0].sizes = [600, 750, 900]
cropped[1].crop_size = (576, 900)
dataloader.test.mapper.augmentations[0].update(sizes=[1200], max_size=2000)
del whole, cropped, resize, SIZES  # a recipe's names are its keys
