"""The coordinate check of muP: do activations keep their size when the width grows, over the first steps of training?

A model is made at several widths, with muP and without, and trained for a few steps on sequences of a random Markov
chain. muP holds where the change of every activation since the start, mean |x(t) - x(0)|, does not grow with width
(arXiv 2203.03466, appendix D.1), nor does mean |x(t)|: slopes of straight lines through log size over log width.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.config import ModelConfig, check_seed, require
from tele_jax.files import Table
from tele_jax.lab.mup.widths import at_width
from tele_jax.model.decoder import activations, init
from tele_jax.model.heads import logits_of
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import OptimizerConfig
from tele_jax.train.optimizer import optimizer

KINDS = ("embedding", "attention", "mlp", "stream", "logits")
LIMITS = dict.fromkeys(KINDS, 0.1) | {"logits": 0.15}  # largest slopes with muP
CONTRAST = 0.4  # a slope that at least one kind reaches without muP: the check can tell the two apart
VOCAB, ROWS, LENGTH = 256, 8, 32  # ids, and sequences and tokens of a batch
WIDTHS = (64, 128, 256, 512, 1024)
MODEL = ModelConfig(
    num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=160, vocab_size=VOCAB, max_seq_len=LENGTH,
    matrix_init_std=0.1, dtype="float32", remat="none",
)  # fmt: skip


def check(
    cfg: ModelConfig = MODEL,
    *,
    learning_rate: float = 2**-6,
    matrix_learning_rate: float | None = None,
    widths: Sequence[int] = WIDTHS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    steps: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> Table:
    """Trains at every width with every seed, with muP and without, and returns sizes, slopes and the verdict.

    cfg: the model at any width; its vocabulary is cut to VOCAB ids, dtypes are float32. Rates are those at the base
      width, which is cfg.mup_base_width, or the smallest of the widths.

    Returns:
      {"widths", "seeds", "steps", "sizes": {"muP" | "standard": {"value" | "change": {kind: [width][seed][step]}}},
      "slopes": {"muP" | "standard": {kind: largest slope}}, "problems": [text], "passed": bool}

    Raises:
      UserError: fewer than four widths, no seed, more than 10 steps, a width that the model cannot have.
    """
    require(len(set(widths)) >= 4, f"widths={tuple(widths)}: a coordinate check needs at least four")
    require(len(seeds) > 0, "seeds is empty; give one at least")
    require(
        1 <= steps <= 10, f"steps={steps} must be 1 to 10: later, models of different widths learn different things"
    )
    for seed in seeds:
        check_seed(seed, "seeds")
    widths = sorted(set(widths))
    rates = OptimizerConfig(learning_rate=learning_rate, matrix_learning_rate=matrix_learning_rate)
    cfg = cfg.replace(
        **dict(vocab_size=VOCAB, padded_vocab_size=VOCAB, max_seq_len=max(cfg.max_seq_len, LENGTH)),
        **dict(dtype="float32", param_dtype="float32", scalar_head=False),
    )
    base = cfg.mup_base_width or widths[0]
    for width in widths:
        at_width(cfg, width)  # refuses what cannot be before the first is trained
    sizes: Table = {}
    found = np.empty((2, len(KINDS), len(widths), len(seeds), steps))
    for name in ("muP", "standard"):
        for i, width in enumerate(widths):
            if name == "standard" and width == base:
                continue  # the model is that of muP
            say(f"{name}, width {width}")
            model = at_width(cfg, width).replace(mup_base_width=base if name == "muP" else None)
            for j, seed in enumerate(seeds):
                found[:, :, i, j] = _sizes(model, rates, steps, seed)
        sizes[name] = {
            what: {kind: sizes_of_kind.tolist() for kind, sizes_of_kind in zip(KINDS, by_kind)}
            for what, by_kind in zip(("value", "change"), found)
        }
    slopes = {
        name: {kind: max(_slope(widths, both[what][kind]) for what in both) for kind in KINDS}
        for name, both in sizes.items()
    }
    problems = _problems(slopes)
    return dict(
        widths=widths, seeds=list(seeds), steps=steps, learning_rate=learning_rate, base_width=base,
        sizes=sizes, slopes=slopes, problems=problems, passed=not problems,
    )  # fmt: skip


def _problems(slopes: Table) -> list[str]:
    found = [
        f"with muP, {kind} grows with slope {slope:.3f}, above {LIMITS[kind]}"
        for kind, slope in slopes["muP"].items()
        if not slope <= LIMITS[kind]
    ]
    steepest = max(slopes["standard"].values())
    if not steepest >= CONTRAST:
        found.append(
            f"without muP, no slope reaches {CONTRAST} (the largest is {steepest:.3f}), so the check shows nothing; "
            "raise the learning rate"
        )
    return found


def _slope(widths: Sequence[int], sizes: Sequence) -> float:
    """The largest slope over steps of log size over log width, sizes [width][seed][step] averaged over seeds in log."""
    means = np.log(np.asarray(sizes)).mean(axis=1)
    return float(np.max(np.polyfit(np.log(widths), means, 1)[0]))


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
