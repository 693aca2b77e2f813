import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("module", ["dino.cli.env", "dino.env"])
def test_the_report_holds_what_a_bug_report_needs(module):
    """The second name is the one from before the module moved."""
    done = subprocess.run([sys.executable, "-m", module], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = ("dino 0.", "Python 3.", f"torch {torch.__version__}", "CPU: ", "GPU", "scipy", "cpu runs ", "cuda build")
    for part in parts:
        assert part in done.stdout, done.stdout
