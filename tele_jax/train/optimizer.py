"""AdamW as an optax chain, with muP learning-rate groups read off the axis names, an age for every unit, and schedules.

Growth adds units to a model in mid-training. Adam's bias correction and a warm-up of new parameters go by how long a
unit has been there, so the state keeps, per axis, the step at which each unit was born: a few small vectors.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tele_jax.axes import Params, ParamSpec, PyTree, flatten, unflatten
from tele_jax.config import ModelConfig, require
from tele_jax.growth.opt_state import AdamState
from tele_jax.model.spec import spec as spec_of
from tele_jax.settings import OptimizerConfig, ScheduleConfig


def optimizer(
    cfg: ModelConfig,
    config: OptimizerConfig,
    factor: Callable[[Any], jax.Array],
    trained: Params | None = None,
    new: Mapping[str, Any] | None = None,
    unread: Collection[str] = (),
) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay, muP groups, and the schedule `factor(step)`.

    Matrix-like parameters learn with matrix_learning_rate / r, r = width / muP base width; all others with
    learning_rate (arXiv 2304.06875). Kernels and tables decay; norm scales and biases do not.
    trained: tree of ParamSpec of what is trained, where that is not all of the model (model/adapters.py).
    new: bool[size] by axis name; entries without a unit that is True there stay as they are. None: all learn.
    unread: axes; leaves with such an output, which the loss does not read, stay as they are, and so do their moments.
    """
    spec = spec_of(cfg) if trained is None else trained
    matrix = config.learning_rate if config.matrix_learning_rate is None else config.matrix_learning_rate
    peaks = jax.tree.map(lambda s: matrix / cfg.width_ratio if s.is_matrix_like else config.learning_rate, spec)
    alone = {name for name, leaf in flatten(spec).items() if not set(leaf.outputs).isdisjoint(unread)}
    decays = unflatten({n: s.role in ("kernel", "table") and n not in alone for n, s in flatten(spec).items()})
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(spec, config, alone),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, peak: u * peak, updates, peaks)),
        optax.scale_by_schedule(lambda step: -factor(step)),
    )
    return chain if new is None else _only(new, flatten(spec), chain)


def _only(new: Mapping[str, Any], leaves: Mapping[str, ParamSpec], inner: Any) -> optax.GradientTransformation:
    """The optimizer `inner`, with its state, for entries with a new unit alone: others have no gradient and no step."""

    def kept(tree: PyTree) -> dict[str, Any]:
        flat = flatten(tree)
        for name, leaf in leaves.items():
            mask = jnp.zeros((1,) * len(leaf.shape), bool)
            for dimension, axis in enumerate(leaf.axes):
                if axis in new:
                    mask |= jnp.asarray(new[axis]).reshape([-1 if d == dimension else 1 for d in range(mask.ndim)])
            flat[name] = jnp.where(mask, flat[name], jnp.zeros((), flat[name].dtype))
        return unflatten(flat)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[Any, Any]:
        steps, state = inner.update(kept(updates), state, params)
        return kept(steps), state

    return optax.GradientTransformation(inner.init, update)


