"""`dino convert-config`: find the recipe and the overrides for a configuration of the official program.

The file is read as data: nothing of it is executed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dino.cli import check_arguments, new_parser
from dino.utils.files import write_new
from dino.utils.paths import expand
from dino.utils.printable import printable

if TYPE_CHECKING:
    from dino.migration.recipe_overrides import Conversion

_EXAMPLES = """
examples:
  dino convert-config config/DINO/DINO_4scale.py
  with the options of its scripts:
    dino convert-config config/DINO/DINO_4scale.py --options dn_scalar=100 embed_init_tgt=TRUE \\
        dn_label_coef=1.0 dn_bbox_coef=1.0 use_ema=False dn_box_noise_scale=1.0
  of a run of that program, whose number of GPUs it holds:
    dino convert-config logs/DINO/R50-MS4/config_args_all.json
  as a recipe, with settings that no override can change:
    dino convert-config mine/DINO_4scale.py --output mine.py
docs/names.md lists every setting of that program, detrex, MMDetection and transformers with its name here.
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = new_parser("dino convert-config", __doc__, _EXAMPLES)
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a configuration file of the official program (.py), or its config_args_all.json",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=(),
        metavar="KEY=VALUE",
        help="as of that program: they replace the file's values",
    )
    parser.add_argument(
        "--gpus", type=int, help="how many it ran on: batch_size is of one (default: the recipe's batch)"
    )
    parser.add_argument("--output", type=Path, metavar="RECIPE.py", help="also write a recipe; it must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb.

    Raises:
        DataError: the configuration can't be read, or is none of the official program.
        UserError: the recipe can't be written.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    output = Path(expand(args.output)) if args.output else None
    problems = {
        "--gpus must be at least 1": args.gpus is not None and args.gpus < 1,
        "--output must end in .py": output is not None and output.suffix != ".py",
    }
    check_arguments(parser, problems)

    from dino.migration.python_settings import parse_options, read_settings
    from dino.migration.recipe_overrides import convert_settings, recipe_text

    options = parse_options(args.options)
    conversion = convert_settings({**read_settings(args.config), **options}, args.gpus)
    if output:
        write_new(output, lambda part: part.write_text(recipe_text(conversion, args.config), encoding="utf-8"))
    print("\n".join(_report(conversion, args.config, output)))


def _report(conversion: Conversion, source: str, output: Path | None) -> list[str]:
    """The command, and what it does not carry over."""
    words = [shlex.quote(str(output))] if output else [conversion.recipe, *map(shlex.quote, conversion.overrides)]
    lines = [
        f"{printable(source, 200)}: the nearest recipe is {conversion.recipe}",
        "",
        " ".join(["dino train", *words]),
    ]
    if conversion.additions:
        where = f", in {output}:" if output else ", so the command lacks them: add --output mine.py"
        lines += ["", f"Settings that no override can change{where}"]
        lines += [f"  {key} = {printable(value, 200)}" for key, value in conversion.additions.items()]
    return lines + _remarks(conversion)


def _remarks(conversion: Conversion) -> list[str]:
    """The remarks, by kind."""
    lines = []
    for kind in dict.fromkeys(remark.kind for remark in conversion.remarks):
        found = [remark for remark in conversion.remarks if remark.kind == kind]
        lines += ["", f"{kind.capitalize()}:"]
        lines += [f"  {printable(r.key)}={printable(r.value)}: {r.text}" for r in found]
    if conversion.never_read:
        lines += ["", f"Never read by that program: {', '.join(conversion.never_read)}"]
    return lines
