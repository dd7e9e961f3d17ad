"""Verdicts by rule, from 95% intervals over seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from tele_jax.files import Table
from tele_jax.lab.study import Criterion

ROUNDING = 1e-12  # relative size below which a difference of float64 numbers, or their mean, is rounding
CONFIRMED, NOT_CONFIRMED, CONTRADICTED = "confirmed", "not confirmed", "contradicted"
RULE = (
    "A criterion is confirmed where the whole 95% t interval of the mean over seeds lies on the claimed side of its "
    "threshold, contradicted where the whole interval lies on the other side, and not confirmed otherwise, also where "
    "there is no interval: with one seed alone, or where a seed gives only a bound. The study is confirmed where all "
    "criteria are, contradicted where one is, and not confirmed otherwise."
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with one value per seed; differences and ratios of arms are taken within a seed.

    Attributes:
      values: one per seed.
      unit: the unit, in words.
      at_least: True where a value is only a lower bound, one per seed.
      extrapolated: True where a value needs a curve beyond the points that it was fitted to, one per seed.
      size: of the numbers whose differences the values are; 0 where they are no differences. Less than ROUNDING of it,
        or of the largest value, is rounding and counts as 0.
    """

    values: Sequence[float]
    unit: str
    at_least: Sequence[bool] = ()
    extrapolated: Sequence[bool] = ()
    size: float = 0.0


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean by Student's t; None for a single value.

    >>> [round(end, 3) for end in interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def figures(estimate: Estimate) -> Table:
    """The values of an estimate, how many are lower bounds or extrapolated, mean and interval; bounds give no interval.

    A mean, or an end of the interval, that is rounding of 0 is 0.0.
    """
    values, bounds = list(estimate.values), sum(estimate.at_least)
    ends = interval(values) if all(map(math.isfinite, values)) else None
    noise = ROUNDING * max([estimate.size, *(abs(value) for value in values if math.isfinite(value))])
    clean = lambda value: 0.0 if abs(value) <= noise else float(value)  # noqa: E731
    return {
        "values": values,
        "at_least": bounds,
        "extrapolated": sum(estimate.extrapolated),
        "mean": clean(np.mean(values)),
        "interval": [clean(end) for end in ends] if ends is not None and not bounds else None,
    }


def judge(criterion: Criterion, estimate: Estimate) -> Table:
    """The verdict on one criterion, with mean and interval."""
    found, verdict = figures(estimate), NOT_CONFIRMED
    if found["interval"] is not None:
        low, high = found["interval"]
        below, above = high < criterion.threshold, low > criterion.threshold
        holds, fails = (below, above) if criterion.side == "below" else (above, below)
        verdict = CONFIRMED if holds else CONTRADICTED if fails else NOT_CONFIRMED
    return found | {
        "says": criterion.says,
        "estimate": criterion.estimate,
        "unit": estimate.unit,
        "side": criterion.side,
        "threshold": criterion.threshold,
        "verdict": verdict,
    }


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a study, from those on its criteria."""
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    return CONFIRMED if all(verdict == CONFIRMED for verdict in verdicts) else NOT_CONFIRMED


def shown(found: Mapping[str, Any]) -> str:
    """Mean and interval for people, of `figures` or `judge`.

    >>> shown(figures(Estimate([1.0, -1.0], "nats", extrapolated=[True, False])))
    '0 [-12.71, 12.71], extrapolated in 1 of 2 seeds'
    """
    mean, ends, count = f"{found['mean']:.4g}", found["interval"], len(found["values"])
    if found["at_least"]:
        text = f"at least {mean} ({found['at_least']} of {count} seeds give only a bound)"
    elif ends is None:
        text = f"{mean}, {'one seed' if count == 1 else 'no interval'}"
    else:
        text = f"{mean} [{ends[0]:.4g}, {ends[1]:.4g}]"
    beyond = found["extrapolated"]
    return text if not beyond else f"{text}, extrapolated in {beyond} of {count} seeds"
