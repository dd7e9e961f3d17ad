"""The feed of a stage that learns from its own replies: draws them, has them rewarded, and gives minibatches of them.

A rollout depends on the stage's seed, the number of the draw, the place of a row in it, and the parameters. It does not
depend on rows_at_once or on devices, except for rounding. The state holds the rows that are being trained on, so that a
stage which was killed in the middle of a rollout goes on to the bit.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tele_jax import files
from tele_jax.align import policy
from tele_jax.align.experience import Arrays, Drawn, joined, pack, rows, unpack
from tele_jax.align.prompts import Prompts, in_parts, load
from tele_jax.align.rollouts import RolloutStage
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, given
from tele_jax.data import order
from tele_jax.data.surroundings import Surroundings
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.losses import rewards_differ
from tele_jax.processes import is_first

SAMPLES = 8  # rows of a file of samples
# complete(stage, rows, rewards float64 [N], group int32 [N], kl_coef) -> arrays [N, S] that the loss reads beside those
# of experience.rows, such as advantages
Complete = Callable[[Any, Mapping[str, np.ndarray], np.ndarray, np.ndarray, float], Arrays]


class RolloutFeed:
    """Minibatches of rollouts, on the mesh; an iterator with the methods of data/feed.py, figures and stepped.

    Attributes:
      taken_over: as data/feed.py has it, of the prompts.
      kl_coef: the weight of the KL divergence, which a kind may adapt.
      fails_everywhere: a UserError of the feed is raised by all processes alike, so that they can save together.
    """

    fails_everywhere = True

    def __init__(
        self,
        stage: RolloutStage,
        prompts: Prompts,
        around: Surroundings,
        complete: Complete,
        *,
        adapt: Callable[[Any, float, float], float] = lambda stage, kl_coef, kl: kl_coef,
        values: bool = False,
    ):
        """Opens the prompts, the rewards and the reference; draws nothing yet.

        complete: see Complete.
        adapt: adapt(stage, kl_coef, mean KL of a sequence in nats) is the kl_coef of the next rollout.
        values: whether the rows have old_values, read off the scalar head.

        Raises:
          UserError: a reward that cannot be opened; a reference without a model to begin with.
        """
        self._stage, self._around, self._complete, self._adapt = stage, around, complete, adapt
        self._has_values = values
        self._opened, self._pad_id = prompts, prompts.pad_id
        self._policy = policy.tempered(around.cfg, stage.temperature)
        self._reference = self._open_reference()
        self._scorer = prompts.open_scorer(around)
        self._prompts = prompts.feed(known=around.known)
        self.taken_over, self.kl_coef = self._prompts.taken_over, stage.kl_coef
        self._draws = self._rollout = self._given = 0  # draws, rollouts begun, minibatches given out
        self._at = self._end = 0  # of the minibatches of the rollout: the next, and where it ends
        self._rows: Arrays = {}
        self._ahead: Drawn | None = None
        self._ahead_figures: dict[str, float] = {}
        self._figures: dict[str, float] = {}  # of the rollout that is trained on
        self._untold: list[dict[str, float]] = []  # of the rollouts that began since `figures` was called
        self._counts = {"reward_failures": 0.0} | ({} if stage.max_kl is None else {"steps_left_out": 0.0})
        self._check: Callable[[], None] = lambda: None
        named = ("batch_size", "answers", "max_new_tokens", "rollout_epochs", "temperature", "stale", "seed")
        self._identity = {name: getattr(stage, name) for name in named}

    def _open_reference(self) -> tuple[ModelConfig, Params] | None:
        stage, around = self._stage, self._around
        if not stage.has_reference:
            return None
        if stage.reference is None and around.base is not None:
            return around.cfg, around.base
        path = around.previous if stage.reference is None else around.checkpoints["reference"]
        return load(given(path, "kl_coef: a model that begins at random has no reference; name one"), around)

    # ---- what the trainer calls --------------------------------------------------------------------------------------

    def __iter__(self) -> "RolloutFeed":
        return self

    def __next__(self) -> Any:
        """Returns the next minibatch on the mesh; draws and rewards a rollout where there is none left.

        Raises:
          UserError: a reward could not be had. The feed is where it was, and its state can be saved.
        """
        stage = self._stage
        if self._at >= self._end:
            self._begin_rollout()
        epoch, part = divmod(self._at, stage.rows // stage.batch_size)
        shuffled = np.random.default_rng((stage.seed, self._rollout, epoch)).permutation(stage.rows)
        chosen = shuffled[part * stage.batch_size : (part + 1) * stage.batch_size]
        self._at += 1
        self._given += 1
        return self._around.place({name: array[chosen] for name, array in self._rows.items()}, stage.batch_size)

    def watch(self, check: Callable[[], None]) -> None:
        """Takes a function that raises where the run was asked to stop; it is called on the way to a rollout.

        The feed is then where it was before that rollout, and its state can be saved.
        """
        self._check = check

    def stepped(self, figures: Mapping[str, jax.Array]) -> None:
        """Ends the rollout after a step that has moved the policy by more than stage.max_kl."""
        if self._stage.max_kl is not None and float(figures["kl_old"]) > self._stage.max_kl:
            self._counts["steps_left_out"] += self._end - self._at
            self._at = self._end

    def figures(self) -> dict[str, float]:
        """Returns the means over the rollouts that began since the last call, and what was counted since.

        Where none began, the means are those of the rollout that is trained on.
        """
        rollouts, counts = self._untold or [self._figures], self._counts
        self._untold, self._counts = [], dict.fromkeys(counts, 0.0)
        return {name: float(np.mean([each[name] for each in rollouts])) for name in rollouts[-1]} | counts

    def positions(self) -> dict[str, order.Position]:
        """Returns the position of every domain of prompts, for a later stage."""
        return self._prompts.positions()

    def close(self) -> None:
        """Ends the processes of rewards and stops reading; the feed cannot be used after."""
        self._prompts.close()
        self._opened.close_scorers()

    def state(self) -> bytes:
        """Returns the place in the prompts, the rollout and the place in it, for `restore`."""
        meta: Table = {"prompts": self._prompts.state(), "identity": self._identity, "figures": self._figures}
        counts = {"draws": self._draws, "rollout": self._rollout, "given": self._given, "at": self._at}
        meta |= counts | {"end": self._end, "kl_coef": self.kl_coef, "ahead_figures": self._ahead_figures}
        meta |= {"untold": self._untold, "counts": self._counts}
        rows = self._rows if self._at < self._end else {}  # what is trained on no more is not kept
        return pack(meta, {"rows": rows, "ahead": {} if self._ahead is None else vars(self._ahead)})

    def restore(self, state: bytes) -> None:
        """Goes to a place that `state` gave; the next minibatch is the one that came after it.

        Raises:
          UserError: the state is of a stage with other settings. DamageError: the bytes are not what `state` gave.
        """
        meta, groups = unpack(state)
        if changed := order.difference(meta["identity"], self._identity):
            raise UserError(f"the rollout was saved for other settings: {changed}; start in another work directory")
        self._prompts.restore(meta["prompts"])
        self._draws, self._rollout, self._given = meta["draws"], meta["rollout"], meta["given"]
        self._at, self._end, self.kl_coef, self._figures = meta["at"], meta["end"], meta["kl_coef"], meta["figures"]
        self._rows, ahead, self._ahead_figures = groups.get("rows", {}), groups.get("ahead"), meta["ahead_figures"]
        self._ahead = None if ahead is None else Drawn(**ahead)
        self._untold, self._counts = meta["untold"], meta["counts"]

    # ---- a rollout ---------------------------------------------------------------------------------------------------

    def _begin_rollout(self) -> None:
        """Draws what is trained on next, and with stale=1 what comes after that, and completes its rows."""
        stage = self._stage
        params = self._around.model()
        with contextlib.ExitStack() as undo:  # where a reward fails or the run is stopped
            undo.callback(self._prompts.restore, self._prompts.state())
            undo.callback(setattr, self, "_draws", self._draws)
            found, told = self._draw(params) if self._ahead is None else (self._ahead, self._ahead_figures)
            ahead, ahead_told = self._draw(params) if stage.stale else (None, {})
            undo.pop_all()
        self._ahead, self._ahead_figures = ahead, ahead_told
        self._finish(params, found, told)
        self._rollout += 1
        self._at, self._end = 0, stage.rollout_epochs * stage.rows // stage.batch_size

    def _draw(self, params: Params) -> tuple[Drawn, dict[str, float]]:
        """Draws replies to the next prompts; with dynamic_draws until enough of them have rewards that differ."""
        stage = self._stage
        found, failures = self._draw_once(params)
        differ, draws = np.asarray(rewards_differ(found.rewards, found.group)), 1
        while draws <= stage.dynamic_draws and differ.sum() < stage.rows:
            more, failed = self._draw_once(params)
            found, failures, draws = joined([found, more]), failures + failed, draws + 1
            differ = np.asarray(rewards_differ(found.rewards, found.group))
        # Groups whose rewards differ come first; where they are too few, others fill up the rollout.
        chosen = np.argsort(~differ, kind="stable")[: stage.rows] if stage.dynamic_draws else np.arange(stage.rows)
        told = {"draws": float(draws), "reward_failures": float(failures)}
        if stage.answers > 1:
            told["equal_groups"] = 1 - float(differ.mean())
        found = found.take(chosen)
        if stage.overlong_tokens:  # rewards are compared above as they came
            over = found.lengths - found.prompts - (stage.max_new_tokens - stage.overlong_tokens)
            found.rewards[:] -= np.clip(over / stage.overlong_tokens, 0, 1)
        return found, told

    def _draw_once(self, params: Params) -> tuple[Drawn, int]:
        """Draws and rewards `answers` replies to each prompt of the next batch."""
        stage, batch = self._stage, next(self._prompts)
        seed = int(np.random.SeedSequence((stage.seed, self._draws)).generate_state(1)[0])
        self._draws += 1
        found = self._opened.draw(self._policy, params, batch, stage.answers, seed, greedy=False)
        self._check()
        found.rewards[:], failures = self._scorer.score(found, seed, self._opened.store)
        return found, failures

    def _finish(self, params: Params, found: Drawn, told: dict[str, float]) -> None:
        """Makes the rows of a rollout, what the policy and the reference say of them, and the figures."""
        stage, around = self._stage, self._around
        made = rows(found, unit=max(1, stage.seq_len // 8), pad_id=self._pad_id)
        logp, values = in_parts(
            around, stage, made, lambda part: policy.evaluate(self._policy, params, part, self._has_values)
        )
        mask = made["loss_weights"] > 0
        made["old_logp"] = np.where(mask, logp, 0).astype(np.float32)
        if self._has_values:
            made["old_values"] = np.where(mask, values, 0).astype(np.float32)
        if self._reference is not None:
            cfg, reference = self._reference
            cfg = policy.tempered(cfg, stage.temperature)
            logp, _ = in_parts(around, stage, made, lambda part: policy.evaluate(cfg, reference, part, False))
            made["ref_logp"] = np.where(mask, logp, 0).astype(np.float32)
        made |= self._complete(stage, made, found.rewards, found.group, self.kl_coef)
        if stage.mask_cut:
            made["loss_weights"] = made["loss_weights"] * found.stopped[:, None]
        self._rows, self._figures = made, figures(found, made, mask) | told | {"kl_coef": self.kl_coef}
        self._counts["reward_failures"] += self._figures.pop("reward_failures")
        self._untold.append(self._figures)
        if self._reference is not None:
            self.kl_coef = self._adapt(stage, self.kl_coef, self._figures["kl_sequence"])
        if stage.samples_every and self._rollout % stage.samples_every == 0 and is_first():
            self._write_samples(found)

    def _write_samples(self, found: Drawn) -> None:
        """Writes prompts, replies and rewards of SAMPLES rows to samples/STEP.jsonl; STEP: the steps that were made.

        The first reply to every prompt comes before the second to any.
        """
        _, firsts, group = np.unique(found.group, return_index=True, return_inverse=True)
        place = np.arange(len(group)) - firsts[group]  # in its group, whose rows are adjacent
        chosen = found.take(np.argsort(place, kind="stable")[:SAMPLES])
        lines = [
            {"prompt": one.prompt, "reply": one.reply, "reward": reward, "tokens": int(size), "stopped": bool(stopped)}
            for one, reward, size, stopped in zip(
                self._scorer.asked(chosen, self._opened.store),
                chosen.rewards.tolist(),
                chosen.lengths - chosen.prompts,
                chosen.stopped,
            )
        ]
        path = self._around.directory / "samples" / f"{self._given}.jsonl"
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        files.write_file(path, text)


def figures(found: Drawn, made: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, float]:
    """Figures of a rollout: rewards, lengths, and divergences of the policy that drew, in nats a token.

    With r = p_reference / p_policy of a drawn token, kl is the mean of -log r, an estimate of KL(policy || reference),
    and kl_forward that of r log r - (r - 1), of KL(reference || policy), both after the drawn prefixes. kl_sequence is
    kl summed over a reply. sampler_gap: mean difference of the log-probabilities in drawing and in training.
    """
    sizes = (found.lengths - found.prompts).astype(np.float64)
    told = {
        "reward": float(found.rewards.mean()),
        "reward_std": float(found.rewards.std()),
        "reply_tokens": float(sizes.mean()),
        "cut_share": 1 - float(found.stopped.mean()),
        "sampler_gap": float(np.abs(made["old_logp"] - made["sampler_logp"])[mask].mean()),
    }
    if "ref_logp" in made:
        apart = (made["old_logp"].astype(np.float64) - made["ref_logp"]) * mask
        ratio = np.exp(np.minimum(-apart[mask], 30.0))
        told["kl"] = float(apart[mask].mean())
        told["kl_forward"] = float((ratio * -apart[mask] - (ratio - 1)).mean())
        told["kl_sequence"] = float(apart.sum(axis=1).mean())
    return told
