"""Screens for what must not be in a document: parts of benchmarks, words of a list, and personal identifiers.

Personal identifiers are found by pattern and checksum, and replaced by a mark such as <email>. The others drop a
document.
"""

import dataclasses
import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tele_jax.clean import hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import OverlapConfig, PrivacyConfig, SafetyConfig
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import expand


def load_benchmarks(config: OverlapConfig) -> np.ndarray:
    """All n-grams of the benchmarks, sorted: uint64 [M].

    A text of fewer than n tokens is left out: short answers are everywhere.

    Raises:
      UserError: a pattern without files, a file that is not UTF-8, not JSON, or a whole without a single n-gram.
    """
    grams = [np.zeros(0, np.uint64)]
    for path in expand(config.files, "overlap.files"):
        for text in _texts(path, config.fields):
            grams.append(_grams(text, config))
    found = np.unique(np.concatenate(grams))
    if not len(found):
        raise UserError(f"overlap.files: no text of at least {config.ngram} tokens in {', '.join(config.files)}")
    return found


def _texts(path: str, fields: tuple[str, ...]) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            if not path.endswith((".jsonl", ".json")):
                yield file.read()
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        record = json.loads(line)
                        texts = list(_strings(record if not fields else [record.get(f) for f in fields]))
                    except (ValueError, AttributeError, RecursionError):
                        what = "not JSON" if not fields else f"no JSON record with {' or '.join(fields)}"
                        raise UserError(f"{path}:{number}: {what}; overlap.files are jsonl or plain text") from None
                    yield from texts
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _grams(text: str, config: OverlapConfig) -> np.ndarray:
    """Hashes of the text's n-grams; of longer ones where most characters are Han or kana."""
    chars = hashing.characters(text)
    unspaced = int(hashing.is_unspaced(chars).sum())
    chinese = 2 * unspaced > int(hashing.is_word(chars).sum())
    return hashing.ngrams(hashing.tokens(text), config.zh_ngram if chinese else config.ngram)


def overlap(document: Document, config: OverlapConfig, benchmarks: np.ndarray) -> Document | Drop:
    """Drops a document that shares `min_matches` n-grams or more with the benchmarks."""
    grams = np.unique(_grams(document.text, config))
    at = np.minimum(np.searchsorted(benchmarks, grams), len(benchmarks) - 1)
    matches = int((benchmarks[at] == grams).sum())
    if matches >= config.min_matches:
        return Drop("benchmark overlap", f"{matches} n-grams")
    return document


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


def load_words(config: SafetyConfig) -> WordList:
    """Reads word lists; UserError for a file that is missing, not UTF-8, or for lists without a word."""
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


