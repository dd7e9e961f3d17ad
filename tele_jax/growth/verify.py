"""Verification of a growth, at three levels:

structural   every entry is what the plan says: kept to the bit, zero, or fresh with the right moments    structure.py
by parts     embedding, every layer and head do what they did, on random inputs, in float64               layerwise.py
as a whole   the logits on tokens before and after; whether all that is new can learn           here, liveness.py

`verify` does all three; `verify_stored` the first two, which need no more memory than a block of a leaf.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax.axes import flatten
from tele_jax.config import require
from tele_jax.growth import layerwise, share, structure
from tele_jax.growth.apply import check_tree
from tele_jax.growth.liveness import liveness
from tele_jax.growth.masks import vectors
from tele_jax.growth.plan import Growth
from tele_jax.model import decoder
from tele_jax.sharding import to_host

# Largest logit difference, relative to the largest logit, that rounding explains.
RELATIVE_TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 5e-2}

# Largest difference of a part, relative to the largest value of its row: all is computed in float64.
PARTS_TOLERANCE = 1e-11


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` or `verify_stored` found. What was not looked at is None.

    Attributes:
      max_abs: largest difference of a logit of the old tokens; max_rel: the same over the largest logit.
      kl: mean KL divergence of the grown model's predictions from the source's, over the old tokens, in nats.
      altered: leaves that are not what the plan makes of the source; problems says how.
      parts: {part: largest relative difference of what comes out of it}, of embedding, layers and head, in float64 and
        without the rounding of products to the dtype of the parameters, which `altered` looks at.
      parts_tolerance: of those.
      dead: "axis[unit] in leaf" for new units that have no gradient after two optimizer steps.
      locked: "axis[unit] = axis[unit]" for units that are still identical after two optimizer steps.
      tokens: SHA-256 of the tokens.
      ok: everything that the plan promises holds, as far as it was looked at.
    """

    policy: str
    plan: str
    preserving: bool
    lively: bool
    altered: tuple[str, ...]
    problems: tuple[str, ...]
    parts: Mapping[str, float]
    parts_tolerance: float
    max_abs: float | None = None
    max_rel: float | None = None
    tolerance: float | None = None
    kl: float | None = None
    dead: tuple[str, ...] | None = None
    locked: tuple[str, ...] | None = None
    tokens: str | None = None

    @property
    def ok(self) -> bool:
        # Written so that a difference that is no number does not pass.
        same = self.max_rel is None or self.max_rel <= self.tolerance
        parts = all(difference <= self.parts_tolerance for difference in self.parts.values())
        preserved = not self.preserving or (same and parts)
        lively = not self.lively or not (self.dead or self.locked)
        return preserved and lively and not self.altered

    @property
    def worst_part(self) -> tuple[str, float]:
        """The part that differs most, and by how much."""
        return max(self.parts.items(), key=lambda item: item[1], default=("", 0.0))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        name, difference = self.worst_part
        lines = [
            f"altered leaves: {_listed(self.problems)}",
            f"parts: {len(self.parts)} looked at, largest relative difference {difference:.3g} in {name or 'none'}",
        ]
        if self.max_abs is None:
            lines.append("logits, dead and locked units: not looked at")
        else:
            lines += [
                f"logits: max difference {self.max_abs:.3g} ({self.max_rel:.3g} of the largest), KL {self.kl:.3g} nats",
                f"dead units: {_listed(self.dead)}",
                f"locked units: {_listed(self.locked)}",
            ]
        return "\n".join([*lines, "ok" if self.ok else "NOT ok"])


def _listed(names: tuple[str, ...]) -> str:
    return "none" if not names else ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")


