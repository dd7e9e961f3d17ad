"""Runs notebooks from their first cell to their last, and writes what they print and draw into the files.

    python notebooks/execute.py notebooks/growth_in_five_minutes.ipynb

The outputs that are committed come from here. They carry the SHA-256 of the cells that they were made by, so that a
test sees when cells were edited and not run again. Needs the extra [notebooks].
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
MADE_FROM = "outputs_made_from"  # in the metadata of the notebook: the digest of its cells


def digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256, hexadecimal, of the code of a notebook: all that its outputs follow from."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def execute(notebook: nbformat.NotebookNode, directory: Path, environment: Mapping[str, str]) -> None:
    """Runs every cell, in a kernel that works in `directory` and imports tele_jax from here; outputs are kept.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed; the message holds its code and the traceback.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(directory)}})
    client.execute(env={**os.environ, **environment, "PYTHONPATH": path})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    for path in parser.parse_args().notebooks:
        notebook = nbformat.read(path, as_version=4)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            execute(notebook, Path(directory), {})
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day: another diff at every run
        notebook.metadata[MADE_FROM] = digest(notebook)
        temporary = path.with_suffix(".tmp")
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
        print(f"{path}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
