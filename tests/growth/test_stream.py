"""Growth from checkpoint to checkpoint: the bits of apply and apply_opt, whatever the tiles, threads, processes, kills.

apply and apply_opt are compared with numpy in test_apply.py and test_apply_opt.py.
"""

import contextlib
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.errors import UserError
from tests.checkpoint.trees import assert_same, chunk_files
from tests.growth.checkpoints import DST, SMALL, SRC, random_state, random_tree, save, stop_half_way


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    return save(tmp_path_factory.mktemp("stream") / "src")


@pytest.fixture(scope="module")
def finely_cut(src):
    """The same checkpoint in chunks of 700 bytes, by a growth in which nothing grows."""
    path = src.with_name("finely_cut")
    growth.stream(growth.plan(SRC, SRC), src, path, opt=True, chunk_bytes=700, memory_gb=0.2)
    assert_same(checkpoint.load(path).params, checkpoint.load(src).params)
    assert_same(checkpoint.load(path).opt_state, checkpoint.load(src).opt_state)
    return path


def grown(plan, path):
    """What growth in memory gives, compiled as one program."""
    loaded = checkpoint.load(path)
    return jax.jit(lambda p, o: (growth.apply(plan, p), growth.apply_opt(plan, o)))(loaded.params, loaded.opt_state)


@pytest.fixture(scope="module")
def exact(src):
    """(plan, parameters and optimizer state as they must be) of the growth that most tests repeat."""
    plan = growth.plan(SRC, DST, policy="exact", seed=3)
    return plan, *grown(plan, src)


def same_files(a: Path, b: Path) -> None:
    """Every file of the checkpoints has the same bytes; but Orbax notes times and places."""
    files = [{str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} for path in (a, b)]
    assert files[0] == files[1]
    for file in files[0]:
        if file.endswith(("_CHECKPOINT_METADATA", "commit_success.txt")):
            continue
        left, right = ((path / file).read_bytes() for path in (a, b))
        if file == "meta/meta.json":
            left, right = ({**json.loads(x), "sha256": "", "provenance": ""} for x in (left, right))
        assert left == right, file


# ---- the bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "kwargs", "how"),
    [
        ("exact", {}, {"chunk_bytes": 300, "workers": 1}),
        ("exact", {"epsilon": "keep"}, {"chunk_bytes": 1111, "workers": 4}),
        ("msg", {"layers": [0, 1, 1]}, {"chunk_bytes": 777, "workers": 2}),
        ("copy", {"layers": [0, 0, 1]}, {"chunk_bytes": 500, "workers": 2}),
        ("stack", {}, {"chunk_bytes": 2000, "workers": 4}),
        ("random", {}, {"chunk_bytes": None, "workers": None}),
    ],
)
def test_streaming_gives_the_bits_of_apply(policy, kwargs, how, src, finely_cut, tmp_path):
    plan = growth.plan(SRC, DST, policy=policy, seed=3, **kwargs)
    params, state = grown(plan, src)
    for source in (src, finely_cut):
        figures = growth.stream(plan, source, tmp_path / source.name, opt=True, memory_gb=0.2, **how)
        loaded = checkpoint.load(tmp_path / source.name, cfg=plan.dst_cfg)
        assert_same(loaded.params, params)
        assert_same(loaded.opt_state, state)
        assert figures.complete
        directories = [tmp_path / source.name / item for item in ("params", "opt_state")]
        files = [file for d in directories for leaf in d.iterdir() if leaf.is_dir() for file in chunk_files(leaf, "")]
        assert figures.bytes_written == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype, tmp_path, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    cfg = SRC.replace(param_dtype=dtype, dtype=dtype, output_biases=False)
    params = random_tree(cfg, 1, jnp.dtype(dtype))
    state = {"adam": {"mu": params, "nu": params, "count": 3, "born": {}}, "done": True}
    checkpoint.save(tmp_path / "src", cfg, params, opt_state=state | {"adam": state["adam"] | {"born": _born(cfg)}})
    plan = growth.plan(cfg, DST.replace(param_dtype=dtype, dtype=dtype, output_biases=False), epsilon="keep")
    assert plan.dst_spec  # evaluated, and remembered
    jax.config.update("jax_enable_x64", False)  # streaming does not need it
    growth.stream(plan, tmp_path / "src", tmp_path / "dst", opt=True, **SMALL)
    jax.config.update("jax_enable_x64", dtype == "float64")
    params, state = jax.jit(lambda p, o: (growth.apply(plan, p), growth.apply_opt(plan, o)))(params, state)
    loaded = checkpoint.load(tmp_path / "dst")
    assert_same(loaded.params, params)
    assert_same({k: loaded.opt_state["adam"][k] for k in ("mu", "nu")}, {k: state["adam"][k] for k in ("mu", "nu")})
    assert loaded.opt_state["adam"]["count"] == 3 and loaded.opt_state["done"] is True


