"""Every notebook runs from its first cell to its last; the outputs that are committed are those of its cells."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the extra [notebooks] is not installed")

import nbformat

from notebooks.execute import MADE_FROM, ROOT, digest, execute

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Small sizes, one device as a user has it, and quick compilation: what is computed is not timed.
SMOKE = {"TELE_NOTEBOOK_SMOKE": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_it_runs_at_smoke_size_and_what_it_asserts_holds(notebook, tmp_path):
    notebook.cells.append(nbformat.v4.new_code_cell("print(tele.__file__)"))
    execute(notebook, tmp_path, SMOKE)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert Path(code[-1].outputs[0].text.strip()) == ROOT / "tele_jax" / "__init__.py"
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 1
    assert not list(tmp_path.iterdir())  # it leaves nothing lying about


def test_it_installs_what_it_needs_in_its_first_code_cell(notebook):
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "%pip install" in first.source


INSTALLS = re.compile(r'%pip install --quiet "(.+)"')


def test_all_first_cells_differ_in_their_extras_alone():
    cells = [nbformat.read(path, as_version=4).cells for path in NOTEBOOKS]
    first = [next(cell.source for cell in cells if cell.cell_type == "code") for cells in cells]
    assert len({re.sub(r"\[[a-z,]+\]( @|\")", r"[EXTRAS]\1", source) for source in first}) == 1


def first_cell(directory, source=""):
    """What the first code cell installs, run in `directory` by a Python that has no packages; or its last message."""
    notebook = nbformat.read(ROOT / "notebooks" / "growth_in_five_minutes.ipynb", as_version=4)
    code = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    code = code.replace('SOURCE = ""', f"SOURCE = {source!r}")
    code = INSTALLS.sub(r'print(f"\1")', code)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=directory, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip()


def a_copy(directory):
    (directory / "tele_jax").mkdir(parents=True)
    (directory / "setup.py").write_text("")
    return directory


def test_the_first_cell_finds_the_copy_that_it_is_given(tmp_path):
    clone = a_copy(tmp_path / "clone")
    (clone / "notebooks").mkdir()
    assert first_cell(clone / "notebooks") == f"{clone}[plots]"  # the notebook of a clone

    uploaded = tmp_path / "uploaded"
    a_copy(uploaded / "tele_jax")
    assert first_cell(uploaded) == f"{uploaded / 'tele_jax'}[plots]"  # the folder beside it

    zipped = tmp_path / "zipped"
    zipped.mkdir()
    shutil.make_archive(zipped / "tele_jax-main", "zip", tmp_path / "clone")
    shutil.make_archive(tmp_path / "whole", "gztar", uploaded)  # with a folder around it
    assert first_cell(zipped) == f"{zipped / 'tele_jax_unpacked'}[plots]"
    assert first_cell(tmp_path, "whole.tar.gz") == f"{tmp_path / 'tele_jax_unpacked' / 'tele_jax'}[plots]"

    address = "git+https://example.com/tele_jax.git"
    assert first_cell(tmp_path, address) == f"tele_jax[plots] @ {address}"


def test_the_first_cell_says_what_to_do_without_a_copy(tmp_path):
    empty = tmp_path / "here" / "notebooks"
    empty.mkdir(parents=True)
    for source in ("", "nowhere"):
        assert f"SOURCE={source!r}: no copy of tele_jax is there; set SOURCE" in first_cell(empty, source)


def test_committed_outputs_are_those_of_the_cells(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    again = "run `python notebooks/execute.py NOTEBOOK` again"
    assert notebook.metadata.get(MADE_FROM) == digest(notebook), f"cells were edited after the last run: {again}"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), again
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 400_000
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(root|home|tmp|work|usr|Users)/|\blocalhost\b|\d+\.\d+\.\d+\.\d+", without_pictures)
