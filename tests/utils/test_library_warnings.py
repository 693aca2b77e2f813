import os
import subprocess
import sys
import warnings

import pytest

from dino.utils import library_warnings
from dino.utils.library_warnings import hide_library_warnings, is_own, quiet_children


def warn(file, text="too\x1b[31m bad"):
    warnings.warn_explicit(text, UserWarning, file, 1)


@pytest.mark.parametrize("options", [[], ["default"]])
def test_own_warnings_alone_are_shown_in_one_line(options, capsys, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings():
        before = warnings.showwarning
        hide_library_warnings()
        assert (warnings.showwarning is before) == bool(options)
        if not options:
            warn("/elsewhere/torch/nn.py")
            warn(library_warnings.__file__)
            assert capsys.readouterr().err == "warning: too\\x1b[31m bad\n"


def test_files_of_the_package():
    assert is_own(library_warnings.__file__)
    assert not is_own("/elsewhere/dino/utils/library_warnings.py")


def test_new_processes_hide_warnings_of_imports(monkeypatch):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    program = "import warnings; warnings.warn_explicit('old', FutureWarning, 'f.py', 1, module='{}')"
    with quiet_children():
        done = [
            subprocess.run([sys.executable, "-c", program.format(name)], capture_output=True, text=True, check=True)
            for name in ("torch.jit._script", "mine")
        ]
    assert done[0].stderr == ""
    assert "FutureWarning: old" in done[1].stderr
    assert "PYTHONWARNINGS" not in os.environ
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    with quiet_children():
        assert os.environ["PYTHONWARNINGS"] == "error"
    assert os.environ["PYTHONWARNINGS"] == "error"
