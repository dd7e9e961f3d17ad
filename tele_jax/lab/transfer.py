"""Learning rates across widths, with muP and without (study E8).

An arm is a table with `family`, the name of the arms that differ in width alone, `width`, `mup` (False: the standard
parametrisation), `rates`, and where they are not those of settings: `model`, fields of ModelConfig that change;
`matrix_rate`, the rate of matrix-like parameters in multiples of the rate; `weight_decay`; `repeats`. A job trains the
model with every rate, `repeats` times, on rows of bytes cut from the text at random places, and finds its mean loss on
held-out text, in nats per byte.

settings: `model` (fields at settings.base_width), `base_width`, `steps`, `batch_size`, `seq_len`; `text` and
`held_out`, files of JSON lines with `text`, or "synthetic"; `reference`, the family that others are compared with. A
family whose arms have one rate each is there for prediction: L = a*C^b + c, fitted on arms of at most a quarter of the
largest width, predicts the loss there.
"""

import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax import plots
from tele_jax.config import ModelConfig, checked, from_dict, require, require_positive
from tele_jax.errors import require_known
from tele_jax.files import Table
from tele_jax.lab.mup import predict
from tele_jax.lab.mup.widths import at_width
from tele_jax.lab.study import Study
from tele_jax.lab.verdict import Estimate
from tele_jax.model.decoder import init
from tele_jax.model.loss import next_token_loss
from tele_jax.model.spec import count_params
from tele_jax.settings import OptimizerConfig, ScheduleConfig
from tele_jax.train.optimizer import optimizer, schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tele_jax.lab.report import Results

BYTES = 256  # token ids: the text is not tokenized
TEXT_BYTES, HELD_OUT_ROWS = 4_000_000, 128  # text to train on, at most; rows of held-out text


@checked
class Arm:
    """One width of one family."""

    family: str  # arms that differ in width alone
    width: int  # embed_dim
    mup: bool = True  # False: the standard parametrisation, in which no rate and no multiplier follows the width
    rates: tuple[float, ...]  # learning rates, in rising order
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of ModelConfig at the base width
    matrix_rate: float = 1.0  # rate of matrix-like parameters at the base width, in multiples of the rate
    weight_decay: float = 0.0  # decay of kernels and tables
    repeats: int = 1  # runs of each rate, over which the loss is averaged

    def __post_init__(self):
        require_positive(self, "width", "repeats")


@checked
class Settings:
    """Settings that all arms share."""

    model: dict[str, Any]  # fields of ModelConfig at the base width
    base_width: int  # width at which muP and the standard parametrisation are one model
    steps: int  # length of a run
    batch_size: int  # rows per step
    seq_len: int  # bytes in a row
    text: tuple[str, ...] | str = "synthetic"  # files to train on
    held_out: tuple[str, ...] | str = "synthetic"  # files to evaluate on
    reference: str  # family that others are compared with

    def __post_init__(self):
        require_positive(self, "base_width", "steps", "batch_size", "seq_len")


def _read(study: Study) -> tuple[Settings, dict[str, Arm]]:
    settings = from_dict(Settings, study.settings, "config.settings")
    arms = {name: from_dict(Arm, table, f"config.arms.{name}") for name, table in study.arms.items()}
    families = {arm.family for arm in arms.values()}
    require_known(settings.reference, families, f"config.settings.reference={settings.reference!r} is no family")
    for name, arm in arms.items():
        require(len(arm.rates) > 0, f"config.arms.{name}.rates is empty")
        require(list(arm.rates) == sorted(arm.rates), f"config.arms.{name}.rates: give them in rising order")
    return settings, arms


def compute(study: Study) -> dict[str, float]:
    """Nothing: widths differ in compute. Raises UserError for an arm that cannot be."""
    settings, arms = _read(study)
    for arm in arms.values():
        _model(settings, arm)
    return {}


def _model(settings: Settings, arm: Arm) -> ModelConfig:
    shared = dict(vocab_size=BYTES, max_seq_len=settings.seq_len, dtype="float32", remat="none")
    base = from_dict(ModelConfig, {**settings.model, **shared, **arm.model, "embed_dim": settings.base_width}, "model")
    return at_width(base, arm.width).replace(mup_base_width=settings.base_width if arm.mup else None)


def work(study: Study, arm: str, seed: int, directory: Path) -> Table:
    """Trains one width with every rate."""
    del directory
    settings, arms = _read(study)
    chosen = arms[arm]
    cfg = _model(settings, chosen)
    train, held_out = (_text(source, settings, n) for n, source in enumerate((settings.text, settings.held_out)))
    rows = np.lib.stride_tricks.sliding_window_view(held_out, settings.seq_len + 1)
    rows = rows[np.linspace(0, len(rows) - 1, HELD_OUT_ROWS).astype(int)]
    # Peaks of 1 (and of the ratio), times a schedule that begins with the rate: one program for all rates and seeds.
    optimizer_config = OptimizerConfig(
        learning_rate=1.0, matrix_learning_rate=chosen.matrix_rate, weight_decay=chosen.weight_decay
    )
    keys = jax.random.split(jax.random.key(seed), chosen.repeats)
    sizes = settings.steps, settings.batch_size
    losses = [
        [_trained(cfg, optimizer_config, *sizes, rate, key, train, rows) for key in keys] for rate in chosen.rates
    ]
    found = np.mean(np.array(losses, np.float64), axis=1).tolist()
    return {"rates": list(chosen.rates), "losses": found, "parameters": count_params(cfg)}


