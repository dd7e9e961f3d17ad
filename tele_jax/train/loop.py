"""The training loop: runs the stages of a config in order, and goes on where it was when started again.

A work directory W:

    W/config.json                     the run, as it was started
    W/tokenizer.model                 a copy of the tokenizer
    W/<stage>/checkpoints/<step>/     see checkpoint/
    W/<stage>/metrics/                metrics.jsonl and TensorBoard events
    W/<stage>/growth_receipt.json     of a growth stage, with plan.json
    W/<stage>/summary.json            written last: the stage is complete

Whatever is complete on disk is never done again; what a kill interrupted starts from the last complete checkpoint.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tele_jax import checkpoint
from tele_jax.config import ModelConfig, to_dict
from tele_jax.data import feed as feeds
from tele_jax.errors import FailedError, UserError
from tele_jax.eval.bpb import bits_per_byte
from tele_jax.growth import MaskSchedule, Plan
from tele_jax.model.decoder import init
from tele_jax.model.spec import abstract_params, count_params, spec
from tele_jax.run import GrowStage, RunConfig, TrainStage
from tele_jax.sharding import batch_sharding, make_mesh, param_shardings
from tele_jax.train import growing, metrics
from tele_jax.train.optimizer import optimizer, restart_schedule
from tele_jax.train.schedule import schedule
from tele_jax.train.step import flops_per_token, make_step, put_batch, state_shardings

VERIFY_ROWS, VERIFY_TOKENS = 4, 256  # of held-out text, to verify a growth on


class Stopped(Exception):
    """The run was asked to stop, and has saved its state."""


def run(config: RunConfig, workdir: Path) -> list[dict[str, Any]]:
    """Runs every stage that is not complete yet, and returns the summaries of all, in order.

    Raises:
      UserError: W belongs to another config or is in use; the tokenizer does not fit the model.
      FailedError: the loss is not finite; a growth that does not preserve.
      Stopped: SIGTERM came; the state is saved.
    """
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor])
    workdir.mkdir(parents=True, exist_ok=True)
    with _locked(workdir), _stop_signal() as stop:
        tokenizer = _check(config, mesh)
        _same_config(config, workdir / "config.json")
        _adopt_tokenizer(tokenizer, workdir)
        previous: Path | None = None
        plan: Plan | None = None
        for name in config.run:
            stage, directory = config.stages[name], workdir / name
            if not (directory / "summary.json").exists():
                _say(f"stage {name}: {stage.kind}")
                if isinstance(stage, GrowStage):
                    summary = _grow_stage(stage, directory, previous, mesh, _text_for(config, name), f"config.{name}")
                else:
                    summary = _train_stage(stage, directory, previous, plan, mesh, tokenizer, stop)
                _write_json(directory / "summary.json", {"stage": name, "kind": stage.kind, **summary})
            previous = directory / "checkpoints"
            plan = _read_plan(directory) if isinstance(stage, GrowStage) else None
    return [json.loads((workdir / name / "summary.json").read_text()) for name in config.run]


# ------------------------------------------------------------------------------------------------ a training stage


def _train_stage(
    stage: TrainStage,
    directory: Path,
    previous: Path | None,
    plan: Plan | None,
    mesh: jax.sharding.Mesh,
    tokenizer: dict[str, Any],
    stop: "list[int]",
) -> dict[str, Any]:
    # Model and optimizer. Their shapes come first, so that restoring writes straight into the shardings.
    cfg = stage.model if previous is None else checkpoint.open_lazy(previous).cfg
    tokens_per_step = stage.batch_size * stage.seq_len
    tx = optimizer(cfg, stage.optimizer, schedule(stage.schedule, stage.steps, tokens_per_step))
    shardings, opt_shardings = state_shardings(cfg, tx, mesh)
    opt_state_like = jax.eval_shape(tx.init, abstract_params(cfg))
    step_function = make_step(cfg, tx, mesh, batch_size=stage.batch_size, microbatches=stage.microbatches)
    masks = (lambda step: None) if plan is None else MaskSchedule(plan, stage.mask_start, stage.mask_ramp)

    # Data: an endless feed whose position is part of the checkpoint, and held-out rows per domain.
    feed = feeds.LiveFeed(
        stage.data, kind=stage.kind, seq_len=stage.seq_len, batch_size=stage.batch_size, seed=stage.seed
    )
    held_out = feeds.held_out(stage.data, kind=stage.kind, seq_len=stage.seq_len, batch_size=stage.batch_size)

    # State: of this stage where there is some, else what the stage before left, else fresh.
    manager = checkpoint.Manager(directory / "checkpoints", keep=stage.keep_checkpoints)
    restore = {"cfg": cfg, "shardings": shardings, "opt_state_like": opt_state_like}
    first_step = manager.latest_step() or 0
    tokens_seen, history = 0, []
    if manager.latest_step() is not None:
        loaded = manager.load(**restore)
        params, opt_state = loaded.params, jax.device_put(loaded.opt_state, opt_shardings)
        feed.restore(loaded.data_state)
        tokens_seen, history = loaded.provenance[-1]["tokens"], loaded.provenance[:-1]
        _say(f"  goes on at step {first_step} of {stage.steps}")
    elif previous is not None and _keeps_optimizer(stage, previous):
        loaded = checkpoint.load(previous, **restore)
        params, history = loaded.params, loaded.provenance
        opt_state = jax.device_put(restart_schedule(loaded.opt_state), opt_shardings)
    else:
        if previous is not None:
            loaded = checkpoint.load(previous, cfg=cfg, shardings=shardings, items=("params",))
            params, history = loaded.params, loaded.provenance
        else:
            key = jax.random.key(stage.seed)
            params = jax.jit(lambda key: init(cfg, key), out_shardings=shardings)(key)
        opt_state = jax.jit(tx.init, out_shardings=opt_shardings)(params)

    def provenance(step: int) -> list[dict[str, Any]]:
        entry = {"stage": directory.name, "kind": stage.kind, "step": step, "tokens": tokens_seen}
        mask = masks(step)
        entry["mask"] = None if mask is None else float(min(vector.min() for vector in mask.values()))
        entry["data"] = {"tokenizer": tokenizer["sha256"], "domains": sorted(stage.data.sources)}
        return [*history, entry]

    def save(step: int) -> None:
        if not np.isfinite(loss):
            raise FailedError(
                f"{directory.name}: the loss is {loss} at step {step}; nothing was saved since, the last checkpoint is "
                f"step {manager.latest_step() or 0}; lower the learning rate or look at the data"
            )
        manager.save(step, cfg, params, opt_state, provenance(step), feed.state())

    def evaluate(step: int) -> None:
        figures = bits_per_byte(cfg, params, held_out, mesh, masks(step))
        writer.write(step, {f"eval/bits_per_byte/{domain}": value for domain, value in figures.items()})
        _say("  " + f"step {step}: bits per byte " + ", ".join(f"{d} {v:.4f}" for d, v in figures.items()))

    def evaluated(step: int) -> bool:
        """Whether a start before this one came as far: a kill may fall between an evaluation and what follows it."""
        lines = metrics.read(directory / "metrics" / "metrics.jsonl")
        return any(line["step"] == step and any(k.startswith("eval/") for k in line) for line in lines)

    # The loop. A step is dispatched and not waited for, except where a figure is read.
    writer = metrics.Metrics(directory / "metrics", first_step)
    flops = flops_per_token(cfg, stage.seq_len) * tokens_per_step
    loss = 0.0
    try:
        if first_step == 0 and not evaluated(0):
            evaluate(0)
        with tqdm(total=stage.steps, initial=first_step, desc=directory.name, disable=not sys.stderr.isatty()) as bar:
            since, since_step, weights = time.perf_counter(), first_step, []
            for step in range(first_step, stage.steps):
                batch = put_batch(next(feed), mesh, stage.batch_size)
                params, opt_state, figures = step_function(params, opt_state, batch, masks(step))
                weights.append(figures["weight"])
                done = step + 1
                bar.update()
                last, stopped = done == stage.steps, bool(stop)
                if done % stage.log_every == 0 or done % stage.checkpoint_every == 0 or last or stopped:
                    loss = float(figures["loss"])
                    tokens_seen += int(sum(float(w) for w in weights))
                    seconds = (time.perf_counter() - since) / (done - since_step)
                    line = {
                        "loss": loss,
                        "grad_norm": float(figures["grad_norm"]),
                        "learning_rate": stage.optimizer.learning_rate
                        * float(schedule(stage.schedule, stage.steps, tokens_per_step)(step)),
                        "tokens": tokens_seen,
                        "tokens_per_second": tokens_per_step / seconds,
                        "mfu": metrics.utilisation(flops / seconds),
                    }
                    writer.write(done, line)
                    bar.set_postfix(loss=f"{loss:.3f}")
                    if bar.disable:
                        _say(f"  step {done}/{stage.steps}: loss {loss:.4f}, {line['tokens_per_second']:,.0f} tokens/s")
                    weights, since_step, since = [], done, time.perf_counter()
                if stage.eval_every and done % stage.eval_every == 0 and not last:
                    evaluate(done)
                if done % stage.checkpoint_every == 0 or last or stopped:
                    save(done)
                    # Neither saving nor evaluating counts as training time.
                    since, since_step = time.perf_counter(), done
                if stopped and not last:
                    raise Stopped(
                        f"stopped at step {done} of {stage.steps} in stage {directory.name}; start again to go on"
                    )
        if not evaluated(stage.steps):
            evaluate(stage.steps)
    finally:
        manager.close()
        writer.close()
    return _train_summary(cfg, stage, directory, tokens_seen)


def _train_summary(cfg: ModelConfig, stage: TrainStage, directory: Path, tokens: int) -> dict[str, Any]:
    lines = metrics.read(directory / "metrics" / "metrics.jsonl")
    prefix = "eval/bits_per_byte/"
    evaluations = [{k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)} for line in lines]
    evaluations = [line for line in evaluations if line] or [{}]
    return {
        "parameters": count_params(cfg),
        "steps": stage.steps,
        "tokens": tokens,
        "flops": flops_per_token(cfg, stage.seq_len) * stage.steps * stage.batch_size * stage.seq_len,
        "bits_per_byte_before": evaluations[0],
        "bits_per_byte_after": evaluations[-1],
    }


def _keeps_optimizer(stage: TrainStage, previous: Path) -> bool:
    """Whether the moments of the stage before go on: fine-tuning starts with its own, on other data and goals."""
    return not (stage.reset_optimizer or stage.kind == "sft") and checkpoint.open_lazy(previous).opt_state is not None


# -------------------------------------------------------------------------------------------------- a growth stage


def _grow_stage(
    stage: GrowStage, directory: Path, previous: Path, mesh: jax.sharding.Mesh, text: TrainStage, where: str
) -> dict[str, Any]:
    saved = directory / "checkpoints"
    receipt_file = directory / "growth_receipt.json"
    manager = checkpoint.Manager(saved, keep=1)
    try:
        if manager.latest_step() is None:
            loaded = checkpoint.load(previous, mesh=mesh)
            tokens = _verify_tokens(text)
            plan, params, opt_state, receipt = growing.grow(
                loaded.cfg, loaded.params, loaded.opt_state, stage, mesh, tokens, where
            )
            _write_json(directory / "plan.json", plan.to_json())
            _write_json(receipt_file, receipt)
            entry = {"stage": directory.name, "kind": "grow", "policy": plan.policy, "seed": plan.seed}
            entry |= {"plan": plan.digest, "max_abs": receipt["max_abs"], "mask": 0.0 if plan.masked else None}
            manager.save(0, plan.dst_cfg, params, opt_state, [*loaded.provenance, entry])
    finally:
        manager.close()
    receipt = json.loads(receipt_file.read_text())
    dead, locked = len(receipt["dead"]), len(receipt["locked"])
    _say(f"  logits moved by {receipt['max_abs']:.3g} at most; dead units {dead}, locked units {locked}")
    return {
        "parameters": count_params(checkpoint.open_lazy(saved).cfg),
        "receipt": {key: receipt[key] for key in ("policy", "max_abs", "max_rel", "kl", "ok")},
    }


def _verify_tokens(text: TrainStage) -> np.ndarray:
    """Rows of held-out text of every domain in turn, int32[VERIFY_ROWS, VERIFY_TOKENS] or as long as rows are."""
    held_out = feeds.held_out(text.data, kind=text.kind, seq_len=text.seq_len, batch_size=text.batch_size)
    if held_out:
        rows = [np.asarray(domain.batches[0]["tokens"]) for domain in held_out.values()]
        rows = np.stack([part[i] for i in range(min(len(part) for part in rows)) for part in rows])
    else:
        rows = next(
            feeds.LiveFeed(text.data, kind=text.kind, seq_len=text.seq_len, batch_size=text.batch_size, seed=text.seed)
        )["tokens"]
    return np.asarray(rows)[:VERIFY_ROWS, :VERIFY_TOKENS]


def _text_for(config: RunConfig, name: str) -> TrainStage:
    """The training stage before a growth stage: its text is what the growth is verified on."""
    before = config.run[: config.run.index(name)]
    return next(config.stages[n] for n in reversed(before) if isinstance(config.stages[n], TrainStage))


def _read_plan(directory: Path) -> Plan:
    return Plan.from_json(json.loads((directory / "plan.json").read_text()))


# ------------------------------------------------------------------------------------------------ the work directory


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{workdir}: another run is at work in this directory") from None
        yield


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that holds the signal once SIGTERM has come; the loop then saves and stops."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread, as in a notebook's worker: nothing to install
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _same_config(config: RunConfig, path: Path) -> None:
    now = json.loads(json.dumps({"run": list(config.run), **{n: to_dict(s) for n, s in config.stages.items()}}))
    now["mesh"] = dataclasses.asdict(config.mesh)
    if path.exists():
        before = json.loads(path.read_text())
        # The mesh may change: a checkpoint restores onto any.
        changed = _differences({**before, "mesh": None}, {**now, "mesh": None}, "config")
        if changed:
            raise UserError(
                f"{path.parent}: was started with another config: {'; '.join(changed)}; use another --workdir"
            )
        return
    _write_json(path, now)


def _differences(before: Any, now: Any, where: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{where}.{key}")]
    return [] if before == now else [f"{where} was {before!r}, is {now!r}"]


def _check(config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Everything that can be known to be wrong before the first step: hours of training should not end in a typo.

    Returns the path, the size and the SHA-256 of the run's tokenizer.
    """
    cfg: ModelConfig | None = None
    tokenizers = {}
    for name, stage in config.stages.items():
        if isinstance(stage, GrowStage):
            # Layers chosen by distance need the trained model; which ones makes no difference to whether they fit.
            how = "uniform" if stage.layers == "distance" else stage.layers
            larger = cfg.replace_from(stage.model, f"config.{name}.model")
            try:
                cfg = growing.plan_of(cfg, larger, stage, layers=how).dst_cfg
            except UserError as error:
                raise UserError(f"config.{name}: {error}") from None
        else:
            cfg = stage.model or cfg
            schedule(stage.schedule, stage.steps, stage.batch_size * stage.seq_len)
            batch_sharding(mesh, stage.batch_size // stage.microbatches)
            size = feeds.open_vocabulary(stage.data, stage.kind).vocab_size
            if size > cfg.vocab_size:
                raise UserError(
                    f"config.{name}: the tokenizer has {size} ids, but the model's vocab_size is {cfg.vocab_size}"
                )
            for files in ("files", "validation_files"):
                feeds.open_corpora(stage.data, stage.kind, stage.seq_len, files)
            path = Path(stage.data.tokenizer)
            tokenizers[path] = {"path": path, "size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        param_shardings(spec(cfg), mesh)
    if len({tokenizer["sha256"] for tokenizer in tokenizers.values()}) > 1:
        raise UserError(f"the stages of a run have to share one tokenizer, but name {', '.join(map(str, tokenizers))}")
    return next(iter(tokenizers.values()))


def _adopt_tokenizer(tokenizer: dict[str, Any], workdir: Path) -> None:
    """Copies the run's tokenizer into W, so that the checkpoints can be used without the place it came from."""
    copy = workdir / "tokenizer.model"
    if not copy.exists():
        shutil.copyfile(tokenizer["path"], copy.with_suffix(".tmp"))
        os.replace(copy.with_suffix(".tmp"), copy)
    elif hashlib.sha256(copy.read_bytes()).hexdigest() != tokenizer["sha256"]:
        raise UserError(f"{tokenizer['path']}: is another tokenizer than the one this run was started with, {copy}")


def _write_json(path: Path, value: Any) -> None:
    """Atomically: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def _say(line: str) -> None:
    tqdm.write(line) if sys.stderr.isatty() else print(line, flush=True)
