"""The optimizer against optax's own AdamW and against Adam written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten
from tele_jax.errors import UserError
from tele_jax.settings import OptimizerConfig, ScheduleConfig
from tele_jax.train.optimizer import AdamState, delay_births, optimizer, restart_schedule, schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    num_layers=2, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=12, vocab_size=16, dtype="float32", output_biases=True
)
constant = lambda step: jnp.float32(1.0)  # noqa: E731


def gradients_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def adam_state(opt_state):
    return next(s for s in opt_state if isinstance(s, AdamState))


def test_without_growth_it_is_optax_adamw():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0)
    params = tele.init(CFG, jax.random.key(0))
    decays = {name: not name.endswith(("scale", "bias")) for name in flatten(params)}
    mask = tele.axes.unflatten(decays)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask)
    )
    ours = optimizer(CFG, config, constant)
    a = b = params
    state_a, state_b = ours.init(a), theirs.init(b)
    for i in range(5):
        updates, state_a = ours.update(gradients_like(params, i), state_a, a)
        a = optax.apply_updates(a, updates)
        updates, state_b = theirs.update(gradients_like(params, i), state_b, b)
        b = optax.apply_updates(b, updates)
    for name, leaf in flatten(a).items():
        np.testing.assert_allclose(leaf, flatten(b)[name], rtol=0, atol=1e-6, err_msg=name)


def test_mup_scales_matrix_like_learning_rates_by_width():
    cfg = CFG.replace(mup_base_width=2)  # r = 4
    params = tele.init(cfg, jax.random.key(0))
    tx = optimizer(cfg, OptimizerConfig(learning_rate=1e-3, matrix_learning_rate=8e-3, clip_norm=1e9), constant)
    updates, _ = tx.update(gradients_like(params, 0), tx.init(params), params)
    # The first step of Adam has the size of the learning rate, whatever the gradient.
    size = {name: float(jnp.max(jnp.abs(u))) for name, u in flatten(updates).items()}
    matrices = {"layers.attn.q", "layers.attn.k", "layers.attn.v", "layers.attn.o"}
    matrices |= {"layers.mlp.gate", "layers.mlp.up", "layers.mlp.down"}
    for name, value in size.items():
        assert value == pytest.approx(8e-3 / 4 if name in matrices else 1e-3, rel=1e-3), name


def test_units_born_by_growth_count_their_own_steps():
    config = OptimizerConfig(learning_rate=1.0, beta2=0.999, clip_norm=1e9)
    large = CFG.replace(mlp_dim=15, num_layers=3)
    plan = growth.plan(CFG, large, layers="last")
    params = tele.init(CFG, jax.random.key(0))
    tx = optimizer(CFG, config, constant)
    state = tx.init(params)
    for i in range(50):
        _, state = tx.update(gradients_like(params, i), state, params)
    grown = growth.apply_opt(plan, state)
    assert adam_state(grown).born["mlp"].tolist() == [0] * 12 + [50] * 3
    assert adam_state(grown).born["layers"].tolist() == [0, 0, 50]
    big = growth.apply(plan, params)
    tx = optimizer(large, config, constant)
    gradients = gradients_like(big, 99)
    updates, _ = tx.update(gradients, grown, big)
    step = np.asarray(updates["layers"]["mlp"]["gate"])
    g = np.asarray(gradients["layers"]["mlp"]["gate"], np.float64)
    # A new entry's first step is sign(g): its own bias correction, not the fiftieth's, which gives 4.5 times as much.
    np.testing.assert_allclose(step[:, :, 12:], -np.sign(g[:, :, 12:]), atol=1e-4)
    np.testing.assert_allclose(step[2], -np.sign(g[2]), atol=1e-4)
    # An old entry goes on as if nothing had happened.
    mu = np.asarray(adam_state(state).mu["layers"]["mlp"]["gate"], np.float64)
    nu = np.asarray(adam_state(state).nu["layers"]["mlp"]["gate"], np.float64)
    old = np.s_[:2, :, :12]
    m, v = 0.9 * mu + 0.1 * g[old], 0.999 * nu + 0.001 * g[old] ** 2
    expected = -(m / (1 - 0.9**51)) / (np.sqrt(v / (1 - 0.999**51)) + 1e-8)
    np.testing.assert_allclose(step[old], expected, rtol=2e-4, atol=1e-5)


def test_with_the_count_of_the_state_new_entries_are_as_in_optax():
    config = OptimizerConfig(learning_rate=1.0, beta2=0.999, clip_norm=1e9, bias_correction="state")
    large, params = CFG.replace(mlp_dim=15, num_layers=3), tele.init(CFG, jax.random.key(0))
    plan, tx = growth.plan(CFG, large, layers="last"), optimizer(CFG, config, constant)
    state = tx.init(params)
    for i in range(50):
        _, state = tx.update(gradients_like(params, i), state, params)
    state, big = growth.apply_opt(plan, state), growth.apply(plan, params)
    count, mu, nu, _ = adam_state(state)
    gradients = gradients_like(big, 99)
    updates, _ = optimizer(large, config, constant).update(gradients, state, big)
    expected, _ = optax.scale_by_adam(b1=0.9, b2=0.999).update(gradients, optax.ScaleByAdamState(count, mu, nu))
    for name, leaf in flatten(updates).items():
        np.testing.assert_allclose(leaf, -flatten(expected)[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_new_units_warm_up_alone():
    config = OptimizerConfig(learning_rate=1.0, clip_norm=1e9, new_warmup_steps=4)
    large = CFG.replace(mlp_dim=15)
    params = tele.init(CFG, jax.random.key(0))
    tx = optimizer(CFG, config, constant)
    _, state = tx.update(gradients_like(params, 0), tx.init(params), params)
    plan = growth.plan(CFG, large)
    state, big = growth.apply_opt(plan, state), growth.apply(plan, params)
    tx, gradients = optimizer(large, config, constant), gradients_like(big, 5)
    sizes = []
    for _ in range(5):
        updates, state = tx.update(gradients, state, big)
        sizes.append(float(jnp.abs(updates["layers"]["mlp"]["up"][:, :, 12:]).mean()))
    np.testing.assert_allclose(sizes, [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-3)


def test_units_behind_closed_masks_are_born_when_their_mask_begins_to_rise():
    """Axis after axis: bias correction (beta2 0.999) and warm-up count from the first gradient of each entry."""
    config = OptimizerConfig(learning_rate=1.0, beta2=0.999, clip_norm=1e9, new_warmup_steps=4)
    plan = growth.plan(CFG, CFG.replace(mlp_dim=15, num_layers=3), policy="msg", layers="last")
    small, big = (jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tele.spec(cfg)) for cfg in (CFG, plan.dst_cfg))
    state = jax.jit(optimizer(CFG, config, constant).init)(small)
    state = tuple(s._replace(count=s.count + 30) if isinstance(s, AdamState) else s for s in state)
    state = jax.jit(lambda s: growth.apply_opt(plan, s))(state)  # after 30 steps, the moments at 0
    schedule = growth.MaskSchedule(plan, start=11, ramp=3, order=("mlp", "layers"))
    state = delay_births(state, schedule.closed_steps())
    assert adam_state(state).born["mlp"].tolist() == [0] * 12 + [42] * 3
    assert adam_state(state).born["layers"].tolist() == [0, 0, 45]
    assert adam_state(state).born["embed"].tolist() == [0] * 8
    update, gradients = jax.jit(optimizer(plan.dst_cfg, config, constant).update), gradients_like(big, 5)
    mlp, layers, both = [], [], []
    for step in range(20):
        masks = schedule(step) or {"mlp": np.ones(15), "layers": np.ones(3)}
        opened = (masks["layers"] > 0)[:, None, None] & (masks["mlp"] > 0)
        g = gradients["layers"]["mlp"]["up"] * opened
        now = {**gradients, "layers": {**gradients["layers"], "mlp": {**gradients["layers"]["mlp"], "up": g}}}
        updates, state = update(now, state, big)
        up = np.abs(np.asarray(updates["layers"]["mlp"]["up"]))
        assert np.isfinite(up).all()
        mlp.append(up[:2, :, 12:])
        layers.append(up[2, :, :12])
        both.append(up[2, :, 12:])
    # A constant gradient makes every step of Adam that counts right from its first one as large as the learning rate.
    warm_up = [0.25, 0.5, 0.75]
    for sizes, closed in ((mlp, 12), (layers, 15), (both, 15)):
        for size, expected in zip(sizes, [0.0] * closed + warm_up + [1.0] * 20, strict=False):
            np.testing.assert_allclose(size, expected, rtol=1e-3)


def test_a_new_stage_restarts_the_schedule_but_not_the_moments():
    params = tele.init(CFG, jax.random.key(0))
    tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-3), constant)
    _, state = tx.update(gradients_like(params, 0), tx.init(params), params)
    restarted = restart_schedule(state)
    assert adam_state(restarted).count == 1
    counts = [int(s.count) for s in restarted if isinstance(s, optax.ScaleByScheduleState)]
    assert counts == [0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(kind="constant", warmup=4), {0: 0.25, 3: 1.0, 50: 1.0, 99: 1.0}),
        (ScheduleConfig(kind="linear", warmup=0, final=0.2), {0: 1.0, 50: 0.6, 100: 0.2, 200: 0.2}),
        (ScheduleConfig(kind="cosine", warmup=20, final=0.1), {19: 1.0, 60: 0.55, 100: 0.1}),
        (ScheduleConfig(kind="wsd", warmup=10, decay=50, final=0.0), {9: 1.0, 50: 1.0, 75: 0.5, 100: 0.0}),
        (ScheduleConfig(kind="linear", unit="tokens", warmup=0, total=5_000, final=0.0), {25: 0.5, 50: 0.0}),
    ],
)
def test_schedules_have_the_published_shapes(config, expected):
    factor = schedule(config, 100, 100)
    for step, value in expected.items():
        assert float(factor(step)) == pytest.approx(value, abs=1e-6), step


def test_a_warm_up_longer_than_the_stage_is_refused():
    with pytest.raises(UserError, match="warmup 30 is not below the total of 20 steps"):
        schedule(ScheduleConfig(warmup=30), 20, 100)
