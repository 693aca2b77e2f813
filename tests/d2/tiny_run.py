"""Trains the tiny recipe in processes of its own, which can be killed: `python -m tests.d2.tiny_run --folder F [options]`.

KILL_AT=rank:iteration in the environment kills that process with SIGKILL when it comes to the iteration for the first time.
"""

import os
import signal
import sys
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from dino.d2 import engine, recipe
from dino.d2.parallel import launch
from dino.d2.trainer import Trainer

from .recipes import tiny_recipe


class Mortal(Trainer):
    """Dies where KILL_AT says, once in the life of a folder."""

    def run_step(self):
        rank, iteration = map(int, os.environ.get("KILL_AT", "-1:-1").split(":"))
        mark = Path(self.guard.output_dir, "killed")
        if (comm.get_rank(), self.iter) == (rank, iteration) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().run_step()


def main(args):
    """One process."""
    cfg = tiny_recipe(Path(args.folder), *args.opts, counts=(2, 0, 3, 1, 2, 1))
    recipe.choose_output(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="detectron2")
    engine.Trainer = Mortal
    if args.eval_only:
        engine.evaluate_checkpoint(cfg)
    else:
        engine.train(cfg, args.resume)


if __name__ == "__main__":
    parser = recipe.argument_parser("")
    parser.add_argument("--folder", required=True)
    arguments = parser.parse_args()
    try:
        launch(main, arguments)
    except Exception as error:
        sys.exit(f"error: {str(error).rstrip().splitlines()[-1]}")
