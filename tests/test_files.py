"""Files are written whole or not at all; directories appear when they are complete; locks are held by one."""

import pytest

from tele_jax import files
from tele_jax.errors import UserError


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