def scale_by_adam(spec: Params, config: OptimizerConfig, unread: Collection[str] = ()) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) whose bias correction counts the steps of each entry since it was born, or of all.

    An entry is as young as its youngest unit. 1 - beta^age and the warm-up both rise with age, so the smallest factor
    over the axes of a leaf is the entry's: vectors, broadcast, and nothing of the size of the parameters.
    unread: names of leaves that stay as they are, with their moments.
    """
    leaves = flatten(spec)
    sizes = {axis: size for leaf in leaves.values() for axis, size in zip(leaf.axes, leaf.shape, strict=True)}

    def init(params: PyTree) -> AdamState:
        narrow = config.moment_dtype == "bfloat16"
        dtype = lambda p: jnp.bfloat16 if narrow else jnp.promote_types(p.dtype, jnp.float32)  # noqa: E731
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype(p)), params)  # noqa: E731
        born = {axis: jnp.zeros(size, jnp.int32) for axis, size in sizes.items()}
        return AdamState(jnp.zeros([], jnp.int32), zeros(), zeros(), born)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[Any, AdamState]:
        del params
        count = state.count + 1
        # A unit that is not born yet has no gradient: any age above 0 gives it a step of 0.
        age = {axis: jnp.maximum(count - born, 1).astype(jnp.float32) for axis, born in state.born.items()}
        whole = config.bias_correction == "state"
        steps_of = {axis: count.astype(jnp.float32) if whole else a for axis, a in age.items()}
        first = {axis: 1 - config.beta1**a for axis, a in steps_of.items()}
        second = {axis: 1 - config.beta2**a for axis, a in steps_of.items()}
        if config.new_warmup_steps:
            # Units that were there from the start (born 0) follow the schedule's own warm-up alone.
            new = {axis: born > 0 for axis, born in state.born.items()}
            warm = {a: jnp.where(new[a], jnp.minimum(1.0, age[a] / config.new_warmup_steps), 1.0) for a in age}
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
        gradients = jax.tree.map(lambda m, g: wide(g).astype(wide(m).dtype), state.mu, updates)
        mu = jax.tree.map(lambda m, g: config.beta1 * wide(m) + (1 - config.beta1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: config.beta2 * wide(v) + (1 - config.beta2) * g**2, state.nu, gradients)
        steps = {}
        flat_mu, flat_nu = flatten(mu), flatten(nu)
        for name, leaf in leaves.items():
            if name in unread:
                steps[name] = jnp.zeros_like(flat_mu[name])
                continue
            m = flat_mu[name] / _least(first, leaf)
            v = flat_nu[name] / _least(second, leaf)
            step = m / (jnp.sqrt(v) + config.eps)
            steps[name] = (step * _least(warm, leaf) if config.new_warmup_steps else step).astype(flat_mu[name].dtype)

        def stored(new: Mapping[str, jax.Array], old: PyTree) -> PyTree:
            return unflatten({n: o if n in unread else new[n].astype(o.dtype) for n, o in flatten(old).items()})

        return unflatten(steps), AdamState(count, stored(flat_mu, state.mu), stored(flat_nu, state.nu), state.born)

    return optax.GradientTransformation(init, update)


def _least(vectors: Mapping[str, jax.Array], leaf: ParamSpec) -> jax.Array:
    """The smallest of the vectors of a leaf's axes, broadcast to its shape."""
    least = jnp.float32(1.0)
    for dimension, axis in enumerate(leaf.axes):
        shape = [1] * len(leaf.axes)
        shape[dimension] = -1
        least = jnp.minimum(least, vectors[axis].reshape(shape))
    return least


def delay_births(opt_state: PyTree, steps: Mapping[str, object]) -> PyTree:
    """The state with units born `steps` later, int32[size] by axis name: MaskSchedule.closed_steps().

    Behind a closed mask the gradient is 0. If a unit aged there, its bias correction would be over before its first
    gradient comes (with beta2 0.999, steps up to 6.6 times as large as they should be), and so would its warm-up.
    """
    is_adam = lambda node: isinstance(node, AdamState)  # noqa: E731

    def later(node: PyTree) -> PyTree:
        if not is_adam(node):
            return node
        return node._replace(born={axis: born + steps.get(axis, 0) for axis, born in node.born.items()})

    return jax.tree.map(later, opt_state, is_leaf=is_adam)


def restart_schedule(opt_state: PyTree) -> PyTree:
    """The state with the schedule at step 0, for a new stage; moments and ages stay."""
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(
        lambda node: node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node,
        opt_state,
        is_leaf=is_schedule,
    )


def schedule(config: ScheduleConfig, steps: int, tokens_per_step: int) -> Callable[[Any], jax.Array]:
    """factor(step) in [0, 1]: linear warm-up to 1, then constant, cosine, linear, or constant and a final linear decay.

    The first step (0) already learns: the warm-up reaches 1 at step `warmup` - 1. Lengths in tokens are divided by
    tokens_per_step, fractions of a step kept.

    Raises:
      UserError: a warm-up (and decay) longer than the whole.
    """
    unit = 1 if config.unit == "steps" else tokens_per_step
    total = steps if config.total is None else config.total / unit
    warmup = config.warmup / unit + config.warmup_share * total
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
