"""Makes a cache: Apache Beam spreads the units of shards.py over workers, and the shards are put together here.

An unfinished cache lies in DIR.incomplete, with a plan and an account of every finished unit. A second start keeps the
finished units. The directory gets the name DIR only when the cache is complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tele_jax import processes
from tele_jax.config import written_table
from tele_jax.data import documents, shards, sources, templates
from tele_jax.data.cache import FORMAT, MANIFEST, Counts, Domain, Manifest, incomplete, read_manifest
from tele_jax.data.dialogue_formats import DIALOGUES
from tele_jax.data.domains import has_dialogues, open_vocabulary, require_other_files, resolve
from tele_jax.data.order import difference
from tele_jax.data.vocabulary import Vocabulary, load_vocabulary, tokenizer_name
from tele_jax.errors import DamageError, FailedError, UserError
from tele_jax.extras import need
from tele_jax.files import Table, held_alone, move, parse_json, write_file
from tele_jax.settings import CacheConfig

_REGISTERING = threading.Lock()  # a worker may have several threads
PLAN, LOCK = "plan.json", ".lock"
SERIAL = "serial"
_ERRORS = {error.__name__: error for error in (UserError, DamageError, FailedError)}


def make(
    config: CacheConfig,
    out: Path,
    *,
    runner: str = "DirectRunner",
    workers: int | None = 1,
    options: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
    load_tasks: Callable[[], Any] | None = None,
) -> Manifest:
    """Makes a cache in the directory `out`, or continues one. Equal files and configs give equal bytes.

    Args:
      config: settings of the cache.
      out: a directory that does not exist yet. All workers must reach it, and the files, by the same path.
      runner: name of a Beam runner, or "serial": this process writes one unit after the other, without Beam.
      workers: number of processes of the DirectRunner. With 1, this process does all the work, and tokenises on all
        cores. None: one for every core, and at most one for every unit.
      options: more options for Beam, as on its command line.
      progress: called about once a second as progress(finished units, all units).
      say: prints a line.
      load_tasks: registers the seqio Tasks that `config` names, in worker processes that do not have them; pickle must
        accept it. In this process they are registered already.

    Raises:
      UserError: `out` exists; DIR.incomplete was begun for another config; shards.plan refuses the config; a domain has
        no usable document; the tokenizer lacks a token that is needed; Beam is not installed.
      FailedError: the disk is full, or Beam fails.
    """
    need("array_record.python.array_record_module")
    if workers not in (1, None) and runner != "DirectRunner":
        raise UserError(f"workers={workers} is for the DirectRunner; {runner} has options of its own, or none")
    if out.exists():
        raise UserError(f"{out}: is there already; choose another --out, or remove it")
    config = dataclasses.replace(config, data=resolve(config.data))
    vocabulary = open_vocabulary(config.data, config.kind)
    units = shards.plan(config)
    _check_vocabularies(units, vocabulary)
    require_other_files(config.data)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(units)) if runner == "DirectRunner" else 1
    run = _serial if runner == SERIAL else _pipeline(runner, workers, options)
    work = incomplete(out)
    with _failing_in_one_line(work), held_alone(work / LOCK, f"{work}: is being made by another process"):
        goes_on = _begun(work, config, vocabulary, units, say)
        if goes_on:
            say(f"{work}: goes on where it was")
        before = _of_tasks(work, units)
        with _watched(work, units, progress):
            here = runner == SERIAL or (runner == "DirectRunner" and workers == 1)
            threads = len(os.sched_getaffinity(0)) if here else 1
            run(units, _Work(config, work, vocabulary.sha256, threads, goes_on, load_tasks, _held_out(config)))
        if changed := sum(before.get(name, text) != text for name, text in _of_tasks(work, units).items()):
            say(
                f"{changed} finished shards were made again: their tasks give other examples since this cache was begun"
            )
        _require_same_text(work, units)
        manifest = _assemble(work, config, vocabulary, units)
        shutil.rmtree(work / shards.ACCOUNTS)
        (work / PLAN).unlink()
        (work / LOCK).unlink()
        move(work, out)
    return manifest


@contextlib.contextmanager
def _failing_in_one_line(work: Path) -> Iterator[None]:
    """Turns an error of the system about a file into a FailedError of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise FailedError(f"{error.filename or work}: {reason}; start again to go on") from None


