"""The work directory of a run: who may use it, for which config, and what changes when a run goes on with another one.

What may change while a run is under way:

    freely      mesh, slices, compiler options, microbatches, rows of pairs, remat, attention, cadence, evaluation, how
                many processes reward replies and for how long, and where data and tokenizer lie: none of these changes
                what is computed, but for the order in which sums are added up and for what is held out; what is read
                is known by its checksum
    freely      everything of a stage that has not begun
    by itself   `steps` of the last stage, where its schedule stays the same: a schedule without `total` follows them
    --from STEP optimizer, schedule, steps, and rewards and limits of the policy's steps, of the last stage, from its
                checkpoint of that step on

All else would make the record of the run untrue, and is refused. What was changed is in W/<stage>/changes.json and in
the provenance of every later checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tele_jax import checkpoint, files
from tele_jax.checkpoint import locate
from tele_jax.config import to_dict, written_table
from tele_jax.data.vocabulary import tokenizer_name
from tele_jax.errors import DamageError, UserError, abridged
from tele_jax.files import Table, held_alone
from tele_jax.growth.receipt import RECEIPT_FIELDS
from tele_jax.processes import is_first
from tele_jax.settings import TrainStage
from tele_jax.stages import RunConfig, run_config

CONFIG, CHANGES, SUMMARY, LOCK, INDEXES = "config.json", "changes.json", "summary.json", ".lock", "indexes"
Changed = dict[str, tuple[object, object]]  # {path of a key: (before, now)}
BEST = "best"  # directory in a stage: the checkpoint of its best evaluation, by `keep_best`
SET_ASIDE = "set_aside"  # directory in a stage: what came after the checkpoint that --from went back to

# Paths inside a stage, as patterns, of settings that say how, where and how often, but not what is computed.
_FREE = re.compile(
    r"log_every|eval_every|tasks(\..*)?|keep_best|checkpoint_every|keep_checkpoints|microbatches|tolerance|(model\.)?(remat|attention)"
    r"|reward\.(processes|time_limit)|evaluation_reward(\..*)?|rows|rows_at_once|samples_every"
    r"|data\.(cache|tokenizer|eval_bytes|sources\.[^.]+\.(files|validation_files|task|split|validation_split))(\..*)?"
)
_ON_REQUEST = re.compile(
    r"steps|epochs|schedule\..*|optimizer\.(learning_rate|matrix_learning_rate|beta1|beta2|eps|weight_decay|clip_norm)"
    r"|reward\.(function|batched|verifier|model|on_failure)|kl_target|max_kl|clip(_low|_high)?|value_(clip|coef)"
)


def require_own(workdir: Path, from_step: int | None = None) -> None:
    """Raises UserError where `workdir` holds anything but a run: nothing of it may be overwritten.

    from_step: as in `claim`, for which there has to be a run.

    Raises DamageError where the document of the run is not JSON.
    """
    if from_step is not None and not (workdir / CONFIG).exists():
        raise UserError(f"--from {from_step} (from_step): {workdir} holds no run yet")
    config = workdir / CONFIG
    if config.exists():
        try:
            page = json.loads(config.read_text())
        except (ValueError, RecursionError) as error:
            what = "of something else, or damaged: it is not JSON"
            raise DamageError(f"{config}: {what} ({error}); give a new or an empty directory") from None
        if _is_run(page):
            return
        raise UserError(f"{workdir}: its {CONFIG} is not that of a run; give a new or an empty directory")
    for above in workdir.resolve().parents:
        if above.exists() and not above.is_dir():
            raise UserError(f"{workdir}: {above} is a file, not a directory")
        if locate.is_step(above):
            raise UserError(f"{workdir}: lies inside the checkpoint {above}; give a directory elsewhere")
        if _holds_run(above):
            raise UserError(f"{workdir}: lies inside {above}, the directory of another run; give a directory elsewhere")
    if not os.path.lexists(workdir):
        return
    if not workdir.is_dir():
        raise UserError(f"{workdir}: is not a directory; a run has a directory of its own")
    ours = (LOCK, files.temporary_of(config).name, "config.tmp")  # the last was left by kills of the version before
    others = sorted(path.name for path in workdir.iterdir() if path.name not in ours)
    if others:
        raise UserError(
            f"{workdir}: holds {abridged(others)}, but no {CONFIG} of a run; give a new or an empty directory"
        )


def _is_run(page: Any) -> bool:
    """Tells whether the content of a config.json is that of a run."""
    names = page.get("run") if isinstance(page, dict) else None
    return isinstance(names, list) and all(isinstance(name, str) and name in page for name in names)


def _holds_run(directory: Path) -> bool:
    try:
        return _is_run(json.loads((directory / CONFIG).read_bytes()))
    except (OSError, ValueError, RecursionError):  # there is none, or that of another program
        return False


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks the directory for this run in process 0, and makes it where needed.

    Raises:
      UserError: another run has it.
    """
    if not is_first():
        yield
        return
    with held_alone(workdir / LOCK, f"{workdir}: another run is at work in this directory"):
        yield


