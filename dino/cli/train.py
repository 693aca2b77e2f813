"""`dino train`: train a recipe on your data, or evaluate one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dino.cli import new_parser
from dino.utils.files import UsageError, UserError
from dino.utils.overrides import SHORT_NAMES, is_override

_EXAMPLES = """
examples:
  train on your own data:
    dino train dino_r18_small_data --train train.json images --val val.json images --output output/mine
  train on COCO (in the folder DETECTRON2_DATASETS), 8 GPUs:
    dino train dino_r50_4scale_12ep --num-gpus 8
  start from published weights: add --weights dino_r50_4scale_12ep
  continue: add --resume. Change anything: append key=value, for example optimizer.lr=5e-5 train.amp.enabled=True
  evaluate a recipe (`dino eval` also writes a report):
    dino train dino_r50_4scale_12ep --eval-only --weights output/model_final.pth
  several machines, elastic: see docs/scaling.md
A recipe is a name or a file. A recipe is a Python program: run only recipes that you trust.
"""
_ENGINES = ("auto", "detectron2", "plain")


def build_parser(prog: str = "dino train") -> argparse.ArgumentParser:
    """The arguments, and those of Detectron2's programs."""
    parser = new_parser(prog, __doc__, _EXAMPLES, setting_of=_setting_of)
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="RECIPE [key=value ...]",
        help="recipe, by name or file, and settings to change, such as train.epochs=25",
    )
    pair = ("ANNOTATIONS", "IMAGES")
    parser.add_argument("--train", nargs=2, metavar=pair, help="data to train on: JSON file in COCO format, folder")
    parser.add_argument("--val", nargs=2, metavar=pair, help="data to evaluate on, of the same classes")
    parser.add_argument(
        "--weights", metavar="CHECKPOINT", help="start from: a checkpoint, an address, or a name of `dino weights`"
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder of the run (default: the recipe's train.output_dir)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="move a run that is in the output folder aside")
    parser.add_argument(
        "--engine",
        choices=_ENGINES,
        default="auto",
        help="auto: Detectron2's where it is installed (default %(default)s)",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate the weights, train nothing")
    _add_processes(parser)
    _add_old_forms(parser)
    return parser


def _add_processes(parser: argparse.ArgumentParser) -> None:
    """The arguments of several processes, as of Detectron2's programs."""
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine, one for each GPU")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0 on")
    user = os.getuid() if hasattr(os, "getuid") else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + user % 2**14}",  # as in Detectron2
        help="address of machine 0, such as tcp://HOST:29500; a single machine ignores it and takes a free port",
    )


def _add_old_forms(parser: argparse.ArgumentParser) -> None:
    """Flags that have a new form: Detectron2's, and those of earlier versions."""
    parser.add_argument("--config-file", default="", help=argparse.SUPPRESS)
    for split in ("train", "val"):
        for part in ("json", "images"):
            parser.add_argument(f"--{split}-{part}", help=argparse.SUPPRESS)


def _setting_of(name: str, value: str) -> str:
    """The override that a flag such as --epochs or --train.epochs stands for; "" for none."""
    key = name if "." in name else SHORT_NAMES.get(name.replace("-", "_").lower(), "")
    return f"{key}={value or '...'}" if key else ""


def main(argv: Sequence[str] | None = None, prog: str = "dino train") -> None:
    """Run the verb."""
    args = parse(argv, prog)

    from dino.api import choose_engine
    from dino.training.recipe_completion import DataFiles

    files = DataFiles(args.train_json, args.train_images, args.val_json, args.val_images)
    wishes = {"eval_only": args.eval_only, "resume": args.resume, "overwrite": args.overwrite}
    if choose_engine(args.engine) == "plain":
        if args.num_gpus > 1 or args.num_machines > 1:
            raise UserError("several processes need Detectron2 (README.md says how to install it)")
        from dino.training.recipe_run import RecipeJob
        from dino.training.recipe_run import run as run_plain

        run_plain(RecipeJob(args.config_file, args.opts, files, **wishes))
        return

    from dino.d2.training.launch import Job, run
    from dino.d2.training.parallel import Processes

    job = Job(args.config_file, args.opts, files, **wishes)
    run(job, Processes(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url))


def parse(argv: Sequence[str] | None, prog: str = "dino train") -> argparse.Namespace:
    """The arguments: `config_file`, `opts` (overrides alone), one path each for `train_json` and the others.

    Raises:
        UsageError: there is no recipe, or a word is neither a recipe nor an override.
    """
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    args.config_file, args.opts = split_words(args.config_file, args.opts)
    for split in ("train", "val"):
        pair = getattr(args, split)
        if pair:
            setattr(args, f"{split}_json", pair[0])
            setattr(args, f"{split}_images", pair[1])
    for key, value in (("train.init_checkpoint", args.weights), ("train.output_dir", args.output)):
        if value:
            args.opts.append(f"{key}={value}")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


def split_words(recipe: str, words: Sequence[str]) -> tuple[str, list[str]]:
    """Recipe and overrides of the positional words.

    Args:
        recipe: of `--config-file`; "" if the first word that is no override is the recipe.

    Raises:
        UsageError: there is no recipe, or a word is neither.
    """
    words = list(words)
    place = next((i for i, word in enumerate(words) if not is_override(word) or os.path.isfile(word)), None)
    if not recipe and place is not None:
        recipe = words.pop(place)
    if not recipe:
        raise UsageError("name a recipe: dino train RECIPE, for example dino_r18_small_data")
    wrong = next((i for i, word in enumerate(words) if not is_override(word)), None)
    if wrong is not None:
        raise UsageError(f"{words[wrong]!r} is no override: write key=value")
    return recipe, words
