"""The page of a selection as frozen dataclasses."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from tele_jax.clean.settings import DuplicatesConfig, OverlapConfig
from tele_jax.config import check_seed, checked, from_dict, require, require_positive

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Stage = Literal["rules", "overlap", "duplicates", "difficulty", "perplexity"]
STAGES: tuple[Stage, ...] = ("rules", "overlap", "duplicates", "difficulty", "perplexity")


@checked
class SourceConfig:
    """Files of dialogues."""

    files: tuple[str, ...]  # glob patterns
    # dialogues: each record tells its format; or the name of the one format; see docs/fine_tuning.md
    format: Literal["dialogues", "messages", "sharegpt", "alpaca", "telechat", "telechat2"] = "dialogues"
    # category of all samples; None: the field "category" of each record, or where it has none the name of the source
    category: str | None = None

    def __post_init__(self):
        require(bool(self.files), "files: give at least one pattern")
        require(self.category is None or bool(self.category.strip()), f"category={self.category!r} is empty")


@checked
class RulesConfig:
    """Properties that a sample must have. A token here is a word or a Han character. Thresholds are ours."""

    min_question_tokens: int = 1  # of system and questions together
    max_question_tokens: int = 4096  # of system and questions together
    min_answer_tokens: int = 1  # of all answers together
    max_answer_tokens: int = 4096  # of all answers together
    same_language: bool = True  # an answer is in the language of its question; code may follow any
    any_language: tuple[str, ...] = ()  # categories, such as translation, whose answers may be in another language
    truncated: bool = True  # drop answers that end inside a sentence or a bracket
    any_end: tuple[str, ...] = ()  # categories, such as quotations, whose answers may end anywhere
    repetition: bool = True  # drop answers that say the same again and again, by the limits of the cleaning room
    echo: bool = True  # drop answers identical to the question
    # drop answers that begin with one of these, in any case
    refusals: tuple[str, ...] = (
        "as an ai", "i'm sorry, but", "i am sorry, but", "i cannot help", "i can't help", "抱歉，我无法",
        "对不起，我无法", "作为一个人工智能", "作为一个ai", "作为ai",
    )  # fmt: skip

    def __post_init__(self):
        require_positive(self, "max_question_tokens", "max_answer_tokens")
        for what in ("question", "answer"):
            low, high = (getattr(self, f"{end}_{what}_tokens") for end in ("min", "max"))
            require(low <= high, f"min_{what}_tokens={low} is above max_{what}_tokens={high}")


@checked
class ModelConfig:
    """The model whose losses and states judge the samples."""

    checkpoint: str  # step, stage or work directory
    tokenizer: str | None = None  # its file; None: searched in the checkpoint and the directories above it
    # how a dialogue is written: plain is one message a line, for a model that has not learned the markers of a template
    form: Literal["plain", "template"] = "plain"
    template: str | None = None  # name of the template; None: as the tokenizer and the checkpoint say
    layer: int | None = None  # the states after this many layers; None: after all
    max_tokens: int | None = None  # longer samples are dropped, and counted; None: max_seq_len of the model

    def __post_init__(self):
        for name in ("layer", "max_tokens"):
            require(getattr(self, name) is None or getattr(self, name) > 0, f"{name} must be above 0")
        require(self.template is None or self.form == "template", "template is named, but form is not 'template'")


@checked
class BandConfig:
    """A range of values, both ends included; None: no end."""

    min: float | None = None  # least value
    max: float | None = None  # largest value

    def __post_init__(self):
        low, high = self.min, self.max
        require(low is None or high is None or low <= high, f"min={low} is above max={high}")


@checked
class ClustersConfig:
    """Groups of alike samples, and the choice inside each."""

    count: int = 100  # clusters of k-means
    features: Literal["hashed", "states"] = "hashed"  # of character n-grams, or the states of the model
    dims: int = 64  # of hashed features
    fit_samples: int = 20_000  # most samples that the features and the centres are computed from, chosen by the seed
    # samples of a cluster: random ones; nearest to the centre; hardest: of the highest difficulty; k_centre: always the
    # farthest from those before it
    within: Literal["random", "nearest", "hardest", "k_centre"] = "random"
    balance: Literal["equal", "proportional"] = "equal"  # samples of a cluster within its category

    def __post_init__(self):
        require_positive(self, "count", "dims", "fit_samples")
        require(self.fit_samples >= self.count, f"fit_samples={self.fit_samples} is below count={self.count}")


def _shingles() -> DuplicatesConfig:
    # Shingles of 3 tokens, where cleaning has 5: samples are short, and one changed word is a part of 3 shingles.
    return DuplicatesConfig(methods=("exact", "minhash"), ngram=3, min_shingles=6)


@checked
class SelectConfig:
    """A selection: what is read, what is dropped, and how many are chosen in which way."""

    sources: dict[str, SourceConfig]  # files, by the name of the source
    count: int  # samples to select
    # clusters, or a baseline: random, stratified by category, longest answers
    method: Literal["random", "stratified", "longest", "clusters"] = "clusters"
    seed: int = 0  # of random choices and of k-means
    stages: tuple[Stage, ...] = (
        "rules",
        "duplicates",
    )  # rules, overlap, duplicates, difficulty, perplexity: what drops samples
    quotas: dict[str, int] = dataclasses.field(default_factory=dict)  # samples of a category; others share what is left
    balance: Literal["proportional", "equal"] = "proportional"  # shares of the categories without a quota
    rules: RulesConfig = RulesConfig()  # what a sample must be
    overlap: OverlapConfig | None = None  # files of benchmarks, whose n-grams no sample may have
    duplicates: DuplicatesConfig = dataclasses.field(default_factory=_shingles)  # what is a copy
    model: ModelConfig | None = None  # for losses and states
    # loss of the answers after their questions, divided by their loss alone: above 1 the question does not help
    difficulty: BandConfig = BandConfig(max=1.0)
    perplexity: BandConfig = BandConfig()  # of the answers after their questions, per token
    clusters: ClustersConfig = ClustersConfig()  # for the method clusters, and for the picture of the report
    max_unreadable: float = 0.01  # share of records that may be no dialogues before the run stops

    def __post_init__(self):
        require(bool(self.sources), "sources: name at least one")
        require_positive(self, "count")
        check_seed(self.seed)
        require(len(set(self.stages)) == len(self.stages), f"stages: one is named twice in {self.stages}")
        order = tuple(name for name in STAGES if name in self.stages)
        require(self.stages == order, f"stages: their order is {', '.join(order)}")
        require(
            "overlap" not in self.stages or self.overlap is not None, "stages names 'overlap', but there is no table"
        )
        require(0 <= self.max_unreadable <= 1, f"max_unreadable={self.max_unreadable} must be in [0, 1]")
        for name, quota in self.quotas.items():
            require(quota >= 0, f"quotas.{name}={quota} must not be negative")
        total = sum(self.quotas.values())
        require(total <= self.count, f"quotas: {total:,} in all, but count={self.count:,}")
        if self.model is None:
            clusters = self.method == "clusters"
            for named, what in (
                ("difficulty" in self.stages, "the stage 'difficulty'"),
                ("perplexity" in self.stages, "the stage 'perplexity'"),
                (self.clusters.features == "states", "clusters.features='states'"),
                (clusters and self.clusters.within == "hardest", "clusters.within='hardest'"),
            ):
                require(not named, f"{what} needs a model; give model=dict(checkpoint=...)")

    def of_results(self) -> "SelectConfig":
        """Returns the page with one value for everything that only chooses among samples that were read and scored.

        Pages for which this is equal share the results of chunks.
        """
        return dataclasses.replace(
            self,
            count=1,
            method="random",
            stages=tuple(name for name in self.stages if name not in ("difficulty", "perplexity")),
            quotas={},
            balance="equal",
            difficulty=BandConfig(),
            perplexity=BandConfig(),
            clusters=ClustersConfig(count=1, dims=self.clusters.dims, fit_samples=self.clusters.fit_samples),
            max_unreadable=0.0,
        )


def select_config(page: "Mapping[str, Any] | ConfigDict") -> SelectConfig:
    """Reads a page (ConfigDict or dict); raises UserError with the path of what is wrong."""
    table = dict(page.items())
    defaults = {"duplicates": dataclasses.asdict(_shingles()), "difficulty": {"max": 1.0}}
    for name, values in defaults.items():  # a table replaces the keys that it names
        if hasattr(table.get(name), "items"):
            table[name] = {**values, **dict(table[name].items())}
    return from_dict(SelectConfig, table)
