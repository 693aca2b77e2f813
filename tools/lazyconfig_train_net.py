"""Train or evaluate a LazyConfig recipe: `dino train` for a clone that is not installed."""

import sys

from dino.cli import report_errors
from dino.cli.train import main

if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(sys.argv[1:], "python tools/lazyconfig_train_net.py")))
