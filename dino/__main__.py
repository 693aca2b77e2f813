"""`python -m dino` is the console command `dino`."""

import sys

from dino.cli import main

if __name__ == "__main__":
    sys.exit(main())
