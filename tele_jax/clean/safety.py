"""Word lists: documents in which too many of their words occur go."""

import dataclasses
import re
from typing import Any

from tele_jax.clean import hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import SafetyConfig
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import expand

_LATIN = re.compile(r"[\w]", re.ASCII)


@dataclasses.dataclass(frozen=True, eq=False)
class WordList:
    """The words, folded, and an Aho-Corasick automaton of them."""

    words: tuple[str, ...]
    automaton: Any

    def hits(self, text: str) -> list[str]:
        """Words found, in order; a Latin word only as a whole word."""
        text = text.casefold()
        found = []
        for index, start, end in self.automaton.find_matches_as_indexes(text):
            word = self.words[index]
            inside = (_LATIN.match(word[0]) and start > 0 and _LATIN.match(text[start - 1])) or (
                _LATIN.match(word[-1]) and end < len(text) and _LATIN.match(text[end])
            )
            if not inside:
                found.append(word)
        return found


def load(config: SafetyConfig) -> WordList:
    """Raises UserError for a file that is missing, not UTF-8, or for lists without a word."""
    words = list(config.words)
    for path in expand(config.files, "safety.files") if config.files else ():
        try:
            with open(path, encoding="utf-8") as file:
                words += file.read().splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    words = sorted({word.strip().casefold() for word in words if word.strip() and not word.startswith("#")})
    if not words:
        raise UserError("safety: the lists hold no word")
    library = need("ahocorasick_rs")
    return WordList(tuple(words), library.AhoCorasick(words, matchkind=library.MatchKind.LeftmostLongest))


def safety(document: Document, config: SafetyConfig, words: WordList) -> Document | Drop:
    """Drops a document with too many hits, or too many for its length."""
    hits = words.hits(document.text)
    if not hits:
        return document
    rate = 1000 * len(hits) / max(len(hashing.tokens(document.text)), 1)
    if len(hits) > config.max_hits or rate > config.max_hits_per_1000:
        return Drop("word list", f"{len(hits)} hits, e.g. {hits[0]}")
    return document