def _text(source: Sequence[str] | str, settings: Settings, number: int) -> np.ndarray:
    """Bytes of text, uint8[n]; synthetic text is made of words in which each leads to few others."""
    if source == "synthetic":
        drawn = random.Random(0)
        words = ["".join(drawn.choices("aeioulnrst", k=drawn.randint(2, 6))) for _ in range(60)]
        after, drawn = {word: drawn.sample(words, 3) for word in words}, random.Random(number)
        said = [words[0]]
        for _ in range(20_000):
            said.append(drawn.choice(after[said[-1]]))
        text = " ".join(said).encode()
    else:
        parts, length = [], 0
        for path in source:
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    parts.append(json.loads(line)["text"].encode())
                    length += len(parts[-1])
                    if length > TEXT_BYTES:
                        break
        text = b"\n".join(parts)
    require(len(text) > settings.seq_len + 1, f"config.settings: the text of {source} is shorter than a row")
    return np.frombuffer(text, np.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _trained(
    cfg: ModelConfig, config: OptimizerConfig, steps: int, batch_size: int, rate, key: jax.Array, text, held_out
) -> jax.Array:
    """The loss on the rows held_out, uint8[N, S + 1], in nats per byte, after training with a rate."""
    length, keys = held_out.shape[1] - 1, jax.random.split(key)
    factor = schedule(ScheduleConfig(warmup=max(1, steps // 10)), steps, 1)
    tx = optimizer(cfg, config, lambda step: rate * factor(step))

    def batch(rows):
        rows = rows.astype(jnp.int32)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_weights": jnp.ones(rows[:, 1:].shape)}

    def loss(params, rows):
        total, weight = next_token_loss(cfg, params, batch(rows))
        return total / weight

    def step(carry, places):
        params, state = carry
        rows = jax.vmap(lambda place: jax.lax.dynamic_slice(text, (place,), (length + 1,)))(places)
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    params = init(cfg, keys[0])
    places = jax.random.randint(keys[1], (steps, batch_size), 0, len(text) - length - 1)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), places)
    return loss(params, held_out)


def _best(rates: Sequence[float], losses: Sequence[float | None]) -> tuple[float, float]:
    """(log2 of the best rate, the least loss); between the points of the grid by a parabola through the least three.

    >>> _best([0.25, 0.5, 1.0], [3.0, 1.0, 3.0])
    (-1.0, 1.0)
    """
    known = [math.inf if loss is None else loss for loss in losses]  # None: not finite, in JSON
    at = int(np.argmin(known))
    around = known[at - 1 : at + 2] if 0 < at < len(known) - 1 else []
    if not around or not all(map(math.isfinite, around)):
        return math.log2(rates[at]), known[at]
    left, least, right = around
    bend = left - 2 * least + right
    shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
    return math.log2(rates[at]) + shift * math.log2(rates[at + 1] / rates[at]), known[at]


def _families(study: Study) -> dict[str, dict[int, str]]:
    """{family: {width: arm}}, widths in rising order."""
    found: dict[str, dict[int, str]] = {}
    for name, arm in sorted(_read(study)[1].items(), key=lambda item: item[1].width):
        found.setdefault(arm.family, {})[arm.width] = name
    return found


def names(study: Study) -> list[str]:
    """The names of the estimates."""
    found = []
    for family, arms in _families(study).items():
        alone = len(_read(study)[1][next(iter(arms.values()))].rates) == 1
        found += [family] if alone else [f"{what}: {family}" for what in ("shift", "excess", "difference")]
    return found


def estimates(study: Study, results: "Results") -> dict[str, Estimate]:
    """Per family "shift", "excess" and "difference", and "prediction" of a family with one rate, of means over seeds.

    The shift is that of the best rate from the smallest width to the largest, in factors of 2 and without its sign. The
    excess is the loss of the largest width at the point of the grid that is best for the smallest, over its best.
    The difference is the best loss of the largest width minus that of the reference. A prediction is off by its
    distance to the loss found, with its sign.

    All are functions of the losses' means over seeds: within one, the best of several rates is partly the luckiest.
    The interval is by the jackknife: a seed's value is f(all) + (n - 1) (mean of f(all but one) - f(all but this one)).
    """
    found, families = {}, _families(study)
    for family, arms in families.items():
        first: Any = results[next(iter(arms.values()))]
        if len(first[study.seeds[0]]["rates"]) == 1:
            off = functools.partial(_off, arms, results)
            found[family] = Estimate(_jackknife(off, study.seeds), "percent of the loss", size=100.0)
            continue
        reference = families[study.settings["reference"]]
        for what, unit in UNITS.items():
            measured = functools.partial(MEASURES[what], arms, reference, results)
            found[f"{what}: {family}"] = Estimate(_jackknife(measured, study.seeds), unit, size=SIZES[what])
    return found


def _jackknife(measured: Callable[[Sequence[int]], float], seeds: Sequence[int]) -> list[float]:
    """A value per seed whose mean is what is measured on all seeds, and whose spread is that of the jackknife.

    >>> _jackknife(lambda seeds: sum(seeds) / len(seeds), [1, 2, 6])
    [1.0, 2.0, 6.0]
    """
    whole, number = measured(seeds), len(seeds)
    if number == 1:
        return [whole]
    without = [measured([s for s in seeds if s != left_out]) for left_out in seeds]
    middle = sum(without) / number
    return [whole + (number - 1) * (middle - one) for one in without]


def _mean(results: "Results", arm: str, seeds: Sequence[int]) -> Table:
    """The result of an arm with the means of its losses over seeds; a loss that is not finite stays so."""
    runs = [results[arm][seed] for seed in seeds]
    losses = [[math.inf if loss is None else loss for loss in run["losses"]] for run in runs]
    return runs[0] | {"losses": np.mean(losses, axis=0).tolist()}


def _ends(arms: dict[int, str], results: "Results", seeds: Sequence[int]) -> tuple[Table, Table]:
    return _mean(results, arms[min(arms)], seeds), _mean(results, arms[max(arms)], seeds)


def _shift(arms, reference, results: "Results", seeds: Sequence[int]) -> float:
    del reference
    small, large = (_best(run["rates"], run["losses"])[0] for run in _ends(arms, results, seeds))
    return abs(large - small)


def _excess(arms, reference, results: "Results", seeds: Sequence[int]) -> float:
    del reference
    small, large = _ends(arms, results, seeds)
    return 100 * (large["losses"][large["rates"].index(_grid_best(small))] / min(large["losses"]) - 1)


def _difference(arms, reference, results: "Results", seeds: Sequence[int]) -> float:
    own, other = (_mean(results, of[max(of)], seeds)["losses"] for of in (arms, reference))
    return min(own) - min(other)


def _off(arms: dict[int, str], results: "Results", seeds: Sequence[int]) -> float:
    fit, size, truth = _prediction({width: _mean(results, arm, seeds) for width, arm in arms.items()})
    return 100 * (fit.at(size)[0] / truth - 1)


UNITS = {"shift": "factors of 2", "excess": "percent of the best loss", "difference": "nats per byte"}
SIZES = {"shift": 1.0, "excess": 100.0, "difference": 1.0}  # of the numbers that are compared
MEASURES = {"shift": _shift, "excess": _excess, "difference": _difference}


def _grid_best(run: Table) -> float:
    return run["rates"][int(np.argmin(run["losses"]))]


def _prediction(runs: dict[int, Table]) -> tuple[predict.Fit, float, float]:
    """The fit over the small widths, the size of the largest, in millions of parameters, and the loss found there."""
    largest = max(runs)
    points = [(run["parameters"] / 1e6, run["losses"][0]) for width, run in runs.items() if 4 * width <= largest]
    return predict.fit(points), runs[largest]["parameters"] / 1e6, runs[largest]["losses"][0]


def rows(study: Study, results: "Results") -> tuple[list[str], list[list[str]]]:
    """A row per arm: its best rate, and its losses there and at the best rate of the family's smallest width."""
    lines = []
    for family, arms in _families(study).items():
        kept = _grid_best(_mean(results, next(iter(arms.values())), study.seeds))
        for width, arm in arms.items():
            mean = _mean(results, arm, study.seeds)
            rates, losses = mean["rates"], mean["losses"]
            by_seed = ", ".join(f"{_best(rates, results[arm][seed]['losses'])[0]:.2f}" for seed in study.seeds)
            given = [f"{math.log2(rates[0]):g}, given", ""]
            best = given if len(rates) == 1 else [f"{_best(rates, losses)[0]:.2f}", by_seed]
            found = [f"{min(losses):.4f}", f"{losses[rates.index(kept)]:.4f}"]
            lines.append([family, str(width), f"{mean['parameters']:,}", *best, *found])
    header = ["family", "width", "parameters", "log2 of the best rate", "by seed", "best mean loss, nats per byte"]
    return [*header, "mean loss at the best rate of the smallest width"], lines


def picture(study: Study, results: "Results") -> "Figure":
    """Held-out loss over the learning rate, a panel per family and a curve per width: means over seeds."""
    panels = {}
    for family, arms in _families(study).items():
        if len(results[next(iter(arms.values()))][study.seeds[0]]["rates"]) > 1:
            panels[f"{family}\nnats per byte"] = {
                f"width {width}": (
                    [math.log2(rate) for rate in results[arm][study.seeds[0]]["rates"]],
                    np.mean(
                        [[math.nan if x is None else x for x in run["losses"]] for run in results[arm].values()], 0
                    ),
                )
                for width, arm in arms.items()
            }
    return plots.loss(panels, x_label="log2 of the learning rate at the base width", title=study.title)
