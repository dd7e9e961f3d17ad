"""Files are written whole or not at all; directories appear when they are complete; locks are held by one."""

import errno
import os
from pathlib import Path

import pytest

from tele_jax import files
from tele_jax.errors import DamageError, UserError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "below" / "a"
    files.write_file(path, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and names(path.parent) == ["a"]
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_text() == "new" and names(path.parent) == ["a"]
    with files.replacing(path):
        pass
    assert path.read_text() == "new"


def test_a_written_file_touches_no_other_file(tmp_path):
    """Whatever the names are, also those that a temporary file might have."""
    written = ["x.tmp", "a.json", "a.bin", "a", ".a", ".tmp", "note", "note.txt.tmp"]
    for name in (*written, "note.tmp", "a.tmp", ".a.tmp"):
        (tmp_path / name).write_text("old")
    for name in written:
        files.write_file(tmp_path / name, name)
    assert all((tmp_path / name).read_text() == name for name in written)
    assert all((tmp_path / name).read_text() == "old" for name in ("note.tmp", "a.tmp", ".a.tmp"))
    assert len({files.temporary_of(tmp_path / name) for name in written}) == len(written)


def test_the_next_write_removes_what_a_killed_one_left(tmp_path):
    files.temporary_of(tmp_path / "a").write_text("half")
    files.write_file(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("write", [lambda path: files.write_file(path, "a"), lambda path: files.write_json(path, {})])
def test_a_path_that_cannot_be_written_is_the_users_and_a_full_disk_is_not(tmp_path, write, monkeypatch):
    (tmp_path / "file").write_text("a")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "directory", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            write(path)
    assert names(tmp_path) == ["directory", "file"]

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DamageError, match=rf"{tmp_path}/b: could not be written \(No space left .*\); make room"):
        write(tmp_path / "b")


def test_a_directory_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "above" / "out"
    with files.new_directory(out, "text") as directory:
        (directory / "inner").mkdir()
        (directory / "inner" / "a").write_text("a")
        assert not out.exists()
        with (
            pytest.raises(UserError, match=r"out\.partial: is being written by another process"),
            files.new_directory(out, "text"),
        ):
            pass
    assert names(out) == ["inner"] and names(out.parent) == ["out"]
    with (
        pytest.raises(UserError, match="out: exists already, and is not overwritten"),
        files.new_directory(out, "text"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), files.new_directory(tmp_path / "failed", "text"):
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["above"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / "out.partial"
    (left / "deep").mkdir(parents=True)
    with (
        pytest.raises(UserError, match=r"out\.partial: is needed for the unfinished text, but exists already"),
        files.new_directory(tmp_path / "out", "text"),
    ):
        pass
    assert (left / "deep").is_dir()
    (left / ".lock").touch()
    with files.new_directory(tmp_path / "out", "text") as directory:
        assert names(directory) == [".lock"]
    assert names(tmp_path / "out") == []


def test_a_lock_is_held_by_one(tmp_path):
    with files.locked(tmp_path / "lock") as first, files.locked(tmp_path / "lock") as second:
        assert first and not second
    with (
        files.held_alone(tmp_path / "lock", "taken"),
        pytest.raises(UserError, match="taken"),
        files.held_alone(tmp_path / "lock", "taken"),
    ):
        pass
