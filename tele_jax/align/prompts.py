"""Replies that were drawn are rewarded, in training and on held-out prompts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tele_jax import checkpoint
from tele_jax.align.experience import Arrays, Drawn, drawn, rows
from tele_jax.align.pairs import compiled_scores
from tele_jax.align.rewards import Asked, RewardConfig, Rewards
from tele_jax.align.rollouts import RolloutStage
from tele_jax.align.scoring import require_reward_model
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, require
from tele_jax.data import sources, templates
from tele_jax.data.record_rows import RecordBatches, RecordRows
from tele_jax.data.surroundings import Surroundings
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.inference.generate import generate_scored, prepare
from tele_jax.processes import from_first
from tele_jax.sharding import on_host


class Scorer:
    """Rewards replies as a stage says: in processes, or by a reward model on the mesh."""

    def __init__(self, stage: RolloutStage, field: str, prompts: RecordBatches, around: Surroundings):
        """Opens the function or verifier in process 0, or loads the model.

        field: of the stage, that says what rewards.

        Raises:
          UserError: as Rewards; a model without a scalar head.
        """
        self._config: RewardConfig = getattr(stage, field)
        self._stage, self._prompts, self._around = stage, prompts, around
        self._workers: Rewards | None = None
        if self._config.model is not None:
            path = around.checkpoints[f"{field}.model"]
            require_reward_model(checkpoint.open_lazy(path))
            self._cfg, self._params = load(path, around)
            return
        failed = from_first(self._open)
        require(not failed, failed)

    def _open(self) -> str:
        try:
            self._workers = Rewards(self._config)
        except UserError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Ends the processes."""
        if self._workers is not None:
            self._workers.close()

    def asked(self, found: Drawn, store: RecordRows) -> list[Asked]:
        """The replies as texts, with the records of their prompts in a store."""
        decode, told = self._prompts.vocabulary.decode, []
        for row, number in enumerate(found.record.tolist()):
            record = store.fields(number)
            given = record.get("prompt", record.get("question"))
            prompt = given if isinstance(given, str) else decode(found.tokens[row, : found.prompts[row]].tolist())
            where = f"record {number} ({prompt[:60]!r})"
            told.append(Asked(prompt, decode(found.reply(row)), record, where))
        return told

    def score(self, found: Drawn, seed: int, store: RecordRows) -> tuple[np.ndarray, int]:
        """Rewards, float64 [N], in every process, and how many could not be had; raises UserError as Rewards.score."""
        if self._config.model is not None:
            return self._by_model(found), 0

        def make() -> Table:
            assert self._workers is not None
            try:
                rewards, failures = self._workers.score(self.asked(found, store), seed)
                return {"rewards": rewards.tolist(), "failures": failures}
            except UserError as error:  # which all processes have to raise
                return {"error": str(error)}

        told = from_first(make)
        require("error" not in told, told.get("error", ""))
        return np.array(told["rewards"], np.float64), told["failures"]

    def _by_model(self, found: Drawn) -> np.ndarray:
        stage, pad = self._stage, max(self._prompts.vocabulary.pad_id, 0)
        batch = rows(found, unit=max(1, stage.seq_len // 8), pad_id=pad) | {"lengths": found.lengths}

        def run(part: Arrays) -> Any:
            firsts = np.arange(len(part["tokens"]), dtype=np.int32) * part["tokens"].shape[1]
            return compiled_scores(self._cfg, self._params, part | {"ends": firsts + part["lengths"] - 1})

        return in_parts(self._around, stage, batch, run)


def check(stage: RolloutStage, models: Mapping[str, ModelConfig]) -> None:
    """Raises UserError where a reward cannot be opened, or its model has no scalar head; see stages.__init__."""
    for field in ("reward", "evaluation_reward"):
        config: RewardConfig | None = getattr(stage, field)
        if config is not None and config.model is not None:
            is_one = models[f"{field}.model"].scalar_head
            require(is_one, f"{field}.model={config.model!r} has no scalar head: it is no reward model")
        elif config is not None:
            failed = from_first(lambda config=config: _failure(config))
            require(not failed, f"{field}: {failed}")


def _failure(config: RewardConfig) -> str:
    """The reason why the process of a reward cannot be started; "" where it can."""
    try:
        Rewards(config).close()
    except UserError as error:
        return str(error)
    return ""


def load(path: Path, around: Surroundings) -> tuple[ModelConfig, Params]:
    """Another model on the mesh, computed as the one that is trained."""
    cfg = checkpoint.open_lazy(path).cfg
    how = {"attention": around.cfg.attention, "dtype": around.cfg.dtype, "remat": around.cfg.remat}
    return cfg.replace(**how), checkpoint.load(path, around.mesh, cfg=cfg, items=("params",)).params


def in_parts(around: Surroundings, stage: RolloutStage, batch: Arrays, run: Callable[[Any], Any]) -> Any:
    """Runs a function of batches on the mesh, as many rows at once as in training; results [N, ...] on the host."""
    size, count, found = stage.batch_size // stage.microbatches, len(batch["tokens"]), []
    with jax.set_mesh(around.mesh):
        for first in range(0, count, size):
            at = np.minimum(np.arange(first, first + size), count - 1)
            found.append(on_host(run(around.place({name: array[at] for name, array in batch.items()}, size))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)


@dataclasses.dataclass(frozen=True)
class HeldOutPrompts:
    """Held-out prompts of a domain: batches as those of the feed, the last filled up with record -1; their store."""

    batches: list[dict[str, np.ndarray]]
    store: RecordRows
    prompts: "Prompts"


class Prompts(RecordBatches):
    """The prompts of a stage, in batches of `rollout_prompts`, and what rewards replies to them."""

    def __init__(self, stage: RolloutStage, index: sources.Indexes):
        """Raises UserError as RecordBatches."""
        self._stage_settings = stage
        cut = dataclasses.replace(stage, batch_size=stage.rollout_prompts, microbatches=1)
        super().__init__(cut, "prompts", index, room=stage.max_new_tokens)
        self.stop_ids = templates.stop_ids(templates.choose(self.vocabulary), self.vocabulary)
        self.pad_id = max(self.vocabulary.pad_id, 0)
        self._scorers: dict[str, Scorer] = {}  # by field of the stage; opened with the feed

    def open_scorer(self, around: Surroundings) -> Scorer:
        """Opens what rewards replies, and what judges those to held-out prompts. Raises UserError as Scorer."""
        for field in ("reward", "evaluation_reward"):
            if getattr(self._stage_settings, field) is not None:
                self._scorers[field] = Scorer(self._stage_settings, field, self, around)
        return self._scorers["reward"]

    @property
    def judge(self) -> Scorer:
        """The judge of replies to held-out prompts, that `open_scorer` has opened."""
        return self._scorers.get("evaluation_reward", self._scorers["reward"])

    def close_scorers(self) -> None:
        """Ends the processes of rewards."""
        for scorer in self._scorers.values():
            scorer.close()

    @functools.cached_property
    def held_out(self) -> dict[str, HeldOutPrompts]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The held-out prompts of every domain that has some."""
        return {
            name: HeldOutPrompts(found.batches, self.held_out_store(name), self)
            for name, found in super().held_out.items()
        }

    def draw(
        self,
        cfg: ModelConfig,
        params: Params,
        batch: Mapping[str, np.ndarray],
        answers: int,
        seed: int,
        *,
        greedy: bool,
    ) -> Drawn:
        """Draws so many replies to each prompt of a batch, without rewards; greedy: the likeliest tokens."""
        stage = self._stage_settings
        given = [ids[:length].tolist() for ids, length in zip(batch["tokens"], batch["lengths"].tolist(), strict=True)]
        prompts, replies = [prompt for prompt in given for _ in range(answers)], []
        ready, size = prepare(cfg, params), stage.rows_at_once or len(prompts)
        how: Table = {"max_new_tokens": stage.max_new_tokens, "stop_ids": self.stop_ids, "seed": seed}
        how |= {"temperature": 0.0 if greedy else 1.0, "keep_stop": True}
        for first in range(0, len(prompts), size):
            numbers = list(range(first, min(first + size, len(prompts))))
            replies += generate_scored(cfg, ready, [prompts[i] for i in numbers], numbers=numbers, **how)
        group = np.repeat(np.arange(len(given), dtype=np.int32), answers)
        made: Table = {"stop_ids": self.stop_ids, "seq_len": stage.seq_len, "pad_id": self.pad_id}
        return drawn(prompts, replies, **made, record=np.repeat(batch["record"], answers), group=group)


def evaluate(
    stage: RolloutStage, cfg: ModelConfig, params: Params, held_out: Mapping[str, HeldOutPrompts], mesh: Mesh
) -> dict[str, float]:
    """The mean reward of the likeliest replies to held-out prompts, and their length, by domain."""
    found: dict[str, float] = {}
    for domain, held in held_out.items():
        judge, parts = held.prompts.judge, []
        for batch in held.batches:
            made = held.prompts.draw(cfg, params, batch, 1, 0, greedy=True)
            parts.append(made.take(np.flatnonzero(made.record >= 0)))
        rewards = [judge.score(part, 0, held.store)[0] for part in parts]
        sizes = np.concatenate([part.lengths - part.prompts for part in parts])
        found |= {f"reward/{domain}": float(np.concatenate(rewards).mean()), f"tokens/{domain}": float(sizes.mean())}
    return found
