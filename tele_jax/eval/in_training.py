"""Tasks of the harness while a stage trains: the parameters as they are, on the mesh of the run."""

from collections.abc import Sequence
from pathlib import Path

from tele_jax.axes import PyTree
from tele_jax.config import ModelConfig, given
from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import UserError
from tele_jax.eval import harness, tasks
from tele_jax.eval import model as models
from tele_jax.files import Table
from tele_jax.processes import from_first
from tele_jax.settings import TasksConfig, TrainStage
from tele_jax.train.evaluation import Tasks


def open_tasks(stage: TrainStage, vocabulary: Vocabulary, where: str) -> Tasks:
    """Opens the tasks that a stage names, and returns the function that evaluates them, see train.evaluation.Tasks.

    Of every task the first items are taken, as large a share as the stage says: the same at every evaluation.

    Raises:
      UserError: a task that is not there; dialogues without a template.
    """
    settings = given(stage.tasks, f"{where}.tasks: not there")
    directory = None if settings.data is None else Path(settings.data)
    try:
        with tasks.offline(directory):
            for name in settings.names:
                tasks.find([name], directory, num_fewshot=settings.num_fewshot)
    except UserError as error:
        raise UserError(f"{where}.tasks: {error}") from None

    def evaluate(cfg: ModelConfig, params: PyTree, masks: PyTree, provenance: Sequence[Table]) -> dict[str, float]:
        model = models.of_params(where, cfg, params, vocabulary, provenance, template=stage.data.template, masks=masks)
        figures: dict[str, float] = {}
        with models.Leader(model) as leader, tasks.offline(directory):
            for name, share in settings.names.items() if leader.leads else ():
                found = tasks.find([name], directory, num_fewshot=settings.num_fewshot)
                limit = None if share == 1 else share
                figures |= _figures(leader, name, found, limit, settings)
        return from_first(lambda: figures)

    return evaluate


def _figures(
    leader: models.Leader, name: str, found: tasks.Found, limit: float | None, settings: TasksConfig
) -> dict[str, float]:
    """{"TASK/METRIC": value} of the task or group as a whole; TASK/prompts_cut counts prompts that were too long."""
    how = {"num_fewshot": settings.num_fewshot, "limit": limit, "chat": settings.chat or found.chat}
    results = harness.run(harness.adapter(leader), found, **how, bootstrap_iters=0, log_samples=False)
    values = (results.get("groups") or {}).get(name) or results["results"][name]
    found_figures = {
        f"{name}/{metric.split(',')[0]}": float(value)
        for metric, value in values.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, float)
    }
    cut = results["counts"]["cut"]
    return found_figures | ({f"{name}/prompts_cut": float(cut)} if cut else {})
