"""Exactness of growth (study E0): grown models compared with their sources, and growths made wrong on purpose.

An arm is a table with `model` and `growth` (fields that change), `policy`, `epsilon`, `dtype`, and `mistake`, the name
of what is made wrong. Models are small, their parameters random and norm scales not 1. Two figures of growth.verify
count: the largest logit difference, relative to the largest logit, over what rounding explains in the dtype; and the
largest relative difference of a part (embedding, layer, head) in float64, over its tolerance.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tele_jax import growth, plots
from tele_jax.axes import PyTree
from tele_jax.config import ModelConfig, from_dict, require
from tele_jax.errors import UserError, require_known
from tele_jax.files import Table
from tele_jax.growth import axis_map
from tele_jax.growth.plan import Plan
from tele_jax.lab.study import Study
from tele_jax.lab.verdict import Estimate
from tele_jax.model.decoder import init

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tele_jax.lab.report import Results

ROWS, TOKENS = 2, 24  # of random text to compare logits on
IDLE, WORST, ALTERED, LEAST = "units that cannot learn", "worst exact growth", "altered leaves", "least mistake"


def _forget_scale(plan: Plan) -> Plan:
    """Norm scales that are not multiplied by sqrt(d/d') when embed grows."""
    leaves = {n: dataclasses.replace(p, coefficient=1.0) if "norm" in n else p for n, p in plan.leaves.items()}
    return plan.replace(leaves=leaves)


def _keep_epsilon(plan: Plan) -> Plan:
    """The epsilon of the source in all norms, though the mean of squares has become smaller."""
    return plan.replace(dst_cfg=plan.dst_cfg.replace(rms_eps=plan.src_cfg.rms_eps))


def _copy_in_circles(plan: Plan) -> Plan:
    """Channel i of embed is a copy of channel i mod d, each read by 1/n, and the norm's mean is not kept."""
    before = plan.maps["embed"]
    index = np.arange(before.dst_size) % before.src_size
    return plan.replace(maps={**plan.maps, "embed": axis_map.copies("embed", before.src_size, index)})


def _append_heads(plan: Plan) -> Plan:
    """New query heads behind all old ones, so that old heads read the keys and values of other groups."""
    before = plan.maps["heads"]
    return plan.replace(maps={**plan.maps, "heads": axis_map.widen("heads", before.src_size, before.dst_size)})


def _zero_both_sides(plan: Plan) -> Plan:
    """Zeros in all that is new but norm scales: the function stays, and nothing new ever has a gradient."""
    leaves = plan.leaves.items()
    zeroed = {
        n: p if plan.dst_spec[n].role == "scale" else dataclasses.replace(p, zero=plan.dst_spec[n].axes)
        for n, p in leaves
    }
    return plan.replace(leaves=zeroed)


def _none(plan: Plan) -> Plan:
    """The plan as its policy makes it; policies such as stack change the function all the same."""
    return plan


MISTAKES = {
    "scale forgotten": _forget_scale,
    "epsilon kept": _keep_epsilon,
    "circular copy": _copy_in_circles,
    "heads appended": _append_heads,
    "both sides zero": _zero_both_sides,
    "policy": _none,
}


def compute(study: Study) -> dict[str, float]:
    """No arm trains. Raises UserError for an arm that cannot be planned."""
    for key in study.settings:
        require_known(key, ("model",), f"config.settings.{key}: unknown key")
    for arm, table in study.arms.items():
        with jax.enable_x64(table.get("dtype") == "float64"):
            plan_of(study, arm, 0)
    return {}


def work(study: Study, arm: str, seed: int, directory: Path) -> Table:
    """Grows one random model and compares it with its source."""
    table = study.arms[arm]
    with jax.enable_x64(table.get("dtype") == "float64"):
        plan = plan_of(study, arm, seed)
        params = _random(plan.src_cfg, seed)
        tokens = np.random.default_rng(seed).integers(0, plan.src_cfg.vocab_size, (ROWS, TOKENS), dtype=np.int32)
        found = growth.verify(plan, params, growth.apply(plan, params), tokens)
    assert found.max_rel is not None and found.tolerance is not None  # verify looks at the logits
    part, difference = found.worst_part
    return {
        "plan": found.plan,
        "max_rel": found.max_rel,
        "tolerance": found.tolerance,
        "part": part,
        "part_difference": difference,
        "part_tolerance": found.parts_tolerance,
        "altered": len(found.altered),
        "dead": len(found.dead or ()),
        "locked": len(found.locked or ()),
        "lively": plan.lively,
    }


def plan_of(study: Study, arm: str, seed: int) -> Plan:
    """The plan of an arm, with its mistake, if it has one."""
    table, where = study.arms[arm], f"config.arms.{arm}"
    known = ("model", "growth", "policy", "epsilon", "dtype", "mistake")
    for key in table:
        require_known(key, known, f"{where}.{key}: unknown key")
    tables = {f"{where}.model": table.get("model"), f"{where}.growth": table.get("growth")}
    for key, value in (tables | {"config.settings.model": study.settings.get("model")}).items():
        require(value is None or isinstance(value, dict), f"{key}={value!r} is no table")
    dtype = table.get("dtype", "float32")
    base = {**study.settings.get("model", {}), **table.get("model", {}), "dtype": dtype, "param_dtype": dtype}
    cfg = from_dict(ModelConfig, base, f"{where}.model")
    larger = cfg.replace_from(table.get("growth", {}), f"{where}.growth")
    how = {key: table[key] for key in ("policy", "epsilon") if key in table}
    try:
        plan = growth.plan(cfg, larger, seed=seed, **how)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    mistake = table.get("mistake")
    if mistake is None:
        require(plan.preserving, f"{where}: policy {plan.policy} changes the function here; mistake='policy' says so")
        return plan
    require_known(mistake, MISTAKES, f"{where}.mistake={mistake!r} is no known mistake")
    return MISTAKES[mistake](plan)


def _random(cfg: ModelConfig, seed: int) -> PyTree:
    """Parameters with noise on every leaf, so that no scale is 1 and no bias 0."""
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    noisy = lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape, leaf.dtype)  # noqa: E731
    return jax.tree.map(noisy, init(cfg, jax.random.key(seed)))


