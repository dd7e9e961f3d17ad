"""Carries out the jobs of a study, each once.

    OUT/study.json                  the study, as its page gave it
    OUT/<arm>/<seed>/result.json    written last: the job is done, and never done again
    OUT/<arm>/<seed>/run/           work directory of `tele train`, of arms that train
    OUT/programs/                   what JAX has compiled, for the jobs that follow
    OUT/report.json, page.md, figure.png     see report.py

Started several times at once, on one device each, the processes share the jobs: each is locked while it is under way,
and who finds nothing left to do waits for the others.
"""

import contextlib
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from tele_jax import files
from tele_jax.config import require, to_dict
from tele_jax.lab.study import Study, job_directory

STUDY, RESULT, LOCK = "study.json", "result.json", ".lock"
RESULTS_OF = ("name", "kind", "budget", "arms", "settings")  # fields that results depend on; arms one by one


def run(study: Study, out: Path, say: Callable[[str], None] = print) -> None:
    """Carries out the jobs that are not done, and waits for those that other processes have begun.

    Raises:
      UserError: `out` holds another study, or something else. What a job raises ends the run, which then goes on.
    """
    _claim(study, out)
    jobs = list(enumerate(study.jobs, start=1))
    turns = [(job, wait) for wait in (False, True) for job in jobs]  # what others hold comes again, last
    for (number, (arm, seed)), wait in turns:
        directory = job_directory(out, arm, seed)
        with files.locked(directory / LOCK, wait) as free, _programs_kept(out / "programs"):
            if not free or (directory / RESULT).exists():
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


@contextlib.contextmanager
def _programs_kept(directory: Path) -> Iterator[None]:
    """Keeps what JAX compiles, unless the user does: jobs that differ in their seed alone have the same programs."""
    ours = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in ours}
    try:
        for name, value in ours.items() if before["jax_compilation_cache_dir"] is None else ():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at its directory once
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


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
        known = {arm: table for arm, table in before.get("arms", {}).items() if arm in described["arms"]}
        before["arms"] = described["arms"] | known  # arms may come and go
        changed = [key for key in RESULTS_OF if before.get(key) != described[key]]
        require(
            not changed,
            f"{out}: holds results of another version of the study (config.{', config.'.join(changed)} differ); "
            "choose another --out",
        )
    files.write_json(out / STUDY, described)
