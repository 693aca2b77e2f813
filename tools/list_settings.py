"""Write docs/settings.md: every argument of the programs, every key of a recipe, every part that a recipe can name.

The descriptions come from the `--help` of the programs, the comments of the recipes in configs/common, and the
docstrings of the parts. A setting without a description is an error.

    python tools/list_settings.py            (--check: only compare the page with the code)
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from generated_page import markdown_table, write_page

from dino import cli  # comes first: silences warnings of Detectron2's import
from dino.utils.files import UserError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/settings.md"
RECIPE = ROOT / "configs/dino_r50_4scale_12ep.py"
PARTS = """dino.modeling:Decoder
dino.modeling:TorchvisionBackbone,TimmBackbone dino.d2.detectron2_backbones:vitdet,regnet,dilated_stages,AsBackbone
dino.d2.data_loading:ShortSide,OneOf dino.d2.combining_mapper:CombiningMapper dino.data.mixing:Mosaic,MixUp
dino.d2.training.optimizer:layerwise_params
dino.d2.augmented_detector:AugmentedDetector
dino.layers.loss_scaling:LossScaling
dino.modeling.variants:LearnedQueries,PatternSelection,LearnedPositionEncoding,DropoutEncoder,DropoutDecoder
dino.layers:IoUAwareLoss,SquaredIoULoss,VarifocalLoss,MatchabilityLoss
dino.modeling.variants:PositionModulatedMatcher,ThresholdMatcher,MixedMatchingCriterion,RankedCriterion
dino.modeling.variants:OneToManyCriterion,CombinedCriterion
dino.modeling.variants:Branches,SharedHybridBranch,HybridBranch,SecondPass"""  # that the recipe does not name
VARIABLES = {
    "CUDA_HOME": "`python -m dino.layers.ops.build`: the folder of CUDA's compiler, if not in `PATH`",
    "CXX": "`python -m dino.layers.ops.build`: the only C++ compiler to try, such as `g++-12` (default: all)",
    "DETECTRON2_DATASETS": "the folder of COCO and the other data sets that Detectron2 knows (default `datasets`)",
    "DINO_BCCD": "tests: the folder of the BCCD photographs",
    "DINO_CACHE": "the folder of downloaded files (default `dino-detectron2` in the platform's folder of caches)",
    "DINO_DEFORM_ATTN": "attention operator: `auto` (default), `reference` (plain PyTorch) or `compiled` (or an error)",
    "DINO_GOLDEN": "tests: the folder of the official program's numbers",
    "DINO_MIRROR": "`http(s)://HOST[/path]`, which replaces `https://` in all addresses of files to download",
    "DINO_TEST_DEVICE": "tests: the device for tests that support it",
    "DINO_TORCH_HEADERS": "tests: the folder of other torch versions' headers (default `output/torch_headers`)",
    "FORCE_CUDA": "`python -m dino.layers.ops.build`: 1 to compile for CUDA without a GPU",
    "FVCORE_CACHE": "the folder of weights that Detectron2 downloaded (default `~/.torch/iopath_cache`): they are used",
    "HF_ENDPOINT": "`hf://`, `timm://`: the address of Hugging Face's hub or its copy (default `https://huggingface.co`)",
    "HF_HOME": "the folder of Hugging Face's programs, whose cache and token are used (default `~/.cache/huggingface`)",
    "HF_HUB_CACHE": "the cache of Hugging Face's programs (default `hub` in `HF_HOME`)",
    "HF_HUB_OFFLINE": "`hf://`, `timm://`: 1 to use what is in a cache, and nothing else",
    "HF_TOKEN": "`hf://`, `timm://`: the person's token for private files; sent to `HF_ENDPOINT` only",
    "HF_TOKEN_PATH": "the file of that token (default `token` in `HF_HOME`)",
    "LOCALAPPDATA": "Windows: in its folder `dino-detectron2` is the cache, unless `DINO_CACHE` is set",
    "PYTHONWARNINGS": "Python's: with it, warnings of libraries are shown too",
    "TORCH_CUDA_ARCH_LIST": "`python -m dino.layers.ops.build`: the GPUs to compile for, for example `8.0;9.0+PTX`",
    "WORLD_SIZE": "set by torchrun: processes of a training; more than one needs Detectron2",
    "XDG_CACHE_HOME": "Linux: the same (default `~/.cache`)",
}
OF_THE_MACHINE = {"device": "a GPU where there is one", "dist_url": "a port of this machine"}  # defaults
OF_THE_BASE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
HEAD = """# Every setting

