"""New units that cannot learn, over hundreds of steps after a growth (study E1).

Arms are those of `exactness`. Every job trains a small random model for settings.warmup steps, grows it with its
moments, and trains on for the last of settings.steps steps. At each of these a unit is counted as dead in a leaf where
its gradient is 0 there, and as locked where it equals another unit in all leaves. Masks of policy msg rise over the
first half of the steps.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax import growth, plots
from tele_jax.axes import PyTree
from tele_jax.config import ModelConfig, convert
from tele_jax.errors import require, require_known
from tele_jax.files import Table
from tele_jax.growth.verify import liveness
from tele_jax.lab import exactness
from tele_jax.lab.study import Study
from tele_jax.lab.verdict import Estimate
from tele_jax.model.decoder import init
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh
from tele_jax.train.optimizer import delay_births, optimizer
from tele_jax.train.step import make_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tele_jax.lab.report import Results

ROWS, TOKENS = 4, 32  # of random text in a batch
COUNTED = ("dead", "locked")


def compute(study: Study) -> dict[str, float]:
    """No arm trains for a loss. Raises UserError for an arm that cannot be planned."""
    for key in study.settings:
        require_known(key, ("model", "warmup", "steps", "learning_rate"), f"config.settings.{key}: unknown key")
    _settings(study)
    for arm in study.arms:
        exactness.plan_of(study, arm, 0)
    return {}


def _settings(study: Study) -> tuple[int, tuple[int, ...], OptimizerConfig]:
    """Steps before the growth, the steps after it at which units are counted, and the optimizer."""
    warmup = convert(int, study.settings.get("warmup", 50), "config.settings.warmup")
    steps = convert(tuple[int, ...], study.settings.get("steps", (0, 500)), "config.settings.steps")
    require(warmup > 0 and steps[:1] == (0,) and list(steps) == sorted(steps), "config.settings.steps: from 0, rising")
    rate = convert(float, study.settings.get("learning_rate", 3e-3), "config.settings.learning_rate")
    return warmup, steps, OptimizerConfig(learning_rate=rate)


def work(study: Study, arm: str, seed: int, directory: Path) -> Table:
    """Trains, grows and trains on, and counts units on the way."""
    warmup, steps, config = _settings(study)
    plan, drawn = exactness.plan_of(study, arm, seed), np.random.default_rng(seed)
    params, state = init(plan.src_cfg, jax.random.key(seed)), None
    step, state = _step(plan.src_cfg, config, params)
    for _ in range(warmup):
        params, state, _ = step(params, state, _batch(plan.src_cfg, drawn))
    state, params = growth.apply_opt(plan, state), growth.apply(plan, params)
    masks = growth.MaskSchedule(plan, 0, max(1, steps[-1] // 2)) if plan.masked else None
    state = state if masks is None else delay_births(state, masks.closed_steps())
    step, _ = _step(plan.dst_cfg, config, params)
    gradient = jax.jit(jax.grad(lambda p, b, m: next_token_loss(plan.dst_cfg, p, b, m)[0]))
    found: Table = {"steps": list(steps), "dead": [], "locked": []}
    for number in range(steps[-1] + 1):
        now = None if masks is None else masks(number)
        batch = _batch(plan.src_cfg, drawn)  # ids that both models have
        if number in steps:
            found["dead"].append(len(liveness.dead(plan, gradient(params, batch, now))))
            found["locked"].append(len(liveness.locked(plan, params)))
        params, state, _ = step(params, state, batch, now)
    return found


def _step(cfg: ModelConfig, config: OptimizerConfig, params: PyTree) -> tuple[Any, PyTree]:
    """The training step of a model, and a new optimizer state."""
    tx = optimizer(cfg, config, lambda step: jnp.ones([]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return make_step(cfg, tx, mesh, batch_size=ROWS), tx.init(params)


def _batch(cfg: ModelConfig, drawn: np.random.Generator) -> Table:
    tokens = drawn.integers(0, cfg.vocab_size, (ROWS, TOKENS + 1), dtype=np.int32)
    weights = np.ones((ROWS, TOKENS), np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": weights}


def names(study: Study) -> list[str]:
    """The names of the estimates."""
    return [f"{what}: {arm}" for arm in study.arms for what in COUNTED]


def estimates(study: Study, results: "Results") -> dict[str, Estimate]:
    """For every arm "dead: ARM" and "locked: ARM": units that cannot learn after the last step."""
    return {
        f"{what}: {arm}": Estimate([float(results[arm][seed][what][-1]) for seed in study.seeds], "units")
        for arm in study.arms
        for what in COUNTED
    }


def rows(study: Study, results: "Results") -> tuple[list[str], list[list[str]]]:
    """A row per arm: the most units of any seed that cannot learn, at every step that was looked at."""
    header = ["initialisation", *(f"{what} at step {n}" for what in COUNTED for n in _settings(study)[1])]
    most = {
        arm: [np.max([result[what] for result in seeds.values()], axis=0) for what in COUNTED]
        for arm, seeds in results.items()
    }
    return header, [[arm, *(f"{count}" for counts in both for count in counts)] for arm, both in most.items()]


def picture(study: Study, results: "Results") -> "Figure":
    """Dead and locked units over the steps after the growth: the first seed."""
    seed, panels = study.seeds[0], {}
    for what, label in zip(COUNTED, ("dead: no gradient in a leaf", "locked: equal to another unit")):
        panels[f"units\n{label}"] = {arm: (seeds[seed]["steps"], seeds[seed][what]) for arm, seeds in results.items()}
    figure = plots.loss(panels, x_label="steps after the growth (linear up to 1, then logarithmic)", title=study.title)
    for axes in figure.axes:
        axes.set_xscale("symlog", linthresh=1)
    return figure
