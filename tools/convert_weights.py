"""Convert checkpoints of DINO programs: `dino convert` for a clone that is not installed."""

import sys

from dino.cli import report_errors
from dino.cli.convert import main

if __name__ == "__main__":
    sys.exit(report_errors(main))
