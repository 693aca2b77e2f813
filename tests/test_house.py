"""The rules of the house: who imports whom, how long and how branched code may be, and words that no line may use."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

radon = pytest.importorskip("radon.complexity")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dino"
FILES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted(p for folder in ("tools", "benchmarks", "configs", "projects") for p in (ROOT / folder).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in FILES}
LONGEST_FUNCTION = 49  # lines
MOST_COMPLEX = 10  # radon's measure, which counts comprehensions and lambdas
MOST_PUBLIC_NAMES = 21.8  # for 1,000 lines, beside those of `injected_names`
MOST_MODEL_LINES = 1500  # blank ones do not count
TIERS = [  # a room imports from its own line and those above it
    {"structures", "utils"},
    {"layers"},
    {"modeling"},
    {"weights", "data"},
    {"inference", "evaluation", "export", "explain", "training", "d2", "hf"},
    {"api", "migration"},
    {"cli", "__main__"},
]
OWNERS = {"detectron2": "d2", "transformers": "hf", "argparse": "cli"}  # library -> the only room that imports it
EXCEPTIONS = {"dino.weights.reading"}  # official checkpoints hold an argparse.Namespace
MODEL = [  # what one reads to understand DINO
    "structures.py",
    *(f"layers/{name}.py" for name in ("boxes", "criterion", "deform_attn", "denoising", "matcher")),
    *(f"layers/{name}.py" for name in ("feed_forward", "position_encoding", "postprocess")),
    *(f"modeling/{name}.py" for name in ("detector", "dino", "neck", "transformer")),
]
DEVICE_LITERAL = re.compile(r"""\.cuda\(|device\s*=\s*["']cuda|\.to\(\s*["']cuda|torch\.device\(\s*["']cuda""")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def relative(path):
    return str(path.relative_to(ROOT))


def imports(tree, module, is_package):
    """Full names of what any import in `tree` asks for, those inside functions and of importlib included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def graph_of(trees):
    """{module: (tree, whether it is a package)} -> {module: the modules of the package that it imports}."""
    graph = {}
    for module, (tree, is_package) in trees.items():
        names = set(imports(tree, module, is_package))
        found = {name if name in trees else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in found if name in trees} - {module}
    return graph


GRAPH = graph_of({name: (TREES[path], path.name == "__init__.py") for name, path in MODULES.items()})


def circle_of(graph):
    """The modules of a circle of imports, in order; none where there is no circle."""
    finished, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        path.append(module)
        found = next(filter(None, map(visit, sorted(graph[module]))), [])
        finished.add(path.pop())
        return found

    return next(filter(None, map(visit, graph)), [])


def room(module):
    return (module.split(".") + [""])[1]


def tier(module):
    return next((height for height, rooms in enumerate(TIERS) if room(module) in rooms), -1)


def upward(graph):
    """Pairs (module, what it imports from a higher tier)."""
    return [(m, other) for m, others in graph.items() for other in others if tier(other) > tier(m) >= 0]


def between_rooms(graph):
    """The graph of the rooms; `dino` itself holds the version and lazy names only."""
    rooms = defaultdict(set)
    for module, others in graph.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module), ""}
    return {name: others for name, others in rooms.items() if name}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_there_is_something_to_check():
    assert {"dino", "dino.layers.boxes", "dino.modeling.dino", "dino.weights"} <= set(MODULES)
    assert "dino.structures" in GRAPH["dino.modeling.dino"]
    assert "dino.layers.boxes" in GRAPH["dino.layers.matcher"]
    assert {room(module) for module in MODULES} - {""} <= set.union(*TIERS)


def test_no_import_circles():
    assert not circle_of(GRAPH)


def test_no_circles_of_rooms():
    assert not circle_of(between_rooms(GRAPH))


def test_imports_go_downwards():
    assert not upward(GRAPH)


