"""What growth from checkpoint to checkpoint refuses, says, and leaves as it was."""

import functools
import os
import shutil

import pytest

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.axes import flatten, unflatten
from tele_jax.errors import DamageError, UserError
from tests.checkpoint.trees import chunk_files
from tests.growth.checkpoints import DST, SMALL, SRC, Stopped, random_tree, save, stop_half_way


@functools.cache
def plan(seed=3):
    return growth.plan(SRC, DST, seed=seed)


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return save(tmp_path_factory.mktemp("refused") / "src")


def test_a_destination_that_exists(src, tmp_path):
    (tmp_path / "dst").mkdir()
    with pytest.raises(UserError, match=r"dst: exists already, and checkpoints are never overwritten"):
        growth.stream(plan(), src, tmp_path / "dst")
    assert os.listdir(tmp_path) == ["dst"] and not os.listdir(tmp_path / "dst")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine").write_text("")
    with pytest.raises(UserError, match=r"other.partial: is needed for the unfinished checkpoint, but holds mine"):
        growth.stream(plan(), src, tmp_path / "other")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"plan": 4}, "begun with another plan;"),
        ({"src": "other"}, "begun with another source;"),
        ({"chunk_bytes": 1000}, "begun with another chunk_bytes;"),
        ({"provenance": {"a": 1}}, "begun with another provenance;"),
        ({"opt": True, "chunk_bytes": 1000}, "begun with another opt;"),
        ({"step": 1, "provenance": {"a": 1}}, "begun with another step;"),
        ({"shard": (1, 2), "resume": False}, "one of several processes cannot start over"),
    ],
)
def test_what_was_begun_otherwise(what, message, src, tmp_path):
    call = {"plan": plan(), "src": src, "dst": tmp_path / "dst", **SMALL}
    stop_half_way(**call)
    if "plan" in what:
        what = {"plan": plan(seed=what["plan"])}
    if "src" in what:
        params = random_tree(SRC, 2)
        checkpoint.save(tmp_path / "other", SRC, params, step=7, provenance=[{"stage": "before"}])
        what = {"src": tmp_path / "other"}
    with pytest.raises(UserError, match=message):
        growth.stream(**{**call, **what})
    assert growth.stream(**call).resumed_tiles


def test_two_processes_on_the_same_part(src, tmp_path, monkeypatch):
    refusals = []

    def meanwhile(done, total):
        for shard in ((0, 2), (1, 3)):
            with pytest.raises(UserError) as refused:
                growth.stream(plan(), src, tmp_path / "dst", shard=shard, **SMALL)
            refusals.append(str(refused.value))
        with pytest.raises(UserError, match="is being written by another process"):
            growth.stream(plan(), src, tmp_path / "dst", resume=False, **SMALL)
        raise Stopped

    with pytest.raises(Stopped):
        growth.stream(plan(), src, tmp_path / "dst", shard=(0, 2), progress=meanwhile, **SMALL)
    assert refusals[0].endswith("shard 0 of 2 is being written by another process")
    assert refusals[1].endswith("is being written in other shards (0-of-2); use the same number")


def test_too_little_disk(src, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    with pytest.raises(UserError, match=r"dst: [\d,]+ bytes are to be written, but the disk has only 50,000 free"):
        growth.stream(plan(), src, tmp_path / "new" / "dst", **SMALL)
    assert not os.listdir(tmp_path)


def test_too_little_memory(src, tmp_path):
    with pytest.raises(UserError, match=r"memory_gb=0.01 is too little for params/\S+: .* need memory_gb=0.1\d\d"):
        growth.stream(plan(), src, tmp_path / "dst", memory_gb=0.01)
    assert not os.listdir(tmp_path)


def test_a_source_of_another_model(src, tmp_path):
    other = SRC.replace(rms_eps=1e-3, vocab_size=41, padded_vocab_size=41, tie_embeddings=True)
    with pytest.raises(UserError, match="not a checkpoint of the model that the plan grows") as refused:
        growth.stream(growth.plan(other, other), src, tmp_path / "dst")
    for line in (
        "config.rms_eps: stored 1e-05, in the plan 0.001",
        "embed.table: stored float32[40,16], expected float32[41,16]",
        "lm_head.kernel: stored float32[16,40], not expected",
    ):
        assert line in str(refused.value)


def test_a_source_that_lacks_leaves(tmp_path):
    leaves, specs = flatten(random_tree(SRC, 1)), flatten(tele.spec(SRC))
    for name in ("final_norm.scale", "layers.attn.q"):
        del leaves[name], specs[name]
    checkpoint.save(tmp_path / "src", SRC, unflatten(leaves), spec=unflatten(specs))
    with pytest.raises(UserError, match=r"final_norm.scale: missing, .*\n.*layers.attn.q: missing, expected float32"):
        growth.stream(plan(), tmp_path / "src", tmp_path / "dst")
    with pytest.raises(UserError, match="src: holds no optimizer state to grow"):
        checkpoint.save(tmp_path / "whole" / "src", SRC, random_tree(SRC, 1))
        growth.stream(plan(), tmp_path / "whole" / "src", tmp_path / "dst", opt=True)
    assert not (tmp_path / "dst.partial").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]), "its checksum is not that of its content"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"bytes, and no index with its"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_a_damaged_source(damage, message, src, tmp_path):
    shutil.copytree(src, tmp_path / "src")
    file = chunk_files(tmp_path / "src", "opt_state/1.nu.layers.mlp.up")[0]
    whole = file.read_bytes()
    damage(file)
    with pytest.raises(DamageError, match=rf"opt_state/1.nu.layers.mlp.up: damaged: {file}.*{message}"):
        growth.stream(plan(), tmp_path / "src", tmp_path / "dst", opt=True, **SMALL)
    assert not (tmp_path / "dst").exists()
    with pytest.raises(UserError, match=r"no such directory|no complete checkpoint"):
        checkpoint.open_lazy(tmp_path / "dst.partial")
    file.write_bytes(whole)
    growth.stream(plan(), tmp_path / "src", tmp_path / "dst", opt=True, **SMALL)
    assert not list(checkpoint.verify(checkpoint.open_lazy(tmp_path / "dst")))


@pytest.mark.parametrize("shard", [(2, 2), (-1, 3), (0, 0)])
def test_a_shard_that_is_none(shard, src, tmp_path):
    with pytest.raises(UserError, match=r"must be \(i, n\) with 0 <= i < n"):
        growth.stream(plan(), src, tmp_path / "dst", shard=shard)


def test_addresses_are_refused(src, tmp_path):
    with pytest.raises(UserError, match="gs://bucket/dst: growth from checkpoint to checkpoint needs a file system"):
        growth.stream(plan(), src, "gs://bucket/dst")
    with pytest.raises(UserError, match="gs://bucket/src"):
        growth.stream(plan(), "gs://bucket/src", tmp_path / "dst")
