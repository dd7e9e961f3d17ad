"""The laboratory: studies of growth as pages, each carried out, resumed and reported by one command.

A study is a page of configs/lab/, whose get_config(budget) gives hypothesis, claim, arms, seeds and criteria (study.py)
and the module of this folder that the page names as `kind`, which holds what is special to it:

    compute(study)           {arm: planned FLOPs}; empty where the arms train nothing; refuses arms that cannot be
    work(study, arm, seed, directory) -> table       carries out one job; interrupted and called again, it goes on
    names(study) -> [name]                   what estimates will return, known before the jobs
    estimates(study, results) -> {name: Estimate}    figures for the criteria, one value per seed, paired by seed
    rows(study, results) -> (header, rows)           the table of the report
    picture(study, results) -> Figure                the figure of the report

Every (arm, seed) is a job with its own directory and a result.json, written whole (runner.py); the report is made from
these files alone (report.py). Verdicts follow a rule from 95% t intervals over seeds (verdict.py).
"""

from tele_jax.lab.report import report
from tele_jax.lab.runner import run
from tele_jax.lab.study import Study, read_study

__all__ = ["Study", "read_study", "report", "run"]


def __dir__() -> list[str]:
    return __all__
