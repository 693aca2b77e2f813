"""COCO with DETR's augmentation: flip, then resize, with an equal chance of a crop in between."""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from omegaconf import OmegaConf

from dino.d2.data_loading import Evaluator, OneOf, ShortSide, TestMapper, TrainMapper, dataset
from dino.d2.training.sampler import TrainLoader

SIZES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]  # of the short side in training, pixels
MAX_SIZE = 1333  # bound of the long side

dataloader = OmegaConf.create()
dataloader.train = L(TrainLoader)(
    dataset=L(dataset)(name="coco_2017_train", filter_empty=False),
    mapper=L(TrainMapper)(
        augmentations=[
            L(T.RandomFlip)(),
            L(OneOf)(
                branches=[
                    [L(ShortSide)(sizes=SIZES, max_size=MAX_SIZE)],
                    [
                        L(ShortSide)(sizes=[400, 500, 600]),
                        L(T.RandomCrop)(crop_type="absolute_range", crop_size=(384, 600)),
                        L(ShortSide)(sizes=SIZES, max_size=MAX_SIZE),
                    ],
                ]
            ),
        ]
    ),
    total_batch_size=16,
    repeat_threshold=0.0,  # e.g. 0.1: classes on less than a tenth of the images have theirs shown more often
    sorted_batches=1,  # e.g. 8: so many share out their images by shape, which saves padding
    num_workers=4,
    seed="${oc.select:train.seed,0}",
    settings="${oc.select:train,null}",
)
dataloader.test = L(
    build_detection_test_loader
)(
    dataset=L(dataset)(name="coco_2017_val"),  # the images to evaluate on
    mapper=L(TestMapper)(augmentations=[L(ShortSide)(sizes=SIZES[-1:], max_size=MAX_SIZE)]),  # what happens to each
    num_workers=4,  # reading processes
)
dataloader.evaluator = L(Evaluator)(
    dataset_name="coco_2017_val",
    output_dir="${train.output_dir}/inference",
    max_dets_per_image=100,
)
