"""The page of a cleaning run as frozen dataclasses: sources, the order of stages, and one table per stage."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from tele_jax.config import checked, from_dict, require, require_positive

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Language = Literal["en", "zh", "code", "other"]
Stage = Literal[
    "extract", "language", "normalise", "rules", "urls", "duplicates", "paragraphs", "quality", "perplexity", "overlap",
    "privacy", "safety",
]  # fmt: skip


def _fraction(config: object, *names: str) -> None:
    for name in names:
        require(0 <= getattr(config, name) <= 1, f"{name}={getattr(config, name)} must be in [0, 1]")


@checked
class SourceConfig:
    """Files of one kind. Where duplicates meet, the source of the lowest rank keeps its copy; among equals, by name."""

    files: tuple[str, ...]  # glob patterns
    format: Literal["text", "jsonl", "parquet", "html", "warc"]  # how a file is read
    domain: str  # the output directory
    rank: int = 0  # said by number, since a ConfigDict forgets the order of its keys
    language: Language | None = None  # None: identified; else taken as known
    text_field: str = "text"  # jsonl, parquet
    url_field: str = "url"  # jsonl, parquet; a record without it has no URL
    html: bool = False  # jsonl, parquet: the text is HTML
    statuses: tuple[int, ...] = (200,)  # warc: HTTP statuses of responses that are documents; others are counted
    encodings: tuple[str, ...] = ("utf-8",)  # tried in order, each strictly; html and warc pages declare their own

    def __post_init__(self):
        require(bool(self.files), "files: give at least one pattern")
        require(self.domain.replace("-", "_").isidentifier(), f"domain={self.domain!r}: letters, digits, _ and -")
        # What could not be read goes to the directory of this name.
        require(self.domain != "rejects", "domain='rejects': this directory is for what could not be read")
        require(bool(self.encodings), "encodings: give at least one")
        for name in self.encodings:
            try:
                "".encode(name)
            except LookupError:
                require(False, f"encodings: {name!r} is not an encoding that Python knows")


@checked
class ExtractConfig:
    """Extraction of text from pages of HTML."""

    main_content: bool = True  # without navigation, footers, comments
    min_chars: int = 50  # less than this from a page is "no text" (ours)


@checked
class NormaliseConfig:
    """Unicode form and spaces of prose; of code only line ends and what cannot be text are touched."""

    form: Literal["NFC", "none"] = "NFC"  # Unicode normal form of prose


@checked
class LanguageConfig:
    """Languages that stay."""

    keep: tuple[Language, ...] = ("en", "zh", "code")  # languages whose documents stay
    min_share: float = 0.5  # of the text that must be in the language found (ours)

    def __post_init__(self):
        _fraction(self, "min_share")


@checked
class RuleConfig:
    """Thresholds for one language; None: the rule is off. Each field's comment in stages.py names its source."""

    min_tokens: int | None = None  # tokens of a document at least
    max_tokens: int | None = None  # tokens of a document at most
    min_mean_word: float | None = None  # mean characters of a word at least
    max_mean_word: float | None = None  # mean characters of a word at most
    max_symbol_ratio: float | None = None  # symbols (#, ellipses) per word at most
    max_punctuation: float | None = None  # share of visible characters that are punctuation, at most
    min_letters: float | None = None  # share of visible characters that are letters, at least
    max_bullet_lines: float | None = None  # share of lines that begin with a bullet, at most
    max_ellipsis_lines: float | None = None  # share of lines that end in an ellipsis, at most
    min_lines: int = 5  # rules on shares of lines need so many: of two lines one is half (ours)
    min_stop_words: int | None = None  # different stop words at least
    max_duplicate_lines: float | None = None  # share of lines that stand there twice or more, at most
    max_duplicate_line_chars: float | None = None  # share of characters in such lines, at most
    max_top_ngram: tuple[float, ...] = ()  # share of characters in the most frequent n-gram, for n = 2, 3, ..., at most
    # share of characters in n-grams that repeat, for n = 5, 6, ..., at most
    max_duplicate_ngrams: tuple[float, ...] = ()
    min_unique_tokens: float | None = None  # different tokens per token at least
    max_replacement: float | None = None  # share of U+FFFD among visible characters, at most
    min_terminal_lines: float | None = None  # share of lines that end in punctuation of a sentence, at least
    max_line: int | None = None  # characters of the longest line at most
    max_mean_line: float | None = None  # mean characters of a line at most
    min_alphanumeric: float | None = None  # share of characters that are letters or digits, at least
    drop_phrases: tuple[str, ...] = ()  # a document with one of these goes


