"""Every optimizer of the installed optax: is its state grown, how exactly, and why not. Prints docs/growth.md's table.

python -m tests.growth.optimizers

The truth is the optimizer itself: two steps on small parameters and gradients, grown, against two steps on the grown
parameters with the grown gradients (new entries without gradient), in float64.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten, unflatten
from tests.growth import oracle

SRC = tele.ModelConfig(
    **dict(num_layers=2, embed_dim=2, num_heads=2, head_dim=2, mlp_dim=2, vocab_size=2),
    **dict(dtype="float64", param_dtype="float64"),
)
DST = SRC.replace(num_layers=3, embed_dim=3, num_heads=3, num_kv_heads=3, mlp_dim=3, vocab_size=3)
# One leaf of every kind is enough.
LEAVES = ("final_norm.scale", "layers.attn_norm.scale", "layers.mlp.up")
RATE = 1e-3
PREFIX = {"final_norm": True, "layers": False}  # optax takes masks of whole branches
ADAM = optax.scale_by_adam()


def _by_width(params: Any) -> Any:
    return jax.tree.map(lambda x: "matrices" if x.ndim > 2 else "others", params)


OPTAX: dict[str, Callable[[], Any]] = {
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(1e9),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "add_noise": lambda: optax.add_noise(0.1, 0.5, seed=0),
    "apply_every": lambda: optax.apply_every(4),
    "apply_if_finite": lambda: optax.apply_if_finite(ADAM, 5),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), ADAM, optax.add_decayed_weights(0.1)),
    "clip": lambda: optax.clip(1.0),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "conditionally_mask": lambda: optax.conditionally_mask(ADAM, lambda step: step % 2 == 0),
    "conditionally_transform": lambda: optax.conditionally_transform(ADAM, lambda step: step % 2 == 0),
    "ema": lambda: optax.ema(0.9),
    "flatten": lambda: optax.flatten(ADAM),
    "freeze": lambda: optax.freeze(PREFIX),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(RATE),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adamw)(RATE),
    "masked": lambda: optax.masked(ADAM, PREFIX),
    "measure_with_ema": lambda: optax.measure_with_ema(optax.tree.norm, 0.9),
    "multi_transform": lambda: optax.multi_transform({"matrices": ADAM, "others": optax.trace(0.9)}, _by_width),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", ADAM)),
    "optimistic_adam": lambda: optax.optimistic_adam(RATE, 1.0),
    "partition": lambda: optax.partition({"matrices": ADAM, "others": optax.trace(0.9)}, _by_width),
    "lookahead": lambda: optax.lookahead(optax.adam(RATE), 5, 0.5),
    "scale": lambda: optax.scale(2.0),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda step: 1.0 / (1 + step)),
    "selective_transform": lambda: optax.selective_transform(ADAM, freeze_mask=PREFIX),
    "sgd": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "snapshot": lambda: optax.snapshot("norm", optax.tree.norm),
    "stateless": lambda: optax.stateless(lambda updates, params: updates),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda update, param: update),
    "trace": lambda: optax.trace(0.9),
    "with_extra_args_support": lambda: optax.with_extra_args_support(ADAM),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=0),
}
CONTRIB: dict[str, Callable[[], Any]] = {
    "differentially_private_aggregate": lambda: contrib.differentially_private_aggregate(1.0, 1.0, 0),
    "dpsgd": lambda: contrib.dpsgd(RATE, 1.0, 1.0, 0, momentum=0.9),
    "galore": lambda: contrib.galore(RATE, rank=1),
    "mechanize": lambda: contrib.mechanize(optax.adam(RATE)),
    "sam": lambda: contrib.sam(optax.adam(RATE), optax.sgd(RATE)),
    "scale_by_galore": lambda: contrib.scale_by_galore(rank=1),
    "scale_by_muon": lambda: optax.masked(
        contrib.scale_by_muon(weight_dimension_numbers=contrib.MuonDimensionNumbers()),
        lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
    ),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(RATE), RATE),
    "sophia": lambda: contrib.sophia(RATE),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(ADAM),
}
# What users set beside the defaults, and what changes the state.
VARIANTS: dict[str, Callable[[], Any]] = {
    "MultiSteps(adam)": lambda: optax.MultiSteps(optax.adam(RATE), 4).gradient_transformation(),
    "rmsprop(momentum)": lambda: optax.rmsprop(RATE, momentum=0.9),
    "rmsprop(momentum, eps=0)": lambda: optax.rmsprop(RATE, momentum=0.9, eps=0.0),
    "rmsprop(centered)": lambda: optax.rmsprop(RATE, centered=True),
    "adagrad(start 0)": lambda: optax.adagrad(RATE, initial_accumulator_value=0.0),
    "adamw(mask)": lambda: optax.adamw(RATE, mask=lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
    "adam(bfloat16 mu)": lambda: optax.adam(RATE, mu_dtype="bfloat16"),
    "adafactor(factored)": lambda: optax.adafactor(RATE, min_dim_size_to_factor=2),
}


def names(module: Any) -> list[str]:
    """What a module of optax makes optimizers and their parts with, found in the module itself."""
    found = []
    for name in sorted(vars(module)):
        item = getattr(module, name)
        if not inspect.isfunction(item) or name.startswith("_"):
            continue
        returns = str(inspect.signature(item).return_annotation)
        if "GradientTransformation" in returns:
            found.append(name)
    return found


def factories() -> dict[str, Callable[[], Any]]:
    """{name: a function without arguments that makes the optimizer}, of all that `names` finds."""
    made = {}
    for module, special, prefix in ((optax, OPTAX, ""), (contrib, CONTRIB, "contrib.")):
        for name in names(module):
            made[prefix + name] = special.get(name) or _with_rate(getattr(module, name))
    return made | VARIANTS


def distinct() -> list[str]:
    """The names without the parts of which an optimizer is made that has a name of its own: scale_by_adam and adam."""
    made = factories()
    return [name for name in made if name.replace("scale_by_", "") == name or name.replace("scale_by_", "") not in made]


def _with_rate(factory: Callable[..., Any]) -> Callable[[], Any]:
    """With a learning rate where it has to have one, and otherwise its defaults."""
    needed = [
        p
        for p in inspect.signature(factory).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return lambda: factory(**{p.name: RATE for p in needed})


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer. deviation: largest, relative to the largest entry of a leaf; None where it is refused."""

    name: str
    deviation: float | None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """The line of the table that the optimizer stands in."""
        return "grown exactly" if self.deviation is not None else f"refused: {self.reason.rpartition(': ')[2]}"


