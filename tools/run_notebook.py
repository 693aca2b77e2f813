"""Run a notebook in an empty folder, and store its outputs in the file.

    python tools/run_notebook.py docs/first_steps.ipynb

Needs nbclient and ipykernel (`pip install -e ".[slow]"`). The notebook must write into its own folder alone. The folder
is removed, and its path is left out of the outputs.
"""

import argparse
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def execute(path, folder, timeout=900):
    """The notebook of a file with the outputs of all its cells.

    Args:
        folder: in which it runs.
        timeout: seconds of a cell.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = {"timeout": timeout, "record_timing": False, "resources": {"metadata": {"path": str(folder)}}}
    NotebookClient(notebook, **options).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.pop("metadata", None) if output.output_type == "stream" else output.metadata.clear()
            if "text" in output:
                output.text = output.text.replace(f"{Path(folder).resolve()}{os.sep}", "")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def build_parser():
    """The argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path, help="the file to run, and to write")
    return parser


def main():
    """Run it and replace the file."""
    import nbformat

    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(args.notebook, folder)
    nbformat.write(notebook, args.notebook)
    print(f"{args.notebook}: {args.notebook.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
