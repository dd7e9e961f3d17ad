"""The check of a plan by its own numbers, before a byte moves, for models of any size.

After growth the residual stream holds w times what it held before (w = 1 but for epsilon="keep"), and zeros in its new
channels. From that, and from the names of the axes, follow the rules that every leaf of a preserving plan has to obey.
"""

import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from tele_jax.axes import ParamSpec, unflatten
from tele_jax.errors import UserError, abridged
from tele_jax.growth.axis_map import NEW
from tele_jax.growth.leaf import LeafPlan
from tele_jax.growth.plan import Plan, Step, require_plan
from tele_jax.model.spec import flat_spec
from tele_jax.sharding import param_shardings, require_mesh


def check(plan: Plan, mesh: jax.sharding.Mesh | None = None) -> None:
    """Raises UserError unless the plan is sound and the grown parameters fit the mesh, if one is given.

    Found are: heads that lose their keys and values; new units with both sides random
    (the function changes) or both sides zero (dead for ever); norm scales, epsilon and multipliers that do not fit the
    width. Nothing is allocated. The values of parameters are not looked at: see growth.verify.

    Raises:
      UserError: names what is wrong.
    """
    require_plan(plan, "check: plan")
    if mesh is not None:
        require_mesh(mesh, "check: mesh")
    problems = [problem for step in plan.steps for problem in _problems(step)]
    if mesh is not None:
        try:
            param_shardings(unflatten(plan.dst_spec), mesh)
        except UserError as error:
            problems.append(f"the grown model does not fit the mesh: {error}")
    if problems:
        raise UserError(f"plan ({plan.policy}): " + abridged(dict.fromkeys(problems), "; "))


def _problems(step: Step) -> Iterator[str]:
    yield from _groups(step)
    if step.preserving and not step.masked:
        yield from _zero_sides(step)
    if step.preserving:
        yield from _shares(step)
    if step.preserving and step.dst_spec.keys() == flat_spec(step.dst_cfg).keys():
        yield from _stream_rules(step)
    if step.lively:
        yield from _dead(step)


