"""The steps of grpo and ppo against float64 formulas, from the same experience; ends of replies are found by index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.align import experience
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings, put_batch
from tele_jax.stages import find_kind, read_stage
from tests import reference
from tests.align import oracle

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=23, padded_vocab_size=24, scalar_head=True,
    max_seq_len=32, dtype="float32", remat="none",
)  # fmt: skip
STOP = PAD = 2  # the id that ends a reply is that of the padding, and stands inside prompts, too
ROWS, LIMIT = 8, 6


def stage(kind, **fields):
    data = {"tokenizer": "none", "sources": {"p": {"files": ["none"], "format": "prompts"}}}
    table = {"kind": kind, "data": data, "optimizer": {"learning_rate": 1e-3}, "steps": 1, "seq_len": 16}
    table |= {"batch_size": ROWS, "rollout_prompts": 2, "answers": 4, "max_new_tokens": LIMIT, "reward": {"model": "m"}}
    return read_stage(table | fields, "config.stage")


def drawn(rng, pad=PAD, extra=0):
    """Replies of 1 to LIMIT tokens to two prompts of other lengths; some end by STOP, and some were cut."""
    prompts = [[5, STOP, 7]] * 4 + [[STOP, 9, 11, 3, STOP, 4]] * 4
    replies = [[*rng.integers(3, 23, n % LIMIT).tolist(), STOP][:LIMIT] for n in (0, 1, 2, 3)]
    replies += [rng.integers(3, 23, n).tolist() for n in (LIMIT, 4, 1, 2)]
    pairs = [(reply, rng.normal(-2, 0.3, len(reply))) for reply in replies]
    number, group = np.arange(ROWS, dtype=np.int32), np.repeat([0, 1], 4).astype(np.int32)
    made = experience.drawn(prompts, pairs, stop_ids=[STOP], seq_len=16 + extra, pad_id=pad, record=number, group=group)
    made.rewards[:] = rng.normal(size=ROWS)
    return made


def batch_of(kind, made, rng, kl_coef=0.1, unit=2):
    """A batch as the feed makes it, with log-probabilities and values that no model gave."""
    rows = experience.rows(made, unit=unit, pad_id=PAD)
    mask = rows["loss_weights"]
    for name in ("old_logp", "ref_logp", "old_values"):
        mean = 0 if name == "old_values" else -3
        rows[name] = np.zeros(mask.shape, np.float32)
        rows[name][mask > 0] = rng.normal(mean, 0.4, int(mask.sum()))
    rows |= find_kind(kind.kind).complete(kind, rows, made.rewards, made.group, kl_coef)
    return rows


def float64_outputs(params, rows, temperature):
    """Log-probabilities of the targets at a temperature, and values, by the float64 model."""
    told = [rows[name] for name in ("tokens", "positions", "segment_ids")]
    logits = reference.forward(CFG, params, *told) / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values = reference.forward(CFG, params | {"lm_head": {"kernel": params["scalar_head"]["kernel"]}}, *told)[..., 0]
    return np.take_along_axis(logp, rows["targets"][..., None], -1)[..., 0], values


def sampler_weights(rows, cap):
    return np.minimum(np.exp(rows["old_logp"].astype(np.float64) - rows["sampler_logp"]), cap)


def grpo(kind, params, rows, base=None):
    """The loss from the formulas, and the number that it is divided by.

    base: parameters that the ratio in the term of the divergence is taken from, whose kind is then k2: so it has the
    gradient that the term should have.
    """
    logp, _ = float64_outputs(params, rows, kind.temperature)
    ratios = np.exp((logp if base is None else float64_outputs(base, rows, kind.temperature)[0]) - rows["old_logp"])
    mask, mean = rows["loss_weights"], {"sequences": "grpo", "tokens": "dapo", "limit": "dr_grpo"}[kind.loss_over]
    weights = None if kind.sampler_cap is None else sampler_weights(rows, kind.sampler_cap)
    how = {"clip": (kind.clip_low, kind.clip_high), "level": kind.ratio, "mean": mean, "weights": weights}
    total, count = oracle.policy(logp, rows["old_logp"], rows["advantages"], mask, length=LIMIT, **how)
    for b in range(ROWS):
        (where,) = np.nonzero(mask[b])
        size = {"dapo": 1, "grpo": max(len(where), 1), "dr_grpo": LIMIT}[mean]
        for t in where:
            term = oracle.kl(logp[b, t], rows["ref_logp"][b, t], "k2" if base else kind.kl_kind) * ratios[b, t]
            total += kind.kl_coef * term * (1 if weights is None else weights[b, t]) / size
    return total, count


def ppo(kind, params, rows, base=None):
    logp, values = float64_outputs(params, rows, kind.temperature)
    mask = rows["loss_weights"]
    total, count = oracle.policy(logp, rows["old_logp"], rows["advantages"], mask, clip=kind.clip)
    of_values, _ = oracle.value(values, rows["old_values"], rows["returns"], mask, kind.value_clip)
    return total + kind.value_coef * of_values, count


CASES = {
    "grpo": (grpo, stage("grpo", temperature=1.3)),
    "grpo, kl": (grpo, stage("grpo", kl_coef=0.2)),
    "rloo": (grpo, stage("grpo", advantages="rloo", kl_coef=0.2, kl_kind="k2")),
    "dr_grpo": (grpo, stage("grpo", advantages="dr_grpo", loss_over="limit", kl_coef=0.1)),
    "dapo, stale": (grpo, stage("grpo", loss_over="tokens", clip_high=0.28, stale=1, sampler_cap=1.5, kl_coef=0.1)),
    "gspo": (grpo, stage("grpo", ratio="sequence", clip_low=0.02, clip_high=0.03)),
    "ppo": (ppo, stage("ppo", kl_coef=0.1, temperature=0.7)),
    "ppo, no clip of values": (ppo, stage("ppo", kl_coef=0.1, value_clip=None, value_coef=1.0)),
}


@pytest.fixture(scope="module")
def params():
    made = reference.random_params(CFG, np.random.default_rng(0), 1.0)
    made["scalar_head"] = {"kernel": np.random.default_rng(1).normal(size=(CFG.embed_dim, 1)) / 4}
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_formulas(name, params):
    """The loss to 1e-5, and its gradient in two directions, by central differences of the float64 model."""
    formula, kind = CASES[name]
    rng = np.random.default_rng(5)
    rows = batch_of(kind, drawn(rng), rng)
    module = find_kind(kind.kind)
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    def mean(params):
        total, weight, figures = module.loss(kind, CFG, params, rows)
        return total / weight, figures

    (loss, figures), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(single)
    exact = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in rows.items()}
    total, count = formula(kind, params, exact)
    assert float(loss) == pytest.approx(total / count, abs=1e-5)
    assert {"entropy", "clip_fraction", "kl_old"} <= figures.keys()
    for seed in (1, 2):
        direction = jax.tree.map(lambda leaf: np.random.default_rng(seed).normal(size=leaf.shape), params)  # noqa: B023

        def at(step, direction=direction):
            moved = jax.tree.map(lambda leaf, d: leaf + step * d, params, direction)
            total, count = formula(kind, moved, exact, params)
            return total / count

        expected = (at(1e-5) - at(-1e-5)) / 2e-5
        dots = jax.tree.map(lambda g, d: float(np.sum(np.asarray(g, np.float64) * d)), gradient, direction)
        assert sum(jax.tree.leaves(dots)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_reward_stands_at_the_last_drawn_token_whatever_the_padding():
    """Faults 2, 3 and 4: the stop id is the padding; other padding, and more of it, changes no advantage."""
    kind = stage("ppo", kl_coef=0.1, whiten_advantages=True)
    found = []
    for pad, extra, unit in ((PAD, 0, 2), (17, 5, 21), (PAD, 9, 25)):
        rng = np.random.default_rng(5)
        made = drawn(rng, pad=pad, extra=extra)
        rows = batch_of(kind, made, np.random.default_rng(7), unit=unit)
        found.append(rows)
        beyond = rows["loss_weights"] == 0
        assert (rows["advantages"][beyond] == 0).all() and (rows["returns"][beyond] == 0).all()
        assert rows["loss_weights"].sum() == (made.lengths - made.prompts).sum(), "the stop id is learned, too"
    width = found[0]["tokens"].shape[1]
    for other in found[1:]:
        assert other["tokens"].shape[1] > width
        np.testing.assert_allclose(other["advantages"][:, :width], found[0]["advantages"], atol=1e-6)
    # By the formulas, the reward of the whole at the position before the last drawn token.
    rows = found[0]
    rewards = -0.1 * (rows["old_logp"].astype(np.float64) - rows["ref_logp"]) * rows["loss_weights"]
    made = drawn(np.random.default_rng(5))
    rewards[np.arange(ROWS), made.lengths - 2] += made.rewards
    advantages, returns = oracle.gae(rewards, rows["old_values"], rows["loss_weights"], kind.gamma, kind.lam)
    kept = rows["loss_weights"] > 0
    whitened = np.where(kept, (advantages - advantages[kept].mean()) / np.sqrt(advantages[kept].var() + 1e-8), 0)
    np.testing.assert_allclose(rows["returns"], returns, atol=1e-5)
    np.testing.assert_allclose(rows["advantages"], whitened, atol=1e-5)


def test_the_divergence_may_be_a_part_of_the_reward():
    kind = stage("grpo", kl_in="reward", kl_coef=0.3, advantages="rloo")
    made = drawn(np.random.default_rng(5))
    rows = batch_of(kind, made, np.random.default_rng(6), kl_coef=0.3)
    apart = ((rows["old_logp"].astype(np.float64) - rows["ref_logp"]) * rows["loss_weights"]).sum(axis=1)
    expected = oracle.group_advantages(made.rewards - 0.3 * apart, made.group, "rloo")
    np.testing.assert_allclose(rows["advantages"].max(axis=1) + rows["advantages"].min(axis=1), expected, atol=1e-5)


def test_equal_rewards_of_a_group_move_nothing(params):
    """Fault 5: also where the rewards are no binary fractions, and a group next to it differs."""
    kind = stage("grpo")
    made = drawn(np.random.default_rng(5))
    made.rewards[:4] = 0.1
    rows = batch_of(kind, made, np.random.default_rng(6))
    assert (rows["advantages"][:4] == 0).all() and (rows["advantages"][4:] != 0).any()


def test_the_controller_of_the_kl_coefficient_is_the_published_one():
    kind = stage("ppo", kl_coef=0.2, kl_target=6.0)
    adapt = find_kind("ppo").adapt
    assert adapt(kind, 0.2, 6.6) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapt(kind, 0.2, 60.0) == pytest.approx(0.2 * (1 + 0.1 * 0.2)), "the error counts up to 0.2"
    assert adapt(kind, 0.2, 0.0) == pytest.approx(0.2 * (1 - 0.1 * 0.2))
    assert adapt(stage("ppo", kl_coef=0.2), 0.2, 60.0) == 0.2


def test_the_value_gradient_can_be_kept_out_of_the_trunk(params):
    rng = np.random.default_rng(5)
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    for kept_out in (True, False):
        kind = stage("ppo", value_in_trunk=not kept_out)
        rows = batch_of(kind, drawn(rng), rng)
        rows["advantages"] = 0 * rows["advantages"]
        gradient = jax.grad(lambda p, kind=kind, rows=rows: find_kind("ppo").loss(kind, CFG, p, rows)[0])(single)
        assert np.abs(gradient["scalar_head"]["kernel"]).max() > 1e-4
        assert (np.abs(gradient["layers"]["mlp"]["down"]).max() == 0) == kept_out


@pytest.mark.parametrize("name", ["dapo, stale", "ppo"])
def test_one_device_and_eight_give_the_same_step(name, params):
    _, kind = CASES[name]
    rng = np.random.default_rng(5)
    rows = batch_of(kind, drawn(rng), rng)
    found = []
    for shape in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        count = shape.data * shape.fsdp * shape.tensor
        mesh = make_mesh(shape, jax.devices()[:count])
        with jax.set_mesh(mesh):
            placed = jax.device_put(
                jax.tree.map(lambda leaf: leaf.astype(np.float32), params), param_shardings(tele.spec(CFG), mesh)
            )
            batch = put_batch(rows, mesh, ROWS)
            step = jax.jit(jax.value_and_grad(lambda p, b: find_kind(kind.kind).loss(kind, CFG, p, b)[0]))
            found.append(jax.device_get(step(placed, batch)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[0][1], found[1][1])
