"""Verification of a growth, as a report on several levels.

configs            the configs that two checkpoints hold are those of the plan
parameters         every entry is kept (to the bit, or to rounding where a factor was         entries.py
                   planned), zero, or the fresh value of its place
optimizer state    every moment, count and birth is as growth makes it from the source's      entries.py
parts              embedding, every layer and head do what they did, on random inputs         parts.py
logits, liveness   the logits on tokens before and after; all that is new can learn           liveness.py

`verify_stored` covers all but the last line, and needs no more memory than blocks of leaves; `verify` covers all.
Configs are those of open checkpoints: trees have none. The optimizer state is compared where one is given or stored.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tele_jax import tables
from tele_jax.axes import Params, PyTree, check_tree, flatten
from tele_jax.config import ModelConfig, differing_fields, require
from tele_jax.errors import DamageError, UserError, abridged
from tele_jax.files import Table
from tele_jax.growth.masks import vectors
from tele_jax.growth.plan import Plan, require_plan
from tele_jax.growth.verify import entries, liveness
from tele_jax.growth.verify import parts as model_parts
from tele_jax.model import decoder, heads
from tele_jax.sharding import to_host

if TYPE_CHECKING:  # it imports TensorStore
    from tele_jax.checkpoint import Lazy

# Largest logit difference, relative to the largest logit, that rounding explains.
RELATIVE_TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 5e-2}

# Largest difference of a part, relative to the largest value of its row: all is computed in float64.
PARTS_TOLERANCE = 1e-11


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The findings of `verify` or `verify_stored`; None where nothing was looked at.

    Attributes:
      levels: those looked at, of "configs", "parameters", "optimizer state", "parts", "logits" and "liveness".
      max_abs: largest difference of a logit of the old tokens; max_rel: that over the largest logit.
      kl: mean KL divergence of the grown model's predictions from the source's, over the old tokens, in nats.
      altered: leaves that are not what the plan makes of the source, "opt_state.PART" of the optimizer state, and
        "config.FIELD" where a checkpoint holds another config than the plan; problems says how.
      parts: {part: largest relative difference of its outputs}, for embedding, layers and head, in float64 and without
        the rounding of products to the dtype of the parameters, which `altered` covers.
      parts_tolerance: the largest difference of a part that counts as none.
      dead: "axis[unit] in leaf" for new units that have no gradient after two optimizer steps.
      locked: "axis[unit] = axis[unit]" for units that are still identical after two optimizer steps.
      tokens: SHA-256 of the tokens.
      ok: all that the plan promises holds, as far as it was looked at.
    """

    policy: str
    plan: str
    preserving: bool
    lively: bool
    levels: tuple[str, ...]
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
        # A difference that is NaN does not pass.
        same = self.max_rel is None or self.max_rel <= (self.tolerance or 0.0)
        parts = all(difference <= self.parts_tolerance for difference in self.parts.values())
        preserved = not self.preserving or (same and parts)
        lively = not self.lively or not (self.dead or self.locked)
        return preserved and lively and not self.altered

    @property
    def worst_part(self) -> tuple[str, float]:
        """The part that differs most, and by how much."""
        return max(self.parts.items(), key=lambda item: item[1], default=("", 0.0))

    def to_json(self) -> Table:
        return dataclasses.asdict(self) | {"ok": self.ok}

    def _rows(self) -> list[tuple[str, str]]:
        """The findings for people, as (what was looked at, result)."""
        name, difference = self.worst_part
        found = f"{len(self.parts)} looked at, largest relative difference {difference:.3g} in {name or 'none'}"
        rows = [
            ("looked at", ", ".join(self.levels)),
            ("altered leaves", abridged(self.problems) or "none"),
            ("parts", found),
        ]
        if self.max_abs is None:
            return [*rows, ("logits, dead and locked units", "not looked at")]
        moved = f"max difference {self.max_abs:.3g} ({self.max_rel:.3g} of the largest), KL {self.kl:.3g} nats"
        units = [
            ("dead units", abridged(self.dead or ()) or "none"),
            ("locked units", abridged(self.locked or ()) or "none"),
        ]
        return [*rows, ("logits", moved), *units]

    def __repr__(self) -> str:
        return f"<Report {self.policy}: {self._verdict}, {len(self.altered)} leaves altered; print it for all levels>"

    def __str__(self) -> str:
        return "\n".join([*(f"{what}: {result}" for what, result in self._rows()), self._verdict])

    def _repr_html_(self) -> str:
        return tables.html(self._rows(), ("verification", self._verdict), align="ll")

    @property
    def _verdict(self) -> str:
        return "ok" if self.ok else "NOT ok"