def _excess(found: Mapping[str, Any]) -> float:
    """The larger of the two differences in multiples of what rounding explains, at most 1 where the growth is exact.

    A difference that is not finite, which JSON holds as null, counts as 1e20.
    """
    pairs = (("max_rel", "tolerance"), ("part_difference", "part_tolerance"))
    return max(1e20 if found[name] is None else found[name] / found[allowed] for name, allowed in pairs)


def _number(value: float | None) -> float:
    """The value; infinite where it is not finite, which JSON holds as null."""
    return math.inf if value is None else value


def _orders(found: Mapping[str, Any]) -> float:
    """The common logarithm of the excess; no difference at all counts as 1e-20."""
    return math.log10(max(_excess(found), 1e-20))


def _arms(study: Study) -> tuple[list[str], list[str]]:
    """The arms that are exact by design, and those made wrong on purpose."""
    exact = [arm for arm in study.arms if study.arms[arm].get("mistake") is None]
    return exact, [arm for arm in study.arms if arm not in exact]


def names(study: Study) -> list[str]:
    """The names of the estimates."""
    exact, wrong = _arms(study)
    return [IDLE, *([WORST, ALTERED] if exact else []), *([LEAST] if wrong else [])]


def estimates(study: Study, results: "Results") -> dict[str, Estimate]:
    """The worst of the exact arms, and the least of the mistakes, of every seed, as orders of magnitude."""
    exact, wrong = _arms(study)
    unit = "orders of magnitude above what rounding explains"
    found = {IDLE: Estimate([_idle(results, exact, seed) for seed in study.seeds], "units")}
    if exact:
        values = [max(_orders(results[arm][seed]) for arm in exact) for seed in study.seeds]
        found[WORST] = Estimate(values, unit)
        altered = [float(sum(results[arm][seed]["altered"] for arm in exact)) for seed in study.seeds]
        found[ALTERED] = Estimate(altered, "leaves")
    if wrong:
        values = [min(_orders(results[arm][seed]) for arm in wrong) for seed in study.seeds]
        found[LEAST] = Estimate(values, unit)
    return found


def _idle(results: "Results", arms: list[str], seed: int) -> float:
    """Counts new units that are dead or locked, where the policy promises none."""
    rows = [results[arm][seed] for arm in arms]
    return float(sum(row["dead"] + row["locked"] for row in rows if row["lively"]))


def rows(study: Study, results: "Results") -> tuple[list[str], list[list[str]]]:
    """A row per arm: the largest of each figure over all seeds; exact where every seed is."""
    header = ["growth", "dtype", "made wrong", "logits, relative", "worst part, in float64", "dead", "locked", "exact"]
    lines = []
    by_name = lambda arm: arm.rpartition(" ")  # noqa: E731 - all dtypes of a growth stand together
    for arm in sorted(study.arms, key=by_name):
        table, seeds = study.arms[arm], list(results[arm].values())
        part = max(seeds, key=lambda row: _number(row["part_difference"]))
        largest = max(_number(row["max_rel"]) for row in seeds)
        lines.append(
            [
                arm.rpartition(" ")[0] or arm,
                table.get("dtype", "float32"),
                table.get("mistake") or "",
                f"{largest:.2e} (tolerance {seeds[0]['tolerance']:.0e})",
                f"{_number(part['part_difference']):.2e} in {part['part']}",
                str(max(row["dead"] for row in seeds)),
                str(max(row["locked"] for row in seeds)),
                "yes" if all(_excess(row) <= 1 and not row["altered"] for row in seeds) else "no",
            ]
        )
    return header, lines


def picture(study: Study, results: "Results") -> "Figure":
    """Dots of the worst difference of every arm, in multiples of what rounding explains."""
    groups: dict[str, dict[str, list[float]]] = {}
    for arm, table in study.arms.items():
        group = "exact by design" if table.get("mistake") is None else "made wrong on purpose"
        groups.setdefault(group, {})[arm] = [_excess(row) for row in results[arm].values()]
    label = "largest difference, in multiples of what rounding explains (one dot per seed)"
    return plots.dots(groups, x_label=label, title=study.title, threshold=(1.0, "tolerance"))
