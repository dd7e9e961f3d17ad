"""The trainer: one training stage of any kind, from where the last start came to, to the last step."""

import datetime
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from tele_jax import checkpoint
from tele_jax.axes import PyTree
from tele_jax.config import ModelConfig, written_table
from tele_jax.data import documents, order
from tele_jax.data.batches import Batches
from tele_jax.data.domains import Documents
from tele_jax.data.surroundings import Surroundings
from tele_jax.errors import FailedError, UserError
from tele_jax.files import Table
from tele_jax.growth import MaskSchedule, Plan
from tele_jax.growth.receipt import new_units
from tele_jax.model import platforms
from tele_jax.model.decoder import init
from tele_jax.model.spec import abstract, count_params, spec
from tele_jax.processes import StopSignal, from_first, is_first
from tele_jax.settings import TrainStage
from tele_jax.stages import find_kind, model_of
from tele_jax.train import metrics, workdir
from tele_jax.train.compiler_options import Options
from tele_jax.train.evaluation import Evaluation, Tasks
from tele_jax.train.frozen import Frozen
from tele_jax.train.optimizer import delay_births, optimizer, restart_schedule, schedule
from tele_jax.train.step import (
    flops_per_token,
    make_step,
    state_shardings,
    trained_as,
    widened,
)


class Stopped(Exception):
    """The run was asked to stop, and has saved its state; so have all processes of it. interrupted: by Ctrl-C."""

    def __init__(self, message: str, interrupted: bool = False):
        super().__init__(message)
        self.interrupted = interrupted


def mask_schedule(stage: TrainStage, plan: Plan) -> MaskSchedule:
    """The masks of the growth that a stage goes on from; raises UserError for an order that is not of its axes."""
    how = {"unit": stage.mask_unit, "order": stage.mask_order, "shape": stage.mask_shape}
    return MaskSchedule(plan, stage.mask_start, stage.mask_ramp, **how, tokens_per_step=stage.tokens_per_step)


