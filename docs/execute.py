"""Execute notebooks: each percent script NAME.py becomes NAME.ipynb beside it, with the outputs of its cells.

    python docs/execute.py                       # all notebooks
    python docs/execute.py docs/notebook.py      # one of them

The scripts are the sources. They run in a temporary folder and without downloads, unless GPT_PARITY_OFFLINE=0 is set.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path = [path for path in sys.path if path != str(DOCS)]  # its notebook.py is not Jupyter's package `notebook`

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TIMEOUT = 600  # seconds per cell


def sources() -> list[Path]:
    """Return all notebooks of the documentation, as percent scripts."""
    return [*DOCS.glob("notebook.py"), *sorted((DOCS / "notebooks").glob("*.py"))]


def execute(source: Path) -> nbformat.NotebookNode:
    """Run a percent script as a notebook.

    Args:
        source: The script.

    Returns:
        The notebook with its outputs, and without metadata that differ from run to run.

    Raises:
        CellExecutionError: If a cell fails.
        ValueError: If an output contains a path of this machine.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext's are random
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",  # the interpreter that runs this program
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        ).execute()
        packages = Path(nbformat.__file__).parents[1]
        places = (folder, tempfile.gettempdir(), sys.prefix, packages, Path.home(), DOCS.parent)
        check_outputs(notebook, set(map(str, places)))
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def texts(output: nbformat.NotebookNode) -> list[str]:
    """Return the texts of an output, without figures, which are base64 and may contain any letters by chance."""
    return [output.get("text", ""), *(str(data) for kind, data in output.get("data", {}).items() if "text/" in kind)]


def check_outputs(notebook: nbformat.NotebookNode, paths: set[str]) -> None:
    """Raise ValueError if a text in the outputs of a notebook contains one of the paths."""
    for number, cell in enumerate(notebook.cells):
        shown = "\n".join(text for output in cell.get("outputs", ()) for text in texts(output))
        for path in paths - {"/"}:  # the home folder of some containers
            if path in shown:
                raise ValueError(f"the output of cell {number} contains the path {path}:\n{cell.source}")


def main() -> None:
    os.environ.setdefault("GPT_PARITY_OFFLINE", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # of the kernel's debugger, which would warn
    for source in [Path(name) for name in sys.argv[1:]] or sources():
        start = time.perf_counter()
        try:
            notebook = execute(source)
        except (CellExecutionError, ValueError) as error:
            sys.exit(f"{source}: {error}")
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"{source.with_suffix('.ipynb')}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
