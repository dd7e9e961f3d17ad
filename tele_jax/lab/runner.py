"""Carries out the jobs of a study, each once.

    OUT/study.json                  the study, as its page gave it
    OUT/<arm>/<seed>/result.json    written last: the job is done, and never done again
    OUT/<arm>/<seed>/run/           work directory of `tele train`, of arms that train
    OUT/report.json, page.md, figure.png     see report.py

Started several times at once, on one device each, the processes share the jobs: each is locked while it is under way.
"""

import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax

from tele_jax import files
from tele_jax.config import require, to_dict
from tele_jax.lab.study import Study, job_directory

STUDY, RESULT, LOCK = "study.json", "result.json", ".lock"
RESULTS_OF = ("name", "kind", "budget", "arms", "settings")  # fields that results depend on


def run(study: Study, out: Path, say: Callable[[str], None] = print) -> int:
    """Carries out the jobs that are not done, and returns how many are left to other processes.

    Raises:
      UserError: `out` holds another study, or something else. What a job raises ends the run, which then goes on.
    """
    _claim(study, out)
    elsewhere = 0
    for number, (arm, seed) in enumerate(study.jobs, start=1):
        directory = job_directory(out, arm, seed)
        with files.locked(directory / LOCK) as free:
            if (directory / RESULT).exists():
                continue
            if not free:
                elsewhere += 1
                continue
            say(f"{study.name}: job {number} of {len(study.jobs)}: {arm}, seed {seed}")
            started = time.perf_counter()
            found = study.module.work(study, arm, seed, directory)
            made = {
                "arm": arm,
                "seed": seed,
                "date": datetime.date.today().isoformat(),
                "seconds": time.perf_counter() - started,
                "device": f"{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}",
            }
            files.write_json(directory / RESULT, made | {"found": found})
    return elsewhere


def _claim(study: Study, out: Path) -> None:
    """Writes the study down, of which words, criteria and seeds may change; UserError for another's directory."""
    described = json.loads(json.dumps(to_dict(study)))  # as it is read back
    ours = {LOCK, files.temporary_of(out / STUDY).name}
    usable = not out.exists() or out.is_dir()  # in this order: another process may make the directory meanwhile
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    free = usable and (not there - ours or (out / STUDY).exists())  # asked last: jobs begin after it is there
    require(free, f"{out}: holds something else than a study; choose another --out")
    with files.locked(out / LOCK, wait=True):  # others may start at the same time
        _write_down(described, out)


def _write_down(described: files.Table, out: Path) -> None:
    if (out / STUDY).exists():
        before = files.read_json(out / STUDY)
        changed = [key for key in RESULTS_OF if before.get(key) != described[key]]
        require(
            not changed,
            f"{out}: holds results of another version of the study (config.{', config.'.join(changed)} differ); "
            "choose another --out",
        )
    files.write_json(out / STUDY, described)