class Trainer:
    """One training stage at work: the state that the step changes, and what is done with it on the way."""

    def __init__(
        self,
        stage: TrainStage,
        directory: Path,
        *,
        batches: Batches,
        previous: Path | None,
        plan: Plan | None,
        mesh: Mesh,
        model: ModelConfig,
        tokenizer: str,
        say: Callable[[str], None],
        tasks: "Tasks | None" = None,
        checkpoints: Mapping[str, Path] | None = None,
        compiler_options: Options | None = None,
    ):
        """Restores or initialises everything; the step is compiled when it first runs.

        Args:
          directory: of the stage in the work directory.
          batches: the data of the stage, opened.
          previous: checkpoints of the stage before; None for the first.
          plan: of the growth that the stage goes on from, whose masks rise in it.
          model: says how the model is computed (remat, attention), as the page has it; checkpoints say what it is.
          tokenizer: SHA-256 of the tokenizer, for the provenance.
          say: prints a line.
          tasks: evaluates the tasks of the stage, if it has some.
          checkpoints: of the other models that the stage reads, by the names of its fields (TrainStage.models).
          compiler_options: as make_step takes them.
        """
        self.stage, self.directory, self.mesh, self.batches, self.say = stage, directory, mesh, batches, say
        self.compiler_options = compiler_options
        before = None if previous is None else checkpoint.open_lazy(previous)
        self.cfg: ModelConfig = model
        if before is not None:
            self.cfg = before.cfg.replace(remat=model.remat, attention=model.attention)
            self.cfg = trained_as(self.cfg) if stage.lora is None else self.cfg
            self.cfg = model_of(stage, self.cfg)
        found = before.cfg if before is not None else stage.model or model
        if self.cfg.param_dtype != found.param_dtype:
            say(f"  parameters are {found.param_dtype}, and are trained and saved in {self.cfg.param_dtype}")
        self.kind = find_kind(stage.kind)
        self.beside = self.kind.beside(stage, self.cfg, previous, mesh) if hasattr(self.kind, "beside") else None
        self.factor = schedule(stage.schedule, stage.steps, stage.tokens_per_step)
        # Where there is no stage before, stages/__init__.py refuses adapters.
        self.frozen = Frozen(self.cfg, stage.lora, previous, mesh) if stage.lora and previous else None
        self.trained = spec(self.cfg) if self.frozen is None else self.frozen.spec
        self.flops = flops_per_token(self.cfg, stage.seq_len, self.frozen and self.frozen.spec)  # of a token
        new = new_units(before, f"config.{directory.name}") if stage.optimizer.trained == "new" else None
        self.tx = optimizer(self.cfg, stage.optimizer, self.factor, self.trained, new, getattr(self.kind, "UNREAD", ()))
        masks = None if plan is None else mask_schedule(stage, plan)
        self.masks = masks or (lambda step: None)
        self.closed_steps = {} if masks is None else masks.closed_steps()
        self.data = {"tokenizer": tokenizer, "domains": batches.domains}
        self.changes = from_first(lambda: workdir.read_changes(directory))
        self.known = [] if before is None or stage.data.restart else order.positions_in(before.provenance)
        around = Surroundings(
            self.cfg,
            mesh,
            directory,
            previous,
            checkpoints or {},
            self.known,
            base=None if self.frozen is None else self.frozen.params,
            model=self._model,
            say=say,
        )
        opens = getattr(self.kind, "feed", None)
        self.feed = around.feed(batches, stage.batch_size) if opens is None else opens(stage, batches, around)
        for line in batches.shared():
            say(f"  {line}")
        self.checkpoints = checkpoint.Manager(directory / "checkpoints", keep=stage.keep_checkpoints)
        self.best = None if stage.keep_best is None else checkpoint.Manager(directory / workdir.BEST, keep=1)
        self.evaluation = Evaluation(stage, self.kind, self.cfg, mesh, batches.held_out, tasks, directory, say)
        self.tokens = 0
        self._restore(previous, before)
        for corpus in batches.corpora.values():  # not before: what was set aside stays where this start is refused
            self._keep_rejected(corpus)
        self.writer = metrics.Metrics(directory / "metrics", self.first_step)

    def _keep_rejected(self, corpus: Documents) -> None:
        """Writes down which documents of a domain cannot be used, and says so, and which were too long."""
        file = self.directory / "rejected" / f"{corpus.where.removeprefix('sources.')}.jsonl"
        from_first(lambda: documents.write_rejected(file, corpus.rejected))
        if corpus.rejected:
            told = "all are" if corpus.num_rejected == len(corpus.rejected) else f"the first {documents.KEPT:,} are"
            self.say(f"  {corpus.account()}; {told} in {file}")
        for line in corpus.notes():
            self.say(f"  {line}")

    def _restore(self, previous: Path | None, before: "checkpoint.Lazy | None") -> None:
        """Loads this stage's own state where there is some, else what the stage before left, else fresh parameters."""
        params, opt_state = state_shardings(self.cfg, self.tx, self.mesh, self.trained)
        like = jax.eval_shape(self.tx.init, abstract(self.trained))
        fits: Table = {"cfg": self.cfg, "opt_state_like": like}
        own = {"mesh": self.mesh, "items": ("adapters", "opt_state", "data")}
        fits |= {"shardings": params} if self.frozen is None else own
        latest = self.checkpoints.latest_step()
        self.first_step, self.history = latest or 0, []
        if latest is not None:
            loaded = self.checkpoints.load(**fits)
            found = self.frozen.restored(loaded, self.checkpoints.directory) if self.frozen else loaded.params
            self.params, self.opt_state = found, jax.device_put(loaded.opt_state, opt_state)
            self.feed.restore(loaded.data_state or b"")
            *self.history, own = loaded.provenance or ({},)
            self.tokens = written_table(own, f"{self.checkpoints.directory}: provenance", {"tokens": int}, {"tokens"})[
                "tokens"
            ]
            self.say(f"  goes on at step {latest} of {self.stage.steps}: parameters, optimizer and data as they were")
            self._say_data({name: at for name, at in self.feed.positions().items() if at.next})
            return
        self._take_over(previous, before, fits, params, opt_state)
        self._say_data(self.feed.taken_over)

    def _take_over(
        self, previous: Path | None, before: "checkpoint.Lazy | None", fits: Table, params: PyTree, opt_state: PyTree
    ) -> None:
        """Takes what the stage before left, else fresh parameters; says which. params, opt_state: their shardings."""
        if before is not None:
            left = {"param_dtype": before.cfg.param_dtype, "scalar_head": before.cfg.scalar_head}
            fits = fits | {"cfg": self.cfg.replace(**left)}
        has_state = before is not None and before.opt_state is not None
        if self.frozen is not None:
            self.params, self.history = self.frozen.fresh(self.stage.seed, params), self.frozen.provenance
            self.say(f"  {self.frozen}; the optimizer is new; begins at step 0")
        elif previous is not None and has_state and not self.stage.fresh_optimizer:
            loaded = checkpoint.load(previous, **fits)
            self.params, self.history = widened(self.cfg, loaded.params, params), loaded.provenance
            goes_on = lambda state: delay_births(restart_schedule(state), self.closed_steps)  # noqa: E731
            self.opt_state = jax.jit(goes_on, out_shardings=opt_state, donate_argnums=0)(loaded.opt_state)
            self.say(f"  takes over parameters and optimizer state from {previous}; begins at step 0, as its schedule")
            return
        elif previous is not None:
            there = {name: params[name] for name in spec(fits["cfg"])}
            loaded = checkpoint.load(previous, cfg=fits["cfg"], shardings=there, items=("params",))
            self.params, self.history = widened(self.cfg, loaded.params, there), loaded.provenance
            self.params |= self._fresh({name: params[name] for name in params if name not in there})
            self.say(f"  takes over parameters from {previous}; the optimizer is new; begins at step 0")
        else:
            self.params = self._fresh(params)
            self.say("  parameters and optimizer are new; begins at step 0")
        start = lambda params: delay_births(self.tx.init(params), self.closed_steps)  # noqa: E731
        self.opt_state = jax.jit(start, out_shardings=opt_state)(self.params)

    def _fresh(self, shardings: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Fresh parameters, drawn from the seed of the stage, of those branches of the tree that have shardings."""
        if not shardings:
            return {}
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = platforms.COMPILED_ONCE if on_cpu else None
        draw = lambda key: {name: branch for name, branch in init(self.cfg, key).items() if name in shardings}  # noqa: E731
        return jax.jit(draw, out_shardings=shardings, compiler_options=options)(jax.random.key(self.stage.seed))

    def _say_data(self, positions: Mapping[str, order.Position]) -> None:
        """Says where the data goes on: a domain that is not there is read from its beginning."""
        unit = "document" if self.stage.data.cache is None else "row"
        known = {at.name for at in self.known}
        other = " (an earlier stage read other content under this name)"
        new = [name + (other if name in known else "") for name in self.data["domains"] if name not in positions]
        parts = [f"{name} at {unit} {at.next:,} ({at.epochs:.2f} epochs)" for name, at in positions.items()]
        goes_on = f"goes on with {', '.join(parts)}" if parts else ""
        begins = f"begins {', '.join(new)}" if new else ""
        self.say(f"  data: {'; '.join(filter(None, (goes_on, begins)))}")

    def run(self, stop: StopSignal) -> Table:
        """Trains to the last step and returns the stage's summary.

        Raises:
          Stopped: stop() says so; the state is saved.
          FailedError: the loss is not finite.
        """
        try:
            # Before the first step; or what a start that failed in an evaluation has left out.
            if not self.evaluation.done(self.first_step) and not stop():
                self._evaluate(self.first_step)
            self._train(stop)
            if not self.evaluation.done(self.stage.steps):
                self._evaluate(self.stage.steps)
        finally:
            self.feed.close()
            self.checkpoints.close()
            if self.best is not None:
                self.best.close()
            self.writer.close()
        return from_first(self._summary)

    def _model(self) -> PyTree:
        """The parameters of the model as it is now."""
        return self.params if self.frozen is None else self.frozen.with_adapters(self.params)

    def _train(self, stop: StopSignal) -> None:
        stage, loss = self.stage, functools.partial(self.kind.loss, self.stage)
        beside = self.beside
        if self.frozen is not None:
            loss, beside = self.frozen.loss(loss), (self.frozen.params, beside)
        how: Table = {name: getattr(stage, name) for name in ("batch_size", "microbatches")}
        how |= {"loss": loss, "trained": self.trained, "compiler_options": self.compiler_options}
        step_function = make_step(self.cfg, self.tx, self.mesh, **how)
        quiet = not (is_first() and sys.stderr.isatty())
        bar = tqdm(total=stage.steps, initial=self.first_step, desc=self.directory.name, disable=quiet)
        stepped = getattr(self.feed, "stepped", None)
        getattr(self.feed, "watch", lambda check: None)(functools.partial(self._check, stop))
        since, since_step, window = time.perf_counter(), self.first_step, []
        for step in range(self.first_step, stage.steps):
            # A step is dispatched and not waited for, except where a figure is read.
            try:
                batch = next(self.feed)  # on the mesh; it was read and put there while the last steps ran
            except (UserError, Stopped):
                self._keep(step, window, since, bar)
                raise
            self.params, self.opt_state, figures = step_function(
                self.params, self.opt_state, batch, self.masks(step), beside
            )
            window.append(figures)
            if stepped is not None:
                stepped(figures)
            done = step + 1
            bar.update()
            stopped, last = stop(), done == stage.steps
            saves = done % stage.checkpoint_every == 0 or last or stopped
            if done % stage.log_every == 0 or saves:
                window = jax.device_get(window)  # waits for the steps, before the clock is looked at
                self._log(done, window, (time.perf_counter() - since) / (done - since_step), bar)
                window, since_step, since = [], done, time.perf_counter()
            paused = time.perf_counter()
            try:
                if not last:
                    self._evaluate(done)
            except UserError:
                if stage.tasks is None or jax.process_count() == 1:  # the harness fails in process 0 alone
                    self._keep(done, window, since, bar)
                raise
            if saves:
                self._save(done, self.checkpoints)
            since += time.perf_counter() - paused  # saving and evaluating are not training time
            if stopped and not last:
                self.checkpoints.wait()
                where = f"step {done} of {stage.steps} in stage {self.directory.name}"
                raise Stopped(f"stopped at {where}, which is saved; start again to go on", stop.interrupted())
        bar.close()

    def _log(self, step: int, window: Sequence[Mapping[str, object]], seconds: float, bar: tqdm) -> None:
        """One line of figures; `window` holds those of all steps since the last line, `seconds` is the time of one.

        Raises:
          FailedError: one of them is not finite.
        """
        columns = {name: np.array([figures[name] for figures in window], np.float64) for name in window[0]}
        weight, loss, grad_norm = columns.pop("weight"), columns["loss"], columns.pop("grad_norm")
        self.tokens += int(columns.pop("counted", weight).sum())
        positions = float(columns.pop("positions", np.float64(self.stage.tokens_per_step)).mean())
        flops = self.flops * positions / seconds
        peaks, factor = self.stage.optimizer, float(self.factor(step - 1))
        matrix = peaks.learning_rate if peaks.matrix_learning_rate is None else peaks.matrix_learning_rate
        line = {
            # The loss, and what else its kind gives: means over the weights since the last line, 0 without a weight.
            **{n: float((c * weight).sum() / weight.sum()) if weight.sum() else 0.0 for n, c in columns.items()},
            **getattr(self.feed, "figures", dict)(),
            "grad_norm": float(grad_norm[-1]),
            "learning_rate": peaks.learning_rate * factor,  # of vector-like parameters
            "matrix_learning_rate": matrix / self.cfg.width_ratio * factor,
            "tokens": self.tokens,
            "tokens_per_second": positions / seconds,
            "model_flops_per_second": flops,
            "mfu": metrics.utilisation(flops, self.mesh.size),
        }
        self.writer.write(step, line)
        described = metrics.described(line)
        bar.set_postfix_str(described)
        if bar.disable:
            left = datetime.timedelta(seconds=round(seconds * (self.stage.steps - step)))
            self.say(f"  step {step}/{self.stage.steps}: {described}, ends in {left}")
        bad = np.flatnonzero(~np.isfinite(loss) | ~np.isfinite(grad_norm))  # either makes the parameters after it NaN
        if bad.size:
            first = int(bad[0])
            at = step - len(window) + 1 + first
            self.writer.flush()
            raise FailedError(
                f"{self.directory.name}: loss {loss[first]:g}, gradient norm {grad_norm[first]:g} at step {at}; "
                f"{self._last_checkpoint()}; lower the learning rate or look at the data"
            )

    def _check(self, stop: StopSignal) -> None:
        """Raises Stopped where the run was asked to stop; feeds call it whose batches take long."""
        if stop():
            said = f"stopped before the next batch of stage {self.directory.name}; its steps are saved"
            raise Stopped(f"{said}; start again to go on", stop.interrupted())

    def _keep(self, step: int, window: Sequence[Mapping[str, object]], since: float, bar: tqdm) -> None:
        """Saves the state before the run ends, if all processes do it in the same way and there is a new step."""
        if step > self.first_step and getattr(self.feed, "fails_everywhere", False):
            if window:
                self._log(step, jax.device_get(window), (time.perf_counter() - since) / len(window), bar)
            self._save(step, self.checkpoints)

    def _last_checkpoint(self) -> str:
        """Names the checkpoint that there is to go on from, for a message."""
        self.checkpoints.wait()  # a save may be under way
        latest = self.checkpoints.latest_step()
        if latest is None:
            return "this stage has no checkpoint yet"
        return f"the last checkpoint is that of step {latest}, in {self.checkpoints.directory}"

    def _save(self, step: int, checkpoints: checkpoint.Manager) -> None:
        mask = self.masks(step)
        entry = {"stage": self.directory.name, "kind": self.stage.kind, "step": step, "tokens": self.tokens}
        entry["mask"] = None if mask is None else float(min(vector.min() for vector in mask.values()))
        positions = {name: at.to_json() for name, at in self.feed.positions().items()}
        entry["data"] = self.data | {"positions": positions}
        if self.changes:
            entry["changes"] = self.changes
        self.writer.flush()  # what lies before a checkpoint is not written again
        adapter = None if self.frozen is None else self.frozen.adapter
        checkpoints.save(
            step, self.cfg, self.params, self.opt_state, [*self.history, entry], self.feed.state(), adapter
        )

    def _evaluate(self, step: int) -> None:
        """Evaluates what is due at a step, writes the figures, and keeps the checkpoint where it is the best so far."""
        provenance = [*self.history, {"kind": self.stage.kind}]
        figures = self.evaluation.figures(step, self._model, self.masks(step), provenance)
        if not figures:
            return
        if self.best is not None and self.evaluation.is_best(step, figures):
            self._save(step, self.best)
            self.best.wait()
            self.say(f"  step {step}: the best {self.stage.keep_best} so far, kept in {self.best.directory}")
        self.writer.write(step, figures)
        self.writer.flush()  # nor is this made again

    def _summary(self) -> Table:
        return self.evaluation.summary() | {
            "parameters": count_params(self.cfg),
            "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.trained)),
            "steps": self.stage.steps,
            "tokens": self.tokens,
            "flops": self.flops * self.stage.steps * self.stage.tokens_per_step,
        }