def _born(cfg):
    return {axis: np.zeros(size, np.int32) for axis, size in cfg.axis_sizes.items()}


def test_a_state_of_another_optimizer_is_refused(tmp_path):
    """Files do not say which optimizer made a state; only the trainer's own is known by its fields."""
    is_norm = jax.tree.map(lambda spec: spec.role == "scale", tele.spec(SRC))
    others = jax.tree.map(operator.not_, is_norm)
    state = random_state(
        SRC, optax.chain(optax.masked(optax.scale_by_adam(), is_norm), optax.masked(optax.trace(0.9), others))
    )
    checkpoint.save(tmp_path / "src", SRC, random_tree(SRC, 1), opt_state=state)
    plan = growth.plan(SRC, DST, seed=3)
    with pytest.raises(tele.UserError, match=r"optimizer state 0\.inner_state\.mu"):
        growth.stream(plan, tmp_path / "src", tmp_path / "dst", opt=True, **SMALL)
    assert not list(tmp_path.glob("dst*"))


# ---- the checkpoint ----------------------------------------------------------------------------------------------


def test_the_files_are_those_of_save(src, exact, tmp_path):
    plan, params, state = exact
    growth.stream(plan, src, tmp_path / "streamed", opt=True)
    checkpoint.save(tmp_path / "saved", plan.dst_cfg, params, opt_state=state, step=7)
    same_files(tmp_path / "streamed", tmp_path / "saved")
    assert not list(checkpoint.verify(checkpoint.open_lazy(tmp_path / "streamed")))


def test_config_step_and_provenance(src, exact, tmp_path):
    plan, *_ = exact
    growth.stream(plan, src, tmp_path / "b", provenance={"stage": "wider", "max_abs": 0.0}, **SMALL)
    loaded = checkpoint.load(tmp_path / "b")
    assert loaded.cfg == plan.dst_cfg
    assert loaded.step == 7
    assert loaded.opt_state is None
    before, entry = loaded.provenance
    assert before == {"stage": "before"}
    expected = {"stage": "wider", "kind": "grow", "policy": "exact", "seed": 3, "plan": plan.digest, "max_abs": 0.0}
    assert entry == expected
    growth.stream(plan, src, tmp_path / "c", step=0, **SMALL)
    assert checkpoint.load(tmp_path / "c").step == 0


def test_plain_orbax_reads_it(src, exact, tmp_path):
    import orbax.checkpoint as ocp

    plan, params, state = exact
    growth.stream(plan, src, tmp_path / "dst", opt=True, **SMALL)
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "dst" / "params"), params)
        restored = checkpointer.restore(tmp_path / "dst" / "opt_state")
    assert_same(restored["1"]["nu"], state["1"]["nu"])
    assert_same(restored["1"]["born"], state["1"]["born"])


def test_progress_and_figures(src, finely_cut, exact, tmp_path):
    plan, *_ = exact
    seen = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    figures = growth.stream(plan, finely_cut, tmp_path / "dst", opt=True, workers=3, progress=report, **SMALL)
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {figures.bytes_written}
    assert done[0] == 0 and done[-1] == figures.bytes_written and list(done) == sorted(set(done))
    assert len(seen) == figures.tiles + 1
    assert figures.resumed_tiles == 0 and figures.workers == 3 and figures.seconds > 0
    source = sum(file.stat().st_size for item in ("params", "opt_state") for file in (finely_cut / item).rglob("*"))
    assert figures.bytes_read < 1.5 * source  # neighbours share what they read