@pytest.mark.parametrize(
    "line",
    [
        "from dino.cli import main",
        "def f():\n    from dino.cli import main",
        "def f():\n    from ..cli import main",
        "import importlib\nimportlib.import_module('dino.cli')",
        "if TYPE_CHECKING:\n    import dino.cli",
    ],
)
def test_planted_imports_are_found(line):
    sources = {"dino.layers.boxes": line, "dino.cli": "from dino.layers import boxes", "dino.layers": ""}
    graph = graph_of({name: (ast.parse(text), name != "dino.layers.boxes") for name, text in sources.items()})
    assert upward(graph) == [("dino.layers.boxes", "dino.cli")]
    assert circle_of(graph) == ["dino.layers.boxes", "dino.cli", "dino.layers.boxes"]
    assert circle_of(between_rooms(graph))


def test_network_is_assembled_elsewhere():
    """Encoder, selection, decoder and denoising are injected."""
    assert not {m for m in GRAPH["dino.modeling.dino"] if m.startswith("dino.modeling")}


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_room(library):
    users = {
        name
        for name, path in MODULES.items()
        if library in {found.split(".")[0] for found in imports(TREES[path], name, path.name == "__init__.py")}
    }
    assert not {name for name in users if room(name) != OWNERS[library]} - EXCEPTIONS


def test_imports_without_detectron2():
    names = [name for name in MODULES if room(name) not in ("d2", "hf", "__main__")]
    code = f"import sys, importlib\nsys.modules['detectron2'] = None\nfor n in {names}: importlib.import_module(n)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_the_network_needs_torch_only():
    hidden = "sys.modules['torchvision'] = sys.modules['detectron2'] = sys.modules['timm'] = sys.modules['PIL'] = None"
    result = run_python(f"import sys\n{hidden}\nimport dino.layers, dino.modeling")
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_nothing():
    result = run_python("import sys, dino; print([m for m in ('torch', 'torchvision', 'scipy') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_devices_are_derived(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [(number, line.strip()) for number, line in lines if DEVICE_LITERAL.search(line)]


def test_device_literals_are_found():
    bad = ["x.cuda()", "zeros(3, device='cuda')", 'x.to("cuda:0")', "torch.device('cuda')"]
    assert all(DEVICE_LITERAL.search(line) for line in bad)
    assert not DEVICE_LITERAL.search("x.to(y.device)")


DEVICE_BRANCH = re.compile(r"\.device\.type\b|\.is_cuda\b|is_autocast_enabled|get_autocast")


@pytest.mark.parametrize("name", [name for name in MODEL if "detector" not in name])
def test_the_network_has_no_device_or_autocast_branch(name):
    assert not DEVICE_BRANCH.search((PACKAGE / name).read_text())


def long_functions(tree):
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    return {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION}


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=relative)
def test_functions_are_short(path):
    assert not long_functions(ast.parse(path.read_text()))


def complex_blocks(source):
    found = [(block.name, block.complexity) for block in radon.cc_visit(source)]
    return [(name, complexity) for name, complexity in found if complexity > MOST_COMPLEX]


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=relative)
def test_functions_are_simple(path):
    assert not complex_blocks(path.read_text())


def test_long_and_complex_functions_are_found():
    branches = "\n".join(f"    if x == {n}: return {n}" for n in range(50))
    source = f"def f(x):\n{branches}"
    assert long_functions(ast.parse(source)) == {"f": 51}
    assert complex_blocks(source) == [("f", 51)]


def test_the_model_is_short():
    lines = {name: len(re.findall(r"\S.*", (PACKAGE / name).read_text())) for name in MODEL}
    assert sum(lines.values()) < MOST_MODEL_LINES, lines


def public_names(tree):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def injected_names():
    """Classes that a recipe puts in place of a part of DINO or of its loader, as two pages list them."""
    losses = {"IoUAwareLoss", "SquaredIoULoss", "VarifocalLoss", "MatchabilityLoss"}
    return {*importlib.import_module("dino.modeling.variants").__all__, *losses, "Mosaic", "MixUp"}


def test_public_names_are_few():
    """Classes and functions of modules, without an underscore in front."""
    injected = injected_names()
    names = [(path, name) for path in FILES for name in public_names(TREES[path])]
    count = Counter(room(module_name(path)) for path, name in names if name not in injected)
    lines = sum(len(path.read_text().splitlines()) for path in FILES)
    assert count.total() <= MOST_PUBLIC_NAMES * lines / 1000, count
    pages = [(ROOT / f"docs/{page}.md").read_text() for page in ("method", "descendants")]
    assert not [name for name in injected if not any(name in page for page in pages)]


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert not [name for name, count in names.items() if count > 1]


