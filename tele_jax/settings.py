"""Frozen settings that pages give: data, optimizer, schedule, mesh, and the fields that all training stages share.

Each kind of stage adds its own fields in its own file (stages/), which also reads whole pages.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from tele_jax.config import FILLED, Filled, ModelConfig, check_seed, checked, from_dict, require, require_positive


@checked
class SourceConfig:
    """One domain of text: where its files are, or which seqio Task gives it, and how often it is drawn."""

    files: tuple[str, ...] = ()  # glob patterns; needed unless a task or a cache gives the text
    # format of the files. text: a file is one document; jsonl: a line is {"text": ...}; dialogues: a line, or an
    # element of a file that is one JSON array, is a dialogue in one of the formats that follow, as its keys say; see
    # docs/fine_tuning.md. pairs (chosen and rejected answers, rankings) and prompts: see docs/alignment.md
    format: Literal[
        "text", "jsonl", "dialogues", "messages", "sharegpt", "alpaca", "telechat", "telechat2", "pairs", "prompts"
    ] = "text"
    rate: float = 1.0  # relative rate; the mixture divides by the sum. 0: the domain is left out
    # Fine-tuning, instead of rates: how often an epoch has each dialogue. The integer part is copies, the fraction the
    # share of the dialogues that has one more (TeleChat's weights of files). Such domains are shuffled together.
    copies: float | None = None
    validation_files: tuple[str, ...] = ()  # held-out text, for bits per byte; none: the domain is not evaluated
    # Instead of files: a seqio Task or Mixture by its name, registered in a module that the page imports. A Mixture
    # becomes one domain for each of its tasks, NAME.TASK, which share `rate` as the Mixture says.
    task: str = ""
    split: str = "train"  # split of the task to train on
    validation_split: str = ""  # split of the task that is held out, as validation_files are

    def __post_init__(self):
        require(math.isfinite(self.rate) and self.rate >= 0, f"rate={self.rate} must be 0 or above, and finite")
        require(
            self.copies is None or (math.isfinite(self.copies) and self.copies > 0),
            f"copies={self.copies} must be above 0, and finite",
        )
        require(self.copies is None or self.rate == 1, "rate and copies: a domain has one of the two; leave one out")
        require(not (self.files and self.task), "files and task: a domain is read from one of the two; leave one out")
        require(
            not (self.validation_files and self.validation_split),
            "validation_files and validation_split: a domain is evaluated on one of the two; leave one out",
        )
        require(not (self.task and not self.split), "split must name a split of the task")
        require(
            not self.task or self.split != self.validation_split,
            f"validation_split={self.validation_split!r} is the split that is trained on",
        )


@checked
class DialogueConfig:
    """Settings of dialogues: how records are read, and which tokens are learned; see docs/fine_tuning.md."""

    learned: Literal["all", "last"] = "all"  # which answers are learned; what a message says of itself counts as well
    next_user: bool = False  # learns the <_user> that follows an answer, as the released trainer does
    # What becomes of a dialogue that is longer than a row of fine-tuning. split: several samples at its turns, each
    # with the system message; cut: the oldest turns go, as in the released code; drop: it is left out.
    too_long: Literal["split", "cut", "drop"] = "split"
    system: str | None = None  # system message of dialogues that have none
    max_rejected: float = 1.0  # largest share of the dialogues of a domain that may be unusable; 1: all but one

    def __post_init__(self):
        require(self.system is None or bool(self.system), "system is empty; leave it out")
        require(0 <= self.max_rejected <= 1, f"max_rejected={self.max_rejected} must be in [0, 1]")


DEFAULT_DIALOGUES = DialogueConfig()


@checked
class DataConfig:
    """A mixture of domains and the tokenizer that reads it.

    With `cache`, rows come from there, and only what is held out is read. `sources` may then choose among the cache's
    domains and give other rates; empty, it is all of them as the cache was made. Their `files` or `task` may be left
    out; where they are given, they have to be those that the cache was made from.
    """

    tokenizer: str  # path of a SentencePiece model, or of a JSON file of the `tokenizers` library
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)  # where each domain comes from
    cache: str | None = None  # directory that `tele data cache` wrote; None: files are read while training goes on
    template: str | None = None  # format of dialogues, see data/templates.py; None: as the tokenizer says
    dialogues: DialogueConfig = DEFAULT_DIALOGUES  # how dialogues are read, and which of their tokens are learned
    eval_bytes: int = 200_000  # UTF-8 bytes of held-out text per domain
    # A domain that an earlier stage (or the run that config.start is of) has read goes on where it was left. True: this
    # stage reads everything from the beginning.
    restart: bool = False

    def __post_init__(self):
        require(self.cache is not None or len(self.sources) > 0, "sources must name at least one domain, or give cache")
        drawn = {name: source for name, source in self.sources.items() if source.rate > 0}
        require(bool(drawn) or not self.sources, "sources: rate=0 leaves every domain out")
        object.__setattr__(self, "sources", drawn)
        counted = [name for name, source in drawn.items() if source.copies is not None]
        without = ", ".join(name for name in drawn if name not in counted)
        require(len(counted) in (0, len(drawn)), f"sources: {', '.join(counted)} have copies, and {without} have none")
        for name, source in self.sources.items():
            require(
                self.cache is not None or len(source.files) > 0 or bool(source.task),
                f"sources.{name}.files must name at least one pattern, or sources.{name}.task a seqio Task",
            )
            require(
                self.cache is not None or bool(source.task) or not source.validation_split,
                f"sources.{name}.validation_split is of a seqio Task, and sources.{name}.task names none",
            )
            require(
                name.isprintable() and name[:1] not in ("", ".") and not set(name) & set("/\\"),
                f"sources: {name!r} is no name for a domain: it becomes a directory of a cache",
            )
        require_positive(self, "eval_bytes")


@checked
class CacheConfig:
    """Settings of `tele data cache`, which makes rows of one length of all domains of `data`."""

    data: DataConfig  # text, its mixture and its tokenizer
    seq_len: int  # tokens in a row
    kind: Literal["pretrain", "sft"] = "pretrain"  # what the rows are for: all tokens are learned, or answers alone
    seed: int = 0  # seed of the order of the documents inside a shard
    # Text that goes into one shard of rows, in bytes. None: 65,536 * seq_len, about 16,384 rows: a shard that is read
    # at random keeps 8 bytes a row in memory, and looks through them at every read.
    shard_bytes: Filled[int] = FILLED

    def __post_init__(self):
        require_positive(self, "seq_len")
        check_seed(self.seed)
        require(self.data.cache is None, "data.cache: a cache is made from files, not from another cache")
        if self.shard_bytes is None:
            object.__setattr__(self, "shard_bytes", 65_536 * self.seq_len)
        require_positive(self, "shard_bytes")


@checked
class OptimizerConfig:
    """AdamW in muP groups (arXiv 2404.16645). Learning rates are peaks, at the muP base width."""

    learning_rate: float  # peak rate of vector-like parameters
    matrix_learning_rate: float | None = None  # peak rate of matrix-like ones, divided by r; None: learning_rate
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # is added to the root of the second moment
    weight_decay: float = 0.0  # decay of kernels and tables; nothing else decays
    clip_norm: float = 1.0  # largest global norm of the gradient
    new_warmup_steps: int = 0  # steps over which parameters that growth added warm up
    # Steps that AdamW's bias correction counts for an entry that a growth added. entry: those since the growth; state:
    # all steps of the optimizer state, those before the growth included.
    bias_correction: Literal["entry", "state"] = "entry"
    # What learns. new: only what the growth that the stage goes on from added (as LLaMA-Pro trains its new blocks); all
    # else stays as it is, and neither decays nor counts in clip_norm.
    trained: Literal["all", "new"] = "all"
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # stored dtype; computed in float32 or better

    def __post_init__(self):
        require_positive(self, "learning_rate", "eps", "clip_norm")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        require(self.new_warmup_steps >= 0, f"new_warmup_steps={self.new_warmup_steps} must not be negative")
        # bfloat16 resolves 2^-8 of a value: a moment that moves by less a step would stick.
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be in [0, 1)")
            require(
                self.moment_dtype == "float32" or 1 - getattr(self, name) >= 2**-6,
                f"moment_dtype='bfloat16' needs {name} of at most 0.984, not {getattr(self, name)}",
            )


@checked
class ScheduleConfig:
    """Learning rate over a stage, as a factor on the peak. `warmup`, `decay` and `total` are in `unit`."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"  # shape after the warm-up; wsd decays at the end
    unit: Literal["steps", "tokens"] = "steps"  # unit of warmup, decay and total
    warmup: int = 0  # length of the linear rise to the peak
    warmup_share: float = 0.0  # instead of warmup: the share of the total that the rise takes
    total: int | None = None  # length of the schedule; None: that of the stage
    decay: int | None = None  # length of the final decay of wsd; None: a tenth of total
    final: float = 0.1  # factor on the peak at the end

    def __post_init__(self):
        require(self.warmup >= 0, f"warmup={self.warmup} must not be negative")
        require(0 <= self.warmup_share < 1, f"warmup_share={self.warmup_share} must be in [0, 1)")
        require(not (self.warmup and self.warmup_share), "warmup and warmup_share: give one of the two")
        require(0 <= self.final <= 1, f"final={self.final} must be in [0, 1]")
        for name in ("total", "decay"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be above 0")


@checked
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices that the run takes."""

    data: int = 1  # copies of the model; the batch is cut over them
    fsdp: int = 1  # devices that a copy is cut over, with the batch
    tensor: int = 1  # devices that heads, mlp and vocabulary are cut over

    def __post_init__(self):
        require_positive(self, "data", "fsdp", "tensor")


@checked
class TasksConfig:
    """Tasks of the harness that are evaluated while a stage trains; see docs/evaluation.md."""

    names: dict[str, float]  # tasks, and of each the share of its items that is taken, in (0, 1]
    data: str | None = None  # directory with their files, as for `tele eval harness`; None: the harness downloads them
    num_fewshot: int | None = None  # examples before each question; None: as the task says
    chat: bool = False  # asks in the dialogue form of the model
    every: int | None = None  # steps between; None: with every evaluation of held-out text

    def __post_init__(self):
        require(bool(self.names), "names is empty; name a task, or leave the table out")
        for name, share in self.names.items():
            require(0 < share <= 1, f"names.{name}={share} is a share of the items, above 0 and at most 1")
        require(self.every is None or self.every > 0, f"every={self.every} must be above 0")


@checked
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): a kernel W acts as W + scale * a b, of which a and b are trained.

    Rank and targets are by default those of TeleChat's released fine-tuning; alpha, twice the rank, is ours.
    """

    rank: int = 8  # size of the axis between a and b
    alpha: float = 16.0  # scale = alpha / rank
    # Kernels inside layers, by parts of their names: attn, mlp, q, attn.q, layers.attn.q; or self_attention., the name
    # of attn in TeleChat's release.
    targets: tuple[str, ...] = ("attn",)
    rank_stabilized: bool = False  # scale = alpha / sqrt(rank), arXiv 2312.03732

    def __post_init__(self):
        require_positive(self, "rank", "alpha")
        require(bool(self.targets), "targets is empty; name kernels, such as attn")

    @property
    def scale(self) -> float:
        """The factor on a b."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@checked
class TrainStage:
    """Fields of every kind of stage that trains; a kind may add others (stages/)."""

    kind: str  # a module of stages/
    data: DataConfig  # text, its mixture and its tokenizer
    optimizer: OptimizerConfig  # AdamW and its rates
    batch_size: int  # sequences per step, over all devices
    seq_len: int  # tokens in a row
    steps: Filled[int] = FILLED  # length of the stage; None: as `epochs` says
    # Instead of steps, in fine-tuning: how often each dialogue is seen. The steps follow when the data is opened.
    epochs: float | None = None
    model: ModelConfig | None = None  # config of the model; None: as the stage that this one goes on from left it
    after: str | None = None  # earlier stage of the run whose model this one continues; None: the one right before
    # What the backward pass recomputes, from this stage on; None: as `model` says.
    remat: Literal["none", "full", "attention", "products", "offload"] | None = None
    # Form of attention, from this stage on; None: as `model` says.
    attention: Literal["auto", "reference", "xla", "blocks", "splash"] | None = None
    schedule: ScheduleConfig = ScheduleConfig()  # the learning rate over the stage
    microbatches: int = 1  # parts of the batch that gradients are accumulated over
    mask_start: int = 0  # when the masks of a growth by policy msg begin to rise, in mask_unit
    mask_ramp: int = 0  # length of the rise from 0 to 1, in mask_unit; with an order, that of each axis in turn
    mask_unit: Literal["steps", "tokens"] = "steps"  # a token is any position of a batch, whatever its weight
    mask_order: str | tuple[str, ...] = "together"  # or axes that grow one after another: ("embed", "mlp", ...)
    mask_shape: Literal["linear", "cosine"] = "linear"  # shape of the rise, see growth.MaskSchedule
    lora: LoraConfig | None = None  # trains low-rank adapters on the model of the previous stage, and nothing else
    reset_optimizer: bool = False  # drops the moments of the stage before
    seed: int = 0  # seed of fresh parameters and of the order of the data
    log_every: int = 10  # steps between lines of figures
    eval_every: int = 0  # steps between evaluations; 0: at the start and the end of the stage only
    tasks: TasksConfig | None = None  # tasks of the harness that are evaluated on the way
    # A figure of the evaluations, bits_per_byte/DOMAIN or tasks/TASK/METRIC, whose best checkpoint stays in best/.
    keep_best: str | None = None
    checkpoint_every: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2  # latest checkpoints that are kept

    def __post_init__(self):
        require_positive(self, "batch_size", "seq_len", "microbatches", "log_every", "checkpoint_every")
        require_positive(self, "keep_checkpoints")
        require(self.steps is not None or self.epochs is not None, "steps is missing (or, in fine-tuning, epochs)")
        require(self.steps is None or self.steps > 0, f"steps={self.steps} must be above 0")
        finite = self.epochs is None or 0 < self.epochs < math.inf
        require(finite, f"epochs={self.epochs} must be above 0, and finite")
        undivided = f"batch_size={self.batch_size} does not divide into microbatches={self.microbatches}"
        require(self.batch_size % self.microbatches == 0, undivided)
        require(self.eval_every >= 0, f"eval_every={self.eval_every} must not be negative")
        if self.keep_best is not None:
            what, _, of = self.keep_best.partition("/")
            task, _, metric = of.partition("/")
            known = what in self.measures or (what == "tasks" and self.tasks and task in self.tasks.names)
            grows = metric.startswith(("acc", "exact_match", "f1", "last_number"))
            require(
                what != "tasks" or not metric or grows,
                f"keep_best={self.keep_best!r}: a checkpoint is kept by the share of right answers (acc, acc_norm, "
                "exact_match, f1, last_number) or by bits per byte",
            )
            require(
                bool(known and of),
                f"keep_best={self.keep_best!r}: expected {self.measures[0]}/DOMAIN, or tasks/TASK/METRIC of one of "
                "`tasks`",
            )
        check_seed(self.seed)
        require(
            not (self.fresh_optimizer and self.optimizer.new_warmup_steps),
            "optimizer.new_warmup_steps needs the moments of the stage before; sft, lora, reset_optimizer start anew",
        )
        require(
            self.lora is None or not self.mask_ramp,
            "lora and mask_ramp: lora freezes the parameters that mask_ramp would open, so new units would enter "
            "untrained; open the masks in a stage without lora",
        )
        require(
            self.lora is None or self.optimizer.trained == "all",
            "lora and optimizer.trained='new': lora trains adapters, and nothing that growth added; leave one out",
        )
        require(self.mask_start >= 0 and self.mask_ramp >= 0, "mask_start and mask_ramp must not be negative")
        together = isinstance(self.mask_order, str)
        other = f"mask_order={self.mask_order!r} is neither 'together' nor a list of axes"
        require(not together or self.mask_order == "together", other)
        if self.steps is None:  # checked again when they are known
            return
        end = self.mask_start + self.mask_ramp * (1 if together else len(self.mask_order))
        length = self.steps * (1 if self.mask_unit == "steps" else self.tokens_per_step)
        require(
            end <= length,
            f"the mask ramp ends after the last step: at {end} {self.mask_unit}, but the stage has {length}; give more",
        )

    def model_after(self, before: ModelConfig | None) -> ModelConfig | None:
        """The model that this stage trains after one that left `before`; None where nothing says which."""
        cfg = self.model or before
        how = {"remat": self.remat, "attention": self.attention}
        how = {name: value for name, value in how.items() if value is not None}
        return cfg.replace(**how) if cfg is not None and how else cfg

    @property
    def measures(self) -> tuple[str, ...]:
        """Figures of the held-out data of a domain by which keep_best may choose."""
        return ("bits_per_byte",)

    @property
    def models(self) -> dict[str, str]:
        """The other models that a stage reads, by field: an earlier stage of the run, or the path of a checkpoint."""
        return {}

    @property
    def fresh_optimizer(self) -> bool:
        """True where the moments of the stage before are dropped; a kind may always say so."""
        return self.reset_optimizer or self.lora is not None

    @property
    def num_rows(self) -> int:
        """Rows of a batch."""
        return self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Positions in a batch, counted in the loss or not."""
        return self.batch_size * self.seq_len

    @property
    def mask_fields(self) -> list[str]:
        """The mask fields that the page sets; a kind may have fields of its own whose names begin so, too."""
        fields = [f for f in dataclasses.fields(TrainStage) if f.name.startswith("mask_")]
        return [f.name for f in fields if getattr(self, f.name) != f.default]


@checked
class GrowStage:
    """Growth of what the stage before left; `model` holds the fields that change."""

    kind: Literal["grow"]  # the file in stages/ that carries the stage out
    model: dict[str, Any]  # fields of the model that change
    after: str | None = None  # earlier training stage whose model is grown; None: the stage right before, of any kind
    policy: str = "exact"  # how new entries are made, see docs/growth.md
    layers: str | tuple[int, ...] = "uniform"  # uniform, last, middle or distance; or the source of every layer
    epsilon: Literal["scale", "keep"] = "scale"  # what becomes of the norm's epsilon, see growth.plan
    seed: int = 0  # seed of fresh values
    optimizer_state: bool = True  # grows the moments as well; False: the next stage starts with new ones
    tolerance: float | None = None  # largest logit difference allowed; None: what rounding explains in the dtype

    def __post_init__(self):
        check_seed(self.seed)


def cache_config(page: Mapping[str, Any] | ConfigDict) -> CacheConfig:
    """Reads a page for `tele data cache` (configs/data/).

    Raises:
      UserError: an unknown or missing key, or a value that cannot be.
    """
    return from_dict(CacheConfig, dict(page.items()), "config")