# ---- kills, threads, processes -----------------------------------------------------------------------------------


def test_a_kill_at_any_moment_changes_nothing(tmp_path):
    run = [sys.executable, "-m", "tests.growth.killed", str(tmp_path), "0.25"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)["kills"]
    assert kills["chain"] >= 4 and kills["late"] == 2 and kills["shards"] == 1
    finished = [path for path in tmp_path.iterdir() if path.suffix != ".partial" and path.name != "src"]
    assert len(finished) >= 5
    for path in finished:
        assert not list(checkpoint.verify(checkpoint.open_lazy(path)))
        same_files(path, tmp_path / "all")
    from tests.growth import killed

    for left in tmp_path.glob("*.partial"):  # killed after it was complete
        plan = growth.plan(killed.CFG, killed.DST, seed=5)
        with contextlib.suppress(UserError):
            growth.stream(plan, tmp_path / "src", left.with_suffix(""), **killed.HOW)
        assert not left.exists()


def test_what_is_finished_is_not_done_again(src, exact, tmp_path):
    plan, params, _ = exact
    finished = stop_half_way(plan, src, tmp_path / "dst", **SMALL)
    with pytest.raises(UserError, match=r"no complete checkpoint here; .*skipped interrupted saves"):
        checkpoint.open_lazy(tmp_path / "dst.partial")
    with pytest.raises(UserError, match="no complete checkpoint here"):
        checkpoint.open_lazy(tmp_path)
    figures = growth.stream(plan, src, tmp_path / "dst", workers=1, memory_gb=0.3, chunk_bytes=SMALL["chunk_bytes"])
    assert figures.resumed_tiles == finished
    assert_same(checkpoint.load(tmp_path / "dst").params, params)
    assert os.listdir(tmp_path) == ["dst"]


def test_a_finished_tile_whose_file_was_lost_is_done_again(src, exact, tmp_path):
    plan, params, _ = exact
    finished = stop_half_way(plan, src, tmp_path / "dst", workers=1, **SMALL)
    (inside,) = (tmp_path / "dst.partial").glob("checkpoint*")
    chunk_files(inside, "params/embed.table")[0].write_bytes(b"")
    assert growth.stream(plan, src, tmp_path / "dst", **SMALL).resumed_tiles == finished - 1
    assert_same(checkpoint.load(tmp_path / "dst").params, params)


def test_a_journal_cut_short_loses_its_last_line_only(src, exact, tmp_path):
    plan, params, _ = exact
    finished = stop_half_way(plan, src, tmp_path / "dst", **SMALL)
    journal = tmp_path / "dst.partial" / "journal" / "0-of-1"
    journal.write_bytes(journal.read_bytes()[:-3])
    assert growth.stream(plan, src, tmp_path / "dst", **SMALL).resumed_tiles == finished - 1
    assert_same(checkpoint.load(tmp_path / "dst").params, params)


def test_starting_over(src, exact, tmp_path):
    plan, params, _ = exact
    stop_half_way(growth.plan(SRC, DST, seed=4), src, tmp_path / "dst", **SMALL)
    assert growth.stream(plan, src, tmp_path / "dst", resume=False, **SMALL).resumed_tiles == 0
    assert_same(checkpoint.load(tmp_path / "dst").params, params)


def test_shards_one_after_another_and_in_another_number(src, exact, tmp_path):
    plan, params, _ = exact
    first, second = (growth.stream(plan, src, tmp_path / "dst", shard=(i, 3), **SMALL) for i in (2, 0))
    assert not first.complete and not second.complete and not (tmp_path / "dst").exists()
    rest = growth.stream(plan, src, tmp_path / "dst", **SMALL)
    assert rest.complete and rest.resumed_tiles == first.tiles + second.tiles
    assert abs(first.bytes_written - rest.bytes_written) < 0.2 * first.bytes_written
    assert_same(checkpoint.load(tmp_path / "dst").params, params)
