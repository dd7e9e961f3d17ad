"""The stages that look at one document at a time, as functions on a batch's documents; and the heuristic rules, the
stage that asks what the shape of a document says about it.

Where a heuristic rule and its English threshold come from (thresholds are in settings.RuleConfig):
  Gopher (Rae et al. 2021, arXiv 2112.11446, tables A1 and A2): number of words, mean word length, symbol-to-word ratio,
    bullet and ellipsis lines, words with a letter, stop words, duplicate lines, top and duplicate n-grams;
  C4 (Raffel et al. 2020, arXiv 1910.10683): "lorem ipsum", lines that end in punctuation (off by default);
  code: longest and mean line, share of letters and digits (the Stack and Codex, arXiv 2211.15533, 2107.03374);
  TeleChat (arXiv 2401.03804): short texts, texts low in information or heavy in punctuation; its numbers are not
    published, so max_punctuation, min_letters, min_unique_tokens and all Chinese thresholds are ours.
A token is a word or a Han character (hashing.tokens); Gopher's words are split at spaces, with no effect on its ratios
that would matter here.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax.clean import hashing, models, screening, text
from tele_jax.clean.document import Document, Drop, Tally
from tele_jax.clean.settings import CleanConfig, RuleConfig, RulesConfig

# Gopher's eight; and function characters without which hardly a Chinese text does, classical or modern (ours).
STOP_WORDS = {
    "en": ("the", "be", "to", "of", "and", "that", "have", "with"),
    "zh": tuple("的了是在和有不人我他之也而其以者于为與于於所無无一上中大来來"),
}
_BULLETS = ("•", "●", "*", "-", "·", "‣", "▪", "◦", "○", "■")
_ELLIPSES = ("...", "…", "。。。")
_TERMINALS = tuple(".!?\"'”’。！？…」』）)")
_PUNCTUATION = frozenset("，。、；：？！“”‘’（）《》〈〉【】「」『』—…·～" + ",.;:?!\"'()[]{}<>-_/\\|@#$%^&*+=~`")


@functools.cache
def _stop_words(language: str) -> np.ndarray:
    return np.array([hashing.tokens(word)[0] for word in STOP_WORDS[language]])


def rules(document: Document, config: RulesConfig) -> Document | Drop:
    """The document, or the first rule that it breaks, with the figure."""
    if document.language not in ("en", "zh", "code"):
        return document
    for broken in violations(document.text, document.language, getattr(config, document.language)):
        return broken
    return document


class _Text:
    """A text and what the rules count of it, each figure computed once, when it is asked for."""

    def __init__(self, text: str, language: str, min_lines: int):
        self.text, self.language, self.min_lines = text, language, min_lines
        self.line_lengths = list(map(len, text.split("\n")))
        self.lines = [line for line in map(str.strip, text.split("\n")) if line]

    @functools.cached_property
    def visible(self) -> int:
        return max(sum(map(len, self.text.split())), 1)

    @functools.cached_property
    def is_word(self) -> np.ndarray:
        return hashing.is_word(hashing.characters(self.text))

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        return hashing.tokens(self.text)

    @functools.cached_property
    def repeated_lines(self) -> list[str]:
        seen: set[str] = set()
        return [line for line in self.lines if line in seen or seen.add(line)]

    def count(self, *parts: str) -> int:
        return sum(map(self.text.count, parts))

    def share_of_lines(self, matches: Callable[[str], bool]) -> float | None:
        """Lines that match per line; None where there are too few lines to judge by."""
        return sum(map(matches, self.lines)) / len(self.lines) if len(self.lines) >= self.min_lines else None

    def per_token(self, count: float) -> float | None:
        return count / len(self.tokens) if len(self.tokens) else None

    def mean_word(self) -> float | None:
        words = self.text.split()
        return sum(map(len, words)) / max(len(words), 1) if len(self.tokens) else None

    def stop_words(self) -> int | None:
        known = self.language in STOP_WORDS and len(self.tokens)
        return int(np.isin(_stop_words(self.language), self.tokens).sum()) if known else None

    def information(self) -> float | None:
        # A long text uses up its vocabulary: judged on windows of at most 10,000 tokens' worth.
        return self.per_token(len(np.unique(self.tokens)) * max(len(self.tokens) / 10_000, 1))


# (reason, threshold in RuleConfig, figure), cheap ones first. Figures that are None break no rule.
_RULES: tuple[tuple[str, str, Callable[[_Text], float | None]], ...] = (
    ("long line", "max_line", lambda t: max(t.line_lengths)),
    ("long lines", "max_mean_line", lambda t: sum(t.line_lengths) / len(t.line_lengths)),
    ("replacement characters", "max_replacement", lambda t: t.count("\ufffd") / t.visible),
    ("few letters and digits", "min_alphanumeric", lambda t: float(t.is_word.mean())),
    ("few letters", "min_letters", lambda t: (int(t.is_word.sum()) - t.count(*"0123456789")) / t.visible),
    ("heavy punctuation", "max_punctuation", lambda t: t.count(*_PUNCTUATION) / t.visible),
    ("bullet lines", "max_bullet_lines", lambda t: t.share_of_lines(lambda line: line.startswith(_BULLETS))),
    ("ellipsis lines", "max_ellipsis_lines", lambda t: t.share_of_lines(lambda line: line.endswith(_ELLIPSES))),
    ("lines without an end", "min_terminal_lines", lambda t: t.share_of_lines(lambda line: line.endswith(_TERMINALS))),
    ("short", "min_tokens", lambda t: len(t.tokens)),
    ("long", "max_tokens", lambda t: len(t.tokens)),
    ("symbols", "max_symbol_ratio", lambda t: t.per_token(t.count("#", "...", "…"))),
    ("short words", "min_mean_word", _Text.mean_word),
    ("long words", "max_mean_word", _Text.mean_word),
    ("few stop words", "min_stop_words", _Text.stop_words),
    ("low in information", "min_unique_tokens", _Text.information),
)


def violations(text: str, language: str, config: RuleConfig) -> Iterator[Drop]:
    """Every rule that the text breaks, cheap rules first."""
    lower = text.lower() if config.drop_phrases else ""
    yield from (Drop("phrase", phrase) for phrase in config.drop_phrases if phrase in lower)
    counted = _Text(text, language, config.min_lines)
    for reason, field, figure in _RULES:
        if (limit := getattr(config, field)) is not None and (value := figure(counted)) is not None:
            yield from (_below if field.startswith("min") else _above)(reason, value, limit)
    yield from _repetition(counted, config)


def _above(reason: str, value: float, limit: float | None) -> Iterator[Drop]:
    if limit is not None and value > limit:
        yield Drop(reason, f"{value:.4g} > {limit:.4g}")


def _below(reason: str, value: float, limit: float) -> Iterator[Drop]:
    if value < limit:
        yield Drop(reason, f"{value:.4g} < {limit:.4g}")


def _repetition(counted: _Text, config: RuleConfig) -> Iterator[Drop]:
    lines, repeated, hashes = counted.lines, counted.repeated_lines, counted.tokens
    if len(lines) > 1:
        if len(lines) >= config.min_lines:
            yield from _above("repeated lines", len(repeated) / len(lines), config.max_duplicate_lines)
        chars = sum(map(len, repeated)) / max(len(counted.text), 1)
        yield from _above("repeated lines", chars, config.max_duplicate_line_chars)
    count = max(len(hashes), 1)
    for n, limit in enumerate(config.max_top_ngram, start=2):
        _, counts = np.unique(hashing.ngrams(hashes, n), return_counts=True)
        most = int(counts.max(initial=0))
        # Twice is no habit: in Gopher's 50 words or more it is below every threshold, and in fewer a title that the
        # first sentence repeats ("Taiwan Strait. The Taiwan Strait is ...") would be above.
        if most > 2:
            # Share of tokens, where Gopher takes characters: the same for words of average length.
            yield from _above(f"most frequent {n}-gram", most * n / count, limit)
        # A longer n-gram is at most as frequent: most texts need no further look.
        if most * (len(config.max_top_ngram) + 1) / count <= min(config.max_top_ngram):
            break
    for n, limit in enumerate(config.max_duplicate_ngrams, start=5):
        grams = hashing.ngrams(hashes, n)
        share = float(_covered(grams, n).sum()) / count if len(grams) else 0.0
        yield from _above(f"repeated {n}-grams", share, limit)
        # What repeated longer n-grams cover, these cover too.
        if share <= min(config.max_duplicate_ngrams):
            break


def _covered(grams: np.ndarray, n: int) -> np.ndarray:
    """bool [N tokens]: in an n-gram that occurred before (a token counts once)."""
    _, first = np.unique(grams, return_index=True)
    again = np.ones(len(grams), bool)
    again[first] = False
    edges = np.zeros(len(grams) + n, np.int64)
    np.add.at(edges, np.flatnonzero(again), 1)
    np.add.at(edges, np.flatnonzero(again) + n, -1)
    return np.cumsum(edges)[:-1] > 0


# ---- all stages ------------------------------------------------------------------------------------------------------

# Per document: what becomes of it, and what was changed: {reason: detail}.
Outcome = tuple[Document | Drop, Mapping[str, str]]
Apply = Callable[[Sequence[Document]], list[Outcome]]


def _each(
    function: Callable[..., Document | Drop], *, load: Callable[[Any], Any] | None = None, change: str = ""
) -> Callable[[Any], Apply]:
    """Makes the maker of a stage from function(document, table of the page, what `load` read).

    load: reads the models or lists that the table names. change: what a new text counts as, where that is counted.
    """

    def make(table: object) -> Apply:
        loaded = () if load is None else (load(table),)

        def one(document: Document) -> Outcome:
            result = function(document, table, *loaded)
            changed = change and isinstance(result, Document) and result.text.strip() != document.text.strip()
            return result, {change: ""} if changed else {}

        return lambda documents: [one(document) for document in documents]

    return make


def _quality(table: Any) -> Apply:
    classifier = models.load_classifier(table.model)
    return lambda documents: [(result, {}) for result in models.quality(documents, table, classifier)]


def _masked(table: Any) -> Apply:
    def one(document: Document) -> Outcome:
        result, found = screening.privacy(document, table)
        return result, {f"masked {kind}": f"{count} times" for kind, count in found.items()}

    return lambda documents: [one(document) for document in documents]


_MAKERS: dict[str, Callable[[Any], Apply]] = {
    "extract": _each(text.extract, change="extracted"),
    "language": _each(text.language),
    "normalise": _each(text.normalise, change="normalised"),
    "rules": _each(rules),
    "quality": _quality,
    "perplexity": _each(models.perplexity, load=models.load_all_ngrams),
    "overlap": _each(screening.overlap, load=screening.load_benchmarks),
    "privacy": _masked,
    "safety": _each(screening.safety, load=screening.load_words),
}
LOCAL = tuple(_MAKERS)


def build(name: str, config: CleanConfig) -> Apply:
    """The function of a stage in LOCAL; loads its models and word lists.

    Raises:
      UserError: a model or a list is missing or not what it should be.
    """
    return _MAKERS[name](getattr(config, name))


def account(stage: str, documents: Sequence[Document], outcomes: Sequence[Outcome]) -> tuple[list[Document], Tally]:
    """Returns the documents that stay, and the account of the stage for this batch."""
    kept, tally = [], Tally()
    for document, (result, changes) in zip(documents, outcomes, strict=True):
        tally.add((stage, document.source, "in", ""), document)
        if isinstance(result, Drop):
            tally.add((stage, document.source, "drop", result.reason), document, result.detail)
            continue
        kept.append(result)
        tally.add((stage, document.source, "out", ""), result)
        for reason, detail in changes.items():
            # Samples of masked text show the masks, never what was under them.
            tally.add((stage, document.source, "change", reason), document, detail, text=result.text)
    return kept, tally
