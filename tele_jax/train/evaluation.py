"""The evaluations of a training stage: which are due, what they give, and which checkpoint is the best so far."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jax.sharding import Mesh

from tele_jax.axes import Params, PyTree
from tele_jax.config import ModelConfig
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.processes import from_first
from tele_jax.settings import TrainStage
from tele_jax.train import metrics
from tele_jax.train.step import bits_per_byte

# tasks(cfg, params, masks, provenance) -> {"TASK/METRIC": value}; made by the caller, for this module does not import
# the harness
Tasks = Callable[[ModelConfig, PyTree, PyTree, Sequence[Table]], dict[str, float]]


class Evaluation:
    """Evaluates held-out data, by default as bits per byte, and the tasks of the harness that a stage names.

    Figures that earlier starts of the stage have made are read from its metrics, and count for what is best.
    """

    def __init__(
        self,
        stage: TrainStage,
        kind: ModuleType,
        cfg: ModelConfig,
        mesh: Mesh,
        held_out: Mapping[str, Any],
        tasks: Tasks | None,
        directory: Path,
        say: Callable[[str], None],
    ):
        """Arguments as Trainer has them. held_out: by domain, what the kind's `evaluate` or bits_per_byte takes."""
        self._stage, self._cfg, self._mesh, self._held_out = stage, cfg, mesh, held_out
        self._own = getattr(kind, "evaluate", None)
        self._tasks, self._path, self._say = tasks, directory / "metrics" / "metrics.jsonl", say

    def figures(
        self, step: int, model: Callable[[], Params], masks: PyTree, provenance: Sequence[Table]
    ) -> dict[str, float]:
        """The figures, by name, of what is due after a step.

        model: gives the whole model.
        masks, provenance: of the model as it is.
        """
        stage, ends = self._stage, step in (0, self._stage.steps)
        every = stage.eval_every if stage.tasks is None or stage.tasks.every is None else stage.tasks.every
        figures: dict[str, float] = {}
        if self._held_out and (ends or (stage.eval_every and step % stage.eval_every == 0)):
            if self._own is None:
                found = bits_per_byte(self._cfg, model(), self._held_out, self._mesh, masks)
                self._say(f"  step {step}: bits per byte " + ", ".join(f"{d} {v:.4f}" for d, v in found.items()))
                figures |= {metrics.EVALUATION + domain: value for domain, value in found.items()}
            else:
                found = self._own(stage, self._cfg, model(), self._held_out, self._mesh)
                self._say(f"  step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
                figures |= {metrics.EVALUATIONS + name: value for name, value in found.items()}
        if self._tasks is not None and (ends or (every and step % every == 0)):
            found = self._tasks(self._cfg, model(), masks, provenance)
            figures |= {metrics.TASKS + name: value for name, value in found.items()}
            self._say(f"  step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        return figures

    def is_best(self, step: int, figures: Mapping[str, float]) -> bool:
        """Tells whether `keep_best` is better than at every evaluation after the first step before.

        Raises UserError where the evaluations have no such figure.
        """
        name = f"{metrics.EVALUATIONS}{self._stage.keep_best}"
        if name not in figures:
            known = ", ".join(figure.removeprefix(metrics.EVALUATIONS) for figure in figures)
            same = name.startswith(metrics.TASKS) == any(figure.startswith(metrics.TASKS) for figure in figures)
            if step == 0 or same:
                raise UserError(f"keep_best={self._stage.keep_best!r}: the evaluations have {known}")
            return False
        before = from_first(lambda: [line[name] for line in self._lines() if name in line and line["step"]])
        sign = 1 if name.startswith(metrics.EVALUATION) else -1  # the least bits, the largest of all other figures
        return bool(step) and all(sign * figures[name] < sign * value for value in before)

    def done(self, step: int) -> bool:
        """True where an earlier start came as far: a kill may fall between an evaluation and what follows it."""
        return from_first(lambda: step in self._evaluations(metrics.EVALUATIONS))

    def summary(self) -> Table:
        """The figures before the first step and after the last."""
        bits, tasks = self._evaluations(metrics.EVALUATION), self._evaluations(metrics.TASKS)
        found = {"bits_per_byte": bits} | ({} if self._tasks is None else {"tasks": tasks})
        if self._own is not None:
            every = self._evaluations(metrics.EVALUATIONS)
            found["figures"] = {
                step: {name: value for name, value in figures.items() if not name.startswith("tasks/")}
                for step, figures in every.items()
            }
        ends = {"before": 0, "after": self._stage.steps}
        return {f"{what}_{end}": by_step.get(step, {}) for what, by_step in found.items() for end, step in ends.items()}

    def _lines(self) -> list[dict[str, float]]:
        return metrics.read(self._path)

    def _evaluations(self, prefix: str) -> dict[int, dict[str, float]]:
        """Figures of evaluations by name after the prefix, such as bits per byte by domain; by step."""
        found = {}
        for line in self._lines():
            figures = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
            if figures:
                found[int(line["step"])] = figures
        return found
