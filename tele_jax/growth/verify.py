"""Verification of a growth: the copied parts, the logits before and after, and whether all that is new can learn."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tele_jax.axes import flatten
from tele_jax.config import require
from tele_jax.growth.apply import check_tree, shrink
from tele_jax.growth.masks import vectors
from tele_jax.growth.plan import Plan
from tele_jax.model import decoder
from tele_jax.model.loss import next_token_loss

# Largest logit difference, relative to the largest logit, that rounding explains.
RELATIVE_TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
      max_abs: largest difference of a logit; max_rel: the same over the largest logit.
      kl: mean KL divergence of the grown model's predictions from the source's, in nats.
      altered: leaves whose old part is not what the source holds.
      dead: "axis[unit] in leaf" for new units that have no gradient after two optimizer steps.
      locked: "axis[unit] = axis[unit]" for units that are still identical after two optimizer steps.
      ok: everything that the plan promises holds.
    """

    policy: str
    plan: str
    preserving: bool
    lively: bool
    max_abs: float
    max_rel: float
    tolerance: float
    kl: float
    altered: tuple[str, ...]
    dead: tuple[str, ...]
    locked: tuple[str, ...]
    tokens: str

    @property
    def ok(self) -> bool:
        preserved = not self.preserving or self.max_rel <= self.tolerance
        lively = not self.lively or not (self.dead or self.locked)
        return preserved and lively and not self.altered

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        lines = [
            f"logits: max difference {self.max_abs:.3g} ({self.max_rel:.3g} of the largest), KL {self.kl:.3g} nats",
            f"altered leaves: {_listed(self.altered)}",
            f"dead units: {_listed(self.dead)}",
            f"locked units: {_listed(self.locked)}",
            "ok" if self.ok else "NOT ok",
        ]
        return "\n".join(lines)


def _listed(names: tuple[str, ...]) -> str:
    return "none" if not names else ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")


def verify(plan: Plan, params: Mapping[str, Any], big: Mapping[str, Any], tokens: jax.Array) -> Report:
    """Compares the grown parameters with the source's on tokens int32[B, S], in the configs' dtype.

    Raises:
      UserError: a tree is not what the plan's config describes, or rows shorter than 3 tokens.
    """
    check_tree(flatten(params), plan.src_spec)
    check_tree(flatten(big), plan.dst_spec)
    tokens = jnp.asarray(tokens)
    # A single position has nothing to attend to, so that its queries and keys could not show that they live.
    fits = tokens.ndim == 2 and tokens.shape[1] >= 3
    require(fits, f"verify: tokens of shape {tokens.shape}; rows of at least 3 tokens are needed")
    masks = vectors(plan, 0.0) if plan.masked else None
    before = jax.jit(decoder.forward, static_argnums=0)(plan.src_cfg, params, tokens)
    after = jax.jit(decoder.forward, static_argnums=0)(plan.dst_cfg, big, tokens, masks=masks)
    max_abs = float(jnp.max(jnp.abs(after - before)))
    old, new = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    dead, locked = _liveness(plan, big, tokens)
    return Report(
        policy=plan.policy,
        plan=plan.digest,
        preserving=plan.preserving,
        lively=plan.lively,
        max_abs=max_abs,
        max_rel=max_abs / max(float(jnp.max(jnp.abs(before))), 1e-30),
        tolerance=max(RELATIVE_TOLERANCE[dtype] for dtype in _dtypes(plan)),
        kl=float(jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=-1))),
        altered=_altered(plan, params, big),
        dead=dead,
        locked=locked,
        tokens=hashlib.sha256(np.ascontiguousarray(np.asarray(tokens, np.int32))).hexdigest(),
    )


def _dtypes(plan: Plan) -> set[str]:
    """The dtypes in which growth and the two forward passes round."""
    scales = not all(leaf.moves_exactly for leaf in plan.leaves.values())
    return {plan.src_cfg.dtype, plan.dst_cfg.dtype} | ({plan.dst_cfg.param_dtype} if scales else set())


def _altered(plan: Plan, params: Mapping[str, Any], big: Mapping[str, Any]) -> tuple[str, ...]:
    back, original = flatten(shrink(plan, big)), flatten(params)
    wrong = []
    for name, value in original.items():
        value, returned = np.asarray(value, np.float64), np.asarray(back[name], np.float64)
        # Scaling and unscaling round once each: two units in the last place of the leaf's dtype.
        exact = plan.leaves[name].moves_exactly
        unit = 0.0 if exact else float(jnp.finfo(plan.src_spec[name].dtype).eps)
        if (np.abs(value - returned) > 2 * unit * np.abs(value)).any():
            wrong.append(name)
    return tuple(wrong)


def _liveness(plan: Plan, big: Mapping[str, Any], tokens: jax.Array) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two Adam steps (masks, where the plan has them, half way up), then the gradient and the equality of new units."""
    masks = vectors(plan, 0.5) if plan.masked else None
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": jnp.ones(tokens[:, 1:].shape)}
    optimizer = optax.adam(1e-3)

    @jax.jit
    def gradient(params):
        def mean_loss(p):
            total, weight = next_token_loss(plan.dst_cfg, p, batch, masks)
            return total / weight

        return jax.grad(mean_loss)(params)

    state = optimizer.init(big)
    for _ in range(2):
        updates, state = optimizer.update(gradient(big), state, big)
        big = optax.apply_updates(big, updates)
    dead = _dead(plan, flatten(gradient(big)))
    return dead, _locked(plan, flatten(big))


def _units(array: np.ndarray, dimension: int) -> np.ndarray:
    """[units, everything else] of a leaf along one of its axes."""
    return np.moveaxis(array, dimension, 0).reshape(array.shape[dimension], -1)


def _dead(plan: Plan, gradients: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    for name, spec in plan.dst_spec.items():
        array = np.asarray(gradients[name], np.float32)
        for dimension, axis in enumerate(spec.axes):
            fresh = np.flatnonzero(plan.maps[axis].fresh)
            if fresh.size:
                silent = fresh[~_units(array, dimension)[fresh].any(axis=1)]
                found += [f"{axis}[{unit}] in {name}" for unit in silent]
    return tuple(found)


def _locked(plan: Plan, params: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    for axis in (*decoder.MASKED_AXES, "kv_heads"):
        axis_map = plan.maps[axis]
        first_seen = np.unique(axis_map.index, return_index=True)[1]
        repeated = ~np.isin(np.arange(axis_map.dst_size), first_seen)
        is_new = axis_map.fresh | repeated  # copies that a unit was split into are not fresh, but may be locked
        if not is_new.any():
            continue
        digests: list[bytes] = [b""] * axis_map.dst_size
        for name, spec in plan.dst_spec.items():
            if axis in spec.axes:
                rows = _units(np.asarray(params[name], np.float32), spec.axes.index(axis))
                digests = [hashlib.sha256(d + row.tobytes()).digest() for d, row in zip(digests, rows, strict=True)]
        first: dict[bytes, int] = {}
        for unit, digest in enumerate(digests):
            twin = first.setdefault(digest, unit)
            if twin != unit and (is_new[unit] or is_new[twin]):
                found.append(f"{axis}[{unit}] = {axis}[{twin}]")
    return tuple(found)
