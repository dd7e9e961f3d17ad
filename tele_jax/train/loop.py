"""The training loop: runs the stages of a config in order, and goes on where it was when started again.

A work directory W:

    W/config.json                     the run, as it was started
    W/tokenizer.model or .json        a copy of the tokenizer
    W/<stage>/checkpoints/<step>/     see checkpoint/
    W/<stage>/metrics/                metrics.jsonl and TensorBoard events
    W/<stage>/rejected/               documents that cannot be used: <domain>.files.jsonl or .validation_files.jsonl
    W/<stage>/growth_receipt.json     of a growth stage, with plan.json
    W/<stage>/summary.json            written last: the stage is complete

Whatever is complete on disk is never done again; what a kill interrupted starts from the last complete checkpoint.

Several processes (processes.py) go through the same stages at the same time, on one mesh and one W. Process 0 looks at
W and writes to it, and the others take from it what it found; each writes its own parts of a checkpoint.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tele_jax import checkpoint
from tele_jax.config import ModelConfig, to_dict
from tele_jax.data import feed as feeds
from tele_jax.data.vocabulary import tokenizer_name
from tele_jax.errors import UserError
from tele_jax.growth import Plan
from tele_jax.growth.masks import require_unmasked
from tele_jax.model.spec import count_params, spec
from tele_jax.processes import StopSignal, from_first, is_first
from tele_jax.run import GrowStage, RunConfig, TrainStage, run_config
from tele_jax.sharding import batch_sharding, make_mesh, param_shardings
from tele_jax.train import growing
from tele_jax.train.schedule import schedule
from tele_jax.train.stage import Stopped, Training, mask_schedule

__all__ = ["Stopped", "run"]

VERIFY_ROWS, VERIFY_TOKENS = 4, 256  # of held-out text, to verify a growth on


def run(config: RunConfig, workdir: Path) -> list[dict[str, Any]]:
    """Runs every stage that is not complete yet, and returns the summaries of all, in order.

    Raises:
      UserError: W belongs to another config or is in use; the tokenizer does not fit the model; the mesh leaves out
        devices of one of several processes, or these were started with different configs.
      FailedError: the loss is not finite; a growth that does not preserve.
      Stopped: SIGTERM came, to any process; the state is saved.
    """
    _same_everywhere(config)
    mesh = _open_mesh(config)
    with _locked(workdir), StopSignal() as stop:
        tokenizer = _check(config, mesh)
        from_first(lambda: _claim(config, tokenizer, workdir))
        previous: Path | None = None if config.start is None else Path(config.start)
        plan: Plan | None = None
        for name in config.run:
            stage, directory = config.stages[name], workdir / name
            if not from_first((directory / "summary.json").exists):
                if stop():
                    raise Stopped(f"stopped before stage {name}; start again to go on")
                _say(f"stage {name}: {stage.kind}")
                if isinstance(stage, GrowStage):
                    summary = _grow_stage(stage, directory, previous, mesh, _text_for(config, name), f"config.{name}")
                else:
                    training = Training(
                        stage,
                        directory,
                        previous=previous,
                        plan=plan,
                        mesh=mesh,
                        tokenizer=tokenizer["sha256"],
                        say=_say,
                    )
                    summary = training.run(stop)
                    del training  # its state must not lie beside that of the next stage
                _write(directory / "summary.json", {"stage": name, "kind": stage.kind, **summary})
            previous = directory / "checkpoints"
            plan = _read_plan(directory) if isinstance(stage, GrowStage) else None
    return from_first(lambda: [growing.read_json(workdir / name / "summary.json") for name in config.run])


def _same_everywhere(config: RunConfig) -> None:
    """Several processes would wait for each other for ever where one of them does something else."""
    mine = _as_json(config)
    changed = _differences(from_first(lambda: mine), mine, "config", but=())
    if changed:
        raise UserError(
            f"started with another config than process 0: {'; '.join(changed)}; start the same command in all"
        )


def _open_mesh(config: RunConfig) -> jax.sharding.Mesh:
    count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    # One process may leave devices for others to use; of several, each has to take part in every step.
    devices = jax.devices() if jax.process_count() > 1 else jax.devices()[:count]
    return make_mesh(config.mesh, devices, num_slices=config.num_slices)


def _write(path: Path, value: dict[str, Any]) -> None:
    """Process 0 does; it is there when this returns."""
    from_first(lambda: growing.write_json(path, value))


# -------------------------------------------------------------------------------------------------- a growth stage


def _grow_stage(
    stage: GrowStage, directory: Path, previous: Path, mesh: jax.sharding.Mesh, text: TrainStage, where: str
) -> dict[str, Any]:
    saved = directory / "checkpoints"
    receipt_file = directory / growing.RECEIPT_FILE
    manager = checkpoint.Manager(saved, keep=1)
    try:
        if manager.latest_step() is None:
            loaded = checkpoint.load(previous, mesh=mesh)
            tokens = _verify_tokens(text)
            plan, params, opt_state, receipt = growing.grow(
                loaded.cfg, loaded.params, loaded.opt_state, stage, mesh, tokens, where
            )
            _write(directory / growing.PLAN_FILE, plan.to_json())
            _write(receipt_file, receipt)
            entry = growing.provenance_entry(directory.name, plan)
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
    receipt = growing.require_receipt(directory, source, grown)
    if "destination" not in receipt:  # a kill may fall between the checkpoint and this
        receipt["source"] = {"path": str(source.path), "step": source.step, **growing.fingerprints(source)}
        growing.write_json(directory / growing.RECEIPT_FILE, receipt | {"destination": growing.fingerprints(grown)})
    return receipt


def _verify_tokens(text: TrainStage) -> np.ndarray:
    """Rows of held-out text of every domain in turn, int32[VERIFY_ROWS, VERIFY_TOKENS] or as long as rows are."""
    shape = {"kind": text.kind, "seq_len": text.seq_len, "batch_size": text.batch_size, "aside": feeds.ignore}
    held_out = feeds.held_out(text.data, **shape)
    if held_out:
        rows = [np.asarray(domain.batches[0]["tokens"]) for domain in held_out.values()]
        rows = np.stack([part[i] for i in range(min(len(part) for part in rows)) for part in rows])
    else:
        rows = next(feeds.open_feed(text.data, **shape, seed=text.seed))["tokens"]
    return np.asarray(rows)[:VERIFY_ROWS, :VERIFY_TOKENS]


def _text_for(config: RunConfig, name: str) -> TrainStage:
    """The training stage before a growth stage, or else after it: its text is what the growth is verified on."""
    place = config.run.index(name)
    nearest = (*reversed(config.run[:place]), *config.run[place:])
    return next(config.stages[n] for n in nearest if isinstance(config.stages[n], TrainStage))


def _read_plan(directory: Path) -> Plan:
    return Plan.from_json(growing.read_json(directory / growing.PLAN_FILE))


# ------------------------------------------------------------------------------------------------ the work directory


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    if not is_first():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{workdir}: another run is at work in this directory") from None
        yield


def _claim(config: RunConfig, tokenizer: dict[str, Any], workdir: Path) -> None:
    _same_config(config, workdir / "config.json")
    _adopt_tokenizer(tokenizer, workdir)


# What may change while a run is under way: it alters when things are written, not what is computed.
_CADENCE = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints")


def _same_config(config: RunConfig, path: Path) -> None:
    """Writes W/config.json, or compares with it: stages may be added at the end; mesh, slices, cadence may change."""
    now = _as_json(config)
    if path.exists():
        # Read as a page is: a field that came later has its default, which is how the run was started.
        before = _as_json(run_config(growing.read_json(path)))
        kept = {name: before[name] for name in before["run"]}
        changed = _differences(kept, {name: now.get(name) for name in kept}, "config")
        if now["run"][: len(kept)] != before["run"]:
            changed.append(f"config.run was {before['run']}, is {now['run']}")
        changed += _differences(before["start"], now["start"], "config.start")
        if changed:
            raise UserError(
                f"{path.parent}: was started with another config: {'; '.join(changed)}; use another --workdir"
            )
    growing.write_json(path, now)


def _as_json(config: RunConfig) -> dict[str, Any]:
    page = {"run": list(config.run), **{name: to_dict(stage) for name, stage in config.stages.items()}}
    where = {"mesh": dataclasses.asdict(config.mesh), "num_slices": config.num_slices, "start": config.start}
    return json.loads(json.dumps(page | where))


def _differences(before: Any, now: Any, where: str, but: Sequence[str] = _CADENCE) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted((before.keys() | now.keys()) - set(but))
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{where}.{key}", but)]
    return [] if before == now else [f"{where} was {before!r}, is {now!r}"]


def _check(config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Everything that can be known to be wrong before the first step: hours of training should not end in a typo.

    Returns the path, the size and the SHA-256 of the run's tokenizer.
    """
    cfg: ModelConfig | None = None
    if config.start is not None:
        start = checkpoint.open_lazy(config.start)
        require_unmasked(start.provenance, f"config.start={config.start}")
        cfg = start.cfg
    tokenizers = {}
    plan: Plan | None = None  # of the growth right before
    for name, stage in config.stages.items():
        if isinstance(stage, GrowStage):
            # Layers chosen by distance need the trained model; which ones makes no difference to whether they fit.
            how = "uniform" if stage.layers == "distance" else stage.layers
            larger = cfg.replace_from(stage.model, f"config.{name}.model")
            try:
                plan = growing.plan_of(cfg, larger, stage, layers=how)
            except UserError as error:
                raise UserError(f"config.{name}: {error}") from None
            cfg = plan.dst_cfg
        else:
            cfg = stage.model or cfg
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
            schedule(stage.schedule, stage.steps, stage.batch_size * stage.seq_len)
            batch_sharding(mesh, stage.batch_size // stage.microbatches)
            size = feeds.check(stage.data, kind=stage.kind, seq_len=stage.seq_len).vocab_size
            if size > cfg.vocab_size:
                raise UserError(
                    f"config.{name}: the tokenizer has {size} ids, but the model's vocab_size is {cfg.vocab_size}"
                )
            path = Path(stage.data.tokenizer)
            tokenizers[path] = {"path": path, "size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        param_shardings(spec(cfg), mesh)
    if len({tokenizer["sha256"] for tokenizer in tokenizers.values()}) > 1:
        raise UserError(f"the stages of a run have to share one tokenizer, but name {', '.join(map(str, tokenizers))}")
    return next(iter(tokenizers.values()))


def _adopt_tokenizer(tokenizer: dict[str, Any], workdir: Path) -> None:
    """Copies the run's tokenizer into W, so that the checkpoints can be used without the place it came from."""
    copy = workdir / tokenizer_name(tokenizer["path"])
    if not copy.exists():
        shutil.copyfile(tokenizer["path"], copy.with_suffix(".tmp"))
        os.replace(copy.with_suffix(".tmp"), copy)
    elif hashlib.sha256(copy.read_bytes()).hexdigest() != tokenizer["sha256"]:
        raise UserError(f"{tokenizer['path']}: is another tokenizer than the one this run was started with, {copy}")


def _say(line: str) -> None:
    if not is_first():
        return
    tqdm.write(line) if sys.stderr.isatty() else print(line, flush=True)
