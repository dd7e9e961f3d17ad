"""Tasks of the harness that are known here, and those of a directory of the harness's own YAML files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tele_jax.errors import UserError
from tele_jax.extras import need


def find(names: Sequence[str], directory: Path | None) -> tuple[list[Any], Any]:
    """The tasks that the harness is to run, and its TaskManager, which knows those of a directory.

    Raises:
      UserError: no such directory; a name that is no task of it.
    """
    how = "pip install tele_jax[eval]"
    lm_eval_tasks = need("lm_eval.tasks", how=how)
    if directory is not None and not directory.is_dir():
        raise UserError(f"--data {directory}: no such directory")
    manager = lm_eval_tasks.TaskManager(
        include_path=None if directory is None else str(directory), include_defaults=directory is None
    )
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        where = "the harness" if directory is None else str(directory)
        raise UserError(f"--tasks {unknown[0]}: no such task in {where}")
    return list(names), manager
