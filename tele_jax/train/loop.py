"""Runs the stages of a config: opens everything once, carries them out in order, and goes on where a start ended.

A work directory W:

    W/config.json                     the run, as it was last started
    W/tokenizer.model or .json        a copy of the tokenizer
    W/indexes/                        indexes of the text, so that another start does not read it again
    W/<stage>/checkpoints/<step>/     see checkpoint/
    W/<stage>/best/<step>/            checkpoint of the best evaluation, where the stage has keep_best
    W/<stage>/metrics/                metrics.jsonl and TensorBoard events
    W/<stage>/rejected/               documents that cannot be used: <domain>.files.jsonl or .validation_files.jsonl
    W/<stage>/changes.json            what was changed on request while the stage was under way, see workdir.py
    W/<stage>/set_aside/<n>/          checkpoints of later steps, after a start with --from STEP
    W/<stage>/growth_receipt.json     of a growth stage, with plan.json
    W/<stage>/summary.json            written last: the stage is complete

Whatever is complete on disk is never done again; what a kill interrupted starts from the last complete checkpoint.

Several processes (processes.py) go through the same stages at the same time, on one mesh and one W. Process 0 looks at
W and writes to it, and the others take from it what it found; each writes its own parts of a checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import jax
from tqdm import tqdm

from tele_jax import checkpoint, files, stages
from tele_jax.config import ModelConfig, given
from tele_jax.data import sources
from tele_jax.data.batches import Batches
from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import UserError, prefixed
from tele_jax.files import Table
from tele_jax.growth import Plan
from tele_jax.growth import receipt as receipts
from tele_jax.growth.masks import require_unmasked
from tele_jax.model import adapters
from tele_jax.model.spec import spec
from tele_jax.processes import StopSignal, from_first, is_first
from tele_jax.settings import TrainStage
from tele_jax.sharding import batch_sharding, make_mesh, param_shardings
from tele_jax.stages import RunConfig, Stage
from tele_jax.train import workdir as own
from tele_jax.train.evaluation import Tasks
from tele_jax.train.optimizer import schedule
from tele_jax.train.step import trained_as
from tele_jax.train.trainer import Stopped, Trainer, mask_schedule

__all__ = ["OpenedRun", "OpenedStage", "Stopped", "open_run", "run"]


@dataclasses.dataclass(frozen=True)
class OpenedStage:
    """One stage whose settings were found to fit.

    Attributes:
      kind: the module of its kind, see stages/__init__.py.
      model: the config of the model that the stage leaves, as far as it is known before the first step.
      plan: the plan of a stage that grows the model, None of another.
      batches: what a stage that trains reads; of another the text to verify it on, that of the last training stage
        that led to it, or else of the next.
      tasks: evaluates the tasks of the harness that the stage names; None where it names none.
    """

    settings: Stage
    kind: ModuleType
    model: ModelConfig
    plan: Plan | None
    batches: Batches
    tasks: Tasks | None = None


# open_tasks(settings of the stage, its vocabulary, "config.NAME") -> the function that evaluates its tasks
OpenTasks = Callable[[TrainStage, Vocabulary, str], Tasks]


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """All that a run reads, opened once.

    Attributes:
      mesh: over the devices that the run takes.
      stages: by name, in order.
      tokenizer: {"path", "size", "sha256"} of the tokenizer that all stages share.
      masks: plan of the growth that left config.start behind closed masks; None where there is none.
    """

    mesh: jax.sharding.Mesh
    stages: Mapping[str, OpenedStage]
    tokenizer: Table
    masks: Plan | None


def run(
    config: RunConfig, workdir: Path, *, from_step: int | None = None, open_tasks: "OpenTasks | None" = None
) -> list[Table]:
    """Runs every stage that is not complete yet, and returns the summaries of all, in order.

    from_step: checkpoint that the last stage which has begun goes back to, with what the config changes in its
      optimizer, schedule and steps; None: it goes on from its latest. Asked for again, it is not done again.
    open_tasks: opens the tasks of a stage that has some; None: a stage with tasks is refused.

    Raises:
      UserError: W holds something else, belongs to another config or is in use; the tokenizer does not fit the model;
        the mesh leaves out devices of one of several processes, or these were started with different configs.
      FailedError: the loss is not finite; a growth that does not preserve.
      Stopped: SIGTERM or Ctrl-C came, to any process; the state is saved.
    """
    _same_everywhere(config, from_step)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopSignal())
        from_first(lambda: own.require_own(workdir, from_step))
        there = from_first((workdir / own.CONFIG).exists)
        if there:  # who else is at work in it is found before all text is read
            held.enter_context(own.locked(workdir))
        lengths = [stage.seq_len for stage in config.stages.values() if isinstance(stage, TrainStage)]
        index = sources.Indexes(workdir / own.INDEXES if there else None, seq_lens=lengths)
        opened = open_run(config, index, open_tasks)
        config = dataclasses.replace(config, stages={name: stage.settings for name, stage in opened.stages.items()})
        if not there:  # a config that cannot be leaves no trace
            held.enter_context(own.locked(workdir))
        from_first(lambda: _claim(config, opened.tokenizer, workdir, from_step))
        index.keep_in(workdir / own.INDEXES)
        parents, left = config.parents, {name: workdir / name / "checkpoints" for name in opened.stages}
        for name, stage in opened.stages.items():
            directory = workdir / name
            if not from_first((directory / own.SUMMARY).exists):
                if stop():
                    raise Stopped(f"stopped before stage {name}; start again to go on", stop.interrupted())
                _say(f"stage {name}: {stage.settings.kind}")
                parent = parents[name]
                previous = left[parent] if parent else None if config.start is None else Path(config.start)
                if isinstance(stage.settings, TrainStage):
                    trainer = Trainer(
                        stage.settings,
                        directory,
                        batches=stage.batches,
                        previous=previous,
                        plan=_masks_before(opened, workdir, parent),
                        mesh=opened.mesh,
                        model=stage.model,
                        compiler_options=config.compiler_options,
                        tokenizer=opened.tokenizer["sha256"],
                        say=_say,
                        tasks=stage.tasks,
                        checkpoints={
                            field: left.get(model, Path(model)) for field, model in stage.settings.models.items()
                        },
                    )
                    summary = trainer.run(stop)
                    del trainer  # its state must not lie beside that of the next stage
                else:
                    where = {"plan": stage.plan, "previous": previous, "mesh": opened.mesh, "where": f"config.{name}"}
                    summary = stage.kind.carry_out(stage.settings, directory, **where, text=stage.batches, say=_say)
                summary = {"stage": name, "kind": stage.settings.kind, **summary}
                from_first(lambda: files.write_json(directory / own.SUMMARY, summary))  # noqa: B023 (called at once)
    return from_first(lambda: [own.read_summary(workdir / name) for name in config.run])


def _masks_before(opened: OpenedRun, workdir: Path, parent: str | None) -> Plan | None:
    """The plan of the growth that left what a stage goes on from; None where that stage trained, or there is none.

    parent: that stage; None: config.start.
    """
    if parent is None:
        return opened.masks
    stage = opened.stages[parent]
    return None if isinstance(stage.settings, TrainStage) else stage.kind.read_plan(workdir / parent)


def _same_everywhere(config: RunConfig, from_step: int | None) -> None:
    """Raises UserError where another process has another config: they would wait for each other for ever."""
    mine = own.as_json(config) | {"from": from_step}
    changed = own.differences(from_first(lambda: mine), mine)
    if changed:
        changes = own.listed(changed, "config")
        raise UserError(f"started with another config than process 0: {changes}; start the same command in all")


def _claim(config: RunConfig, tokenizer: Table, workdir: Path, from_step: int | None) -> None:
    if (workdir / own.CONFIG).exists():  # before anything is changed
        own.adopt_tokenizer(tokenizer, workdir)
    own.claim(config, workdir, from_step, _say)
    own.adopt_tokenizer(tokenizer, workdir)


def _say(line: str) -> None:
    if not is_first():
        return
    tqdm.write(line) if sys.stderr.isatty() else print(line, flush=True)


# ----------------------------------------------------------------------------------------------- before the first step


def open_run(config: RunConfig, index: sources.Indexes, open_tasks: "OpenTasks | None" = None) -> OpenedRun:
    """Opens what a run reads, and finds what can be known to be wrong: hours of training should not end in a typo.

    index: makes the indexes of text, each once.
    open_tasks: as in `run`.

    Raises:
      UserError: a checkpoint, tokenizer, text, cache or growth that is missing or does not fit.
    """
    mesh = _open_mesh(config)
    start = _open_start(config)
    batches: dict[str, Batches] = {}
    tokenizers: dict[Path, Table] = {}
    models: dict[str, tuple[ModelConfig, Plan | None]] = {}
    tasks: dict[str, Tasks] = {}
    settings = dict(config.stages)
    for name, parent in config.parents.items():
        stage, (cfg, masks) = config.stages[name], start if parent is None else models[parent]
        where, kind = f"config.{name}", stages.find_kind(stage.kind)
        if isinstance(stage, TrainStage):
            model = stage.model_after(cfg)
            assert model is not None  # the first stage has one, or config.start
            cfg = stages.model_of(stage, trained_as(model) if stage.lora is None else model)
            if stage.steps is not None:  # before any text is read
                _check_training(stage, cfg, masks, where)
            batch_sharding(mesh, stage.batch_size // stage.microbatches, f"{where}.batch_size")
            batch_sharding(mesh, stage.num_rows // stage.microbatches, f"{where}.rows")
            batches[name] = kind.batches(stage, index)
            if stage.keep_best is not None and stage.tasks is None and not batches[name].held_out:
                raise UserError(f"{where}.keep_best={stage.keep_best!r}: no domain has held-out data to evaluate")
            path, size = Path(stage.data.tokenizer), batches[name].vocabulary.vocab_size
            if size > cfg.vocab_size:
                raise UserError(
                    f"{where}: the tokenizer has {size} ids, but the model's vocab_size is {cfg.vocab_size}"
                )
            if stage.steps is None:
                settings[name] = stage = _counted(stage, batches[name], where)
                _check_training(stage, cfg, masks, where)
            masks = None
            if stage.tasks is not None:
                opener = given(
                    open_tasks, f"{where}.tasks: tele_jax.run evaluates tasks; train.loop.run was not given how"
                )
                tasks[name] = opener(stage, batches[name].vocabulary, where)
            tokenizers[path] = {"path": path, "size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            read = {
                field: models[other][0] if other in models else _open_model(other, tokenizers[path], f"{where}.{field}")
                for field, other in stage.models.items()
            }
            for field, own in read.items():  # they read the rows of the stage
                with prefixed(f"{where}.{field}={stage.models[field]}: "):
                    own.require_positions(stage.seq_len)
            if hasattr(kind, "check"):
                with prefixed(f"{where}."):
                    kind.check(stage, read)
        else:
            cfg, masks = kind.outline(stage, cfg, where)
        param_shardings(spec(cfg), mesh)
        models[name] = cfg, masks
    if len({tokenizer["sha256"] for tokenizer in tokenizers.values()}) > 1:
        raise UserError(f"the stages of a run have to share one tokenizer, but name {', '.join(map(str, tokenizers))}")
    config = dataclasses.replace(config, stages=settings)
    opened = {
        name: OpenedStage(
            stage, stages.find_kind(stage.kind), *models[name], batches[_read_by(config, name)], tasks.get(name)
        )
        for name, stage in config.stages.items()
    }
    return OpenedRun(mesh, opened, next(iter(tokenizers.values())), start[1])


def _counted(stage: TrainStage, batches: Batches, where: str) -> TrainStage:
    """The stage with the steps that its epochs take."""
    with prefixed(f"{where}."):
        counted = dataclasses.replace(stage, steps=batches.count_steps())
    _say(f"{where}: {stage.epochs:g} epochs are {counted.steps:,} steps")
    return counted


def _open_mesh(config: RunConfig) -> jax.sharding.Mesh:
    count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    # One process may leave devices for others to use; of several, each has to take part in every step.
    devices = jax.devices() if jax.process_count() > 1 else jax.devices()[:count]
    return make_mesh(config.mesh, devices, num_slices=config.num_slices)


def _read_by(config: RunConfig, name: str) -> str:
    """The stage whose text a stage reads: itself or the last that led to it, where one trains, else the next to train.

    A growth is verified on that text.
    """
    order = (*reversed(config.lineage(name)), *config.run[config.run.index(name) :], *config.run)
    return next(other for other in order if isinstance(config.stages[other], TrainStage))


def _open_start(config: RunConfig) -> tuple[ModelConfig | None, Plan | None]:
    """The model of config.start, and the plan of the growth that left it behind closed masks, if one did.

    Raises:
      UserError: the first stage does not open those masks, or opens masks that are not there.
    """
    if config.start is None:
        return None, None
    name, where = config.run[0], f"config.start={config.start}"
    stage, start = config.stages[name], checkpoint.open_lazy(config.start)
    if not isinstance(stage, TrainStage):  # only training opens masks
        require_unmasked(start.provenance, where)
    plan = receipts.masked_plan(start, where)
    if plan is not None and isinstance(stage, TrainStage) and stage.mask_ramp == 0:
        raise UserError(
            f"config.{name}.mask_ramp: has to be above 0: {where} was grown by policy 'msg', and its masks, which are "
            "closed, rise in the training stage that comes first"
        )
    if plan is None and isinstance(stage, TrainStage) and stage.mask_fields:
        raise UserError(f"config.{name}.{stage.mask_fields[0]}: {where} is behind no masks")
    return start.cfg, plan


def _open_model(path: str, tokenizer: Table, where: str) -> ModelConfig:
    """The config of another model that a stage reads; UserError where it is missing, or of another tokenizer."""
    try:
        lazy = checkpoint.open_lazy(path)
    except UserError as error:
        raise UserError(f"{where}: no earlier stage of the run, and no checkpoint: {error}") from None
    require_unmasked(lazy.provenance, f"{where}={path}")
    used = [entry["data"]["tokenizer"] for entry in lazy.provenance if "tokenizer" in (entry.get("data") or {})]
    if used and used[-1] != tokenizer["sha256"]:
        raise UserError(f"{where}: {path} was trained with another tokenizer than {tokenizer['path']}")
    if tokenizer["size"] > lazy.cfg.vocab_size:
        raise UserError(
            f"{where}: the tokenizer {tokenizer['path']} has {tokenizer['size']} ids, but {path} has a vocab_size of "
            f"{lazy.cfg.vocab_size}"
        )
    return lazy.cfg


def _check_training(stage: TrainStage, cfg: ModelConfig, masks: Plan | None, where: str) -> None:
    """Raises UserError where the masks, the length of the rows or the schedule of a stage cannot be."""
    checks = (
        ("", lambda: None if stage.lora is None else adapters.spec(cfg, stage.lora)),
        ("mask_", lambda: None if masks is None else mask_schedule(stage, masks)),
        ("", lambda: cfg.require_positions(stage.seq_len)),
        ("", lambda: schedule(stage.schedule, stage.steps, stage.tokens_per_step)),
    )
    for prefix, check in checks:
        try:
            check()
        except UserError as error:  # begins with the name of the field, after the prefix
            raise UserError(f"{where}.{prefix}{error}") from None
