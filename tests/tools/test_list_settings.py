"""Every setting is described, and docs/settings.md says what the code says."""

import argparse
import ast
import re

import pytest

pytest.importorskip("detectron2")

from dino.utils.files import DataError
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
    assert tools - over_verbs == set(tool.TOOLS)


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
    with pytest.raises(DataError, match="the setting --secret of dino try is described nowhere"):
        tool.argument_rows("dino try", parser)


class Part:
    """A part.

    Args:
        told, too: of both.
    """

    __module__ = "dino.part"

    def __init__(self, told, too=2, untold=1):
        pass


def test_an_argument_without_docstring_is_an_error():
    with pytest.raises(DataError, match=r"the setting model\.part\.untold is described nowhere"):
        tool.part_rows("model.part", Part, {"told": 1}, {"told": 1}, {})
    rows = tool.part_rows("model.part", Part, {"told": 1}, {"told": 1}, {"model.part.untold": "an hour"})
    assert rows == [("`model.part.told`, `too`", "`1`, `2`", "of both"), ("`untold`", "`1`", "an hour")]


def test_a_key_without_comment_is_an_error(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("train = dict(\n    a=1,  # told\n    b=dict(  # group\n        c=2,\n    ),\n)\n")
    remarks = tool.comments(recipe)
    assert remarks == {"train.a": "told", "train.b": "group"}
    with pytest.raises(DataError, match=r"the setting train\.b\.c is described nowhere"):
        list(tool.plain_rows("train", {"a": 1, "b": {"c": 2}}, remarks))