EN = RuleConfig(
    min_tokens=50, max_tokens=100_000, min_mean_word=3.0, max_mean_word=10.0, max_symbol_ratio=0.1, max_punctuation=0.4,
    min_letters=0.6, max_bullet_lines=0.9, max_ellipsis_lines=0.3, min_stop_words=2, max_duplicate_lines=0.3,
    max_duplicate_line_chars=0.2, max_top_ngram=(0.20, 0.18, 0.16),
    max_duplicate_ngrams=(0.15, 0.14, 0.13, 0.12, 0.11, 0.10), min_unique_tokens=0.05, max_replacement=0.001,
    drop_phrases=("lorem ipsum",),
)  # fmt: skip
ZH = RuleConfig(
    min_tokens=30, max_tokens=1_000_000, max_symbol_ratio=0.1, max_punctuation=0.35, min_letters=0.6,
    max_bullet_lines=0.9, max_ellipsis_lines=0.3, min_stop_words=1, max_duplicate_lines=0.3,
    max_duplicate_line_chars=0.2, max_top_ngram=(0.4, 0.4, 0.4),
    max_duplicate_ngrams=(0.7, 0.65, 0.6, 0.6, 0.6, 0.6),  # statutes reach 0.67; a text said four times has 0.75
    min_unique_tokens=0.01, max_replacement=0.001,
)  # fmt: skip
CODE = RuleConfig(
    min_tokens=10, max_tokens=1_000_000, max_line=1000, max_mean_line=100.0, min_alphanumeric=0.25,
    max_replacement=0.001,
)  # fmt: skip


@checked
class RulesConfig:
    """Heuristic rules by language; `other` has none. A table given for a language replaces only the keys it names."""

    en: RuleConfig = EN  # rules for English
    zh: RuleConfig = ZH  # rules for Chinese
    code: RuleConfig = CODE  # rules for program code


@checked
class UrlsConfig:
    """The first document of every URL stays."""

    ignore_query: tuple[str, ...] = ("utm_*", "fbclid", "gclid", "spm", "ref")  # parameters that name no other page


@checked
class DuplicatesConfig:
    """Exact, SimHash and MinHash duplicates across all sources."""

    # which kinds of copies are looked for
    methods: tuple[Literal["exact", "simhash", "minhash"], ...] = ("exact", "simhash", "minhash")
    ngram: int = 5  # tokens in a shingle
    bands: int = 25  # bands of MinHash: documents that agree in one are compared
    rows: int = 5  # permutations in a band
    threshold: float = 0.7  # estimated Jaccard similarity of shingles from which two documents are one
    simhash_bits: int = 3  # Hamming distance of 128-bit SimHashes up to which two documents are one
    min_shingles: int = 10  # below, only exact duplicates: too short to tell alike from same (ours)
    seed: int = 0  # seed of the permutations

    def __post_init__(self):
        require(bool(self.methods), "methods: name at least one of exact, simhash, minhash")
        require_positive(self, "ngram", "bands", "rows", "min_shingles")
        _fraction(self, "threshold")
        require(0 <= self.simhash_bits <= 7, f"simhash_bits={self.simhash_bits} must be 0 to 7")


@checked
class ParagraphsConfig:
    """The first occurrence of every long paragraph stays; code is left alone."""

    min_chars: int = 80  # shorter ones (headings, greetings, list items) may repeat (ours)
    min_kept: float = 0.3  # a document that keeps less of its characters goes as a whole (ours)

    def __post_init__(self):
        require_positive(self, "min_chars")
        _fraction(self, "min_kept")


@checked
class QualityConfig:
    """A classifier trained by `tele data clean-train quality`."""

    model: str  # file of the classifier
    threshold: float = 0.5  # least probability of being a good document; see docs/clean.md for what it drops
    languages: tuple[Language, ...] = ("en", "zh")  # languages that are judged

    def __post_init__(self):
        _fraction(self, "threshold")


@checked
class PerplexityConfig:
    """n-gram models trained by `tele data clean-train ngrams`, by language; perplexity per token."""

    models: dict[str, str]  # file of the n-gram model by language
    max_perplexity: dict[str, float]  # largest perplexity per token by language
    min_perplexity: dict[str, float] = dataclasses.field(default_factory=dict)  # boilerplate has very low ones

    def __post_init__(self):
        require(bool(self.models), "models: give at least one language's file")
        for name in (*self.max_perplexity, *self.min_perplexity):
            require(name in self.models, f"a bound for {name!r}, but models has none for it")
        for name in self.models:
            require(name in self.max_perplexity, f"max_perplexity: missing for {name!r}")


@checked
class OverlapConfig:
    """Benchmarks: jsonl or text files. Any shared n-gram drops the document."""

    files: tuple[str, ...]  # glob patterns of the benchmarks
    fields: tuple[str, ...] = ()  # of the jsonl records; none: every string in a record
    ngram: int = 13  # tokens, as GPT-3 (arXiv 2005.14165, appendix C)
    zh_ngram: int = 20  # of mostly Chinese n-grams, where a token is a character (ours)
    min_matches: int = 1  # shared n-grams from which a document goes

    def __post_init__(self):
        require_positive(self, "ngram", "zh_ngram", "min_matches")


