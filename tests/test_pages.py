"""What the pages about the method name exists: files, headings, and names where their links lead."""

import ast
import re

import pytest

from .tools.programs import ROOT

DOCS = ROOT / "docs"
PAGES = ("how_it_works.md", "method.md")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
LARGEST = 150_000  # bytes of a picture


def links(page):
    """(text, file, heading) of every link of a page that leads to a file of the project."""
    for text, address in LINK.findall((DOCS / page).read_text()):
        if not address.startswith("http"):
            name, _, heading = address.partition("#")
            yield text, (DOCS / (name or page)).resolve(), heading


def defined(path):
    """Names that a Python file defines, those inside classes also as `Class.name`."""
    found = set()

    def visit(node, owner):
        for child in ast.iter_child_nodes(node):
            name = None
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = child.name
            elif isinstance(child, ast.Name | ast.Attribute) and isinstance(child.ctx, ast.Store):
                name = child.id if isinstance(child, ast.Name) else child.attr
            if name:
                found.update({name, f"{owner}.{name}"})
            visit(child, child.name if isinstance(child, ast.ClassDef) else owner)

    visit(ast.parse(path.read_text()), "")
    return found


def anchors(path):
    """Headings as GitHub names them in addresses."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for text, path, heading in links(page):
        assert path.exists(), f"{text}: {path}"
        assert not heading or heading in anchors(path), f"{text}: #{heading}"


@pytest.mark.parametrize("page", PAGES)
def test_names_are_defined_where_their_links_lead(page):
    named = [(text.strip("`"), path) for text, path, _ in links(page) if text.startswith("`") and path.suffix == ".py"]
    assert len(named) > 8
    missing = [(name, path.name) for name, path in named if name not in defined(path)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_small_and_all_are_shown(page):
    for picture in (DOCS / "pictures").iterdir():
        assert picture.stat().st_size < LARGEST, picture.name
        assert any(picture.name in (DOCS / page).read_text() for page in PAGES), picture.name


def test_what_is_undefined_is_found():
    names = defined(ROOT / "dino/layers/denoising.py")
    assert {"ContrastiveDenoising", "ContrastiveDenoising.draw", "box_noise", "denoising_mask"} <= names
    assert not {"ContrastiveDenoising.denoising_mask", "absent"} & names
    assert {"positives-and-negatives", "the-39-losses", "3-look-forward-twice"} <= anchors(DOCS / "method.md")