def table(rows: list[Row]) -> str:
    """One line for each verdict, with the names of its optimizers."""
    lines = [f"| optax {optax.__version__} | optimizers and their parts |", "|---|---|"]
    for verdict in dict.fromkeys(row.verdict for row in sorted(rows, key=lambda row: row.deviation is None)):
        lines.append(f"| {verdict} | {', '.join(row.name for row in rows if row.verdict == verdict)} |")
    return "\n".join(lines)


def some_leaves() -> growth.Plan:
    """The growth of SRC into DST, of LEAVES alone."""
    whole = growth.plan(SRC, DST)
    return whole.replace(
        leaves={name: whole.leaves[name] for name in LEAVES},
        tree={name: name for name in LEAVES},
        src_tree={name: whole.src_spec[name] for name in LEAVES},
    )


def look(name: str, make: Callable[[], Any]) -> Row:
    """Grows the state of one optimizer, and compares it with the one that the optimizer makes of grown gradients."""
    plan = some_leaves()
    rng = np.random.default_rng(0)
    spec = unflatten(plan.src_spec)
    draw = lambda size: jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * size), spec)  # noqa: E731
    params, gradients = draw(1.0), [draw(1e-3) for _ in range(2)]
    try:
        optimizer = make()
        state = _run(optimizer, params, gradients)
        grown = growth.apply_opt(plan, state, optimizer)
    except tele.UserError as error:
        return Row(name, None, str(error))
    big = growth.apply(plan, params)
    larger = [_like_a_gradient(plan, gradient) for gradient in gradients]
    return Row(name, _deviation(plan, state, grown, _run(optimizer, big, larger)))


def _run(optimizer: Any, params: Any, gradients: Any) -> Any:
    try:
        state = optimizer.init(params)
        if isinstance(state, optax.LookaheadState):
            params = optax.LookaheadParams.init_synced(params)
        full = optax.with_extra_args_support(optimizer).update
        update = jax.jit(lambda g, s, p: full(g, s, p, value=1.0, grad=g)[1])
        for gradient in gradients:
            state = update(gradient, state, params)
    except (TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError) as error:
        raise tele.UserError(
            "the optimizer needs more than gradients (losses, functions, a gradient for every example)"
        ) from error
    return state


def _like_a_gradient(plan: Any, gradient: Any) -> Any:
    """From the formula: where growth makes a*theta the gradient is divided by a, and new entries have none."""
    out = {}
    for name, old in flatten(gradient).items():
        axes = plan.dst_spec[name].axes
        index = np.ix_(*(np.maximum(plan.maps[axis].index, 0) for axis in axes))
        value = np.asarray(old)[index] / plan.leaves[name].coefficient
        out[name] = jnp.asarray(np.where(oracle.fresh(plan, axes), 0.0, value))
    return unflatten(out)


def _deviation(plan: Any, state: Any, grown: Any, wanted: Any) -> float:
    assert jax.tree.structure(grown) == jax.tree.structure(wanted)
    if isinstance(grown, contrib.ScheduleFreeState):  # the optimizer's own copy of the parameters grows as they do
        wanted = wanted._replace(z=growth.apply(plan, state.z))
    worst = 0.0
    for got, want in zip(jax.tree.leaves(grown), jax.tree.leaves(wanted), strict=True):
        unit = float(jnp.finfo(want.dtype).eps) if jnp.issubdtype(jnp.asarray(want).dtype, jnp.floating) else 1.0
        got, want = (np.asarray(jax.random.key_data(x) if _is_key(x) else x, np.float64) for x in (got, want))
        assert got.shape == want.shape
        if got.size:
            difference = np.abs(got - want)[~(np.isnan(got) & np.isnan(want))].max(initial=0.0)
            worst = max(worst, float(difference / max(np.abs(want).max(), np.finfo(float).tiny)) / unit)
    return worst


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    looked = [look(label, factory) for label, factory in factories().items()]
    print(table(looked))
    print(f"largest deviation: {max(row.deviation or 0 for row in looked):.2g} units of rounding")
