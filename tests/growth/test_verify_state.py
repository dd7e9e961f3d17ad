"""A report vouches for what was looked at: the optimizer state and the stored configs too, and the levels are named.

The grown states are those of the formulas (m/a, v/a^2, new entries zero, new units born now), in numpy.
"""

import re

import jax
import numpy as np
import optax
import pytest

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.errors import UserError
from tele_jax.growth.opt_state import AdamState
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests import reference
from tests.growth.strategies import without_compiling
from tests.growth.test_apply_opt import grown_moments
from tests.growth.test_spread import DST, SRC, on_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

COUNT = 9
LEVELS = ("parameters", "optimizer state", "parts")


def params_of(cfg, seed=0):
    return jax.tree.map(np.float32, reference.random_params(cfg, np.random.default_rng(seed), 1.0))


def state_of(cfg):
    """As the trainer's, in the middle of a run."""
    born = {axis: np.arange(size, dtype=np.int32) % COUNT for axis, size in cfg.axis_sizes.items()}
    mu, nu = params_of(cfg, 1), jax.tree.map(np.square, params_of(cfg, 2))
    return (optax.EmptyState(), AdamState(np.int32(COUNT), mu, nu, born), {"rate": np.float32(0.5)})


def grown_by_formula(plan, state):
    first, adam, last = state
    mu, nu = (
        jax.tree.map(np.float32, grown_moments(plan, tree, power)) for tree, power in ((adam.mu, 1), (adam.nu, 2))
    )
    born = {
        axis: np.where(m.fresh, COUNT, adam.born[axis][np.maximum(m.index, 0)]).astype(np.int32)
        for axis, m in plan.maps.items()
    }
    return (first, AdamState(adam.count, mu, nu, born), {"rate": last["rate"]})


@pytest.fixture(scope="module")
def grown():
    """policy -> (plan, params, grown params, (state, grown state)), made once."""
    made = {}

    def get(policy="exact"):
        if policy not in made:
            with without_compiling():
                plan = growth.plan(SRC, DST, policy=policy)
                params, state = params_of(SRC), state_of(SRC)
                made[policy] = (plan, params, growth.apply(plan, params), (state, grown_by_formula(plan, state)))
        return made[policy]

    return get


@pytest.mark.parametrize("policy", ["exact", "msg"])
def test_a_state_grown_by_the_formulas_passes(grown, policy):
    plan, params, big, states = grown(policy)
    report = growth.verify_stored(plan, params, big, opt_state=states)
    assert report.ok, report
    assert report.levels == LEVELS and "looked at: parameters, optimizer state, parts" in str(report)
    assert report.to_json()["levels"] == LEVELS
    assert growth.verify_stored(plan, params, big).levels == ("parameters", "parts")


@pytest.mark.parametrize("policy", ["copy", "stack", "random", "composed"])
def test_what_apply_opt_gives_passes(policy):
    src, dst = SRC.replace(num_kv_heads=4), DST.replace(num_kv_heads=6, output_mult=3.0)
    with without_compiling():
        if policy == "composed":
            plan = growth.plan(src, dst.replace(num_layers=3))
            plan = growth.compose(plan, growth.plan(plan.dst_cfg, dst, policy="exact", epsilon="keep", seed=1))
        else:
            plan = growth.plan(src, dst, policy=policy)
        params, state = params_of(src), state_of(src)
        big, after = growth.apply(plan, params), growth.apply_opt(plan, state)
        assert growth.verify_stored(plan, params, big, opt_state=(state, after)).ok
        after[1].nu["layers"]["attn"]["k"] *= 1.000001
        report = growth.verify_stored(plan, params, big, opt_state=(state, after))
    assert report.altered == ("opt_state.1.nu.layers.attn.k",)


def put(value, *place):
    def change(leaf):
        leaf[place] = value

    return change


def times(factor):
    def change(leaf):
        leaf *= np.asarray(factor, leaf.dtype)

    return change


WRONG = [
    ("1.nu.layers.mlp.up", put(1e6, 0, 2, 3), r"1000000 at \[0, 2, 3\], from the source"),
    ("1.mu.layers.attn.q", put(np.nan, 0, 0, 0, 0), r"nan at \[0, 0, 0, 0\]"),
    ("1.mu.layers.mlp.down", put(1e-30, 3, 39, 11), r"1e-30 at \[3, 39, 11\], planned 0"),
    ("1.mu.final_norm.scale", times((8 / 12) ** 0.5), r".* at \[0\], from the source"),
    ("1.nu.final_norm.scale", times(12 / 8), r".* at \[0\], from the source"),
    ("1.mu.embed.table", put(np.inf, 3, 2), r"inf at \[3, 2\]"),
    ("1.count", put(COUNT + 1), r"10 at \[\], expected 9"),
    ("1.born.layers", put(0, 3), r"0 at \[3\], expected \d"),
    ("1.born.mlp", put(COUNT + 1, 39), r"10 at \[39\], expected 9"),
    ("2.rate", put(0.25), r"0\.25 at \[\], expected 0\.5"),
]


