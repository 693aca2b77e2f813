"""Recipes of the project, made small enough for a test."""

from pathlib import Path

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dino.cli.train import build_parser
from dino.d2 import recipe

from ..coco_files import write_coco
from ..tiny import TinyBackbone
from ..training.tiny_recipe import SHRINK

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*ROOT.glob("configs/*.py"), *ROOT.glob("projects/dino/configs/*.py")])
OTHERS = ("base", "faster_rcnn_r18_fpn", "retinanet_r18_fpn")  # in the folder of the ablations, but no variants of DINO
ABLATIONS = sorted(p for p in ROOT.glob("projects/dino/configs/ablation/*.py") if p.stem not in OTHERS)
DESCENDANTS = ("align_detr", "dac", "hybrid", "matchability", "relation_detr", "stable_dino", "varifocal")
SMALL = ROOT / "projects/dino/configs/dino_r18_small_data.py"


def parse(*arguments, config=SMALL):
    """The command line of `dino train`."""
    return build_parser().parse_args(["--config-file", str(config), *map(str, arguments)])


def load_recipe(*arguments, config=SMALL):
    """The complete recipe of such a command line."""
    args = parse(*arguments, config=config)
    files = recipe.DataFiles(args.train_json, args.train_images, args.val_json, args.val_images)
    return recipe.load_recipe(args.config_file, args.opts, files, eval_only=args.eval_only)


def file_arguments(train=None, val=None):
    """The four arguments for data in COCO format."""
    given = {"train": train, "val": val}
    return [
        word
        for split, files in given.items()
        if files
        for word in (f"--{split}-json", files.annotations, f"--{split}-images", files.images)
    ]


def write_two_sets(folder, **options):
    return [write_coco(folder / split, seed=seed, **options) for seed, split in enumerate(("train", "val"))]


def tiny_recipe(folder, *overrides, arguments=(), **options):
    """The recipe for small data, with a backbone of three convolutions, on six images; output goes to `folder`/run."""
    (folder / "run").mkdir(exist_ok=True)
    train, val = write_two_sets(folder, **options)
    given = [*SHRINK, f"train.output_dir={folder / 'run'}", *overrides]
    cfg = load_recipe(*arguments, *file_arguments(train, val), *given)
    cfg.model.network.neck.backbone = L(TinyBackbone)()
    cfg.model.network.neck.in_features = ["res3", "res4", "res5"]
    cfg.lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[4], num_updates=5)
    return cfg
