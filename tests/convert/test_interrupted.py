"""Imports and exports that are stopped on the way."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tele_jax import checkpoint, convert
from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tests.convert import releases
from tests.growth.test_stream import same_files

KILLED = """
import os, signal, sys
from tele_jax import convert

def stop(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

convert.{call}
"""


@pytest.fixture
def src(tmp_path):
    return releases.save(tmp_path / "release", *releases.telechat())


def run_killed(call):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED.format(call=call))], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def change(file, seed):
    """Other weights of the same size and date of modification."""
    before = file.stat()
    releases.write_safetensors(file, releases.telechat(seed=seed)[1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_an_import_that_was_killed_goes_on_and_gives_the_same_files(src, tmp_path):
    how = {"chunk_bytes": 700, "workers": 1}
    run_killed(f"import_checkpoint({str(src)!r}, {str(tmp_path / 'ck')!r}, progress=stop, chunk_bytes=700, workers=1)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck.partial", "release"]
    with pytest.raises(UserError, match="no complete checkpoint here"):
        checkpoint.open_lazy(tmp_path / "ck.partial")
    with pytest.raises(UserError, match=r"ck.partial: was begun with another config; finish it as it was begun"):
        convert.import_checkpoint(src, tmp_path / "ck", dtype="bfloat16", **how)
    done = convert.import_checkpoint(src, tmp_path / "ck", **how)
    assert done.tiles / 3 < done.resumed_tiles < done.tiles
    convert.import_checkpoint(src, tmp_path / "other" / "ck", **how)
    same_files(tmp_path / "ck", tmp_path / "other" / "ck")
    assert not (tmp_path / "ck.partial").exists()


def test_ctrl_c_while_a_release_is_imported_is_one_line(src, tmp_path, monkeypatch, capsys):
    """The command's progress is where the signal comes; what is finished is kept."""

    class Interrupting:
        def __init__(self, what):
            pass

        def __call__(self, done, total):
            if done > total / 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("tele_jax.cli.import.Progress", Interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    try:
        assert main(["import", str(src), str(tmp_path / "ck")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "tele: interrupted\n"
    assert not (tmp_path / "ck").exists() and (tmp_path / "ck.partial").exists()
    monkeypatch.undo()
    assert main(["import", str(src), str(tmp_path / "ck")]) == 0


def test_an_import_that_was_killed_starts_over_where_that_is_asked_for_or_the_source_changed(src, tmp_path):
    call = f"import_checkpoint({str(src)!r}, {str(tmp_path / 'ck')!r}, progress=stop, chunk_bytes=700, workers=1)"
    run_killed(call)
    change(src / "model.safetensors", seed=9)
    with pytest.raises(UserError, match=r"was begun with another source"):
        convert.import_checkpoint(src, tmp_path / "ck", chunk_bytes=700)
    assert convert.import_checkpoint(src, tmp_path / "ck", chunk_bytes=700, resume=False).resumed_tiles == 0


def test_an_import_ends_where_the_release_changes_while_it_is_read(src, tmp_path):
    def meanwhile(done, total):
        if done == total:
            change(src / "model.safetensors", seed=10)

    with pytest.raises(UserError, match=r"release: its files changed while they were read; import it again"):
        convert.import_checkpoint(src, tmp_path / "ck", chunk_bytes=700, progress=meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_an_export_that_was_killed_is_done_again(src, tmp_path):
    convert.import_checkpoint(src, tmp_path / "ck", chunk_bytes=700)
    arguments = f"{str(tmp_path / 'ck')!r}, {str(tmp_path / 'out')!r}, format='telechat', progress=stop"
    run_killed(f"export_checkpoint({arguments})")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "out.partial", "release"]
    convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="telechat")
    found, expected = releases.read_weights(tmp_path / "out"), releases.read_weights(src)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "out.partial").exists()


def test_two_exports_to_one_place(src, tmp_path):
    convert.import_checkpoint(src, tmp_path / "ck")
    refusals = []

    def meanwhile(done, total):
        with pytest.raises(UserError, match=r"out.partial: is being written by another process"):
            convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="telechat")
        refusals.append(done)

    convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="telechat", progress=meanwhile)
    assert refusals and (tmp_path / "out" / "config.json").is_file()


def test_a_directory_of_ones_own_is_not_taken_for_an_unfinished_export(src, tmp_path):
    convert.import_checkpoint(src, tmp_path / "ck")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("")
    with pytest.raises(UserError, match=r"out.partial: is needed for the unfinished export, but exists already"):
        convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="telechat")
    assert (tmp_path / "out.partial" / "mine").is_file()
