"""Every setting has a description, and docs/settings.md follows the code."""

import argparse
import ast
import re

import pytest

pytest.importorskip("detectron2")

from dino.utils.files import UserError
from tests.tools.programs import ROOT, load_program

tool = load_program("list_settings")
RECIPES = sorted([*(ROOT / "configs").rglob("*.py"), *(ROOT / "projects").rglob("*.py")])


@pytest.fixture(scope="module")
def page():
    return tool.page()


def test_the_page_is_up_to_date(page):
    assert tool.PAGE.read_text() == page, "run: python tools/list_settings.py"


@pytest.mark.parametrize("key", ["--tile", "train.amp.dtype", "optimizer.lr", "model.network.denoising.num_denoising"])
def test_the_page_holds_programs_and_keys(page, key):
    assert f"| `{key}` |" in page or f"| `{key}`, " in page


def test_every_tool_with_arguments_is_listed():
    over_verbs = {"convert_weights", "lazyconfig_train_net"}
    tools = {path.stem for path in (ROOT / "tools").glob("*.py") if "ArgumentParser(" in path.read_text()}
    assert tools - over_verbs == {path.stem for path in tool.tools()}


def parts_of_recipes():
    """Names of our parts that the recipes call by L(…)."""
    for path in RECIPES:
        tree = ast.parse(path.read_text())
        ours = {
            name.asname or name.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dino.")
            for name in node.names
        }
        yield from ours & set(re.findall(r"\bL\((\w+)\)", path.read_text()))


def test_the_page_holds_every_part_of_the_recipes(page):
    parts = set(parts_of_recipes())
    assert {"Encoder", "vitdet"} <= parts
    assert not {part for part in parts if not re.search(rf"^### .*\b{part}\b", page, re.M)}


def test_variables_of_the_environment_are_listed():
    source = "".join(path.read_text() for path in (ROOT / "dino").rglob("*.py"))
    read = set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', source)) | set(re.findall(r'"(DINO_[A-Z_]+)"', source))
    ours = {name for name in read if not name.startswith(("TORCHELASTIC", "SLURM", "LOCAL", "GROUP"))} - {"PATH"}
    assert "DINO_DEFORM_ATTN" in ours
    assert ours <= set(tool.VARIABLES)


def test_an_argument_without_help_is_an_error():
    parser = argparse.ArgumentParser()
    parser.add_argument("--secret", default=3)
    with pytest.raises(UserError, match="the setting --secret of dino try has no description"):
        tool.argument_rows("dino try", parser)


def test_arguments_are_read_from_the_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("-s", "--short-side", type=int, default=800, metavar="PIXELS", help="in pixels (default 800)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of a\n network.")
    parser.add_argument("--quiet", action="store_true", help="50 %% less")
    parser.add_argument("--device", default="cpu", help="where")
    parser.add_argument("--old", help=argparse.SUPPRESS)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image")
    group = parser.add_argument_group("data")
    group.add_argument("--val", nargs="+", metavar=("JSON", "FOLDER"), help="validation data")
    assert sorted(tool.argument_rows("try", parser)) == [
        ("`--device`", "a GPU where there is one", "where"),
        ("`--dtype`", "`fp32`", "of a network (fp32, bf16)"),
        ("`--quiet`", "", "50 % less"),
        ("`--val`", "", "validation data"),
        ("`-s, --short-side`", "`800`", "in pixels"),
        ("`INPUT`", "", "image"),
    ]


class Part:
    """A part.

    Args:
        told, too: of both.
    """

    __module__ = "dino.part"

    def __init__(self, told, too=2, untold=1):
        pass


def test_an_argument_without_docstring_is_an_error():
    with pytest.raises(UserError, match=r"the setting model\.part\.untold has no description"):
        tool.part_rows("model.part", Part, {"told": 1}, {"told": 1}, {})
    rows = tool.part_rows("model.part", Part, {"told": 1}, {"told": 1}, {"model.part.untold": "an hour"})
    assert rows == [("`model.part.told`, `too`", "`1`, `2`", "of both"), ("`untold`", "`1`", "an hour")]


def test_a_key_without_comment_is_an_error(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("train = dict(\n    a=1,  # told\n    b=dict(  # group\n        c=2,\n    ),\n)\n")
    remarks = tool.comments(recipe)
    assert remarks == {"train.a": "told", "train.b": "group"}
    with pytest.raises(UserError, match=r"the setting train\.b\.c has no description"):
        list(tool.plain_rows("train", {"a": 1, "b": {"c": 2}}, remarks))