def _groups(step: Step) -> Iterator[str]:
    """Finds a kept head that does not read the keys and values that it read before."""
    heads, kv_heads = step.maps["heads"].index, step.maps["kv_heads"].index
    src_group = step.src_cfg.num_heads // step.src_cfg.num_kv_heads
    reads = kv_heads[np.arange(len(heads)) // (len(heads) // len(kv_heads))]
    wrong = np.flatnonzero((heads != NEW) & (reads != heads // src_group))
    if wrong.size:
        head = int(wrong[0])
        yield (
            f"heads[{head}] is heads[{heads[head]}] of the source, but reads kv_heads[{reads[head]}] and not "
            f"[{heads[head] // src_group}]: heads have to grow inside their groups"
        )


def _shares(step: Step) -> Iterator[str]:
    """Finds source units that are lost, or whose copies together do not do what the unit did."""
    for axis in ("embed", "mlp", "heads"):
        m = step.maps[axis]
        kept = m.index[~m.fresh]
        total = np.bincount(kept, (m.scale * m.share)[~m.fresh], m.src_size)
        wrong = np.flatnonzero(~np.isclose(total, 1, rtol=1e-12))
        if wrong.size:
            yield f"{axis}[{wrong[0]}] of the source counts {total[wrong[0]]:.9g} times in the result, and not once"
        for name, spec in step.dst_spec.items():
            leaf = step.leaves[name]
            if spec.role == "scale":
                continue
            if axis in spec.outputs and (m.scale != 1).any() and axis not in leaf.scaled:
                yield f"{name}: is not scaled along {axis}, whose copies are"
            if axis in spec.inputs and (m.share != 1).any() and axis not in leaf.shared:
                yield f"{name}: reads every copy along {axis} whole, and not its share"


def _zeroed(leaf: LeafPlan, axis: str, is_copy: bool) -> bool:
    """True where the leaf is zero at fresh units of an axis, be they copies or filled."""
    return axis in leaf.zero or (not is_copy and leaf.fills_zero)


def _is_copy(step: Step, axis: str) -> bool:
    """True where fresh units hold copies of others."""
    return bool((step.maps[axis].index[step.maps[axis].fresh] != NEW).any())


def _sides(step: Step, axis: str) -> Iterator[tuple[bool, str]]:
    """(nothing passes new units there, the leaves that decide it) for what produces an axis, and for what reads it."""
    # A new head is silent where its keys and values are 0, not where its queries are; an old group's are not 0.
    produces = "kv_heads" if axis == "heads" else axis
    for names, which in (("outputs", produces), ("inputs", axis)):
        is_copy = _is_copy(step, which)
        leaves = [n for n, s in step.dst_spec.items() if s.role in ("kernel", "table") and which in getattr(s, names)]
        zero = [name for name in leaves if _zeroed(step.leaves[name], which, is_copy)]
        # gate and up are multiplied: one of them is enough.
        enough = bool(zero) if (names, axis) == ("outputs", "mlp") else len(zero) == len(leaves)
        silent = enough and bool(step.maps[which].fresh.any())
        yield silent, abridged(zero if silent else (name for name in leaves if name not in zero))


def _zero_sides(step: Step) -> Iterator[str]:
    """Finds new units with no zero side."""
    for axis in ("embed", "mlp", "heads"):
        if step.maps[axis].fresh.any():
            (produced, writers), (read, readers) = _sides(step, axis)
            if not (produced or read):
                yield f"{axis}: new units are random on both sides ({writers}; {readers}): the function changes"
    if step.maps["layers"].fresh.any():
        is_copy = _is_copy(step, "layers")
        for name, spec in step.dst_spec.items():
            if spec.stack and _writes(spec) and not _zeroed(step.leaves[name], "layers", is_copy):
                yield f"layers: {name} of new layers is not zero, and writes to the residual stream at once"


def _dead(step: Step) -> Iterator[str]:
    """Finds new units that are zero on both sides, of which neither ever has a gradient."""
    for axis in ("embed", "mlp", "heads"):
        if step.maps[axis].fresh.any():
            (produced, writers), (read, readers) = _sides(step, axis)
            if produced and read:
                yield f"{axis}: new units are zero on both sides ({writers}; {readers}): they never learn"
    if step.maps["embed"].fresh.any():
        scales = [n for n, s in step.dst_spec.items() if s.role == "scale" and "embed" in s.inputs]
        if scales and all(_zeroed(step.leaves[name], "embed", False) for name in scales):
            yield f"embed: every norm scale is 0 in the new channels ({abridged(scales)}): they never learn"
    if step.maps["layers"].fresh.any():
        yield from _dead_layers(step)


def _dead_layers(step: Step) -> Iterator[str]:
    """Finds new layers whose writers are zero, and have nothing to read either."""
    is_copy = _is_copy(step, "layers")
    stacked = {name: spec for name, spec in step.dst_spec.items() if spec.stack}
    zero = {name for name in stacked if _zeroed(step.leaves[name], "layers", is_copy)}
    kernels = {name: spec for name, spec in stacked.items() if spec.role == "kernel"}
    if not all(name in zero for name, spec in kernels.items() if _writes(spec)):
        return
    for produces, some in (("mlp", any), ("kv_heads", all)):  # gate and up are multiplied: one of them is enough
        silent = [name for name, spec in kernels.items() if produces in spec.outputs]
        if silent and some(name in zero for name in silent):
            names = abridged(name for name in silent if name in zero)
            yield f"layers: {names} of new layers are zero, and so are the writers: they never learn"
    for name in sorted(name for name in zero if stacked[name].role == "scale"):
        yield f"layers: {name} of new layers is zero, and so are the writers: they never learn"


def _writes(spec: ParamSpec) -> bool:
    return "embed" in spec.outputs and spec.role != "scale"


def _stream_rules(step: Step) -> Iterator[str]:
    """Compares norm scales, epsilon and multipliers with what the writers of the residual stream demand."""
    src, dst, leaves, spec = step.src_cfg, step.dst_cfg, step.leaves, step.dst_spec
    written = _common({n: leaves[n].coefficient for n, s in spec.items() if s.stack and _writes(s)})
    if isinstance(written, str):
        yield f"the writers of the residual stream differ: {written}"
        return
    # Copies in embed carry a scale that keeps the mean of squares for any number of them; masks weigh it.
    same_mean = step.masked or (step.maps["embed"].scale != 1).any() or _copied(step)
    d, d2 = (1, 1) if same_mean else (src.embed_dim, dst.embed_dim)
    yield from _expect("rms_eps", dst.rms_eps, src.rms_eps * written**2 * d / d2)
    for name, s in spec.items():
        what, coefficient = f"{name}: coefficient", leaves[name].coefficient
        if s.role == "scale":
            # It multiplies x / rms(x), and the mean of squares has become d/d' of what it was, times w^2.
            own = written if "embed" in s.outputs else 1.0
            yield from _expect(what, coefficient, own * math.sqrt(d / d2))
        elif s.role == "table":
            # Before a norm of its own, the scale of what enters does not matter but for epsilon.
            yield from _expect(what, coefficient * dst.input_mult, written * src.input_mult)
        elif not _writes(s) and "vocab" not in s.outputs:
            yield from _expect(what, coefficient, 1.0)
        elif "vocab" in s.outputs:
            yield from _expect(what, coefficient * dst.logit_mult, src.logit_mult)
    if src.tie_embeddings:
        (table,) = (leaves[n] for n, s in spec.items() if s.role == "table")
        read = _tied_sum(step)
        yield from _expect("output_mult: logits", dst.logit_mult * table.coefficient * read, src.logit_mult)


def _tied_sum(step: Step) -> float:
    """The number of times that a tied head counts what it reads: once, or per copy where embed is split in copies."""
    return step.dst_cfg.embed_dim / step.src_cfg.embed_dim if _copied(step) else 1.0


def _copied(step: Step) -> bool:
    embed = step.maps["embed"]
    return embed.dst_size > embed.src_size and not embed.fresh.any()


def _common(values: Mapping[str, float]) -> float | str:
    """The value that all have, or text that says what differs."""
    if len({round(value, 12) for value in values.values()}) <= 1:
        return next(iter(values.values()), 1.0)
    return abridged(f"{name} {value:g}" for name, value in values.items())


def _expect(what: str, have: float, want: float) -> Iterator[str]:
    if not math.isclose(have, want, rel_tol=1e-12):
        yield f"{what} is {have:.9g}, but {want:.9g} keeps the function"
