"""Learning-rate schedules: a factor on the peak, as a function of the step of a stage."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tele_jax.config import require
from tele_jax.settings import ScheduleConfig


def schedule(config: ScheduleConfig, steps: int, tokens_per_step: int) -> Callable[[jax.Array], jax.Array]:
    """factor(step) in [0, 1]: linear warm-up to 1, then constant, cosine, linear, or constant and a final linear decay.

    The first step (0) already learns: the warm-up reaches 1 at step `warmup` - 1. Lengths in tokens are divided by
    tokens_per_step, fractions of a step kept.

    Raises:
      UserError: a warm-up (and decay) longer than the whole.
    """
    unit = 1 if config.unit == "steps" else tokens_per_step
    warmup = config.warmup / unit
    total = steps if config.total is None else config.total / unit
    decay = total / 10 if config.decay is None else config.decay / unit
    require(
        warmup < total, f"schedule: warmup {config.warmup} is not below the total of {total * unit:g} {config.unit}"
    )
    if config.kind == "wsd":
        require(
            warmup + decay <= total, f"schedule: warmup and decay exceed the total of {total * unit:g} {config.unit}"
        )

    def factor(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1.0))
        start, length = (total - decay, decay) if config.kind == "wsd" else (warmup, total - warmup)
        progress = jnp.clip((step - start) / length, 0.0, 1.0)
        if config.kind == "constant":
            fall = jnp.ones_like(step)
        elif config.kind == "cosine":
            fall = config.final + (1 - config.final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            fall = 1 - (1 - config.final) * progress
        return rise * fall

    return factor
