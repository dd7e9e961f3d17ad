"""Prediction of the loss of a large width from small ones: L = a*C^b + c (arXiv 2304.06875), with an interval.

L is the loss at the same step of models of one muP family, C their size, such as millions of parameters.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from tele_jax import files
from tele_jax.config import finite, nearest, require
from tele_jax.errors import UserError
from tele_jax.lab.mup.widths import first_stage
from tele_jax.model.spec import count_params
from tele_jax.stages import run_config
from tele_jax.train import metrics, workdir

# Bounds of b, which is negative: larger models of a family have a loss that levels off. Without them, four noisy losses
# may be fitted best by one that falls ever faster, and predicts nonsense.
STEEPEST, FLATTEST = -8.0, -0.01
EXPONENTS = tuple(-b / 4 for b in range(1, 17))  # the fit begins at the best of these, with its best a and c
BOUNDS = ((-np.inf, STEEPEST, -np.inf), (np.inf, FLATTEST, np.inf))
_NO_LAW = "the losses follow no law a*C^b + c that falls with C; were they taken at the same step?"


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law L = a*C^b + c.

    Attributes:
      a: the factor, in nats.
      b: the exponent, below 0.
      c: the limit of large sizes, in nats.
      covariance: of (a, b, c), from the residuals; float64[3, 3].
      points: (C, L) that it was fitted on.
    """

    a: float
    b: float
    c: float
    covariance: np.ndarray
    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> tuple[float, tuple[float, float] | None]:
        """The predicted loss at a size, and the 95% interval of a new observation there; None for three points.

        The interval is by the delta method: gradient' covariance gradient plus the variance of the residuals, with
        Student's t for the points that are left over.
        """
        require(finite(size, "size") > 0, f"size={size} must be above 0")
        with np.errstate(over="ignore"):
            power, free = float(np.float64(size) ** self.b), len(self.points) - 3
        require(math.isfinite(power), f"size={size}: too far from the sizes of the fit")
        loss = self.a * power + self.c
        if free == 0:
            return loss, None
        gradient = np.array([power, self.a * power * math.log(size), 1.0])
        sizes, losses = np.array(self.points).T
        residual = float(np.sum((self.a * sizes**self.b + self.c - losses) ** 2)) / free
        error = math.sqrt(max(gradient @ self.covariance @ gradient, 0.0) + residual)
        half = float(stats.t.ppf(0.975, free)) * error
        return loss, (loss - half, loss + half)


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """Fits the law by least squares, with an exponent below 0.

    points: (C, L) of at least three sizes.

    Raises:
      UserError: fewer than three sizes, a size that is not above 0, a loss that is no finite number, or points that no
        such law goes through.
    """
    for size, loss in points:
        require(finite(size, "size") > 0, f"size={size} must be above 0")
        finite(loss, "loss")
    sizes, losses = np.array(sorted(points), float).reshape(-1, 2).T
    require(len(set(sizes)) >= 3, f"{len(set(sizes))} sizes: a*C^b + c needs at least three; add smaller widths")
    unit = float(np.exp(np.log(sizes).mean()))  # the fit counts sizes in it, for they may be any large numbers
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", optimize.OptimizeWarning)  # three points leave no variance
        designs = [np.stack([(sizes / unit) ** b, np.ones_like(sizes)], axis=1) for b in EXPONENTS]
        lines = [np.linalg.lstsq(design, losses)[0] for design in designs]
        best = np.argmin([np.sum((design @ line - losses) ** 2) for design, line in zip(designs, lines)])
        start = (lines[best][0], EXPONENTS[best], lines[best][1])
        try:
            found, covariance = optimize.curve_fit(_law, sizes / unit, losses, p0=start, bounds=BOUNDS, maxfev=20_000)
        except RuntimeError:
            raise UserError(_NO_LAW) from None
        factor, b, c = found
        a = factor * unit**-b
        if len(sizes) > 3:
            slopes = np.array([[unit**-b, -a * math.log(unit), 0], [0, 1, 0], [0, 0, 1]])  # of (a, b, c) after `found`
            covariance = slopes @ covariance @ slopes.T
            require(np.isfinite(covariance).all(), _NO_LAW)
    require(math.isfinite(a) and a > 0 and np.ptp(losses) > 0, _NO_LAW)
    a, b, c = map(float, (a, b, c))
    return Fit(a, b, c, covariance, tuple(zip(sizes.tolist(), losses.tolist())))


def _law(size: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    return a * size**b + c


def of_runs(workdirs: Sequence[Path], figure: str = "loss", step: int | None = None) -> list[tuple[float, float]]:
    """(millions of parameters, a figure at a step) of the first stage of each run, for `fit`.

    figure: a name in metrics.jsonl, such as "loss", the mean since the line before, or "eval/bits_per_byte/en".
    step: None for the last at which all have the figure.

    Raises:
      UserError: a directory is no run, or has no such figure; runs that have seen different numbers of tokens there.
    """
    found: list[dict[int, dict[str, float]]] = []
    sizes = []
    for directory in workdirs:
        require((directory / workdir.CONFIG).exists(), f"{directory}: holds no run (no {workdir.CONFIG})")
        config = run_config(files.read_json(directory / workdir.CONFIG))
        sizes.append(count_params(first_stage(config)[1]) / 1e6)
        lines = metrics.read(directory / config.run[0] / "metrics" / "metrics.jsonl")
        known = sorted({name for line in lines for name in line})
        require(figure in known, f"{directory}: has no figure {figure!r}; {nearest(figure, known, 'it has')}")
        tokens = {int(line["step"]): line["tokens"] for line in lines if "tokens" in line}
        found.append({int(line["step"]): {"value": line[figure]} for line in lines if figure in line})
        for at, point in found[-1].items():
            point["tokens"] = tokens.get(at, math.nan)
    shared = set.intersection(*map(set, found)) if found else set()
    require(bool(shared), f"the runs have {figure} at no common step; train them with one log_every and eval_every")
    at = max(shared) if step is None else step
    require(at in shared, f"--step {at}: not all runs have {figure} there; the last that all have is {max(shared)}")
    seen = {point[at]["tokens"] for point in found}
    require(
        len(seen) == 1, f"step {at}: the runs have seen {', '.join(f'{n:,.0f}' for n in sorted(seen))} tokens there"
    )
    return [(size, point[at]["value"]) for size, point in zip(sizes, found)]


def read_points(path: Path) -> list[tuple[float, float]]:
    """Points for `fit` from a JSON file, [[C, L], ...]. Raises UserError for anything else."""
    points = files.read_json(path)
    pairs = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
    require(pairs, f"{path}: is no list of pairs [[size, loss], ...]")
    return [(finite(size, f"{path}: size"), finite(loss, f"{path}: loss")) for size, loss in points]
