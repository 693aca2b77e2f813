"""The recipe for small data, made small enough for a test, read without Detectron2."""

from omegaconf import OmegaConf

from dino.training.recipe_completion import DataFiles, complete
from dino.training.recipe_reading import read_recipe
from dino.utils.recipes import find_recipe

from ..coco_files import write_coco

SMALL = find_recipe("dino_r18_small_data")
SHRINK = [
    "model.network.neck.out_channels=64",
    "model.network.encoder.num_layers=1",
    "model.network.encoder.hidden_dim=32",
    "model.network.decoder.num_layers=2",
    "model.network.query_selection.num_queries=20",
    "model.network.denoising.num_denoising=8",
    "model.max_detections=20",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.5.sizes=[48]",
    "dataloader.test.mapper.augmentations.0.sizes=[48]",
    "train.epochs=1",
    "train.eval_epochs=1",
    "train.log_period=1",
    "train.ema.enabled=False",
    "optimizer.lr=2e-4",
]
LOSSLESS = (  # a run that is broken off and resumed: all states that a checkpoint must hold
    "train.amp.enabled=True",
    "train.amp.dtype=float16",
    "train.ema.enabled=True",
    "train.max_iter=6",
    "train.eval_period=3",
    "train.checkpointer.period=2",
    "train.seed=7",
    "train.log_matching=True",
)


def write_sets(folder, **options):
    """Training and validation data."""
    return [write_coco(folder / split, seed=seed, **options) for seed, split in enumerate(("train", "val"))]


def shrink(cfg):
    """Three convolutions for a backbone, and no warm-up."""
    cfg.model.network.neck.backbone = OmegaConf.create({"_target_": "tests.tiny.TinyBackbone"})
    cfg.model.network.neck.in_features = ["res3", "res4", "res5"]
    cfg.lr_multiplier = cfg.lr_multiplier.scheduler
    return cfg


def tiny_recipe(folder, *overrides, **options):
    """Complete, on six images; output goes to `folder`/run."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    train, val = write_sets(folder, **options)
    given = [*SHRINK, f"train.output_dir={folder / 'run'}", *overrides]
    return shrink(complete(read_recipe(str(SMALL)), given, DataFiles(*train, *val)))
