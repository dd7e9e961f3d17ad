"""Checkpoints of a training run: in the background, the last few kept, whole at any moment."""

import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import optax
import pytest

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.checkpoint import host_leaves
from tele_jax.errors import DamageError, UserError
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests.checkpoint.trees import CFG, assert_same, params


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_last_few_are_kept(tmp_path):
    with checkpoint.Manager(tmp_path / "checkpoints", keep=2) as manager:
        assert manager.latest_step() is None
        for step in (0, 5, 10, 200):
            assert manager.save(step, CFG, params(seed=step)) is True
        manager.wait()
        assert manager.latest_step() == 200
        assert_same(manager.load(10).params, params(seed=10))
        assert_same(manager.load().params, params(seed=200))
    assert names(tmp_path / "checkpoints") == ["10", "200"]


def test_everything_is_passed_on(tmp_path):
    state = optax.adam(1e-3).init(params())
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(4, CFG, params(), opt_state=state, provenance=[{"stage": "sft"}], data_state=b"there")
        loaded = manager.load(opt_state_like=state)
    assert_same(loaded.opt_state, state)
    assert (loaded.step, loaded.provenance, loaded.data_state) == (4, ({"stage": "sft"},), b"there")


def test_arrays_may_be_donated_at_once(tmp_path):
    """The next step of training overwrites the buffers while the save still runs."""
    before = jax.tree.map(np.array, params())
    shardings = param_shardings(tele.spec(CFG), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 7, tree), donate_argnums=0)
    overwrite(jax.device_put(before, shardings))  # compiled beforehand
    with checkpoint.Manager(tmp_path) as manager:
        for step in range(3):
            tree = jax.device_put(before, shardings)
            host = jax.tree.map(np.array, before)
            manager.save(step, CFG, tree, {"host": host})
            tree = overwrite(tree)
            jax.tree.map(lambda leaf: leaf.fill(-7), host)
            loaded = manager.load(step)
            assert_same(loaded.params, before)
            assert_same(loaded.opt_state["host"], before)


def test_the_loop_goes_on_while_files_are_written(tmp_path, monkeypatch):
    began, may_write = threading.Event(), threading.Event()
    write = host_leaves._write

    async def held(*what):
        began.set()
        assert may_write.wait(60)
        await write(*what)

    monkeypatch.setattr(host_leaves, "_write", held)
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(1, CFG, params())
        assert manager.latest_step() is None
        assert began.wait(60)  # its directory is there
        with pytest.raises(UserError, match="skipped interrupted saves"):
            checkpoint.load(tmp_path)
        may_write.set()
        manager.wait()
        assert manager.latest_step() == 1


def test_a_step_that_is_there_is_left_alone(tmp_path):
    with checkpoint.Manager(tmp_path) as manager:
        assert manager.save(1, CFG, params(seed=1)) is True
        assert manager.save(1, CFG, params(seed=2)) is False
        assert_same(manager.load(1).params, params(seed=1))


def test_what_was_interrupted_is_removed_at_the_next_start(tmp_path):
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(1, CFG, params())
    (tmp_path / "1").rename(tmp_path / "1.deleted")
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with checkpoint.Manager(tmp_path) as manager:
        assert names(tmp_path) == ["notes.txt"]
        assert manager.latest_step() is None


def test_a_failed_write_names_the_checkpoint(tmp_path, monkeypatch):
    async def full(*what):
        raise OSError("No space left on device")

    with checkpoint.Manager(tmp_path) as manager:
        monkeypatch.setattr(host_leaves, "_write", full)
        manager.save(1, CFG, params())
        with pytest.raises(DamageError, match=f"{tmp_path}/1: the checkpoint could not be written: .*No space left"):
            manager.wait()
        monkeypatch.undo()
        assert manager.latest_step() is None
        assert manager.save(1, CFG, params()) is True  # and again, now that there is space
        assert_same(manager.load(1).params, params())


def test_it_may_be_closed_twice(tmp_path):
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(1, CFG, params())
        manager.close()
    assert names(tmp_path) == ["1"]


def test_keep_must_be_above_zero(tmp_path):
    with pytest.raises(UserError, match="keep=0 must be above 0"):
        checkpoint.Manager(tmp_path, keep=0)


KILLS = 8


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Directories 0 to KILLS - 1 of interrupted runs, and what was in each."""
    work = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.killed", str(work), str(KILLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return work, json.loads(done.stdout)


@pytest.mark.parametrize("moment", range(KILLS))
def test_a_killed_save_leaves_a_whole_checkpoint(killed, moment):
    """Killed at file-system events spread evenly over saving steps 2 and 3 and removing 1 and 2."""
    directory = killed[0] / str(moment)
    found = checkpoint.open_lazy(directory)
    assert not list(checkpoint.verify(found))
    with checkpoint.Manager(directory, keep=1) as manager:
        step = manager.latest_step()
        assert step == found.step and step in (1, 2, 3)
        assert all(name.isdecimal() for name in names(directory))
        loaded = manager.load()
        assert loaded.step == step
        for leaf in jax.tree.leaves((loaded.params, loaded.opt_state)):
            np.testing.assert_array_equal(leaf, step)
        assert manager.save(4, CFG, params())
        assert_same(manager.load().params, params())
    assert names(directory) == ["4"]


def test_the_kills_were_in_the_middle_of_things(killed):
    _, report = killed
    assert report["events"] > 10 * KILLS
    assert sum(any("tmp" in name for name in left) for left in report["left"]) >= KILLS // 2
    latest = {max(int(name) for name in left if name.isdecimal()) for left in report["left"]}
    assert len(latest) > 1