def _begun(
    work: Path,
    config: CacheConfig,
    vocabulary: Vocabulary,
    units: list[shards.Unit],
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Writes the plan and returns False, or returns True where an equal plan is there already.

    In the second case it removes half-written files that a kill left, and the accounts of shards whose text files have
    changed since, so that these are made again: a cache never mixes two versions of a text.
    """
    plan = {"config": dataclasses.asdict(config), "tokenizer": vocabulary.sha256, "format": FORMAT}
    plan["units"] = hashlib.sha256(json.dumps([dataclasses.asdict(unit) for unit in units]).encode()).hexdigest()
    plan, files = json.loads(json.dumps(plan)), _stamps(units)
    file = work / PLAN
    if not file.exists():
        write_file(file, json.dumps(plan | {"files": files}))
        return False
    before, stamps = _read_plan(work)
    if changed := difference(before, plan):
        raise UserError(f"{work}: was begun for something else ({changed}); remove it, or choose another --out")
    for leftover in work.rglob(".*.array_record.*"):
        leftover.unlink()
    stale = _stale(work, units, stamps, files)
    for unit in stale:
        shards.account_file(work, unit).unlink()
    if stale:
        paths = sorted({path for unit in stale for path in unit.paths if files[path] != stamps.get(path)})
        say(f"{', '.join(paths)}: changed since this cache was begun; {len(stale)} finished shards are made again")
    write_file(file, json.dumps(plan | {"files": files}))
    return True


def _read_plan(work: Path) -> tuple[Table, dict[str, list[int]]]:
    """Reads the plan of the cache, and the stamps that its text files had at the beginning."""
    file, fields = work / PLAN, {"files": dict[str, tuple[int, ...]]}
    try:
        plan = written_table(parse_json(file.read_bytes(), str(file)), str(file), fields, required=fields)
    except DamageError as error:
        raise DamageError(f"{error}; remove {work}") from None
    return plan, plan.pop("files")


def _stamps(units: Sequence[shards.Unit]) -> dict[str, list[int]]:
    """Returns size, times and inode of every text file, which change when it is written again; reads no file."""
    found = {}
    for path in sorted({path for unit in units for path in unit.paths}):
        stat = os.stat(path)
        found[path] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return found


def _stale(
    work: Path, units: Sequence[shards.Unit], before: dict[str, list[int]], now: dict[str, list[int]]
) -> list[shards.Unit]:
    """Returns the finished units whose text has changed. Text is read only where the stamp of its file differs."""
    changed = {path for path in now if before.get(path) != now[path]}
    found = []
    for unit in units:
        done = shards.finished(work, unit) if any(path in changed for path in unit.paths) else None
        if done is not None and done.text != shards.text_checksum(unit):
            found.append(unit)
    return found


def _require_same_text(work: Path, units: Sequence[shards.Unit]) -> None:
    """Raises UserError where a text file changed while the cache was made."""
    _, before = _read_plan(work)
    if stale := _stale(work, units, before, _stamps(units)):
        paths = ", ".join(stale[0].paths)
        raise UserError(f"{paths}: changed while this cache was made; start again, and its shards are made anew")


def _held_out(config: CacheConfig) -> frozenset[int]:
    """Reads the digests of the lines in the validation files of the page, which are held out."""
    found: set[int] = set()
    for name, source in config.data.sources.items():
        if source.validation_files and source.format != "text":
            where = f"sources.{name}.validation_files"
            how = config.data.dialogues
            corpus = sources.index(where, name, source.validation_files, source.format, how=how)
            found.update(corpus.line_digests().tolist())
    return frozenset(found)


def _of_tasks(work: Path, units: Sequence[shards.Unit]) -> dict[str, str]:
    """Returns the checksums of the examples that finished units of seqio Tasks were made from, by unit."""
    accounts = {unit.name: shards.finished(work, unit) for unit in units if unit.task is not None}
    return {name: done.text for name, done in accounts.items() if done is not None}


def _check_vocabularies(units: Sequence[shards.Unit], vocabulary: Vocabulary) -> None:
    """Raises UserError where a seqio Task has the ids of another tokenizer."""
    if names := sorted({unit.task.task for unit in units if unit.task is not None}):
        from tele_jax.data import task_documents

        for name in names:
            task_documents.check_vocabularies(task_documents.find(name), vocabulary)


@contextlib.contextmanager
def _watched(work: Path, units: list[shards.Unit], progress: Callable[[int, int], None]) -> Iterator[None]:
    """Calls `progress` about once a second while the body runs, and at its end."""
    stop = threading.Event()
    files = [shards.account_file(work, unit) for unit in units]

    def watch() -> None:
        waiting = files
        while True:
            stopped = stop.wait(1)
            waiting = [file for file in waiting if not file.exists()]
            progress(len(files) - len(waiting), len(files))
            if stopped:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclasses.dataclass(frozen=True)
class _Work:
    """The function that writes one unit, in a form that pickle takes: each process reads the tokenizer once."""

    config: CacheConfig
    directory: Path
    tokenizer_sha256: str
    threads: int
    goes_on: bool
    load_tasks: Callable[[], Any] | None
    held_out: frozenset[int]

    def __call__(self, unit: shards.Unit) -> None:
        vocabulary = load_vocabulary(self.config.data.tokenizer).with_template(self.config.data.template)
        if vocabulary.sha256 != self.tokenizer_sha256:
            raise UserError(f"tokenizer {vocabulary.path}: has changed since this cache was begun")
        if unit.task is not None and self.load_tasks is not None:
            from tele_jax.data import task_documents

            with _REGISTERING:  # a worker process begins with an empty registry
                if not task_documents.is_registered(unit.task.task):
                    self.load_tasks()
        how = {"threads": self.threads, "goes_on": self.goes_on, "held_out": self.held_out}
        shards.write_unit(unit, self.config, vocabulary, self.directory, **how)


def _serial(units: Sequence[shards.Unit], work: _Work) -> None:
    for unit in units:
        work(unit)


def _pipeline(runner: str, workers: int, options: Sequence[str]) -> Callable[[Sequence[shards.Unit], _Work], None]:
    """Returns the function that runs the work by Beam. Beam checks its options here, before anything is written."""
    options = [*options, "--default_sdk_harness_log_level=ERROR"]
    if workers > 1:
        options += [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing", processes.BEAM_OPTION]
    with _quiet():
        beam = need("apache_beam", how="pip install tele_jax[data,beam], or --runner serial")
        try:
            pipeline = beam.Pipeline(runner=runner, options=beam.options.pipeline_options.PipelineOptions(options))
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(f"runner {runner}: {error}") from None

    def run(units: Sequence[shards.Unit], work: _Work) -> None:
        try:
            with _quiet(), processes.ending_beam_workers(), pipeline:
                # Reshuffle lets every unit go to another worker.
                _ = pipeline | beam.Create(units) | beam.Reshuffle() | "write" >> beam.Map(work)
        except (RuntimeError, ValueError, ImportError) as error:
            raise _own_error(error, runner) from None
        missing = [unit.name for unit in units if shards.finished(work.directory, unit) is None]
        if missing:
            raise FailedError(f"{runner} is done, but {len(missing)} of {len(units)} shards are missing: {missing[0]}")

    return run


def _own_error(error: Exception, runner: str) -> Exception:
    """Finds the error of a unit in Beam's: of the same type with more text, or a RuntimeError with a traceback."""
    if isinstance(error, tuple(_ERRORS.values())):
        return type(error)(str(error).split(" [while running")[0])
    found = re.findall(rf"({'|'.join(_ERRORS)}): (.*?)(?: \[while running|\n|$)", str(error))
    if found:
        name, message = found[-1]
        return _ERRORS[name](message)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return FailedError(f"{runner}: {lines[-1].strip() if lines else type(error).__name__}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log of Beam, whose errors are raised."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _assemble(work: Path, config: CacheConfig, vocabulary: Vocabulary, units: list[shards.Unit]) -> Manifest:
    """Copies the tokenizer, and writes the manifest from the accounts of all units."""
    domains: dict[str, Table] = {}
    reasons = {}
    for unit in units:
        done = shards.finished(work, unit)
        if done is None:
            raise FailedError(
                f"{work / unit.name}: this shard was finished, and is damaged or gone; start again to go on"
            )
        domain = domains.setdefault(unit.domain, {"counts": Counts(), "shards": []})
        domain["counts"] += done.counts
        domain["shards"] += [done.shard] if done.shard else []
        reasons[unit.domain] = reasons.get(unit.domain) or done.first_reason
    for name, domain in domains.items():
        if not domain["counts"].documents:
            of = config.data.sources[name]
            if of.task and reasons[name] is None:
                raise UserError(f"sources.{name}.task: the split {of.split!r} of the task {of.task} has no example")
            raise documents.nothing_usable(f"sources.{name}", reasons[name])
        counts, of = domain["counts"], config.data.sources[name]
        if of.format in DIALOGUES:
            found = (f"sources.{name}", counts.documents, counts.rejected, reasons[name])
            documents.check_rejected(*found, config.data.dialogues.max_rejected)
        if not domain["shards"]:
            raise documents.nothing_fits(f"sources.{name}", config.seq_len)
    shutil.copyfile(vocabulary.path, work / tokenizer_name(vocabulary.path))
    dialogues = has_dialogues(config.data, config.kind)
    manifest = Manifest(
        format=FORMAT,
        kind=config.kind,
        seq_len=config.seq_len,
        seed=config.seed,
        tokenizer_sha256=vocabulary.sha256,
        vocab_size=vocabulary.vocab_size,
        pad_id=max(vocabulary.pad_id, 0),
        domains={
            name: Domain(
                counts=domain["counts"],
                shards=tuple(domain["shards"]),
                source=config.data.sources[name],
                text_files=_sizes([unit for unit in units if unit.domain == name]),
            )
            for name, domain in domains.items()
        },
        template=templates.choose(vocabulary).name if dialogues else None,
        dialogues=config.data.dialogues if dialogues else None,
    )
    write_file(work / MANIFEST, manifest.to_text())
    return read_manifest(work)


def _sizes(units: Sequence[shards.Unit]) -> tuple[int, ...]:
    """Returns the bytes of the files of some units, in order."""
    return tuple({part.path: part.file_bytes for unit in units for part in unit.parts}.values())
