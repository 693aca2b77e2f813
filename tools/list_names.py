"""Write docs/names.md: the settings of other DINO programs, and what each is called here.

python tools/list_names.py            (--check: only compare the page with the files in dino/migration)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated_page import markdown_table, write_page

from dino import cli
from dino.migration import PROGRAMS, NameMap, Setting, Value, read_map
from dino.utils.files import counted

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/names.md"
DATA = ROOT / "dino/migration"
TABLE_HEAD = (("there", "default", "here", "default", "note"), ("---",) * 5)
HEAD = """# Names of settings in other programs

`python tools/list_names.py` writes this page from [dino/migration](../dino/migration): change the files there.

`dino convert-config FILE` converts a configuration file of the official program: it names the nearest recipe, prints
the overrides, and lists what has no counterpart. It reads the file as data and executes nothing.

Search this page for a name. The column "here" has what to use instead: a key of a recipe, for `key=value` after
`dino train RECIPE` (see the [settings](settings.md)); a flag of a verb; or a class, for a recipe of your own. Defaults
here are those of the recipe that each section names.
"""


def page() -> str:
    """The text of the page, with the programs whose files are there."""
    maps = [read_map(name) for name in PROGRAMS if (DATA / f"{name}.toml").is_file()]
    links = [f"- [{heading(name_map)}](#{anchor(heading(name_map))})" for name_map in maps]
    return "\n".join([HEAD, *links, *(line for name_map in maps for line in section(name_map))]) + "\n"


def heading(name_map: NameMap) -> str:
    """The heading of a program."""
    return name_map.name.replace("the ", "The ", 1) if name_map.name.startswith("the ") else name_map.name


def anchor(text: str) -> str:
    """What GitHub makes of a heading."""
    kept = "".join(letter for letter in text.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def section(name_map: NameMap) -> Iterator[str]:
    """The lines of a program: how many settings, then a table for each group."""
    settings = list(name_map.settings.values())
    yield f"\n## {heading(name_map)}\n"
    yield f"[Source]({name_map.address}). {counted(len(settings), 'setting')}: {numbers(settings)}."
    yield f"Defaults here: of `{name_map.recipe}`."
    for group, title in name_map.groups.items():
        rows = [row(setting) for setting in settings if setting.group == group]
        yield from (f"\n### {title}\n", markdown_table([*TABLE_HEAD, *rows])) if rows else ()


def numbers(settings: list[Setting]) -> str:
    """How many of each kind."""
    kinds = {
        "ours": "with a counterpart",
        "left_out": "left out",
        "missing": "missing",
        "never_read": "never read by that program",
    }
    counts = {what: sum(bool(getattr(setting, kind)) for setting in settings) for kind, what in kinds.items()}
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number)


def row(setting: Setting) -> list[str]:
    """The cells of a setting."""
    default = code(setting.default) if "default" in setting.stated else ""
    ours = ", ".join(f"`{name}`" for name in setting.ours)
    return [f"`{setting.key}`", default, ours, our_default(setting), note(setting)]


def our_default(setting: Setting) -> str:
    """The recipe's value; "" where nothing of the recipe is named."""
    keys = setting.keys()
    if not keys:
        return ""
    if "ours_default" not in setting.stated:
        return code(setting.default)
    several = isinstance(setting.ours_default, list) and len(keys) > 1
    values = setting.ours_default if several else [setting.ours_default]
    return ", ".join(dict.fromkeys(map(code, values)))


def code(value: Any) -> str:
    """A value as Markdown."""
    return f"`{value}`" if value != "" else '`""`'


def note(setting: Setting) -> str:
    """Why it differs, is left out or missing; what single values become."""
    kinds = {"left out: ": setting.left_out, "missing: ": setting.missing, "": setting.why}
    said = [f"{kind}{text}" for kind, text in kinds.items() if text]
    said += ["never read there"] if setting.never_read else []
    said += [f"{code(value.theirs)} {meaning(value)}" for value in setting.values if value != Value(value.theirs)]
    return ". ".join(filter(None, ["; ".join(said), setting.note]))


def meaning(value: Value) -> str:
    """What one value becomes."""
    if value.set:
        return f"is {', '.join(f'`{override}`' for override in value.set)}"
    return f"is left out: {value.left_out}" if value.left_out else f"is missing: {value.missing}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    return parser


def main() -> int:
    write_page(PAGE, page(), "list_names.py", check=build_parser().parse_args().check)
    return 0


if __name__ == "__main__":
    sys.exit(cli.report_errors(main))
