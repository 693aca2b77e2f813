import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dino import cli
from dino.utils.files import DataError

NEEDS_DETECTRON2 = {"train"}


def test_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert f"  {name}" in out
        assert verb.help in out
    assert cli.main([]) == 2


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dino 0.")


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_of_a_verb_shows_an_example(name, capsys):
    if name in NEEDS_DETECTRON2:
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: dino {name}" in out
    assert "example" in out
    assert f"  dino {name} " in out


def test_an_unknown_verb(capsys):
    assert cli.main(["chekc"]) == 2
    assert f"error: no verb 'chekc'; there are {', '.join(cli.VERBS)}\n" in capsys.readouterr().err


def test_a_verb_is_imported_only_when_it_is_called():
    code = "import sys, dino.cli; print([m for m in ('torch', 'detectron2', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(cli.__file__).parents[2], capture_output=True)
    assert result.stdout.strip() == b"[]", result.stderr


def test_checking_data_needs_no_detectron2():
    code = (
        "import sys; sys.modules['detectron2'] = None; from dino import cli; "
        "print(cli.main(['check', 'absent.json', '.']), cli.main(['train']))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(cli.__file__).parents[2], capture_output=True)
    assert result.stdout.split() == [b"1", b"1"], result.stderr
    assert b"error: annotations not found: absent.json" in result.stderr
    assert b"error: dino.d2 needs Detectron2" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("a.jpg is broken"), 1, "error: a.jpg is broken\n"),
        (FloatingPointError("NaN"), 1, "error: NaN\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_are_told_in_one_line(monkeypatch, capsys, error, code, message):
    def fail(argv):
        raise error

    monkeypatch.setattr(importlib.import_module("dino.data.check.check_dataset"), "main", fail)
    assert cli.main(["check"]) == code
    assert capsys.readouterr().err == message
