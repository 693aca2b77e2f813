"""`dino env`: what a bug report needs, and which form of the attention operator runs where, and why."""

import argparse
from collections.abc import Sequence

import dino
from dino.layers.ops.operator_report import operator_lines
from dino.utils.environment import environment_lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report."""
    epilog = "example:\n  dino env > environment.txt"
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser("dino env", description=__doc__, epilog=epilog, formatter_class=formatter).parse_args(argv)
    print("\n".join([f"dino {dino.__version__}", *environment_lines(), *operator_lines()]))


if __name__ == "__main__":
    main()
