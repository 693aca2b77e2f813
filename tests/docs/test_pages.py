"""The pages keep their promises: links lead somewhere, messages and commands are those of the code."""

import ast
import json
import re

import pytest

from dino import cli
from tests.coco_files import write_coco
from tests.tools.programs import ROOT, run_python

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "projects/dino/README.md"]
ABOUT_THE_METHOD = [ROOT / "docs/how_it_works.md", ROOT / "docs/method.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"\[`([^`\]]*)`\]\(([^)\s#]+\.py)\)")  # (name, file) of links whose text is code
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
LARGEST = 150_000  # bytes of a picture


def name(path):
    return str(path.relative_to(ROOT))


def anchors(path):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-") for heading in headings}


def faults_of_links(path):
    for target in LINK.findall(FENCE.sub("", path.read_text())):
        if re.match(r"https?://", target):
            if not re.match(r"https://[\w.-]+\.[a-z]+(/|$)", target):
                yield target
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    assert not list(faults_of_links(path))


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `heading`: here\n[a](page.md#a-heading-here) [b](#there) [c](none.md) [d](http://plain.org)\n")
    assert list(faults_of_links(page)) == ["#there", "none.md", "http://plain.org"]


def test_every_page_can_be_reached_from_the_readme():
    found, todo = set(), [PAGES[0]]
    while todo:
        path = todo.pop()
        if path in found or path.suffix != ".md":
            continue
        found.add(path)
        targets = (link.partition("#")[0] for link in LINK.findall(path.read_text()) if "://" not in link)
        todo += [(path.parent / target).resolve() for target in targets if target]
    assert set(PAGES) <= found


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


@pytest.mark.parametrize("page", ABOUT_THE_METHOD, ids=name)
def test_names_are_defined_where_their_links_lead(page):
    named = [(text, (page.parent / place).resolve()) for text, place in NAMED.findall(page.read_text())]
    assert len(named) > 8
    missing = [(text, path.name) for text, path in named if text not in defined(path)]
    assert not missing


def test_pictures_are_small_and_all_are_shown():
    shown = "".join(page.read_text() for page in ABOUT_THE_METHOD)
    for picture in (ROOT / "docs/pictures").iterdir():
        assert picture.stat().st_size < LARGEST, picture.name
        assert picture.name in shown, picture.name


def test_what_is_undefined_is_found():
    names = defined(ROOT / "dino/layers/denoising.py")
    assert {"ContrastiveDenoising", "ContrastiveDenoising.draw", "box_noise", "denoising_mask"} <= names
    assert not {"ContrastiveDenoising.denoising_mask", "absent"} & names
    assert {"positives-and-negatives", "the-39-losses", "3-look-forward-twice"} <= anchors(ROOT / "docs/method.md")


def literals():
    """Every text of the package, with `…` for what is filled in."""
    for path in (ROOT / "dino").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def texts():
    return [re.sub(r"'?…'?", "…", text) for text in literals()]


def own_messages(page):
    """The messages that the page says are ours."""
    for line in page.splitlines():
        cells = line.removeprefix("| ").split(" | ")
        if len(cells) == 4 and cells[1] == "dino":
            yield from re.findall(r"`([^`]+)`", cells[0])


def is_said(message, texts):
    """Whether one of the texts has the parts of the message in their order."""
    pieces = [re.escape(piece) for piece in message.removeprefix("error: ").split("…")]
    return any(re.search(".*".join(pieces), text, re.S) for text in texts)


def test_our_messages_are_in_the_code(texts):
    messages = list(own_messages((ROOT / "docs/troubleshooting.md").read_text()))
    assert len(messages) > 50
    assert not [message for message in messages if not is_said(message, texts)]


def test_messages_of_others_are_not_taken_for_ours(texts):
    assert list(own_messages("| `a`, `b …` | dino | why | what |\n| `c` | PyTorch | why | what |")) == ["a", "b …"]
    assert is_said("image not found: …", texts)
    assert not is_said("image found: …", texts)


def commands():
    """(page, words) of each `dino` command in the pages, lines that end in a backslash joined."""
    for path in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.partition(" #")[0].split()
                if words[:1] == ["dino"]:
                    yield name(path), words


def test_commands_of_the_pages_exist():
    settings = (ROOT / "docs/settings.md").read_text()
    wrong = []
    for page, (_, verb, *words) in commands():
        headings = (
            f"### `dino {verb}`",
            f"### `dino {verb} {words[0] if words else ''}`",
        )  # of verbs, and parts of one
        section = next(settings.partition(h)[2].partition("###")[0] for h in headings if h in settings)
        options = [word for word in words if word.startswith("--")]
        keys = [word.strip('"').partition("=")[0] for word in words if re.match(r'"?[a-z_.0-9]+=', word)]
        missing = [option for option in options if f"`{option}`" not in section]
        missing += [key for key in keys if f"`{key}`" not in settings]
        wrong += [(page, verb, missing)] if missing or verb not in cli.VERBS else []
    assert not wrong


def test_the_recipe_of_the_quick_start(tmp_path):
    """Loaded in a process of its own, as it registers data sets."""
    pytest.importorskip("detectron2")
    (recipe,) = re.findall(r"^```python\n(# mine\.py.*?)^```", (ROOT / "docs/quick_start.md").read_text(), re.M | re.S)
    (tmp_path / "mine.py").write_text(recipe)
    for split in ("train", "val"):
        files = write_coco(tmp_path / "images", seed=7)
        (tmp_path / f"{split}.json").write_text(json.dumps(files.read()))
    code = """
from dino.d2.recipe import load_recipe
cfg = load_recipe("mine.py")
print(sorted(cfg), cfg.model.num_classes, cfg.dataloader.train.dataset.name)
"""
    result = run_python("-c", code, folder=tmp_path)
    parts = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]
    assert result.stdout.splitlines()[-1:] == [f"{parts} 3 cells_train"], result.stderr
