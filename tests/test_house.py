"""The rules of the house: who imports whom, and what no line of the package may say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dino"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in FILES}
LONGEST_FUNCTION = 50
HEIGHTS = {"layers": 0, "modeling": 1, "d2": 3}  # of the packages; other modules stand at 2
DEVICE_LITERAL = re.compile(r"""\.cuda\(|device\s*=\s*["']cuda|\.to\(\s*["']cuda|torch\.device\(\s*["']cuda""")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def relative(path):
    return str(path.relative_to(ROOT))


def imports(nodes, path):
    """Full names of what the import statements among `nodes` ask for: modules, or names in them."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def outside_functions(tree):
    """All nodes that run when the module is imported, and those under `if TYPE_CHECKING`."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def dino_imports(path):
    """Modules of the package that are imported together with the one in `path`."""
    for name in imports(outside_functions(TREES[path]), path):
        if name in MODULES:
            yield name
        elif name.rpartition(".")[0] in MODULES:
            yield name.rpartition(".")[0]


GRAPH = {name: set(dino_imports(path)) - {name} for name, path in MODULES.items()}


def height(module):
    parts = module.split(".")
    return HEIGHTS.get(parts[1], 2) if len(parts) > 1 else -1


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_there_is_something_to_check():
    assert {"dino", "dino.layers.boxes", "dino.modeling.dino", "dino.weights"} <= set(MODULES)
    assert "dino.structures" in GRAPH["dino.modeling.dino"]
    assert "dino.layers.boxes" in GRAPH["dino.layers.matcher"]


def test_imports_without_detectron2():
    names = [name for name in MODULES if not (name == "dino.d2" or name.startswith("dino.d2."))]
    code = f"import sys, importlib\nsys.modules['detectron2'] = None\nfor n in {names}: importlib.import_module(n)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_the_network_needs_torch_only():
    blocked = "sys.modules['torchvision'] = sys.modules['detectron2'] = sys.modules['timm'] = None"
    result = run_python(f"import sys\n{blocked}\nimport dino.layers, dino.modeling")
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_nothing():
    result = run_python("import sys, dino; print([m for m in ('torch', 'torchvision', 'scipy') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_no_import_circles():
    finished, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished:
            return
        path.append(module)
        for other in sorted(GRAPH[module]):
            visit(other)
        finished.add(path.pop())

    for module in GRAPH:
        visit(module)


def test_imports_go_downwards():
    upwards = [(m, other) for m, others in GRAPH.items() for other in others if height(other) > height(m)]
    assert not upwards


def test_network_is_assembled_elsewhere():
    """Encoder, selection, decoder and denoising are injected."""
    assert not {m for m in GRAPH["dino.modeling.dino"] if m.startswith("dino.modeling")}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_d2_imports_detectron2(path):
    if (PACKAGE / "d2") not in path.parents:
        found = [name for name in imports(ast.walk(TREES[path]), path) if name.split(".")[0] == "detectron2"]
        assert not found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_devices_are_derived(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [(number, line.strip()) for number, line in lines if DEVICE_LITERAL.search(line)]


def test_device_literals_are_found():
    bad = ["x.cuda()", "zeros(3, device='cuda')", 'x.to("cuda:0")', "torch.device('cuda')"]
    assert all(DEVICE_LITERAL.search(line) for line in bad)
    assert not DEVICE_LITERAL.search("x.to(y.device)")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_are_short(path):
    functions = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION}


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
