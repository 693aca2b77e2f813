"""Trains the tiny recipe in a process of its own, which can be killed: `python -m tests.d2.tiny_run --folder F`.

KILL_AT=rank:iteration in the environment kills that process with SIGKILL when it first comes to the iteration;
INTERRUPT_AT sends a signal to its whole group, as a terminal does: SIGINT, or SIGTERM with SIGNAL=TERM. A process that
ends with gloo threads exits with 3.
"""

import atexit
import os
import signal
import subprocess
import sys
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from dino.cli import report_errors
from dino.cli.train import build_parser
from dino.d2 import recipe
from dino.d2.training import engine
from dino.d2.training.launch import launch
from dino.d2.training.parallel import Processes
from dino.d2.training.trainer import Trainer

from .recipes import tiny_recipe


class Mortal(Trainer):
    """Dies, or is interrupted, where the environment says, once in the life of a folder."""

    def run_step(self):
        here = f"{comm.get_rank()}:{self.iter}"
        mark = Path(self.checker.output_dir, "killed")
        if here == os.environ.get("KILL_AT") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if here == os.environ.get("INTERRUPT_AT"):
            assert os.getpgrp() in (os.getpid(), os.getppid())  # else it would reach others
            words = ["kill", f"-{os.environ.get('SIGNAL', 'INT')}", "--", f"-{os.getpgrp()}"]
            subprocess.run(words, check=True, start_new_session=True)  # from another process, as from a terminal
        super().run_step()


def end_without_gloo():
    """Exit with 3 if gloo's threads still run (on Linux): while Python ends, they can abort the process."""
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in name for name in threads):
        print("gloo's threads run at the end of the process:", *threads, file=sys.stderr, flush=True)
        os._exit(3)


def main(args):
    """One process."""
    atexit.register(end_without_gloo)
    cfg = tiny_recipe(Path(args.folder), *args.opts, counts=(2, 0, 3, 1, 2, 1))
    flags = {"resume": args.resume, "overwrite": args.overwrite}
    with recipe.claim_output(cfg, eval_only=args.eval_only, **flags) as resume:
        setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="detectron2")
        engine.Trainer = Mortal
        if args.eval_only:
            engine.evaluate_checkpoint(cfg)
        else:
            engine.train(cfg, resume)


if __name__ == "__main__":
    parser = build_parser()
    parser.add_argument("--folder", required=True)
    arguments = parser.parse_args()
    sys.exit(report_errors(lambda: launch(main, Processes(arguments.num_gpus), arguments)))