@checked
class PrivacyConfig:
    """Personal identifiers that are masked."""

    # kinds of identifiers that are masked
    kinds: tuple[Literal["email", "phone", "id", "ip", "card"], ...] = ("email", "phone", "id", "ip", "card")
    skip_languages: tuple[Language, ...] = ()  # languages that are left as they are


@checked
class SafetyConfig:
    """Word lists: a word or phrase a line, or given here."""

    files: tuple[str, ...] = ()  # glob patterns of word lists
    words: tuple[str, ...] = ()  # words and phrases of the page itself
    max_hits: int = 2  # a document with more goes
    max_hits_per_1000: float = 5.0  # tokens; more goes, whatever the number

    def __post_init__(self):
        require(bool(self.files or self.words), "give files or words")


@checked
class OutputConfig:
    """The files that are written; their number follows from the input, and does not depend on the workers.

    A document is held out, for validation, by the hash of its text: the same text is on the same side in every run,
    whatever is added or removed, as long as validation_share stays.
    """

    shard_bytes: int = 268_435_456  # of input
    compression: Literal["gz", "none"] = "none"  # `tele data cache` and training read plain files; gz is to be kept
    level: int = 6  # of gzip
    validation_share: float = 0.001  # of the documents, about; small domains may have none (ours)

    def __post_init__(self):
        require_positive(self, "shard_bytes")
        _fraction(self, "validation_share")
        require(1 <= self.level <= 9, f"level={self.level} must be 1 to 9")


@checked
class CleanConfig:
    """A whole run. A stage runs if `stages` names it; its table may be left out where everything has a default."""

    sources: dict[str, SourceConfig]  # what is read, by name
    stages: tuple[Stage, ...]  # names of the stages, in the order in which they run
    extract: ExtractConfig = ExtractConfig()  # HTML to text
    normalise: NormaliseConfig = NormaliseConfig()  # Unicode form and spaces
    language: LanguageConfig = LanguageConfig()  # languages that stay
    rules: RulesConfig = RulesConfig()  # heuristic rules by language
    urls: UrlsConfig = UrlsConfig()  # duplicate addresses
    duplicates: DuplicatesConfig = DuplicatesConfig()  # duplicate documents
    paragraphs: ParagraphsConfig = ParagraphsConfig()  # repeated paragraphs
    quality: QualityConfig | None = None  # quality classifier
    perplexity: PerplexityConfig | None = None  # perplexity by n-gram models
    overlap: OverlapConfig | None = None  # overlap with benchmarks
    privacy: PrivacyConfig = PrivacyConfig()  # masks of personal identifiers
    safety: SafetyConfig | None = None  # word lists
    output: OutputConfig = OutputConfig()  # files that are written

    def __post_init__(self):
        require(bool(self.sources), "sources: name at least one")
        ranked = sorted(self.sources.items(), key=lambda item: (item[1].rank, item[0]))
        object.__setattr__(self, "sources", dict(ranked))  # the order in which files are numbered, and reported
        require(bool(self.stages), "stages: name at least one")
        require(len(set(self.stages)) == len(self.stages), f"stages: one is named twice in {self.stages}")
        for name in ("quality", "perplexity", "overlap", "safety"):
            require(
                name not in self.stages or getattr(self, name) is not None,
                f"stages names {name!r}, but the page has no table {name}",
            )
        html = any(s.html or s.format in ("html", "warc") for s in self.sources.values())
        require(not html or "extract" in self.stages, "stages: 'extract' is missing, but a source gives pages of HTML")
        if "rules" in self.stages:
            before = self.stages[: self.stages.index("rules")]
            unknown = [name for name, s in self.sources.items() if s.language is None]
            require(
                "language" in before or not unknown,
                f"stages: 'rules' needs 'language' before it, since sources.{unknown[:1]} names no language",
            )


def clean_config(page: "Mapping[str, Any] | ConfigDict") -> CleanConfig:
    """Reads a page (ConfigDict or dict); raises UserError with the path of what is wrong."""
    table = dict(page.items())
    rules = table.get("rules")
    if rules is not None and hasattr(rules, "items"):
        defaults = {"en": EN, "zh": ZH, "code": CODE}
        table["rules"] = {
            name: from_dict(RuleConfig, {**dataclasses.asdict(defaults[name]), **dict(values.items())}, f"rules.{name}")
            if name in defaults and hasattr(values, "items")
            else values
            for name, values in rules.items()
        }
    return from_dict(CleanConfig, table)
