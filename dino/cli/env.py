"""`dino env`: what a bug report needs, and which form of the attention operator runs where, and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dino.cli import new_parser

_EXAMPLES = """
example:
  dino env > environment.txt
"""


def build_parser() -> argparse.ArgumentParser:
    """No arguments."""
    return new_parser("dino env", __doc__, _EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb."""
    build_parser().parse_args(argv)

    import dino
    from dino.layers.ops.operator_report import operator_lines
    from dino.utils.environment import environment_lines

    print("\n".join([f"dino {dino.__version__}", *environment_lines(), *operator_lines()]))


if __name__ == "__main__":
    main()
