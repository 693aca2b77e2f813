import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dino import cli
from dino.utils.files import DataError, UserError

PACKAGE = Path(cli.__file__).parents[1]
ROOT = PACKAGE.parent


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, does in cli.VERBS.items():
        assert f"  {name}" in out
        assert does in out
    assert cli.main([]) == 2


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dino 0.")


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_of_a_verb_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: dino {name}" in out
    assert "example" in out
    assert f"  dino {name} " in out


def test_an_unknown_verb(capsys):
    assert cli.main(["chekc"]) == 2
    assert capsys.readouterr().err == "error: no verb 'chekc'; the nearest is 'check'; see `dino --help`\n"
    assert cli.main(["zzz"]) == 2
    assert capsys.readouterr().err == f"error: no verb 'zzz'; there are {', '.join(cli.VERBS)}; see `dino --help`\n"


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from dino import cli
for name in {list(cli.VERBS)}:
    try:
        cli.main([name, "--help"])
    except SystemExit:
        pass
print([name for name in ("torch", "numpy", "detectron2", "matplotlib", "PIL") if name in sys.modules])
"""
    result = run_python(code)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr


def test_arguments_are_parsed_in_cli_only():
    def parses(path):
        tree = ast.parse(path.read_text())
        names = {node.attr if isinstance(node, ast.Attribute) else node.id for node in ast.walk(tree)
                 if isinstance(node, ast.Attribute | ast.Name)}  # fmt: skip
        return bool(names & {"ArgumentParser", "parse_args", "parse_known_args", "parse_intermixed_args"})

    found = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if parses(path)}
    assert found == {"cli"}


def test_choices_are_those_of_the_engines():
    """The parsers state them, so that `--help` imports no engine."""
    from dino import structures
    from dino.cli import convert, export, predict
    from dino.export import export_formats
    from dino.inference import predict_files, video
    from dino.modeling import cuda_graphs, precision
    from dino.weights import signatures

    assert tuple(predict_files._DTYPES) == predict._DTYPES
    assert predict._PRECISIONS == precision.PRECISIONS
    assert predict._VIDEOS == video.VIDEO_SUFFIXES
    assert cli.SCORE_THRESH == structures.SCORE_THRESH
    assert predict.build_parser().get_default("score_thresh") == cli.SCORE_THRESH
    assert export.build_parser().get_default("score_thresh") == [cli.SCORE_THRESH]
    assert predict.build_parser().get_default("cuda_graphs") == cuda_graphs.MOST
    assert tuple(export_formats.FORMATS) == export._FORMATS
    assert set(export._SUFFIXES.values()) == set(export_formats.FORMATS)
    assert tuple(export_formats._SAMPLING) == export._SAMPLING
    assert (*signatures.SIGNATURES, "safetensors") == convert._FORMATS


def test_checking_data_needs_no_detectron2():
    code = (
        "import sys; sys.modules['detectron2'] = None; from dino import cli; "
        "print(cli.main(['check', 'absent.json', '.']), cli.main(['train', 'dino_r18_small_data']))"
    )
    result = run_python(code)
    assert result.stdout.split() == ["2", "1"], result.stderr
    assert "error: annotations not found: absent.json" in result.stderr
    assert "give --train and --val ANNOTATIONS IMAGES" in result.stderr  # the recipe's own data, COCO, is not here
    assert "Traceback" not in result.stderr


def test_a_recipe_is_trained_with_the_flags_of_the_command_line(monkeypatch, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from dino.d2.recipe import DataFiles
    from dino.d2.training import launch
    from dino.d2.training.parallel import Processes

    calls = []
    monkeypatch.setattr(launch, "run", lambda *args: calls.append(args))
    monkeypatch.chdir(tmp_path)
    for name in ("t", "v"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "mine.py").write_text("")
    files = ["--train-json", "t.json", "--train-images", "t", "--val-json", "v.json", "--val-images", "v"]
    place = ["--num-gpus", "8", "--num-machines", "2", "--machine-rank", "1", "--dist-url", "tcp://a:1"]
    words = ["--config-file", "mine.py", "--resume", "--eval-only", *place, *files, "optimizer.lr=1", "train.epochs=2"]
    assert cli.main(["train", *words]) == 0
    job = launch.Job(
        "mine.py", ["optimizer.lr=1", "train.epochs=2"], DataFiles("t.json", "t", "v.json", "v"), True, True
    )
    assert calls == [(job, Processes(8, 2, 1, "tcp://a:1"))]

    (tmp_path / "w.pth").write_text("")
    words = ["optimizer.lr=1", "mine.py", "--train", "t.json", "t", "--val", "v.json", "v", "train.epochs=2", *place]
    assert cli.main(["train", *words, "--weights", "w.pth", "--output", "a run [1]", "--overwrite"]) == 0
    changes = ["optimizer.lr=1", "train.epochs=2", "train.init_checkpoint=w.pth", "train.output_dir=a run [1]"]
    job = launch.Job("mine.py", changes, DataFiles("t.json", "t", "v.json", "v"), overwrite=True)
    assert calls[1:] == [(job, Processes(8, 2, 1, "tcp://a:1"))]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("a.jpg is broken"), 1, "error: a.jpg is broken\n"),
        (UserError("--size is 0"), 1, "error: --size is 0\n"),
        (FloatingPointError("NaN"), 1, "error: NaN\n"),
        (ImportError("no onnx"), 1, "error: no onnx\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, error, code, message):
    def fail(argv):
        raise error

    monkeypatch.setattr(importlib.import_module("dino.cli.check"), "main", fail)
    assert cli.main(["check"]) == code
    assert capsys.readouterr().err == message


def test_a_pipe_that_ends_early_is_no_error():
    command = [sys.executable, "-m", "dino", "weights"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `head` does
        assert process.stderr.read() == ""
    assert process.returncode == 1