`python tools/list_settings.py` writes this page from the code: change the code.

- [Programs](#programs): arguments of the command line
- [Recipes](#recipes): keys for `key=value` on the command line, or in a recipe
- [Other parts](#other-parts) that a recipe can name
- [yacs](#yacs): keys of Detectron2's older configuration system
- [Environment variables](#environment-variables)
"""
RECIPES = f"""## Recipes

The values are those of [{RECIPE.stem}](../configs/{RECIPE.name}). Set a full key on the command line. A bare name is an
argument that this recipe leaves at its default: set it in a recipe of your own. For parts of other libraries, the table
lists only the arguments that the recipe states. [structures.py](../dino/structures.py) explains the letters.
"""


class Row(NamedTuple):
    """A line of a table in Markdown: a setting, its value, its meaning."""

    name: str
    value: str
    meaning: str


def table(rows: list[Row], value: str = "default") -> str:
    """Rows -> Markdown."""
    return markdown_table([Row("setting", value, "meaning"), Row("---", "---", "---"), *rows])


def code(value: Any) -> str:
    """A value as Markdown."""
    if isinstance(value, Path) and value.is_absolute():
        value = value.relative_to(ROOT)
    text = getattr(value, "__name__", None) or re.sub(r"\s+", " ", f"{value}" if value != "" else '""')
    return f"`{text}`"


def described(name: str, meaning: str | None) -> str:
    """The meaning on one line.

    Raises:
        UserError: there is none.
    """
    if not meaning or not meaning.strip():
        raise UserError(f"the setting {name} has no description: give it a help text, a comment or a docstring")
    return re.sub(r"\s+", " ", meaning).strip().removesuffix(".")


# Programs


def tools() -> list[Path]:
    """The tools with arguments. The other tools are verbs of `dino`."""
    return [path for path in sorted((ROOT / "tools").glob("*.py")) if "def build_parser(" in path.read_text()]


def programs() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """(command, what it does, parser) of every verb and tool."""
    for name, does in cli.VERBS.items():
        parser = importlib.import_module(f"dino.cli.{name.replace('-', '_')}").build_parser()
        verbs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if verbs:
            helps = {choice.dest: choice.help for choice in verbs[0]._choices_actions}
            yield from ((f"dino {name} {verb}", helps[verb], part) for verb, part in verbs[0].choices.items())
        else:
            yield f"dino {name}", does, parser
    for path in tools():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        does = inspect.cleandoc(module.__doc__).splitlines()[0].rstrip(".")
        yield f"python tools/{path.name}", does, module.build_parser()


def argument_rows(command: str, parser: argparse.ArgumentParser) -> list[Row]:
    """The arguments of a program, from its help with a line for each argument."""
    wide = partial(argparse.HelpFormatter, width=10_000, max_help_position=5_000)
    text = argparse.ArgumentParser(parents=[parser], add_help=False, formatter_class=wide).format_help()
    lines = re.findall(r"^  (?! |-h\b)(.+?)(?: {2,}(.+))?$", text, re.M)
    return [argument_row(command, parser, *line) for line in lines]


def argument_row(command: str, parser: argparse.ArgumentParser, invocation: str, meaning: str) -> Row:
    """The row of an argument.

    Args:
        invocation: as in the help: `opts`, `--size HEIGHT WIDTH` or `--dtype {fp32,bf16}`.
    """
    flags = re.findall(r"(?<!\S)--?\w[\w-]*", invocation)
    name = ", ".join(flags) or invocation
    key = flags[-1].lstrip("-").replace("-", "_") if flags else invocation
    default = parser.get_default(key)
    value = "" if default is False or default in (None, "", [], ()) else OF_THE_MACHINE.get(key) or code(default)
    meaning = described(f"{name} of {command}", meaning).removesuffix(f" (default {default})")
    choices = re.search(r"\{(.+?)\}", invocation)
    return Row(code(name), value, meaning + (f" ({choices[1].replace(',', ', ')})" if choices else ""))


# Recipes


def comments(path: Path) -> dict[str, str]:
    """The comments of a recipe, by key: each stands on the line where its key begins."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    remarks = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}

    def visit(prefix: str, value: ast.expr) -> None:
        for keyword in value.keywords if isinstance(value, ast.Call) else ():
            key = f"{prefix}.{keyword.arg}"
            if keyword.lineno in remarks:
                found[key] = remarks.pop(keyword.lineno)  # the outermost key of a line
            visit(key, keyword.value)

    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            visit(ast.unparse(statement.targets[0]), statement.value)
    return found


def arguments_of(part: Callable) -> dict[str, str]:
    """Descriptions of arguments in a docstring, by name; names that share a description are joined by commas."""
    doc = inspect.cleandoc(part.__doc__ or "")
    match = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", match.group(1) if match else "", re.M)
    return {names: re.sub(r"\s+", " ", text) for names, text in entries}


def signature(part: Callable) -> dict[str, inspect.Parameter]:
    """The arguments of a class or function."""
    function = inspect.unwrap(part.__init__) if isinstance(part, type) else part
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if name != "self"}


def documented(part: Callable) -> Callable:
    """The part itself, or the base class to which its constructor passes all arguments on."""
    passed = signature(part).values() if isinstance(part, type) else ()
    only_passed = passed and all(p.kind is inspect.Parameter.VAR_KEYWORD for p in passed)
    return documented(part.__base__) if only_passed and not arguments_of(part) else part


def is_ours(part: Any) -> bool:
    """Whether a part is of this project."""
    return getattr(part, "__module__", "").startswith("dino.")


def shown(value: Any, resolved: Any) -> str:
    """A value of a recipe: the name of a part, an interpolation with its result."""
    if isinstance(value, dict) and "_target_" in value:
        return code(value["_target_"])
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return ", ".join(shown(item, item) for item in value)
    reference = isinstance(value, str) and "${" in value and not isinstance(resolved, dict)
    return f"{code(resolved)} from `{value}`" if reference else code(value)


def part_rows(key: str, part: Callable, values: dict, resolved: dict, remarks: dict[str, str]) -> list[Row]:
    """The settings of a part: all of a part of this project, of other parts those that the recipe states.

    Args:
        values: what the recipe states; resolved: the same without interpolations.
        remarks: from `comments`, for arguments without a docstring.
    """
    part = documented(part)
    parameters = signature(part) if is_ours(part) else dict.fromkeys(values)
    rows = []
    for names, meaning in groups_of(part, parameters).items():
        known = [name for name in names.split(", ") if name in parameters or name in values]
        cells = [setting_cells(key, name, parameters.get(name), values, resolved) for name in known]
        if cells:
            columns = (", ".join(filter(None, column)) for column in zip(*cells, strict=True))
            rows.append(Row(*columns, described(f"{key}.{names}", meaning or remarks.get(f"{key}.{names}"))))
    return rows


def groups_of(part: Callable, parameters: dict) -> dict[str, str | None]:
    """Descriptions of the arguments of a part, by name or names; None where the docstring has none."""
    groups = dict(arguments_of(part)) if is_ours(part) else {}
    named = {name for names in groups for name in names.split(", ")}
    rest = (name for name, p in parameters.items() if getattr(p, "kind", None) not in OF_THE_BASE)
    return groups | {name: None for name in rest if name not in named}


def setting_cells(
    key: str, name: str, parameter: inspect.Parameter | None, values: dict, resolved: dict
) -> tuple[str, str]:
    """Name and value of an argument: the full key where the recipe states it, else the default."""
    if name in values:
        return code(f"{key}.{name}"), shown(values[name], resolved[name])
    default = getattr(parameter, "default", inspect.Parameter.empty)
    return code(name), "" if default is inspect.Parameter.empty else code(default)


def sections(key: str, node: Any, resolved: Any, remarks: dict[str, str]) -> Iterator[tuple[str, list[Row]]]:
    """(heading, rows) of a recipe's key and of the parts below it."""
    if not isinstance(node, dict):
        return
    part = node.get("_target_")
    values = {name: value for name, value in node.items() if name != "_target_"}
    if part:
        heading = f"`{key}`: {part.__qualname__}" + ("" if is_ours(part) else f" of {part.__module__.split('.')[0]}")
        rows = part_rows(key, part, values, resolved, remarks)
        if rows:
            yield heading, rows
        for name, value in values.items():
            yield from sections(f"{key}.{name}", value, resolved[name], remarks)
    else:
        yield f"`{key}`", list(plain_rows(key, values, remarks))


def plain_rows(key: str, values: dict, remarks: dict[str, str]) -> Iterator[Row]:
    """The settings of a group that is no part, and of the groups below it."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from plain_rows(f"{key}.{name}", value, remarks)
        else:
            yield Row(code(f"{key}.{name}"), code(value), described(f"{key}.{name}", remarks.get(f"{key}.{name}")))


def recipe_sections() -> Iterator[tuple[str, list[Row]]]:
    """(heading, rows) of everything that the recipe names."""
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    from dino.training.recipe_lengths import leave_open

    cfg = LazyConfig.load(str(RECIPE))
    leave_open(cfg)
    raw, resolved = (OmegaConf.to_container(cfg, resolve=resolve) for resolve in (False, True))
    remarks = {}
    for path in sorted((ROOT / "configs/common").rglob("*.py")):
        remarks |= comments(path)
    for key in ("train", "dataloader", "optimizer", "lr_multiplier", "model"):
        nodes = raw[key].items() if key == "dataloader" else [(None, raw[key])]
        for name, node in nodes:
            path = f"{key}.{name}" if name else key
            yield from sections(path, node, resolved[key][name] if name else resolved[key], remarks)


def other_parts() -> Iterator[tuple[str, list[Row]]]:
    """(heading, rows) of PARTS."""
    for entry in PARTS.split():
        module, _, names = entry.partition(":")
        for name in names.split(","):
            part = getattr(importlib.import_module(module), name)
            summary = inspect.cleandoc(part.__doc__).split("\n\n")[0].replace("\n", " ")
            yield f"`{module}.{name}`\n\n{summary}", part_rows(name, part, {}, {}, {})


def yacs_rows() -> list[Row]:
    """The keys below `MODEL.DINO`, with the descriptions of the arguments that they become."""
    from detectron2.config import get_cfg

    from dino.d2 import DINODetector, add_dino_config
    from dino.modeling import build_dino

    cfg = get_cfg()
    add_dino_config(cfg)
    meanings = arguments_of(DINODetector) | arguments_of(build_dino)
    return [
        Row(
            code(f"MODEL.DINO.{key}"),
            code(value),
            described(f"MODEL.DINO.{key}", meanings.get(key.lower().removesuffix("_test"))),
        )
        for key, value in cfg.MODEL.DINO.items()
    ]


def page() -> str:
    """The page.

    Raises:
        UserError: a setting has no description.
    """
    text = [HEAD, "## Programs\n"]
    for command, does, parser in programs():
        rows = argument_rows(command, parser)
        text += [f"### `{command}`\n", f"{does[0].upper()}{does[1:]}.\n", table(rows) if rows else "No arguments.", ""]
    text += [RECIPES]
    for heading, rows in recipe_sections():
        text += [f"### {heading}\n", table(rows, "value"), ""]
    text += ["## Other parts\n"]
    for heading, rows in other_parts():
        text += [f"### {heading}\n", table(rows), ""]
    text += ["## yacs\n", "After `dino.d2.add_dino_config(cfg)`; what else it sets is in `dino/d2/config.py`.\n"]
    text += [table(yacs_rows()), "", "## Environment variables\n", "| variable | meaning |", "| --- | --- |"]
    text += [f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items()]
    return "\n".join(text) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    return parser


def main() -> int:
    write_page(PAGE, page(), "list_settings.py", check=build_parser().parse_args().check)
    return 0


if __name__ == "__main__":
    sys.exit(cli.report_errors(main))
