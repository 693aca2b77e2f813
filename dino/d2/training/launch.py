"""Train or evaluate a LazyConfig recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from detectron2.engine import default_setup
from torch.multiprocessing import ProcessRaisedException

from dino.d2 import recipe
from dino.inference.cpu import keep_freed_memory
from dino.utils.files import DataError

from . import engine, parallel
from .memory_saving import OutOfMemory

EXAMPLES = """
examples:
  train on COCO (DETECTRON2_DATASETS holds it), 8 GPUs:
    %(prog)s --config-file dino_r50_4scale_12ep --num-gpus 8
  train on your own data, no file edited:
    %(prog)s --config-file dino_r18_small_data \\
        --train-json train.json --train-images images --val-json val.json --val-images images
  evaluate (`dino eval` writes a page about it):
    %(prog)s --config-file dino_r50_4scale_12ep --eval-only \\
        train.init_checkpoint=output/model_final.pth
  several machines, elastic: docs/scaling.md has the lines
  continue: add --resume. Change anything: append key=value, for example optimizer.lr=5e-5 train.amp.enabled=True
A recipe is named, or given as a file. It is a Python program: run only recipes that you trust.
"""


def work(args: argparse.Namespace) -> None:
    """One process: train, or with --eval-only evaluate."""
    keep_freed_memory()
    cfg = recipe.load_recipe(args)
    recipe.choose_output(cfg, args)
    default_setup(cfg, args)
    if args.eval_only:
        engine.evaluate_checkpoint(cfg)
    else:
        recipe.scale_to_batch(cfg, args.opts)
        engine.train(cfg, args.resume)


def launch(function: Callable, args: argparse.Namespace) -> None:
    """Call `function(args)` in as many processes as the arguments ask for.

    Raises:
        DataError: memory ran out, or one of several processes failed; its last line is the message.
    """
    try:
        parallel.launch(function, args)
    except OutOfMemory as error:
        raise DataError(str(error)) from error
    except ProcessRaisedException as error:
        raise DataError(str(error).rstrip().splitlines()[-1]) from error


def main(argv: Sequence[str], prog: str = "dino train") -> None:
    """The verb."""
    parser = recipe.argument_parser(EXAMPLES)
    parser.prog = prog
    launch(work, parser.parse_args(argv))