def as_json(config: RunConfig) -> Table:
    """The config as W/config.json has it."""
    stages = {name: to_dict(stage) for name, stage in config.stages.items()}
    stages = {name: stage | ({"steps": None} if stage.get("epochs") else {}) for name, stage in stages.items()}
    page = {"run": list(config.run), **stages}
    where = {name: getattr(config, name) for name in ("num_slices", "start", "compiler_options")}
    return json.loads(json.dumps(page | where | {"mesh": dataclasses.asdict(config.mesh)}))


def differences(before: object, now: object, path: str = "") -> Changed:
    """(value before, value now) of everything that differs, by path inside the two."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: Changed = {}
        for key in sorted(before.keys() | now.keys()):
            found |= differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if before == now else {path: (before, now)}


def listed(changes: Changed, where: str) -> str:
    """The differences as one line."""
    return "; ".join(f"{where}.{path} was {before!r}, is {now!r}" for path, (before, now) in changes.items())


def claim(config: RunConfig, workdir: Path, from_step: int | None, say: Callable[[str], None]) -> None:
    """Compares the config with that of the run in `workdir`, makes the changes that are allowed, and writes it down.

    from_step: checkpoint that the last stage goes back to; None: it goes on from its latest.

    Raises:
      UserError: a change that is not allowed, or not asked for; no such checkpoint.
      DamageError: a document of the run is damaged.
    """
    path, now = workdir / CONFIG, as_json(config)
    if not path.exists():
        files.write_json(path, now)
        return
    # Read as a page is: a field that came later has its default, which is how the run was started.
    before = as_json(_stored_config(path))
    begun = [name for name in before["run"] if _has_begun(workdir / name)]
    elsewhere = "use another work directory (config.start names a checkpoint to start from)"
    if now["run"][: len(begun)] != begun:
        raise UserError(
            f"{workdir}: was started with another config: config.run was {before['run']}, is {now['run']}, and "
            f"{', '.join(begun)} have begun; {elsewhere}"
        )
    changes, refused = {}, []
    for name in begun:
        found = differences(_resolved(before[name]), _resolved(now[name]))
        changes[name] = {key: pair for key, pair in found.items() if not _is_free(key, before[name], now[name])}
    if begun and before["start"] != now["start"] and not _same_start(before["start"], now["start"], workdir / begun[0]):
        refused.append(listed({"start": (before["start"], now["start"])}, "config"))
    last = begun[-1] if begun else None
    refused += [listed(found, f"config.{name}") for name, found in changes.items() if found and name != last]
    if refused:
        raise UserError(f"{workdir}: was started with another config: {'; '.join(refused)}; {elsewhere}")
    if last is not None:
        _change_last(config, workdir, last, changes[last], from_step, say)
    elif from_step is not None:
        raise UserError(f"--from {from_step} (from_step): no stage of {workdir} has begun")
    for name in before["run"]:
        later = differences(before[name], now[name]) if name not in begun and name in now else {}
        if later:
            say(f"stage {name} has not begun, and changes: {listed(later, f'config.{name}')}")
            shutil.rmtree(workdir / name / "metrics", ignore_errors=True)  # of a start that came to no checkpoint
    files.write_json(path, now)


def _has_begun(directory: Path) -> bool:
    return (directory / SUMMARY).exists() or bool(locate.list_steps(directory / "checkpoints"))


def _same_start(before: str | None, now: str | None, first: Path) -> bool:
    """True where a run starts from the checkpoint that its first stage was made from, which lies elsewhere now."""
    if before is None or now is None or not locate.list_steps(first / "checkpoints"):
        return False
    made_from = checkpoint.open_lazy(first).provenance[:-1]
    return tuple(checkpoint.open_lazy(now).provenance) == tuple(made_from)


def _resolved(stage: Table) -> Table:
    """A stage with the length of its schedule written out, so that a change of `steps` shows where it changes that."""
    schedule = stage.get("schedule")
    if schedule is None:
        return stage
    per_step = 1 if schedule["unit"] == "steps" else stage["batch_size"] * stage["seq_len"]
    whole = f"{stage['epochs']} epochs" if stage["epochs"] else stage["steps"] * per_step
    total = whole if schedule["total"] is None else schedule["total"]
    return {**stage, "schedule": {**schedule, "total": None if schedule["kind"] == "constant" else total}}


def _is_free(path: str, before: Table, now: Table) -> bool:
    """True for a difference inside a stage that does not change what is computed."""
    if _FREE.fullmatch(path):
        return True
    # Sources that are left to the cache are those of the cache: their checksums and rates are compared by the feed.
    cached = all((stage.get("data") or {}).get("cache") for stage in (before, now))
    return cached and re.fullmatch(r"data\.sources(\.[^.]+)?(\.format)?", path) is not None


def _change_last(
    config: RunConfig,
    workdir: Path,
    name: str,
    changed: Changed,
    from_step: int | None,
    say: Callable[[str], None],
) -> None:
    """Goes back to `from_step` where that is asked for, and writes down what changes in the last stage that has begun.

    Every part can be done twice: a kill between them leaves what the same command goes on with.
    """
    stage, directory, where = config.stages[name], workdir / name, f"config.{name}"
    steps = locate.list_steps(directory / "checkpoints")
    known = read_changes(directory)
    if from_step is not None and not changed and known and known[-1]["from"] == from_step:
        say(f"--from {from_step} (from_step) was done by an earlier start")
        return
    if from_step is not None and (not isinstance(stage, TrainStage) or from_step not in steps):
        have = f"has {', '.join(map(str, steps))}" if isinstance(stage, TrainStage) else "grows, and does not train"
        raise UserError(
            f"--from {from_step} (from_step): no such checkpoint; the last stage that has begun, {name}, {have}"
        )
    if from_step is None and not changed:
        return
    if from_step is None or not all(map(_ON_REQUEST.fullmatch, changed)):
        _require_steps_alone(changed, where, workdir, steps)
    if not steps:
        raise UserError(f"{directory}: is complete, but has no checkpoint left to go on from")
    start = steps[-1] if from_step is None else from_step
    assert isinstance(stage, TrainStage)  # a growth has nothing that may change while it is under way
    if stage.steps < start:
        raise UserError(f"{where}.steps={stage.steps}: the stage goes on from step {start}, which is beyond")
    _set_aside(directory, start, steps, say)
    entry = {"from": start, "config": {path: list(pair) for path, pair in changed.items()}}
    if known[-1:] != [entry]:
        files.write_json(directory / CHANGES, {"changes": [*known, entry]})
    what = f": {listed(changed, where)}" if changed else ""
    say(f"stage {name} goes on from step {start}{what}")


def _require_steps_alone(changed: Changed, where: str, workdir: Path, steps: Sequence[int]) -> None:
    """Raises UserError for changes beside that of `steps`, and says how they could be made."""
    others = {path: pair for path, pair in changed.items() if path not in ("steps", "epochs")}
    if not others:
        return
    how = "use another work directory (config.start names a checkpoint to start from)"
    if all(map(_ON_REQUEST.fullmatch, others)):
        there = ", ".join(map(str, steps))
        how = f"--from STEP (from_step) changes it from a checkpoint on (there are {there}), or {how}"
    if changed.keys() & {"steps", "epochs"} and list(others) == ["schedule.total"]:
        before = others["schedule.total"][0]
        how = f"the schedule follows the length of the stage; --{where}.schedule.total={before} keeps it, {how}"
    raise UserError(f"{workdir}: was started with another config: {listed(changed, where)}; {how}")


def samples(directory: Path) -> dict[int, Path]:
    """The files of replies that the rollouts of a stage have written down, by the step before which they were drawn."""
    return {int(path.stem): path for path in (directory / "samples").glob("*.jsonl") if path.stem.isdecimal()}


def _set_aside(directory: Path, start: int, steps: Sequence[int], say: Callable[[str], None]) -> None:
    """Moves later checkpoints and samples, and keeps a copy of the figures, so that the stage goes on from `start`."""
    later = [step for step in steps if step > start]
    drawn = {step: path for step, path in samples(directory).items() if step > start}
    if later or drawn:
        number = 1 + max((int(p.name) for p in directory.glob(f"{SET_ASIDE}/*") if p.name.isdecimal()), default=0)
        aside = directory / SET_ASIDE / str(number)
        aside.mkdir(parents=True)
        metrics = directory / "metrics" / "metrics.jsonl"
        if metrics.exists():
            shutil.copyfile(metrics, aside / metrics.name)
        for step, path in drawn.items():
            files.move(path, aside / f"samples_{step}.jsonl")
        for step in sorted(later, reverse=True):  # a kill leaves the steps before
            files.move(directory / "checkpoints" / str(step), aside / str(step))
        for best in (directory / BEST).glob("*"):
            if best.name.isdecimal() and int(best.name) > start:
                files.move(best, aside / f"{BEST}_{best.name}")
        what = f"checkpoints of later steps ({', '.join(map(str, later))})" if later else "samples of later steps"
        say(f"{what} are set aside in {aside}")
    (directory / SUMMARY).unlink(missing_ok=True)


def _stored_config(path: Path) -> RunConfig:
    values = files.read_json(path)
    try:
        return run_config(written_table(values, str(path), {}))
    except UserError as error:
        raise DamageError(f"{path}: damaged, or of another version of tele_jax: {error}") from None


def read_changes(directory: Path) -> list[Table]:
    """The changes of a stage that was under way, oldest first: {"from": step, "config": {path: [was, is]}}.

    Raises:
      DamageError: the document is not what was written.
    """
    path = directory / CHANGES
    if not path.exists():
        return []
    fields = {"changes": tuple[Table, ...]}
    changes = written_table(files.read_json(path), str(path), fields, required=fields)["changes"]
    for i, entry in enumerate(changes):
        written_table(entry, f"{path}: changes[{i}]", {"from": int, "config": Table}, required=("from", "config"))
    return changes


def adopt_tokenizer(tokenizer: Table, workdir: Path) -> None:
    """Copies the run's tokenizer into W, so that the checkpoints can be used without the place it came from.

    Raises:
      UserError: the run was started with another one.
    """
    copy = workdir / tokenizer_name(tokenizer["path"])
    if not copy.exists():
        files.write_file(copy, Path(tokenizer["path"]).read_bytes())
    elif hashlib.sha256(copy.read_bytes()).hexdigest() != tokenizer["sha256"]:
        raise UserError(f"{tokenizer['path']}: is another tokenizer than the one this run was started with, {copy}")


def read_summary(directory: Path) -> Table:
    """The summary that a stage ended with. Raises as `read_receipt`."""
    file = directory / SUMMARY
    summary = written_table(files.read_json(file), str(file), _SUMMARY_FIELDS, required=("stage", "kind", "parameters"))
    if "receipt" in summary:
        written_table(summary["receipt"], f"{file}: receipt", RECEIPT_FIELDS, required=("policy", "max_abs"))
    return summary


_SUMMARY_FIELDS = {
    **{
        "stage": str,
        "kind": str,
        "parameters": int,
        "trained_parameters": int,
        "tokens": int,
        "flops": float,
        "receipt": Table,
    },
    **{f"{what}_{when}": dict[str, float] for what in ("bits_per_byte", "figures") for when in ("before", "after")},
}
