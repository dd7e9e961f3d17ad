"""The training loop: runs the stages of a config in order, and goes on where it was when started again.

A work directory W:

    W/config.json                     the run, as it was last started
    W/tokenizer.model or .json        a copy of the tokenizer
    W/<stage>/checkpoints/<step>/     see checkpoint/
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
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tele_jax import checkpoint, files
from tele_jax.config import ModelConfig
from tele_jax.data import feed as feeds
from tele_jax.data import sources
from tele_jax.errors import UserError
from tele_jax.growth import Plan
from tele_jax.growth import receipt as receipts
from tele_jax.growth.masks import require_unmasked
from tele_jax.growth.verify.report import require_configs
from tele_jax.model.spec import count_params, spec
from tele_jax.processes import StopSignal, from_first, is_first
from tele_jax.settings import GrowStage, RunConfig, TrainStage
from tele_jax.sharding import batch_sharding, make_mesh, param_shardings
from tele_jax.train import workdir as own
from tele_jax.train.schedule import schedule
from tele_jax.train.stage import Stopped, Training, mask_schedule
from tele_jax.train.step import trained_as

__all__ = ["Stopped", "run"]

VERIFY_ROWS, VERIFY_TOKENS = 4, 256  # of held-out text, to verify a growth on


def run(config: RunConfig, workdir: Path, *, from_step: int | None = None) -> list[dict[str, Any]]:
    """Runs every stage that is not complete yet, and returns the summaries of all, in order.

    from_step: checkpoint that the last stage which has begun goes back to, with what the config changes in its
      optimizer, schedule and steps; None: it goes on from its latest. Asked for again, it is not done again.

    Raises:
      UserError: W holds something else, belongs to another config or is in use; the tokenizer does not fit the model;
        the mesh leaves out devices of one of several processes, or these were started with different configs.
      FailedError: the loss is not finite; a growth that does not preserve.
      Stopped: SIGTERM or Ctrl-C came, to any process; the state is saved.
    """
    _same_everywhere(config, from_step)
    mesh = _open_mesh(config)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopSignal())
        from_first(lambda: own.require_own(workdir, from_step))
        there = from_first((workdir / own.CONFIG).exists)
        if there:  # who else is at work in it is found before all text is read
            held.enter_context(own.locked(workdir))
        index = sources.Indexes()
        tokenizer, models, plan = _check(config, mesh, index)
        if not there:  # a config that cannot be leaves no trace
            held.enter_context(own.locked(workdir))
        from_first(lambda: _claim(config, tokenizer, workdir, from_step))
        previous: Path | None = None if config.start is None else Path(config.start)
        for name in config.run:
            stage, directory = config.stages[name], workdir / name
            if not from_first((directory / "summary.json").exists):
                if stop():
                    raise Stopped(f"stopped before stage {name}; start again to go on", stop.interrupted())
                _say(f"stage {name}: {stage.kind}")
                if isinstance(stage, GrowStage):
                    text = _text_for(config, name)
                    summary = _grow_stage(stage, directory, previous, mesh, text, f"config.{name}", index)
                else:
                    training = Training(
                        stage,
                        directory,
                        previous=previous,
                        plan=plan,
                        mesh=mesh,
                        model=models[name],
                        tokenizer=tokenizer["sha256"],
                        index=index,
                        say=_say,
                    )
                    summary = training.run(stop)
                    del training  # its state must not lie beside that of the next stage
                _write(directory / "summary.json", {"stage": name, "kind": stage.kind, **summary})
            previous = directory / "checkpoints"
            plan = receipts.read_plan(directory) if isinstance(stage, GrowStage) else None
    return from_first(lambda: [own.read_summary(workdir / name) for name in config.run])


def _same_everywhere(config: RunConfig, from_step: int | None) -> None:
    """Several processes would wait for each other for ever where one of them does something else."""
    mine = own.as_json(config) | {"from": from_step}
    changed = own.differences(from_first(lambda: mine), mine)
    if changed:
        raise UserError(
            f"started with another config than process 0: {own.said(changed, 'config')}; start the same command in all"
        )


def _claim(config: RunConfig, tokenizer: dict[str, Any], workdir: Path, from_step: int | None) -> None:
    if (workdir / own.CONFIG).exists():  # before anything is changed
        own.adopt_tokenizer(tokenizer, workdir)
    own.claim(config, workdir, from_step, _say)
    own.adopt_tokenizer(tokenizer, workdir)


def _open_mesh(config: RunConfig) -> jax.sharding.Mesh:
    count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    # One process may leave devices for others to use; of several, each has to take part in every step.
    devices = jax.devices() if jax.process_count() > 1 else jax.devices()[:count]
    return make_mesh(config.mesh, devices, num_slices=config.num_slices)


def _write(path: Path, value: dict[str, Any]) -> None:
    """Process 0 does; it is there when this returns."""
    from_first(lambda: files.write_json(path, value))


# -------------------------------------------------------------------------------------------------- a growth stage


def _grow_stage(
    stage: GrowStage,
    directory: Path,
    previous: Path,
    mesh: jax.sharding.Mesh,
    text: TrainStage,
    where: str,
    index: sources.Indexes,
) -> dict[str, Any]:
    saved = directory / "checkpoints"
    receipt_file = directory / receipts.RECEIPT_FILE
    manager = checkpoint.Manager(saved, keep=1)
    try:
        if manager.latest_step() is None:
            loaded = checkpoint.load(previous, mesh=mesh)
            tokens = _verify_tokens(text, index)
            plan, params, opt_state, receipt = receipts.grow(
                loaded.cfg, loaded.params, loaded.opt_state, stage, mesh, tokens, where
            )
            _write(directory / receipts.PLAN_FILE, plan.to_json())
            _write(receipt_file, receipt)
            entry = receipts.provenance_entry(directory.name, plan)
            manager.save(0, plan.dst_cfg, params, opt_state, [*loaded.provenance, entry])
            manager.wait()
        receipt = from_first(lambda: _complete_receipt(directory, previous, saved))
    finally:
        manager.close()
    dead, locked = len(receipt["dead"]), len(receipt["locked"])
    _say(f"  logits moved by {receipt['max_abs']:.3g} at most; dead units {dead}, locked units {locked}")
    return {
        "parameters": count_params(checkpoint.open_lazy(saved).cfg),
        "receipt": {key: receipt[key] for key in ("policy", "max_abs", "max_rel", "kl", "ok")},
    }


def _complete_receipt(directory: Path, previous: Path, saved: Path) -> dict[str, Any]:
    """The receipt of a growth whose checkpoint is there, with what it was made from and became."""
    source, grown = (checkpoint.open_lazy(path) for path in (previous, saved))
    receipt = receipts.require_receipt(directory, source, grown)
    if "destination" not in receipt:  # a kill may fall between the checkpoint and this
        require_configs(receipts.read_plan(directory), source, grown)
        receipt["levels"] = ["configs", *receipt["levels"]]
        receipt["source"] = {"path": str(source.path), "step": source.step, **receipts.fingerprints(source)}
        files.write_json(directory / receipts.RECEIPT_FILE, receipt | {"destination": receipts.fingerprints(grown)})
    return receipt


def _verify_tokens(text: TrainStage, index: sources.Indexes) -> np.ndarray:
    """Rows of held-out text of every domain in turn, int32[VERIFY_ROWS, VERIFY_TOKENS] or as long as rows are."""
    shape = {"kind": text.kind, "seq_len": text.seq_len, "batch_size": text.batch_size}
    shape |= {"aside": feeds.ignore, "index": index}
    held_out = feeds.held_out(text.data, **shape)
    if held_out:
        rows = [np.asarray(domain.batches[0]["tokens"]) for domain in held_out.values()]
        rows = np.stack([part[i] for i in range(min(len(part) for part in rows)) for part in rows])
    else:
        with contextlib.closing(feeds.open_feed(text.data, **shape, seed=text.seed)) as feed:
            rows = next(feed)["tokens"]
    return np.asarray(rows)[:VERIFY_ROWS, :VERIFY_TOKENS]


def _text_for(config: RunConfig, name: str) -> TrainStage:
    """The training stage before a growth stage, or else after it: its text is what the growth is verified on."""
    place = config.run.index(name)
    nearest = (*reversed(config.run[:place]), *config.run[place:])
    return next(config.stages[n] for n in nearest if isinstance(config.stages[n], TrainStage))


# ----------------------------------------------------------------------------------------------- before the first step


def _check(
    config: RunConfig, mesh: jax.sharding.Mesh, index: sources.Indexes
) -> tuple[dict[str, Any], dict[str, ModelConfig], Plan | None]:
    """Everything that can be known to be wrong before the first step: hours of training should not end in a typo.

    Returns the path, the size and the SHA-256 of the run's tokenizer, the model of every stage, and the plan of the
    growth that left config.start behind closed masks.
    """
    cfg: ModelConfig | None = None
    models: dict[str, ModelConfig] = {}
    plan: Plan | None = None  # of the growth right before
    started: Plan | None = None
    if config.start is not None:
        start = checkpoint.open_lazy(config.start)
        if isinstance(config.stages[config.run[0]], GrowStage):  # only training opens masks
            require_unmasked(start.provenance, f"config.start={config.start}")
        plan = started = receipts.masked_plan(start, f"config.start={config.start}")
        cfg = start.cfg
        _check_masks_of_start(config, started)
    tokenizers = {}
    for name, stage in config.stages.items():
        if isinstance(stage, GrowStage):
            # Layers chosen by distance need the trained model; which ones makes no difference to whether they fit.
            how = "uniform" if stage.layers == "distance" else stage.layers
            larger = cfg.replace_from(stage.model, f"config.{name}.model")
            try:
                plan = receipts.plan_of(cfg, larger, stage, layers=how)
            except UserError as error:
                raise UserError(f"config.{name}: {error}") from None
            cfg = plan.dst_cfg
        else:
            cfg = trained_as(stage.model_after(cfg))
            if plan is not None:
                try:
                    mask_schedule(stage, plan)
                except UserError as error:  # starts with the field, as it is called in growth.MaskSchedule
                    raise UserError(f"config.{name}.mask_{error}") from None
                plan = None
            try:
                cfg.require_positions(stage.seq_len)
            except UserError as error:
                raise UserError(f"config.{name}.{error}") from None
            try:
                schedule(stage.schedule, stage.steps, stage.batch_size * stage.seq_len)
            except UserError as error:  # starts with "schedule"
                raise UserError(f"config.{name}.{error}") from None
            batch_sharding(mesh, stage.batch_size // stage.microbatches)
            size = feeds.check(stage.data, kind=stage.kind, seq_len=stage.seq_len, index=index).vocab_size
            if size > cfg.vocab_size:
                raise UserError(
                    f"config.{name}: the tokenizer has {size} ids, but the model's vocab_size is {cfg.vocab_size}"
                )
            path = Path(stage.data.tokenizer)
            tokenizers[path] = {"path": path, "size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        param_shardings(spec(cfg), mesh)
        models[name] = cfg
    if len({tokenizer["sha256"] for tokenizer in tokenizers.values()}) > 1:
        raise UserError(f"the stages of a run have to share one tokenizer, but name {', '.join(map(str, tokenizers))}")
    return next(iter(tokenizers.values())), models, started


def _check_masks_of_start(config: RunConfig, plan: Plan | None) -> None:
    """Raises UserError unless the first stage opens masks where config.start is behind them, and only there."""
    name = config.run[0]
    stage = config.stages[name]
    if plan is not None and stage.mask_ramp == 0:
        raise UserError(
            f"config.{name}.mask_ramp: has to be above 0: config.start={config.start} was grown by policy 'msg', and "
            "its masks, which are closed, rise in the training stage that comes first"
        )
    if plan is None and isinstance(stage, TrainStage) and stage.mask_fields:
        raise UserError(f"config.{name}.{stage.mask_fields[0]}: config.start={config.start} is behind no masks")


def _say(line: str) -> None:
    if not is_first():
        return
    tqdm.write(line) if sys.stderr.isatty() else print(line, flush=True)
