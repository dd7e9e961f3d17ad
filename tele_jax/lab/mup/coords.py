"""The coordinate check of muP: do activations keep their size when the width grows, over the first steps of training?

A model is made at several widths, with muP and without, and trained for a few steps on sequences of a random Markov
chain. muP holds where the change of every activation since the start, mean |x(t) - x(0)|, does not grow with width
(arXiv 2203.03466, appendix D.1), nor does mean |x(t)|: slopes of straight lines through log size over log width.
CompleteP's rule of depth (arXiv 2505.01618) is checked alike, over the number of layers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.config import ModelConfig, check_seed, require
from tele_jax.files import Table
from tele_jax.lab.mup.widths import at_depth, at_width
from tele_jax.model.decoder import activations, init
from tele_jax.model.heads import logits_of
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import OptimizerConfig
from tele_jax.train.optimizer import optimizer

KINDS = ("embedding", "attention", "mlp", "stream", "logits")
CONTRAST = 0.4  # a slope that at least one kind reaches without the rule: the check can tell the two apart
VOCAB, ROWS, LENGTH = 256, 8, 32  # ids, and sequences and tokens of a batch
MODEL = ModelConfig(
    num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=160, vocab_size=VOCAB, max_seq_len=LENGTH,
    matrix_init_std=0.1, dtype="float32", remat="none",
)  # fmt: skip


class Axis(NamedTuple):
    """A size of the model that grows in a check, and the rule that shall keep activations as they are."""

    name: str
    rule: str
    sizes: tuple[int, ...]  # by default
    limits: Mapping[str, float]  # largest slope with the rule, by kind; other kinds are shown and not judged
    model: Callable[[ModelConfig, int, int, bool], ModelConfig]  # cfg, size, base size, does the rule hold?


def _at_width(cfg: ModelConfig, width: int, base: int, ruled: bool) -> ModelConfig:
    return at_width(cfg, width).replace(mup_base_width=base if ruled else None)


WIDTH = Axis("width", "muP", (64, 128, 256, 512, 1024), dict.fromkeys(KINDS, 0.1) | {"logits": 0.15}, _at_width)
# A block reads a normalised stream, so that its output has one size with the rule and without; its sum over layers
# does not.
DEPTH = Axis(
    "depth", "CompleteP", (2, 4, 8, 16, 32), {"stream": 0.1, "logits": 0.15},
    lambda cfg, depth, base, ruled: at_depth(cfg, depth if ruled else base).replace(num_layers=depth),
)  # fmt: skip


def check(
    cfg: ModelConfig = MODEL,
    *,
    learning_rate: float = 2**-6,
    matrix_learning_rate: float | None = None,
    axis: Axis = WIDTH,
    at: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    steps: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """Trains at every size of an axis with every seed, with its rule and without, and returns sizes and the verdict.

    cfg: the model at any width and depth; its vocabulary is cut to VOCAB ids, dtypes are float32. Rates are those at
      the base width, which is cfg.mup_base_width, or the smallest of the widths.
    at: the widths or depths, four at least; default: those of the axis. At the smallest depth the factor on the
      residual branches is one with the rule and without.

    Returns:
      {"axis", "at", "seeds", "steps", "sizes": {RULE | "standard": {"value" | "change": {kind: [at][seed][step]}}},
      "slopes": {RULE | "standard": {kind: largest slope}}, "problems": [text], "passed": bool}, with axis.rule as RULE

    Raises:
      UserError: fewer than four sizes, no seed, more than 10 steps, a width or depth that the model cannot have.
    """
    at, base, models = models_of(cfg, axis, at)
    require(len(seeds) > 0, "seeds is empty; give one at least")
    require(1 <= steps <= 10, f"steps={steps} must be 1 to 10: later, models of different sizes learn different things")
    for seed in seeds:
        check_seed(seed, "seeds")
    rates = OptimizerConfig(learning_rate=learning_rate, matrix_learning_rate=matrix_learning_rate)
    sizes: Table = {}
    found = np.empty((2, len(KINDS), len(at), len(seeds), steps))
    for name, made in models.items():
        for i, size in enumerate(at):
            if name == "standard" and size == base:
                continue  # the model is that of the rule
            say(f"{name}, {axis.name} {size}")
            for j, seed in enumerate(seeds):
                found[:, :, i, j] = _sizes(made[i], rates, steps, seed)
        sizes[name] = {
            what: {kind: sizes_of_kind.tolist() for kind, sizes_of_kind in zip(KINDS, by_kind)}
            for what, by_kind in zip(("value", "change"), found)
        }
    slopes = {
        name: {kind: max(_slope(at, both[what][kind]) for what in both) for kind in KINDS}
        for name, both in sizes.items()
    }
    problems = _problems(slopes, axis)
    return dict(
        axis=axis.name, at=at, seeds=list(seeds), steps=steps, learning_rate=learning_rate, base=base,
        sizes=sizes, slopes=slopes, problems=problems, passed=not problems,
    )  # fmt: skip


def models_of(
    cfg: ModelConfig, axis: Axis, at: Sequence[int] | None
) -> tuple[list[int], int, dict[str, list[ModelConfig]]]:
    """(sizes in rising order, base size, the models at every size by RULE and "standard") of a check.

    Raises:
      UserError: fewer than four sizes, a width or depth that the model cannot have.
    """
    at = sorted(set(axis.sizes if at is None else at))
    require(len(at) >= 4, f"{axis.name}s={tuple(at)}: a coordinate check needs at least four")
    cfg = cfg.replace(
        **dict(vocab_size=VOCAB, padded_vocab_size=VOCAB, max_seq_len=max(cfg.max_seq_len, LENGTH)),
        **dict(dtype="float32", param_dtype="float32", scalar_head=False),
    )
    base = (axis is WIDTH and cfg.mup_base_width) or at[0]
    rules = (axis.rule, "standard")
    return at, base, {name: [axis.model(cfg, size, base, name == axis.rule) for size in at] for name in rules}


def _problems(slopes: Table, axis: Axis) -> list[str]:
    found = [
        f"with {axis.rule}, {kind} grows with slope {slopes[axis.rule][kind]:.3f}, above {limit}"
        for kind, limit in axis.limits.items()
        if not slopes[axis.rule][kind] <= limit
    ]
    steepest = max(slopes["standard"][kind] for kind in axis.limits)
    if not steepest >= CONTRAST:
        found.append(
            f"without {axis.rule}, no slope reaches {CONTRAST} (the largest is {steepest:.3f}), so the check shows "
            "nothing; raise the learning rate"
        )
    return found


def _slope(at: Sequence[int], sizes: Sequence) -> float:
    """The largest slope over steps of log size over log width or depth; sizes [at][seed][step], averaged over seeds."""
    means = np.log(np.asarray(sizes)).mean(axis=1)
    return float(np.max(np.polyfit(np.log(at), means, 1)[0]))


def _sizes(cfg: ModelConfig, rates: OptimizerConfig, steps: int, seed: int) -> np.ndarray:
    """Mean |x| and mean |x - x at the start|, [2, kind, step], after each of the steps."""
    drawn = np.random.default_rng(seed)
    likely = drawn.dirichlet(np.full(VOCAB, 0.05), size=VOCAB).cumsum(axis=1)  # few successors of every id
    tokens = np.empty((steps + 1, ROWS, LENGTH + 1), np.int32)
    tokens[:, :, 0] = drawn.integers(0, VOCAB, tokens.shape[:2])
    for at in range(LENGTH):
        chance = drawn.random(tokens.shape[:2])[..., None]
        tokens[:, :, at + 1] = np.minimum((likely[tokens[:, :, at]] < chance).sum(axis=-1), VOCAB - 1)
    return np.asarray(_trained_sizes(cfg, rates, jax.random.key(seed), tokens))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trained_sizes(cfg: ModelConfig, rates: OptimizerConfig, key: jax.Array, tokens: jax.Array) -> jax.Array:
    """See `_sizes`; tokens int32[steps + 1, B, S + 1], of which the last batch is looked at and never learned."""
    params = init(cfg, key)
    tx = optimizer(cfg, rates, lambda step: jnp.float32(1.0))
    start = _looked_at(cfg, params, tokens[-1, :, :-1])

    def step(carry, rows):
        params, state = carry
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_weights": jnp.ones((ROWS, LENGTH))}

        def loss(params):
            total, weight = next_token_loss(cfg, params, batch)
            return total / weight

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        now = _looked_at(cfg, params, tokens[-1, :, :-1])
        size = lambda x: jnp.mean(jnp.abs(x))  # noqa: E731
        return (params, state), jnp.array([[size(now[k]) for k in KINDS], [size(now[k] - start[k]) for k in KINDS]])

    return jnp.moveaxis(jax.lax.scan(step, (params, tx.init(params)), tokens[:-1])[1], 0, -1)


def _looked_at(cfg: ModelConfig, params, tokens: jax.Array) -> dict[str, jax.Array]:
    found = activations(cfg, params, tokens)
    stream = found["embed"] + cfg.residual_mult * (found["attn"] + found["mlp"]).sum(axis=0)
    values = (found["embed"], found["attn"], found["mlp"], stream, logits_of(cfg, params, found["hidden"]))
    return dict(zip(KINDS, values, strict=True))
