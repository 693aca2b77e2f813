"""`dino train`: train a recipe on your data, or evaluate one."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from dino.cli import arguments, check_arguments, new_parser
from dino.utils.files import UsageError, UserError
from dino.utils.overrides import PARTS, SHORT_NAMES, is_override
from dino.utils.paths import find_data
from dino.utils.recipes import find_recipe

_EXAMPLES = """
examples:
  train on your own data:
    dino train dino_r18_small_data --train train.json images --val val.json images --output output/mine
  train on COCO (in the folder DETECTRON2_DATASETS), 8 GPUs:
    dino train dino_r50_4scale_12ep --num-gpus 8
  start from published weights: add --weights dino_r50_4scale_12ep
  continue: add --resume. Change anything: append key=value, for example optimizer.lr=5e-5 train.amp.enabled=True
  evaluate a recipe (`dino eval` also writes a report):
    dino train dino_r50_4scale_12ep --eval-only --weights output/model_final.pth
  several machines, elastic: see docs/scaling.md
A recipe is a name or a file. A recipe is a Python program: run only recipes that you trust.
"""
_USAGE = """RECIPE [--train ANNOTATIONS IMAGES] [--val ANNOTATIONS IMAGES] [--output FOLDER]
                  [--resume | --overwrite] [more arguments] [key=value ...]"""
_INDEX = re.compile(r"\[(\d+)\]")
_OLD_EXAMPLES = """
examples:
  train on COCO (in the folder DETECTRON2_DATASETS), 8 GPUs:
    %(prog)s --config-file dino_r50_4scale_12ep --num-gpus 8
  train on your own data, no file edited:
    %(prog)s --config-file dino_r18_small_data \\
        --train-json train.json --train-images images --val-json val.json --val-images images
  evaluate: %(prog)s --config-file dino_r50_4scale_12ep --eval-only train.init_checkpoint=output/model_final.pth
  continue: add --resume. Change anything: append key=value, for example optimizer.lr=5e-5 train.amp.enabled=True
`dino train --help` shows shorter forms. A recipe is a Python program: run only recipes that you trust.
"""
_ENGINES = ("auto", "detectron2", "plain")
_VERB = "dino train"


def build_parser(prog: str = _VERB) -> argparse.ArgumentParser:
    """The arguments, and those of Detectron2's programs."""
    examples = _EXAMPLES if prog == _VERB else _OLD_EXAMPLES
    parser = new_parser(prog, __doc__, examples, usage=_USAGE, setting_of=_setting_of)
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="RECIPE [key=value ...]",
        help="recipe, by name or file, and settings to change, such as train.epochs=25",
    )
    pair = ("ANNOTATIONS", "IMAGES")
    parser.add_argument("--train", nargs=2, metavar=pair, help="data to train on: JSON file in COCO format, folder")
    parser.add_argument("--val", nargs=2, metavar=pair, help="data to evaluate on, of the same classes")
    parser.add_argument(
        "--weights", metavar="CHECKPOINT", help="start from: a checkpoint, an address, or a name of `dino weights`"
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder of the run (default: the recipe's train.output_dir)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="move a run that is in the output folder aside")
    parser.add_argument(
        "--engine",
        choices=_ENGINES,
        default="auto",
        help="auto: Detectron2's where it is installed (default %(default)s)",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate the weights, train nothing")
    _add_processes(parser)
    _add_old_forms(parser, shown=prog != _VERB)
    return parser


def _add_processes(parser: argparse.ArgumentParser) -> None:
    """The arguments of several processes, as of Detectron2's programs."""
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine, one for each GPU")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0 on")
    user = os.getuid() if hasattr(os, "getuid") else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + user % 2**14}",  # as in Detectron2
        help="address of machine 0, such as tcp://HOST:29500; a single machine ignores it and takes a free port",
    )


def _add_old_forms(parser: argparse.ArgumentParser, *, shown: bool) -> None:
    """Flags that have a new form: Detectron2's, and those of earlier versions."""
    help_of = (lambda text: text) if shown else lambda text: argparse.SUPPRESS
    parser.add_argument("--config-file", default="", metavar="FILE", help=help_of("recipe, by name or file"))
    for split in ("train", "val"):
        parser.add_argument(f"--{split}-json", help=help_of(f"annotations in COCO format, as in --{split}"))
        parser.add_argument(f"--{split}-images", help=help_of("folder of their images"))


def _setting_of(name: str, value: str) -> str:
    """The override that a flag such as --epochs or --train.epochs stands for; "" for none."""
    key = name if "." in name else SHORT_NAMES.get(name.replace("-", "_").lower(), "")
    return f"{key}={value or '...'}" if key else ""


def main(argv: Sequence[str] | None = None, prog: str = _VERB) -> None:
    """Run the verb."""
    args = parse(argv, prog)

    from dino import api

    api.run(
        args.config_file,
        args.opts,
        train=(args.train_json, args.train_images),
        val=(args.val_json, args.val_images),
        eval_only=args.eval_only,
        resume=args.resume,
        overwrite=args.overwrite,
        engine=args.engine,
        processes={
            "num_gpus": args.num_gpus,
            "num_machines": args.num_machines,
            "machine_rank": args.machine_rank,
            "dist_url": args.dist_url,
        },
    )