def verify(plan: Growth, params: Mapping[str, Any], big: Mapping[str, Any], tokens: jax.Array) -> Report:
    """Compares the grown parameters with the source's, at all three levels; logits on tokens int32[B, S].

    Needs memory for both trees, two gradients and Adam's moments of the larger one.

    Raises:
      UserError: a tree is not what the plan's config describes, rows shorter than 3 tokens, tokens that are in only one
        of the two vocabularies.
    """
    report = verify_stored(plan, params, big)
    tokens = np.asarray(tokens)
    # A single position has nothing to attend to, so that its queries and keys could not show that they live.
    fits = tokens.ndim == 2 and tokens.shape[1] >= 3
    require(fits, f"verify: tokens of shape {tokens.shape}; rows of at least 3 tokens are needed")
    after_ids, before_ids = layerwise.shared_tokens(plan)
    unknown = np.setdiff1d(tokens, before_ids)
    require(unknown.size == 0, f"verify: tokens {', '.join(map(str, unknown[:8]))} are not in both vocabularies")
    new_ids = np.zeros(plan.src_cfg.vocab_size, np.int32)
    new_ids[before_ids] = after_ids
    old_tokens, new_tokens = np.asarray(tokens, np.int32), new_ids[tokens]  # not on one process's device
    masks = vectors(plan, 0.0) if plan.masked else None
    # On TPUs the default precision multiplies in bfloat16, whose rounding would hide what is looked for.
    with jax.default_matmul_precision("highest"):
        before = jax.jit(decoder.forward, static_argnums=0)(plan.src_cfg, params, old_tokens)
        after = jax.jit(decoder.forward, static_argnums=0)(plan.dst_cfg, big, new_tokens, masks=masks)
        before, after = jnp.asarray(to_host(before))[..., before_ids], jnp.asarray(to_host(after))[..., after_ids]
        dead, locked = liveness(plan, big, new_tokens)
    max_abs = float(jnp.max(jnp.abs(after - before)))
    old, new = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    return dataclasses.replace(
        report,
        max_abs=max_abs,
        max_rel=max_abs / max(float(jnp.max(jnp.abs(before))), 1e-30),
        tolerance=max(RELATIVE_TOLERANCE[dtype] for dtype in _dtypes(plan)),
        kl=float(jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=-1))),
        dead=dead,
        locked=locked,
        tokens=hashlib.sha256(np.ascontiguousarray(tokens, np.int32)).hexdigest(),
    )


def verify_stored(
    plan: Growth, src: Mapping[str, Any], dst: Mapping[str, Any], *, layers: Collection[int] | None = None
) -> Report:
    """The two levels that work for models larger than memory: structure, and function part by part.

    src, dst: trees of arrays or of checkpoint.LazyArray (checkpoint.open_lazy(path).params), read block by block. Of
      what several processes hold together each reads its share, layer by layer (`share`): all have to call this.
    layers: destination layers whose function is looked at; all by default.

    Raises:
      UserError: a tree is not what the plan's config describes, or the plan does not lead to a whole model.
      DamageError: a stored leaf is damaged.
    """
    require(plan.is_model, f"verify: the plan ({plan.policy}) leads to a part of a model, or to other names")
    src, dst = flatten(src), flatten(dst)
    check_tree(src, plan.src_spec)
    check_tree(dst, plan.dst_spec)
    found = share.each(plan, src, dst, lambda *unit: _examine(plan, layers, *unit))
    looks = [{name: structure.Look.from_json(seen) for name, seen in unit.items()} for unit, _ in found]
    wrong = structure.altered(plan, looks)
    (_, ends), *others = found
    parts = {"embed": ends["embed"]}
    for _, layer in others:
        parts |= layer
    parts["head"] = ends["head"]
    return Report(
        policy=plan.policy,
        plan=plan.digest,
        preserving=plan.preserving,
        lively=plan.lively,
        altered=tuple(wrong),
        problems=tuple(f"{name}: {problem}" for name, problem in wrong.items()),
        parts=parts,
        parts_tolerance=PARTS_TOLERANCE,
    )


def _examine(
    plan: Growth, layers: Collection[int] | None, unit: int | None, src: Mapping[str, Any], dst: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    """What both levels find in one unit (see `share`), as JSON: ({leaf: structure.Look}, {part: difference})."""
    looks = {name: seen.to_json() for name, seen in structure.look(plan, src, dst, unit).items()}
    if not (unit is None or layers is None or unit in layers):
        return looks, {}
    # That products are rounded right is known from there; how their rounding spreads is no matter of the plan.
    made = {
        name: leaf if plan.moves_exactly(name) else structure.Unrounded(plan, name, src.get(plan.sources[name]), leaf)
        for name, leaf in dst.items()
    }
    with np.errstate(all="ignore"):  # what is no number is found in `looks`
        return looks, layerwise.parts(plan, src, made, unit)


def _dtypes(plan: Growth) -> set[str]:
    """The dtypes in which growth and the two forward passes round."""
    scales = not all(map(plan.moves_exactly, plan.dst_spec))
    return {plan.src_cfg.dtype, plan.dst_cfg.dtype} | ({plan.dst_cfg.param_dtype} if scales else set())