_NO_DIGIT_BEFORE, _NO_DIGIT_AFTER = r"(?<![0-9A-Za-z_.+-])", r"(?![0-9A-Za-z_]|[.-][0-9])"
# Letters stand right beside mobile numbers in Chinese ("tel139...", "139...qq"), but beside digits of a hash as well:
# those that a hexadecimal number has are no neighbours, nor are the x of 0x and the o of 0o.
_NO_HEX_BEFORE = r"(?:(?<![0-9A-Fa-f_.+-])(?<!0[OXox])|(?<=phone)|(?<=mobile)|(?<=[^0-9][.-]))"
_NO_HEX_AFTER = r"(?![0-9]|[A-Fa-f](?![-_]?mail)|_[0-9A-Za-z]|[.-][0-9])"
_PATTERNS = {
    "email": r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9])",
    # GB 11643: region 6, date of birth 8, sequence 3, check character.
    "id": _NO_DIGIT_BEFORE
    + r"[1-8]\d{5}(?:18|19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[0-9Xx]"
    + _NO_DIGIT_AFTER,
    "card": _NO_DIGIT_BEFORE + r"[2-6](?:\d{12,18}|\d{3}(?:[ -]\d{4}){3}|\d{3}[ -]\d{6}[ -]\d{5})" + _NO_DIGIT_AFTER,
    "phone": r"(?:"
    + _NO_HEX_BEFORE
    + r"(?:(?:\+|00)?86[ -]?)?1[3-9]\d(?:\d{8}|[ -]\d{4}[ -]\d{4})"  # Chinese mobile
    + _NO_HEX_AFTER
    + r"|(?<![0-9A-Za-z_.+-])(?:"
    # Chinese landline with its area code set off, or written on behind a word that says what it is.
    r"(?:\+86[ -]?)?(?:\(0[1-9]\d{1,2}\)[ -]{0,2}|0[1-9]\d{1,2}[ -]{1,2})[2-9]\d{2,3}[ -]?\d{4}(?:-\d{1,4}(?![0-9-]))?"
    + _NO_HEX_AFTER
    + r"|(?:(?<=[话机线真系:])0[1-9]\d{1,2}[2-9]\d{6,7}"
    r"|\+[1-9]\d{0,2}[ .-]\(?\d{1,4}\)?(?:[ .-]\d{2,4}){2,4}"  # international, in groups
    r"|(?:\+?1[ .-])?\(?[2-9]\d\d\)?[ .-][2-9]\d\d[.-]\d{4}"  # North American, in groups
    r")" + _NO_DIGIT_AFTER + r"))",
    "ip": r"(?<![0-9A-Za-z_.-])(?<![0-9]:)(?:\d{1,3}\.){3}\d{1,3}(?![0-9A-Za-z_]|\.[0-9])"
    r"|(?<![0-9A-Za-z_.:-])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::|[0-9A-Fa-f]{1,4})(?::?[0-9A-Fa-f]{1,4}){0,6}"
    r"(?![0-9A-Za-z_:]|\.[0-9])",
}
# Quick to search for, and in every match: most texts have none, and are spared the pattern itself.
_HINTS = {
    "email": "@",
    "id": r"\d{17}",
    "card": r"\d{13}|\d{4}[ -]\d{4,6}[ -]\d",
    "phone": r"\d{7}|\d[ .)-]{1,3}\d\d",
    "ip": r"\.\d{1,3}\.\d|:[0-9A-Fa-f]{0,4}:",
}
# Other widths of the same characters, each for one: a match in the text with these has its place in the text without.
_WIDTHS = {ord("０") + i: str(i) for i in range(10)} | {
    ord(other): plain
    for plain, others in {
        "-": "－—–‐‑−―", "(": "（", ")": "）", "+": "＋", "@": "＠", ".": "．", ":": "：", " ": "\u3000\u00a0",
    }.items()
    for other in others
}  # fmt: skip
_OTHER_WIDTH = re.compile("[" + "".join(map(chr, _WIDTHS)) + "]")
_COMPILED = {kind: re.compile(pattern, re.ASCII) for kind, pattern in _PATTERNS.items()}
_HINT = {kind: re.compile(pattern, re.ASCII) for kind, pattern in _HINTS.items()}
_ORDER = ("email", "id", "card", "phone", "ip")  # an identity number's digits resemble those of cards and phones


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B.

    >>> luhn("4111111111111111"), luhn("4111111111111112")
    (True, False)
    """
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def chinese_id(number: str) -> bool:
    """ISO 7064 MOD 11-2 over 18 characters, as GB 11643 asks.

    >>> chinese_id("11010519491231002X")
    True
    """
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


# What stands before numbers of four parts that count versions, sections and the like, and after them.
_COUNTED = re.compile(
    r"(?:\b(?:versions?|ver|v|releases?|kernel|linux|build|firmware|bios|driver|sdk|api|oid|sections?|sect|sec|chapters?"
    r"|figures?|fig|tables?|appendix|clauses?|paragraphs?|items?|rules?)|[版号核本第图表章节录]|§|(?<![:/])/)[\s.:#]*$",
    re.I,
)
_COUNTED_AFTER = re.compile(
    r"\.?[ \t]*[节章条款版]|[-+~](?!\d+\.\d+\.)\w|[ \t]+(?:or (?:later|newer|above)|及以上|以上)"
)
_ADDRESSED = re.compile(
    r"\b(?:ip|ipv4|address(?:es)?|hosts?|servers?|dns|gateway|ping|ssh|router|proxy|netmask|nameserver)\b|地址|服务器|主机|网关|域名",
    re.I,
)
_NUMBERED = re.compile(r"\.?[ \t]+\S|\.$")  # a heading behind its number


def _public_address(match: re.Match) -> bool:
    text, whole = match.group(), match.string
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # Private, loopback and documentation addresses point at nobody; "1.2.3.4" is as often a version or a section.
    if not address.is_global or address.version == 6:
        return address.is_global
    line = whole[whole.rfind("\n", 0, match.start()) + 1 : match.start()][-40:]
    if _ADDRESSED.search(line):
        return True
    if _COUNTED.search(line) or _COUNTED_AFTER.match(whole, match.end()):
        return False
    parts = [int(part) for part in text.split(".")]
    if not line.strip() and max(parts) < 100 and _NUMBERED.match(whole, match.end()):
        return False  # the number of a heading
    # Of addresses, one in 4,096 has four parts as small as these, while versions and sections mostly do.
    return max(parts) >= 32 or len(set(parts)) == 1


_CHECKS: dict[str, Callable[[re.Match], bool]] = {
    "email": lambda match: not match.group().lower().endswith(("@example.com", "@example.org", "@example.net")),
    "id": lambda match: chinese_id(match.group()),
    "card": lambda match: luhn(re.sub("[ -]", "", match.group())),
    "phone": lambda match: True,
    "ip": _public_address,
}


def mask(text: str, kinds: tuple[str, ...]) -> tuple[str, dict[str, int]]:
    """(the text with marks, how many of each kind).

    >>> mask("write to li@mail.cn or 13912345678", ("email", "phone"))
    ('write to <email> or <phone>', {'email': 1, 'phone': 1})
    """
    found: dict[str, int] = {}
    plain = text if text.isascii() or not _OTHER_WIDTH.search(text) else text.translate(_WIDTHS)
    for kind in _ORDER:
        if kind not in kinds or not _HINT[kind].search(plain):
            continue
        spans = [match.span() for match in _COMPILED[kind].finditer(plain) if _CHECKS[kind](match)]
        if spans:
            found[kind] = len(spans)
            # The other kinds look at the rest of the text, and at its characters as they are written.
            text, plain = (_replaced(one, spans, f"<{kind}>") for one in (text, plain))
    return text, found


def _replaced(text: str, spans: list[tuple[int, int]], mark: str) -> str:
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return mark.join(text[end:start] for end, start in zip(ends, starts))


def privacy(document: Document, config: PrivacyConfig) -> tuple[Document, dict[str, int]]:
    """The document with its identifiers masked, and how many of each kind."""
    if document.language in config.skip_languages:
        return document, {}
    text, found = mask(document.text, config.kinds)
    return (document.replace(text=text) if found else document), found