def verify(
    plan: Plan,
    params: PyTree,
    big: PyTree,
    tokens: jax.Array | np.ndarray,
    *,
    opt_state: tuple[PyTree, PyTree] | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Report:
    """Compares the grown parameters with the source's on all levels that apply.

    Needs memory for both trees, two gradients and Adam's moments of the larger tree. Checkpoints are compared as they
    are stored, then loaded.

    Args:
      params, big, opt_state, optimizer: as for `verify_stored`.
      tokens: int32[B, S], for the logits and for liveness.

    Raises:
      UserError: as verify_stored; rows shorter than 3 tokens, tokens that are in only one of the two vocabularies.
    """
    require_plan(plan, "verify: plan")
    old_tokens, new_tokens, before_ids, after_ids = _tokens(plan, tokens)
    report = verify_stored(plan, params, big, opt_state=opt_state, optimizer=optimizer)
    params, big = _loaded(params), _loaded(big)
    masks = vectors(plan, 0.0) if plan.masked else None
    # On TPUs the default precision multiplies in bfloat16, whose rounding would hide differences.
    with jax.default_matmul_precision("highest"):
        before, scalars = jax.jit(_outputs, static_argnums=0)(plan.src_cfg, params, old_tokens)
        after, new_scalars = jax.jit(_outputs, static_argnums=0)(plan.dst_cfg, big, new_tokens, masks)
        before, after = jnp.asarray(to_host(before))[..., before_ids], jnp.asarray(to_host(after))[..., after_ids]
        dead, locked = liveness.liveness(plan, big, new_tokens)
    moved = np.max(np.abs(to_host(new_scalars) - to_host(scalars)), initial=0.0)
    max_abs = max(float(jnp.max(jnp.abs(after - before))), float(moved))
    old, new = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    return dataclasses.replace(
        report,
        levels=(*report.levels, "logits", "liveness"),
        max_abs=max_abs,
        max_rel=max_abs / max(float(jnp.max(jnp.abs(before))), 1e-30),
        tolerance=max(RELATIVE_TOLERANCE[dtype] for dtype in _dtypes(plan)),
        kl=float(jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=-1))),
        dead=dead,
        locked=locked,
        tokens=hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest(),
    )


def _outputs(cfg: ModelConfig, params: Params, tokens: jax.Array, masks: decoder.Masks | None = None):
    """Logits [B, S, V], and [B, S] of the scalar head, or [0] where the model has none."""
    x = decoder.hidden(cfg, params, tokens, masks=masks)
    scalars = heads.scalar_of(cfg, params, x) if cfg.scalar_head else jnp.zeros(0)
    return heads.logits_of(cfg, params, x), scalars