LEAST_COPY = 6  # lines


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def no_code(tree):
    """Numbers of the lines that signatures, docstrings and imports cover."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines |= set(range(node.lineno, node.body[0].lineno))
        if is_docstring(node) or isinstance(node, ast.Import | ast.ImportFrom):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def blocks(path):
    """(lines, where) of every run of LEAST_COPY lines of code; comments and lone brackets do not count."""
    left_out = no_code(TREES[path])
    numbered = [(n, line.strip()) for n, line in enumerate(path.read_text().splitlines(), 1) if n not in left_out]
    code = [(n, line) for n, line in numbered if re.search(r"\w", line) and not line.startswith("#")]
    for start in range(len(code) - LEAST_COPY + 1):
        part = code[start : start + LEAST_COPY]
        yield tuple(line for _, line in part), f"{relative(path)}:{part[0][0]}"


def test_no_block_stands_twice():
    places = defaultdict(list)
    for path in FILES:
        for lines, where in blocks(path):
            places[lines].append(where)
    assert not [found for found in places.values() if len(found) > 1]


REWIRING = re.compile(
    r"^\s*(?:\w+\.)*(?!self\b)\w+\.(?:forward|__class__) = "  # a replaced method or class
    r"|^\s*(?:\w+\.)*(?:model|network|detector|criterion|matcher)\.\w+ = "  # an attribute set from outside
    r"|\._actions\b|\bargparse\.\w+\.\w+ = ",  # a patched parser
    re.MULTILINE,
)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_objects_are_not_rewired(path):
    assert not REWIRING.findall(path.read_text())


def test_rewiring_is_found():
    bad = ["module.forward = f", "other.__class__ = kind", "criterion.average = f", "model.criterion.matcher = m"]
    assert all(REWIRING.search(line) for line in [*bad, "for action in parser._actions:"])
    assert not any(REWIRING.search(line) for line in ["self.forward = f", "self.network = network"])


WORDS = re.compile(
    r"\b(told|goes on|go on|behind|charged?|spoiled|lessons?|put right|shall|learned by heart|can't be had)\b", re.I
)
TEXTS = [*FILES, *PROGRAMS, *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "projects/dino/README.md"]


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_plain_english(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [f"{number}: {line.strip()}" for number, line in lines if WORDS.search(line)]


def constructor_arguments(tree):
    """(class, its __init__, argument names) of every class."""
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for function in (f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"):
            arguments = function.args
            every = [*arguments.posonlyargs, *arguments.args[1:], *arguments.kwonlyargs]
            every += [a for a in (arguments.vararg, arguments.kwarg) if a]
            yield cls.name, function, [a.arg for a in every]


def unused_arguments(tree):
    for name, function, arguments in constructor_arguments(tree):
        read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        yield from ((name, argument) for argument in arguments if argument not in read)


def stored_attributes(tree):
    """(class, attribute) wherever a constructor keeps something as `self.attribute`."""
    for name, function, _ in constructor_arguments(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield name, node.attr


BUILDING_BLOCKS = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in ("layers", "modeling")]


@pytest.mark.parametrize("path", BUILDING_BLOCKS, ids=relative)
def test_constructor_arguments_are_used(path):
    assert not list(unused_arguments(TREES[path]))


@pytest.mark.parametrize("path", BUILDING_BLOCKS, ids=relative)
def test_what_constructors_keep_is_read(path):
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    assert not [(name, attribute) for name, attribute in stored_attributes(TREES[path]) if attribute not in read]


def test_unused_arguments_are_found():
    code = "class A:\n def __init__(self, used, unused, *, kept=1):\n  self.used = used\n  self.kept = kept"
    assert list(unused_arguments(ast.parse(code))) == [("A", "unused")]
    assert list(stored_attributes(ast.parse(code))) == [("A", "used"), ("A", "kept")]
