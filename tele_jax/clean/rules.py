"""Heuristic rules: what the shape of a document says about it. Thresholds are in settings.RuleConfig.

Where a rule and its English threshold come from:
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
from collections.abc import Iterator

import numpy as np

from tele_jax.clean import hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import RuleConfig, RulesConfig

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


def violations(text: str, language: str, config: RuleConfig) -> Iterator[Drop]:
    """Every rule that the text breaks, cheap rules first."""
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    yield from _length(text, lines, config)
    yield from _characters(text, config)
    yield from _lines(text, lines, config)
    hashes = hashing.tokens(text)
    yield from _words(text, hashes, language, config)
    yield from _repetition(text, lines, hashes, config)


def _above(name: str, value: float, limit: float | None) -> Iterator[Drop]:
    if limit is not None and value > limit:
        yield Drop(name, f"{value:.4g} > {limit:.4g}")


def _below(name: str, value: float, limit: float | None) -> Iterator[Drop]:
    if limit is not None and value < limit:
        yield Drop(name, f"{value:.4g} < {limit:.4g}")


def _length(text: str, lines: list[str], config: RuleConfig) -> Iterator[Drop]:
    if config.max_line is not None or config.max_mean_line is not None:
        lengths = [len(line) for line in text.split("\n")]
        yield from _above("long line", max(lengths), config.max_line)
        yield from _above("long lines", sum(lengths) / len(lengths), config.max_mean_line)
    if config.drop_phrases:
        lower = text.lower()
        for phrase in config.drop_phrases:
            if phrase in lower:
                yield Drop("phrase", phrase)


def _characters(text: str, config: RuleConfig) -> Iterator[Drop]:
    visible = max(sum(map(len, text.split())), 1)
    yield from _above("replacement characters", text.count("\ufffd") / visible, config.max_replacement)
    chars = hashing.characters(text)
    if config.min_alphanumeric is not None:
        yield from _below("few letters and digits", float(hashing.is_word(chars).mean()), config.min_alphanumeric)
    if config.min_letters is not None:
        digits = sum(map(text.count, "0123456789"))
        letters = int(hashing.is_word(chars).sum()) - digits
        yield from _below("few letters", letters / visible, config.min_letters)
    if config.max_punctuation is not None:
        marks = sum(text.count(mark) for mark in _PUNCTUATION)
        yield from _above("heavy punctuation", marks / visible, config.max_punctuation)


def _lines(text: str, lines: list[str], config: RuleConfig) -> Iterator[Drop]:
    count = len(lines)
    if count < config.min_lines:
        return
    if config.max_bullet_lines is not None:
        yield from _above(
            "bullet lines", sum(line.startswith(_BULLETS) for line in lines) / count, config.max_bullet_lines
        )
    if config.max_ellipsis_lines is not None:
        ends = sum(line.endswith(_ELLIPSES) for line in lines)
        yield from _above("ellipsis lines", ends / count, config.max_ellipsis_lines)
    if config.min_terminal_lines is not None:
        ends = sum(line.endswith(_TERMINALS) for line in lines)
        yield from _below("lines without an end", ends / count, config.min_terminal_lines)


def _words(text: str, hashes: np.ndarray, language: str, config: RuleConfig) -> Iterator[Drop]:
    count = len(hashes)
    yield from _below("short", count, config.min_tokens)
    yield from _above("long", count, config.max_tokens)
    if not count:
        return
    if config.max_symbol_ratio is not None:
        symbols = text.count("#") + text.count("...") + text.count("…")
        yield from _above("symbols", symbols / count, config.max_symbol_ratio)
    if config.min_mean_word is not None or config.max_mean_word is not None:
        words = text.split()
        mean = sum(map(len, words)) / max(len(words), 1)
        yield from _below("short words", mean, config.min_mean_word)
        yield from _above("long words", mean, config.max_mean_word)
    if config.min_stop_words is not None and language in STOP_WORDS:
        found = np.isin(_stop_words(language), hashes).sum()
        yield from _below("few stop words", int(found), config.min_stop_words)
    if config.min_unique_tokens is not None:
        unique = len(np.unique(hashes)) / count
        # A long text uses up its vocabulary: judged on windows of at most 10,000 tokens' worth.
        yield from _below("low in information", unique * max(count / 10_000, 1), config.min_unique_tokens)


def _repetition(text: str, lines: list[str], hashes: np.ndarray, config: RuleConfig) -> Iterator[Drop]:
    if len(lines) > 1:
        seen: set[str] = set()
        repeated = [line for line in lines if line in seen or seen.add(line)]
        if len(lines) >= config.min_lines:
            yield from _above("repeated lines", len(repeated) / len(lines), config.max_duplicate_lines)
        chars = sum(map(len, repeated)) / max(len(text), 1)
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
