import runpy
import sys

import pytest
import torch


@pytest.mark.parametrize("module", ["dino.cli.env", "dino.env"])
def test_the_report_holds_what_a_bug_report_needs(module, monkeypatch, capsys):
    """The second name is the one from before the module moved."""
    monkeypatch.setattr(sys, "argv", ["env"])
    monkeypatch.delitem(sys.modules, "dino.cli.env", raising=False)  # as in a new process
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    report = capsys.readouterr().out
    parts = ("dino 0.", "Python 3.", f"torch {torch.__version__}", "CPU: ", "GPU", "scipy", "cpu runs ", "cuda build")
    for part in parts:
        assert part in report, report