def _tokens(plan: Plan, tokens: object) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens for the source, for the grown model, the ids that both share: of the source, of the grown model)."""
    try:
        tokens = np.asarray(tokens)
        require(np.issubdtype(tokens.dtype, np.integer), f"verify: tokens have to be integers, not {tokens.dtype}")
    except ValueError:
        raise UserError("verify: tokens have to be int32[B, S], rows of one length") from None
    # A single position has nothing to attend to, so that its queries and keys could not show that they live.
    fits = tokens.ndim == 2 and tokens.shape[1] >= 3
    require(fits, f"verify: tokens of shape {tokens.shape}; rows of at least 3 tokens are needed")
    after_ids, before_ids = model_parts.shared_tokens(plan)
    unknown = np.setdiff1d(tokens, before_ids)
    ids = abridged(unknown)
    require(unknown.size == 0, f"verify: tokens: the source and the grown model do not both have the ids {ids}")
    new_ids = np.zeros(plan.src_cfg.vocab_size, np.int32)
    new_ids[before_ids] = after_ids
    return np.asarray(tokens, np.int32), new_ids[tokens], before_ids, after_ids  # not on one process's device


def _loaded(model: Any) -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    from tele_jax import checkpoint

    return checkpoint.load(model.path, items=("params",)).params


def verify_stored(
    plan: Plan,
    src: Any,
    dst: Any,
    *,
    layers: Collection[int] | None = None,
    opt_state: tuple[PyTree, PyTree] | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Report:
    """Compares every entry, and the function part by part, for models that may be larger than memory.

    Args:
      src, dst: trees of arrays or of checkpoint.LazyArray, or open checkpoints (checkpoint.open_lazy), of which the
        configs and, where `dst` holds one, the optimizer state are compared too. All is read block by block. Where
        several processes hold the arrays together, all of them have to call this (entries.each).
      layers: destination layers whose function is looked at; all by default.
      opt_state: the optimizer states (before, after), where src and dst are trees.
      optimizer: the optimizer that made the state, as for apply_opt.

    Raises:
      UserError: a tree is not what the plan's config describes, or the plan does not lead to a whole model.
      DamageError: a stored leaf is damaged.
    """
    require_plan(plan, "verify_stored: plan")
    require(plan.is_model, f"the plan ({plan.policy}) leads to a part of a model, or to other names")
    for name, model in (("params", src), ("grown params", dst)):
        known = isinstance(model, Mapping) or hasattr(model, "params")
        require(known, f"{name}: expected a tree or an open checkpoint, got {type(model).__name__}")
    levels, wrong = ["parameters"], {}
    if not isinstance(src, Mapping) and not isinstance(dst, Mapping):
        levels.insert(0, "configs")
        wrong |= _config_problems(plan, src.cfg, dst.cfg)
        if dst.opt_state is not None:
            require(src.opt_state is not None, f"{src.path}: holds no optimizer state, but {dst.path} does")
            opt_state = (src.opt_state, dst.opt_state)
        src, dst = src.params, dst.params
    src, dst = flatten(src), flatten(dst)
    check_tree(src, plan.src_spec)
    check_tree(dst, plan.dst_spec)
    found = entries.each(plan, src, dst, lambda *unit: _examine(plan, layers, *unit))
    wrong |= entries.first_problems(plan, [problems for problems, _ in found])
    if opt_state is not None:
        levels.append("optimizer state")
        problems = entries.differing_state(plan, *opt_state, optimizer)
        wrong |= {f"opt_state.{part}": problem for part, problem in problems.items()}
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
        levels=(*levels, "parts"),
        altered=tuple(wrong),
        problems=tuple(f"{name}: {problem}" for name, problem in wrong.items()),
        parts=parts,
        parts_tolerance=PARTS_TOLERANCE,
    )


def _config_problems(plan: Plan, src: ModelConfig, dst: ModelConfig) -> dict[str, str]:
    """{config.FIELD: problem} where two checkpoints hold another model than the plan."""
    return {
        f"config.{field}": f"the {which} holds {have!r}, the plan {want!r}"
        for which, stored, planned in (("source", src, plan.src_cfg), ("grown checkpoint", dst, plan.dst_cfg))
        for field, (have, want) in differing_fields(stored, planned).items()
    }


def require_configs(plan: Plan, src: "Lazy", dst: "Lazy") -> None:
    """Raises DamageError where two open checkpoints hold other configs than the plan."""
    if problems := _config_problems(plan, src.cfg, dst.cfg):
        raise DamageError(f"{dst.path}: {abridged((f'{field}: {what}' for field, what in problems.items()), '; ')}")


def _examine(
    plan: Plan, layers: Collection[int] | None, unit: int | None, src: Mapping[str, object], dst: Mapping[str, object]
) -> tuple[dict[str, str], dict[str, float]]:
    """Compares one unit (see entries.each) on both levels, and gives ({leaf: problem}, {part: difference}) as JSON."""
    problems = entries.differing(plan, src, dst, unit)
    if not (unit is None or layers is None or unit in layers):
        return problems, {}
    # `problems` says whether products are rounded right; how their rounding spreads is no matter of the plan.
    made = {
        name: leaf
        if plan.moves_exactly(name)
        else entries.Unrounded(plan.leaf_steps(name), src.get(plan.sources[name]), leaf)
        for name, leaf in dst.items()
    }
    with np.errstate(all="ignore"):  # NaN and infinities are found in `problems`
        return problems, model_parts.parts(plan, src, made, unit)


def _dtypes(plan: Plan) -> set[str]:
    """The dtypes in which growth and the two forward passes round."""
    scales = not all(map(plan.moves_exactly, plan.dst_spec))
    return {plan.src_cfg.dtype, plan.dst_cfg.dtype} | ({plan.dst_cfg.param_dtype} if scales else set())
