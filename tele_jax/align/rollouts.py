"""Settings of stages that learn from replies which they draw themselves.

At temperature T the policy is the model whose logits are divided by T, in drawing and in training alike (policy.py);
top-k, top-p and penalties would draw from another distribution than the one that is trained, and are not offered.
"""

import math

import jax
import numpy as np

from tele_jax.align.rewards import RewardConfig
from tele_jax.config import checked, require, require_positive
from tele_jax.settings import TrainStage


@checked
class RolloutStage(TrainStage):
    """Fields of kinds that draw replies to prompts, reward them and train on them; beside those of every stage.

    A rollout draws `answers` replies to each of `rollout_prompts` prompts. Its rows are trained on `rollout_epochs`
    times, batch_size of them a step, in an order that is drawn anew for every epoch. seq_len is the most that a prompt
    and its reply may take together.
    """

    reward: RewardConfig  # what rewards replies
    evaluation_reward: RewardConfig | None = None  # what judges replies to held-out prompts; None: reward
    rollout_prompts: int  # prompts in a rollout
    max_new_tokens: int  # tokens of a reply at most, the one that ends it included
    answers: int = 1  # replies that are drawn to a prompt
    temperature: float = 1.0  # divides the logits, in drawing and in training
    rollout_epochs: int = 1  # how often the rows of a rollout are trained on
    rows_at_once: int | None = None  # replies that are drawn at once, for memory; None: all of a rollout
    # Model that the policy is kept near: an earlier stage, or a checkpoint. None: the model that the stage begins with,
    # with lora the one without adapters. It is loaded where kl_coef is not 0, or this is given.
    reference: str | None = None
    kl_coef: float = 0.0  # weight of the KL divergence from the reference
    # Limit of the importance weights exp(log-probability at the start of training - that of the sampler) that multiply
    # the losses of the policy (truncated, arXiv 1802.01561). None: no such weights.
    sampler_cap: float | None = None
    stale: int = (
        0  # 1: the next rollout is drawn before the current one is trained on, so its policy is one rollout old
    )
    # The rest of a rollout is left out once the policy has moved so far from the one at its start: the mean of k3, nats
    # a token, of a step. None: never. Every step is then waited for.
    max_kl: float | None = None
    # Most draws, beyond the first, that replace prompts whose replies have equal rewards (DAPO). The rewards are
    # compared as they came, before overlong_tokens and kl_in="reward". Where too few prompts are left, the rest of the
    # rollout is filled with those whose rewards are equal.
    dynamic_draws: int = 0
    mask_cut: bool = (
        False  # replies that are cut at max_new_tokens count in the rewards of their group, not in the loss
    )
    # Number of tokens before max_new_tokens over which a penalty, taken off the reward, grows from 0 to 1
    # (arXiv 2503.14476, equation 13).
    overlong_tokens: int = 0
    samples_every: int = 10  # rollouts between files of samples, samples/STEP.jsonl; 0: none

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "rollout_prompts", "max_new_tokens", "answers", "temperature", "rollout_epochs")
        for name in ("rows_at_once", "sampler_cap", "max_kl"):
            require(getattr(self, name) is None or getattr(self, name) > 0, f"{name} must be above 0, or None")
        for name in ("kl_coef", "dynamic_draws", "overlong_tokens", "samples_every"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name}={value} must be a number of at least 0")
        require(self.stale in (0, 1), f"stale={self.stale}: 0, or 1 for the rollout before")
        require(
            self.stale == 0 or self.sampler_cap is not None,
            "stale=1: replies of an older policy need importance weights; give sampler_cap, such as 2.0",
        )
        require(
            self.overlong_tokens < self.max_new_tokens,
            f"overlong_tokens={self.overlong_tokens} must be below max_new_tokens={self.max_new_tokens}",
        )
        require(
            self.max_new_tokens < self.seq_len,
            f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in seq_len={self.seq_len}",
        )
        require(
            self.rows % self.batch_size == 0,
            f"batch_size={self.batch_size} does not divide the {self.rows} rows of a rollout (rollout_prompts="
            f"{self.rollout_prompts} times answers={self.answers})",
        )
        require(self.epochs is None, "epochs: a stage that draws its replies has steps")
        require(
            not self.mask_ramp, "mask_ramp: open the masks of a growth in a stage before; replies are drawn without"
        )

    @property
    def rows(self) -> int:
        """Rows of a rollout."""
        return self.rollout_prompts * self.answers

    def drawn_at_once(self) -> tuple[int, int]:
        """Replies that are drawn together, and the most tokens of each with its prompt."""
        return min(self.rows_at_once or self.rows, self.rows), self.seq_len

    def shapes(self, *more: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a minibatch of the longest rows; `more` of float32 beside those of all kinds."""
        singles = ("loss_weights", "sampler_logp", "old_logp", *(["ref_logp"] if self.has_reference else []), *more)
        dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32)
        dtypes |= dict.fromkeys(singles, np.float32)
        rows = (self.batch_size, self.seq_len)
        return {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in dtypes.items()}

    @property
    def measures(self) -> tuple[str, ...]:
        return "reward", "tokens"

    @property
    def has_reference(self) -> bool:
        """True where a reference is loaded."""
        return self.kl_coef > 0 or self.reference is not None

    @property
    def models(self) -> dict[str, str]:
        """The models that the stage reads beside its own, see TrainStage.models."""
        judge = None if self.evaluation_reward is None else self.evaluation_reward.model
        found = {"reference": self.reference, "reward.model": self.reward.model, "evaluation_reward.model": judge}
        return {field: model for field, model in found.items() if model is not None}

    @property
    def fresh_optimizer(self) -> bool:
        return True
