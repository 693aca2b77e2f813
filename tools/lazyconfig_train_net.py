"""Train or evaluate a LazyConfig recipe: `dino train` for a clone that is not installed."""

import sys

from dino import cli  # comes first: silences warnings of Detectron2's import
from dino.d2.training import launch

if __name__ == "__main__":
    prog = "python tools/lazyconfig_train_net.py"
    sys.exit(cli.guard(lambda: launch.main(sys.argv[1:], prog)))
