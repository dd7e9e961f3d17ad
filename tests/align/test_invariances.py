"""What must not change the losses of alignment: microbatches, padding and its ids, the order of rows, and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax.align import pairs
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh, put_batch
from tele_jax.stages import find_kind, read_stage
from tele_jax.train.optimizer import optimizer
from tele_jax.train.step import make_step, state_shardings

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS, WIDTH, PAD, EOS = 8, 16, 0, 1
CFG = tele.ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=60, dtype="float32",
    tie_embeddings=False, input_mult=2.0,
)  # fmt: skip
ROLLOUT = {"reward": {"function": "os.path:basename"}, "rollout_prompts": 4, "max_new_tokens": 8, "kl_coef": 0.3}
ROLLOUT |= {"sampler_cap": 1.5}
KINDS = {  # name: (kind, fields)
    "reward": ("reward", {"centre": 0.1}),
    "dpo": ("dpo", {"beta": 0.5}),
    "grpo": ("grpo", ROLLOUT | {"answers": 2}),
    "grpo, sequences": ("grpo", ROLLOUT | {"answers": 2, "ratio": "sequence", "loss_over": "tokens"}),
    "ppo": ("ppo", ROLLOUT | {"answers": 2}),
}
FLOATS = ("old_logp", "ref_logp", "sampler_logp", "advantages", "returns", "old_values")


@functools.cache
def made(name):
    """The stage, the config of its model, parameters, and the compiled loss with its gradient."""
    kind, fields = KINDS[name]
    sources = {"a": {"files": ["f"], "format": "pairs" if kind in ("reward", "dpo") else "prompts"}}
    table = {"kind": kind, "data": {"tokenizer": "t", "sources": sources}, "optimizer": {"learning_rate": 1e-3}}
    stage = read_stage(table | {"steps": 1, "batch_size": ROWS, "seq_len": WIDTH} | fields, "config.s")
    module = find_kind(kind)
    cfg = module.model(stage, CFG) if hasattr(module, "model") else CFG
    params = tele.init(cfg, jax.random.key(3))

    def both(params, batch):
        total, weight, figures = module.loss(stage, cfg, params, batch, None, None)
        return total, (weight, figures)

    return stage, cfg, params, jax.jit(jax.value_and_grad(both, has_aux=True))


def rows_of(texts, width, pad, left):
    """Rows [N, width] of prompts and replies as the feeds give them; `left` puts the padding in front."""
    shape = (len(texts), width)
    tokens, targets = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
    weights, segments, positions = np.zeros(shape, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, (prompt, reply) in enumerate(texts):
        ids = [*prompt, *reply]
        begin = width - len(ids) if left else 0
        lengths[row] = begin + len(ids)  # one more than the place of the last token
        tokens[row, begin : lengths[row]] = ids
        targets[row, begin : lengths[row] - 1] = ids[1:]
        weights[row, begin + len(prompt) - 1 : lengths[row] - 1] = 1
        segments[row, begin : lengths[row]] = 1
        positions[row, begin : lengths[row]] = np.arange(len(ids))
    found = {"tokens": tokens, "targets": targets, "loss_weights": weights, "segment_ids": segments}
    return found | {"positions": positions, "lengths": lengths}


def batch_of(name, seed, *, take=range(ROWS), width=WIDTH, pad=PAD, left=False):
    """Eight rows (or pairs) of random texts, which end with EOS or are cut; arrays of tokens are NaN where none is.

    Each answer of a pair has a row of its own. take: the numbers of the rows or pairs that are in it.
    """
    rng, paired = np.random.default_rng(seed), KINDS[name][0] in ("reward", "dpo")
    texts, floats = [], []
    for _ in range(ROWS):
        prompt = rng.integers(2, 60, rng.integers(1, 7)).tolist()
        for _ in range(1 + paired):
            reply = rng.integers(2, 60, rng.integers(1, 9)).tolist()
            texts.append((prompt, [*reply[:-1], EOS] if rng.random() < 0.7 else reply))
            floats.append(rng.normal(0, 1, (len(FLOATS), len(reply))))
    take = list(take)
    if paired:
        batch = rows_of([texts[2 * pair + side] for pair in take for side in (0, 1)], width, pad, left)
        firsts = np.arange(2 * len(take), dtype=np.int32)
        batch["segment_ids"] *= 1 + firsts[:, None]
        batch["ends"] = (firsts * width + batch.pop("lengths") - 1).reshape(-1, 2)
        batch["answer_lengths"] = batch["loss_weights"].sum(axis=1).reshape(-1, 2)
        of_pairs = {"margin": rng.uniform(0, 1, ROWS), "pair_weights": rng.choice([1.0, 0.5], ROWS)}
        of_pairs |= {"reference": rng.normal(-20, 3, (ROWS, 2))}
        return batch | {key: array[take].astype(np.float32) for key, array in of_pairs.items()}
    batch = rows_of(texts, width, pad, left)
    for index, key in enumerate(FLOATS):
        batch[key] = np.full(batch["tokens"].shape, np.nan, np.float32)
        for row, values in enumerate(floats):
            of_model = -4.1 + 0.1 * values[index]  # near log(1/60), so that ratios are near 1
            batch[key][row, batch["loss_weights"][row] > 0] = of_model if "logp" in key else values[index]
    return {key: array[take] for key, array in batch.items()}


def packed(batch, answers=2):
    """The pairs of a batch with several answers in a row, and padding between them and behind."""
    rows = {key: array for key, array in batch.items() if array.shape == batch["tokens"].shape}
    return batch | {key: array.reshape(len(array) // answers, -1) for key, array in rows.items()}


def found(name, *parts):
    """The loss and the gradient of a batch that is computed in parts."""
    _, _, params, both = made(name)
    sums = [both(params, part) for part in parts]
    total, weight = (sum(float(x) for x in values) for values in zip(*((t, w) for (t, (w, _)), _ in sums)))
    gradients = jax.tree.map(lambda *leaves: sum(leaves) / weight, *(g for _, g in sums))
    assert np.isfinite(total) and weight > 0
    return total / weight, gradients


def assert_same(ours, theirs, what):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-6, err_msg=what)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs[1]))
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, largest), err_msg=what)


def variants(name, seed, order=range(ROWS)):
    """The same rows in other forms: lists of batches whose sums are added."""

    def cut(size):
        return [batch_of(name, seed, take=range(i, i + size)) for i in range(0, ROWS, size)]

    whole = batch_of(name, seed)
    more = {f"{n} answers in a row": [packed(whole, n)] for n in (2, 8)} if "ends" in whole else {}
    return more | {
        "8 x 1": cut(1),
        "2 x 4": cut(4),
        "another order": [batch_of(name, seed, take=order)],
        "padding with the id of EOS": [batch_of(name, seed, pad=EOS)],
        "more padding": [batch_of(name, seed, width=WIDTH + 8)],
        "padding in front": [batch_of(name, seed, left=True)],
    }


@pytest.mark.parametrize("name", KINDS)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(ROWS)))
@settings(max_examples=4)
def test_microbatches_padding_and_order_change_nothing(name, seed, order):
    """One mean for all, ends by lengths where padding has the id of EOS, and NaN in the padding never read."""
    whole = found(name, batch_of(name, seed))
    for label, parts in variants(name, seed, order).items():
        assert_same(found(name, *parts), whole, label)


def mean_of_the_microbatch(monkeypatch):
    """Fault 1: every microbatch is divided by its own weight."""
    module = find_kind("dpo")
    real = module.loss

    def loss(*args):
        total, weight, figures = real(*args)
        return total / weight, jnp.ones_like(weight), figures

    monkeypatch.setattr(module, "loss", loss)


def ends_at_the_first_padding_id(monkeypatch):
    """Fault 2: the end of a sequence is the first token with the id of padding, which EOS may have."""
    real = pairs.scores

    def scores(cfg, params, rows, *how):
        tokens = rows["tokens"]
        ends = jnp.argmax(tokens == tokens[:, -1:], axis=1) + tokens.shape[1] * jnp.arange(len(tokens)) - 1
        return real(cfg, params, {**rows, "ends": ends.reshape(-1, 2)}, *how)

    monkeypatch.setattr(pairs, "scores", scores)


PLANTED = [
    ("dpo", mean_of_the_microbatch, "8 x 1"),
    ("reward", ends_at_the_first_padding_id, "padding with the id of EOS"),
]


@pytest.mark.parametrize(("name", "plant", "label"), PLANTED)
def test_a_planted_fault_is_seen(name, plant, label, monkeypatch):
    plant(monkeypatch)
    made.cache_clear()
    whole, other = found(name, batch_of(name, 5)), found(name, *variants(name, 5)[label])
    made.cache_clear()
    with pytest.raises(AssertionError, match=label):
        assert_same(other, whole, label)


@pytest.mark.parametrize("name", ["reward", "dpo", "grpo", "ppo"])
def test_the_step_of_eight_devices_has_the_loss_and_gradient_of_one(name):
    stage, cfg, params, _ = made(name)
    batch = batch_of(name, 5)
    loss, gradients = found(name, batch)
    if "ends" in batch:  # every second pair, and its rows, are of one microbatch, in which they are counted
        parts = [packed(batch_of(name, 5, take=range(i, ROWS, 2))) for i in range(2)]
        batch = {
            key: np.stack([part[key] for part in parts], 1).reshape(ROWS, *parts[0][key].shape[1:]) for key in batch
        }
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tx = optimizer(cfg, OptimizerConfig(learning_rate=1e-2), lambda step: 1.0)
    of_stage = functools.partial(find_kind(stage.kind).loss, stage)
    step = make_step(cfg, tx, mesh, batch_size=ROWS, microbatches=2, loss=of_stage)
    shardings, opt_shardings = state_shardings(cfg, tx, mesh)
    params = jax.device_put(jax.tree.map(jnp.copy, params), shardings)
    opt_state = jax.device_put(tx.init(params), opt_shardings)
    _, _, figures = step(params, opt_state, put_batch(batch, mesh, ROWS))
    np.testing.assert_allclose(figures["loss"], loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(figures["grad_norm"], optax.tree.norm(gradients), rtol=1e-5)
