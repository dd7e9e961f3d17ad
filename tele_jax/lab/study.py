"""Studies as data, read from a page and checked before anything runs."""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ml_collections import ConfigDict

from tele_jax.config import check_seed, checked, from_dict, require
from tele_jax.errors import require_known
from tele_jax.files import is_plain_name

KINDS = ("exactness", "forgetting", "layer_choice", "paths", "transfer", "units")
BUDGETS = ("smoke", "cpu", "accelerator")


@checked
class Criterion:
    """A claim about an estimate: its 95% interval over seeds lies on one side of a threshold."""

    estimate: str  # name of an estimate of the study's kind
    side: Literal["below", "above"]  # the side on which the claim holds
    threshold: float  # in the unit of the estimate
    says: str  # the claim in words


@checked
class Study:
    """A page of configs/lab/ for one budget."""

    name: str  # name of the study, such as E0
    title: str  # heading of its page
    kind: str  # module of tele_jax.lab that carries out its jobs
    budget: Literal["smoke", "cpu", "accelerator"]  # size of the work
    hypothesis: str  # sentence that the study tests
    claim: str  # published claim that the hypothesis comes from
    source: str  # paper or page of the claim
    seeds: tuple[int, ...]  # every arm runs once with each
    arms: dict[str, dict[str, Any]]  # settings of each arm, as the kind reads them
    criteria: tuple[Criterion, ...]  # all have to hold for the verdict "confirmed"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # those that all arms share
    # Largest relative difference of the planned FLOPs of two arms with one `baseline`; None: the study does not compare
    # at equal compute.
    equal_compute: float | None = None
    overrides: tuple[str, ...] = ()  # changes to the page, as the command had them
    notes: tuple[str, ...] = ()  # what a reader of the report has to know, such as what was not tuned

    def __post_init__(self):
        require(is_plain_name(self.name), f"name={self.name!r} is no name for a directory")
        require_known(self.kind, KINDS, f"kind={self.kind!r} is no kind of study")
        require(len(self.seeds) > 0, "seeds is empty: a study needs at least one, and two for an interval")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds={self.seeds}: one is named twice")
        for seed in self.seeds:
            check_seed(seed, "seeds")
        require(len(self.arms) > 0, "arms is empty: a study needs at least one")
        for arm in self.arms:
            require(is_plain_name(arm), f"arms: {arm!r} is no name for a directory")
        equal = self.equal_compute
        require(
            equal is None or 0 <= equal < math.inf,
            f"equal_compute={equal}: has to be a share of 0 or more, such as 0.02",
        )
        require(len(self.criteria) > 0, "criteria is empty: without one there is no verdict")

    @property
    def module(self) -> ModuleType:
        """The module that carries out the jobs."""
        return importlib.import_module(f"tele_jax.lab.{self.kind}")

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(arm, seed) of every job, all arms of a seed before the next seed."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


def read_study(page: Mapping[str, Any] | ConfigDict) -> Study:
    """Reads a page and plans its arms.

    Raises:
      UserError: an unknown or missing key; no seeds; an arm that its kind refuses; arms whose compute differs by more
        than equal_compute; a criterion of an estimate that there is none of.
    """
    study = from_dict(Study, page.to_dict() if isinstance(page, ConfigDict) else page, "config")
    flops = study.module.compute(study)
    for criterion in study.criteria:
        name = criterion.estimate
        require_known(name, study.module.names(study), f"config.criteria: there is no estimate {name!r}")
    compared: dict[str | None, dict[str, float]] = {}  # those with one baseline
    for arm, spent in flops.items() if study.equal_compute is not None else ():
        baseline = study.arms.get(arm, {}).get("baseline", study.settings.get("baseline"))
        compared.setdefault(baseline, {})[arm] = spent
    for group in compared.values():
        least, most = min(group, key=group.__getitem__), max(group, key=group.__getitem__)
        require(
            group[most] <= group[least] * (1 + (study.equal_compute or 0)),
            f"config.arms: {most} takes {group[most]:.4g} FLOPs and {least} {group[least]:.4g}, more than "
            f"equal_compute={study.equal_compute:g} allows; change their steps",
        )
    return study


def job_directory(out: Path, arm: str, seed: int) -> Path:
    """The directory of one job."""
    return out / arm / str(seed)
