"""Which directories a path may name, and what is said where there is no checkpoint."""

import json

import pytest

from tele_jax import checkpoint
from tele_jax.checkpoint.locate import find_step, list_steps
from tele_jax.errors import UserError
from tests.checkpoint.trees import CFG, params


def make_step(directory, step):
    """As much of a step directory as finding it needs."""
    (directory / str(step) / "meta").mkdir(parents=True)
    (directory / str(step) / "meta" / "meta.json").write_text("{}")


def test_a_step_directory_is_itself(tmp_path):
    make_step(tmp_path, 10)
    assert find_step(tmp_path / "10") == tmp_path / "10"
    assert find_step(str(tmp_path / "x" / ".." / "10")) == tmp_path / "10"


def test_the_latest_step_by_number_that_is_complete(tmp_path):
    for step in (9, 10, 100):
        make_step(tmp_path, step)
    (tmp_path / "200").mkdir()  # empty
    make_step(tmp_path, "300.orbax-checkpoint-tmp")
    make_step(tmp_path, "400.deleted")
    make_step(tmp_path, "notes")
    assert list_steps(tmp_path) == [9, 10, 100]
    assert find_step(tmp_path) == tmp_path / "100"


def test_a_stage_directory(tmp_path):
    make_step(tmp_path / "checkpoints", 3)
    (tmp_path / "metrics").mkdir()
    assert find_step(tmp_path) == tmp_path / "checkpoints" / "3"


def test_a_work_directory_takes_the_last_stage_in_the_order_of_the_run(tmp_path):
    make_step(tmp_path / "small" / "checkpoints", 900)
    make_step(tmp_path / "grow" / "checkpoints", 0)
    make_step(tmp_path / "left_over" / "checkpoints", 5)
    (tmp_path / "z_last" / "checkpoints").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"run": ["small", "grow", "z_last"], "stages": {}}))
    assert find_step(tmp_path) == tmp_path / "grow" / "checkpoints" / "0"


def test_a_work_directory_without_order_must_have_one_stage(tmp_path):
    make_step(tmp_path / "a" / "checkpoints", 1)
    assert find_step(tmp_path) == tmp_path / "a" / "checkpoints" / "1"
    make_step(tmp_path / "b" / "checkpoints", 1)
    with pytest.raises(UserError, match=r"several stages have checkpoints, .* name one of \['a', 'b'\]"):
        find_step(tmp_path)


LOADERS = [checkpoint.load, checkpoint.open_lazy]


@pytest.mark.parametrize("read", LOADERS)
def test_nothing_there(tmp_path, read):
    with pytest.raises(UserError, match=f"{tmp_path}/none: no such directory"):
        read(tmp_path / "none")


@pytest.mark.parametrize("read", LOADERS)
def test_an_empty_directory(tmp_path, read):
    with pytest.raises(UserError, match=r"an empty directory; looked for meta/meta.json, <step>/, checkpoints/<step>/"):
        read(tmp_path)


@pytest.mark.parametrize("read", LOADERS)
def test_a_file(tmp_path, read):
    (tmp_path / "model.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"model.bin: a file, but a checkpoint is a directory"):
        read(tmp_path / "model.bin")


@pytest.mark.parametrize("read", LOADERS)
def test_a_directory_of_something_else(tmp_path, read):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint here; looked for"):
        read(tmp_path)


@pytest.mark.parametrize("read", LOADERS)
def test_only_an_interrupted_save(tmp_path, read):
    make_step(tmp_path, "7.orbax-checkpoint-tmp")
    with pytest.raises(UserError, match=r"skipped interrupted saves: 7.orbax-checkpoint-tmp"):
        read(tmp_path)
    with pytest.raises(UserError, match="a save that was interrupted"):
        read(tmp_path / "7.orbax-checkpoint-tmp")


def test_saved_steps_are_found(tmp_path):
    for step in (2, 11):
        checkpoint.save(tmp_path / str(step), CFG, params(), step=step)
    assert checkpoint.load(tmp_path).step == 11
    assert checkpoint.open_lazy(tmp_path / "2").step == 2
