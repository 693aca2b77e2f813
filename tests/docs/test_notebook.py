"""The notebook runs, offline and from the project's files alone; its stored outputs are those of a run."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/first_steps.ipynb"
MOST_BYTES = 300_000


def code_cells(content):
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def test_stored_outputs():
    """Of every cell, without errors, small, and without paths of a machine."""
    text = NOTEBOOK.read_text()
    cells = code_cells(json.loads(text))
    assert all(cell["outputs"] for cell in cells)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream", "execute_result"}
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", ())]
    assert len(pictures) == 3
    assert len(text.encode()) < MOST_BYTES
    assert not re.findall(r"(?:^|[\s\"'(])/(?:tmp|home|root|work|Users|usr|opt)\b", text)


def test_links_lead_somewhere():
    texts = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    pages = re.findall(r"\]\((?!https:)([^)#]+)", "\n".join(texts))
    assert pages
    assert not [page for page in pages if not (NOTEBOOK.parent / page).is_file()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    from ..tools.programs import load_program

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = load_program("run_notebook").execute(NOTEBOOK, tmp_path)
    found = code_cells(notebook)
    assert len(found) == len(code_cells(json.loads(NOTEBOOK.read_text())))
    assert (tmp_path / "first_steps/report/report.html").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"first_steps"}
    metrics = json.loads((tmp_path / "first_steps/report/metrics.json").read_text())
    assert metrics["AP50"] > 0.2
    assert str(tmp_path) not in json.dumps(notebook)