def parse(argv: Sequence[str] | None, prog: str = _VERB) -> argparse.Namespace:
    """The arguments: `config_file`, `opts` (overrides alone), one path each for `train_json` and the others.

    Raises:
        UserError: recipe, data or weights are missing, or another thing; a word is no override.
    """
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    check_arguments(parser, {"--resume and --overwrite exclude each other": args.resume and args.overwrite})
    args.config_file, args.opts = _split_words(args.config_file, args.opts, prog)
    for split in ("train", "val"):
        _use_data(args, split, prog)
    if args.train_json and not args.val_json and not args.eval_only:
        raise UsageError(
            "--train without --val: give validation data of the same classes too: --val ANNOTATIONS IMAGES"
        )
    for key, value in (("train.init_checkpoint", args.weights), ("train.output_dir", args.output)):
        if value:
            args.opts.append(f"{key}={value}")
    _check_paths(args.opts, resume=args.resume)
    if args.engine == "detectron2" and not arguments.is_installed("detectron2"):
        raise UserError("--engine detectron2 needs Detectron2, which is not installed: docs/quick_start.md says how")
    return args


def _check_paths(overrides: Sequence[str], *, resume: bool) -> None:
    """Look for the weights and the folder of the run among the overrides.

    Raises:
        UserError: there are no such weights, or the folder can't be written.
    """
    values = {key: text.strip("'\"") for key, _, text in (override.partition("=") for override in overrides)}
    weights = values.get("train.init_checkpoint")
    if weights and not resume:  # a run that resumes has its own
        arguments.find_checkpoint(weights)
    if values.get("train.output_dir"):
        arguments.check_output(values["train.output_dir"])


def _use_data(args: argparse.Namespace, split: str, prog: str) -> None:
    """Set the two paths of a split from either form of its flags.

    Raises:
        UsageError: one of two is missing, or another thing.
    """
    old = [f"{split}_json", f"{split}_images"]
    pair = arguments.join_pairs(split, getattr(args, split), [getattr(args, name) for name in old])
    if all(pair):
        pair = find_data(*pair, before=f"--{split}")
    for name, path in zip(old, pair, strict=True):
        setattr(args, name, path)


def _split_words(recipe: str, words: Sequence[str], prog: str) -> tuple[str, list[str]]:
    """Recipe, found, and overrides of the positional words.

    Args:
        recipe: of `--config-file`; "" if the first word that is no override is the recipe.

    Raises:
        UsageError: there is no recipe, or a word is neither.
    """
    others = [word for word in words if not is_override(word) or (not recipe and os.path.isfile(word))]
    overrides = [word for word in words if word not in others]
    if not recipe:
        recipe, others = _take_recipe(others)
    if others:
        raise UsageError(_describe_word(others[0], words))
    if not recipe:
        raise UsageError(f"name a recipe: {prog} RECIPE, for example dino_r18_small_data")
    find_recipe(recipe)
    return recipe, overrides


def _take_recipe(words: list[str]) -> tuple[str, list[str]]:
    """The first word, unless it is a key, and the rest; "" for none."""
    return ("", words) if not words or _is_key(words[0]) else (words[0], words[1:])


def _is_key(word: str) -> bool:
    """Whether a word that is no recipe looks like the key of a setting, as in `train.epochs 3`."""
    return word.split(".")[0] in PARTS and not os.path.exists(word)


def _describe_word(word: str, words: Sequence[str]) -> str:
    """What a word between overrides may mean: it is part of `key = value`, or of a value with spaces."""
    place = list(words).index(word)
    before = words[place - 1] if place else ""
    after = [*words[place + 1 : place + 3], "...", "..."]
    if word.startswith("=") and _is_key(before):
        return f"write {before}={word[1:] or after[0]}, without spaces"
    if _is_key(word):
        return _join(word, *after[:2])
    if before.endswith("="):
        return f"write {before}{word}, without spaces"
    if "." in word and (meant := _translate(word, after[0])):
        return meant
    if is_override(before):
        return f'{word!r} is no override; for a value with spaces, write "{before} {word}", in quotes'
    return f"{word!r} is no override: write key=value"


def _translate(word: str, after: str) -> str:
    """What a key in the style of another program means: an index in brackets, a yacs key; "" for none."""
    key, equals, value = word.partition("=")
    if equals and _INDEX.search(key):
        dotted = _INDEX.sub(r".\1", key)
        return f"write {dotted}={value}, an index without brackets"
    short = SHORT_NAMES.get(word.lower().rpartition(".")[2])
    return f"{word!r} is no setting: write {short}={after}" if short else ""


def _join(key: str, first: str, second: str) -> str:
    """The message for a key that is followed by its value, or by `= value`."""
    spaced = first.startswith("=")
    return f"write {key}={(first[1:] or second) if spaced else first}" + ", without spaces" * spaced