@pytest.mark.parametrize(("part", "change", "problem"), WRONG, ids=[part for part, *_ in WRONG])
def test_a_part_of_the_state_that_is_not_as_planned_is_named(grown, part, change, problem):
    plan, params, big, (state, after) = grown()
    after = jax.tree.map(np.array, after)
    leaves = checkpoint.layout.named_leaves(after)
    change(leaves[part])
    report = growth.verify_stored(plan, params, big, opt_state=(state, after))
    assert report.altered == (f"opt_state.{part}",) and not report.ok
    assert re.fullmatch(rf"opt_state\.{re.escape(part)}: {problem}.*", report.problems[0]), report.problems


def test_parts_that_are_missing_added_or_of_another_dtype_are_named(grown):
    plan, params, big, (state, after) = grown()
    first, adam, last = after

    def altered(after):
        return growth.verify_stored(plan, params, big, opt_state=(state, after)).altered

    assert altered((first, adam, {})) == ("opt_state.2.rate",)
    assert altered((first, adam, {**last, "more": np.zeros(3)})) == ("opt_state.2.more",)
    narrow = {**adam.mu, "lm_head": jax.tree.map(np.float16, adam.mu["lm_head"])}
    assert altered((first, adam._replace(mu=narrow), last)) == ("opt_state.1.mu.lm_head.kernel",)
    assert altered((first, adam._replace(count=np.int64(COUNT)), last)) == ("opt_state.1.count",)
    small = (first, adam._replace(mu=state[1].mu), last)  # not grown at all
    assert any(part.startswith("opt_state.1.mu") for part in altered(small))


def test_a_state_of_optax_is_compared_where_its_optimizer_is_given(grown):
    plan, params, big, _ = grown()
    tx = optax.adamw(1e-3)
    state = tx.init(params)
    state = (state[0]._replace(mu=params_of(SRC, 3), count=np.int32(4)), *state[1:])
    with without_compiling():
        after = growth.apply_opt(plan, state, tx)
        report = growth.verify_stored(plan, params, big, opt_state=(state, after), optimizer=tx)
        assert report.ok and report.levels == LEVELS
        with pytest.raises(UserError, match="Pass the optax optimizer that made the state"):
            growth.verify_stored(plan, params, big, opt_state=(state, after))


def test_a_state_on_a_mesh_is_looked_at_layer_by_layer(grown):
    plan, params, big, (state, after) = grown()
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    _, spread, spread_big = on_mesh(mesh, plan, params, big)

    def placed(cfg, state):
        where = param_shardings(tele.spec(cfg), mesh)
        return (state[0], state[1]._replace(**{n: jax.device_put(getattr(state[1], n), where) for n in ("mu", "nu")}))

    wrong = jax.tree.map(np.array, after)
    wrong[1].nu["layers"]["attn"]["v"][2, 1, 1, 1] += 1
    for changed in (after, wrong):
        states = (placed(SRC, state), placed(DST, changed))
        expected = growth.verify_stored(plan, params, big, opt_state=(state[:2], changed[:2]))
        assert growth.verify_stored(plan, spread, spread_big, opt_state=states) == expected
        assert expected.ok == (changed is after)


def test_stored_configs_and_states_are_compared_with_the_plan(grown, tmp_path):
    plan, params, big, (state, after) = grown()

    def stored(name, cfg, params, state):
        checkpoint.save(tmp_path / name, cfg, params, opt_state=state)
        return checkpoint.open_lazy(tmp_path / name)

    src, dst = stored("src", SRC, params, state), stored("dst", plan.dst_cfg, big, after)
    report = growth.verify_stored(plan, src, dst)
    assert report.ok and report.levels == ("configs", *LEVELS)
    wrong = jax.tree.map(np.array, after)
    wrong[1].mu["layers"]["attn"]["q"][...] = np.nan
    kept = stored("kept", plan.dst_cfg.replace(rms_eps=SRC.rms_eps, remat="none"), big, wrong)
    report = growth.verify_stored(plan, src, kept)
    assert report.altered == ("config.rms_eps", "opt_state.1.mu.layers.attn.q") and not report.ok
    eps = (SRC.rms_eps, plan.dst_cfg.rms_eps)
    assert "config.rms_eps: the grown checkpoint holds {!r}, the plan {!r}".format(*eps) in report.problems
    other = stored("other", SRC.replace(rope=tele.Rope(theta=5e5)), params, state)
    assert growth.verify_stored(plan, other, dst).altered == ("config.rope",)
    alone = stored("alone", SRC, params, None)
    with pytest.raises(UserError, match="holds no optimizer state, but"):
        growth.verify_stored(plan, alone, dst)
    assert "optimizer state" not in growth.verify_stored(plan, src, stored("without", plan.dst_cfg, big, None)).levels
    # At all levels: what is computed comes from what is stored.
    tokens = np.random.default_rng(0).integers(0, 12, (2, 9))
    report = growth.verify(plan, src, dst, tokens)
    assert report.ok and report.levels == ("configs", *LEVELS, "logits", "liveness") and report.max_rel < 2e-5
