"""Tokens and n-grams of a text as 64-bit hashes, computed with numpy for the whole text at once.

A token is a run of letters, marks and digits (case folded), or one character of a script that writes no spaces (Han,
kana). The searches for duplicates, for repetition and for overlap with benchmarks, and the n-gram models, count these
tokens.
"""

import functools
import unicodedata

import numpy as np

_M = np.uint64(0x9E3779B97F4A7C15)  # odd: has an inverse modulo 2^64
_M_INVERSE = np.uint64(pow(int(_M), -1, 1 << 64))
# Ranges written without spaces between words: kana, Han and its extensions, compatibility ideographs.
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


def mix(x: np.ndarray) -> np.ndarray:
    """Applies the finaliser of splitmix64, a bijection of uint64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Two tables bool[0x110000] by code point: part of a word, and a token of its own."""
    categories = ("L", "M", "N")
    word = np.zeros(0x110000, bool)
    word[:0x40000] = [unicodedata.category(chr(i))[0] in categories for i in range(0x40000)]
    alone = np.zeros(0x110000, bool)
    for first, last in _UNSPACED:
        alone[first : last + 1] = True
    return word, alone & word


@functools.lru_cache(maxsize=4)
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers 0, 1, ... of _M and of its inverse modulo 2^64: two arrays uint64[2^bits]."""
    size = 1 << bits
    with np.errstate(over="ignore"):
        up = np.cumprod(np.full(size, _M, np.uint64)) * _M_INVERSE
        down = np.cumprod(np.full(size, _M_INVERSE, np.uint64)) * _M
    return up, down


def characters(text: str) -> np.ndarray:
    """Returns the code points of a text, uint32[len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def is_unspaced(chars: np.ndarray) -> np.ndarray:
    """Tells for each code point whether it is Han or kana, bool[n]."""
    return _tables()[1][chars]


def is_word(chars: np.ndarray) -> np.ndarray:
    """Tells for each code point whether it is a letter, a mark or a digit, bool[n]."""
    return _tables()[0][chars]


def tokens(text: str) -> np.ndarray:
    """Returns the hashes of the tokens of a text in order, uint64[N].

    >>> a, b = tokens("Growing 模型"), tokens("growing, 模 型!")
    >>> len(a), bool((a == b).all())
    (3, True)
    """
    chars = characters(text.lower())
    if not len(chars):
        return np.zeros(0, np.uint64)
    word, alone = is_word(chars), is_unspaced(chars)
    before = np.concatenate(([False], word[:-1] & ~alone[:-1]))
    starts = np.flatnonzero(word & (alone | ~before))
    after = np.concatenate((word[1:] & ~alone[1:], [False]))
    ends = np.flatnonzero(word & (alone | ~after)) + 1
    # Polynomial hashes of all tokens from prefix sums: (P[end] - P[start]) / m^start, then mixed with the length.
    up, down = _powers(max(12, len(chars).bit_length()))
    with np.errstate(over="ignore"):
        prefix = np.cumsum(mix(chars.astype(np.uint64)) * up[: len(chars)])
        total = prefix[ends - 1] - np.where(starts > 0, prefix[starts - 1], np.uint64(0))
        return mix(total * down[starts] + (ends - starts).astype(np.uint64))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hashes of all runs of n tokens in order, uint64[max(N - n + 1, 0)]."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        result = np.zeros(count, np.uint64)
        for i in range(n):
            result = result * _M + hashes[i : i + count]
        return mix(result)


def tokens_of_characters(text: str) -> np.ndarray:
    """Returns the hash of every character, uint64[len(text)]: for comparisons in which case and punctuation count."""
    return mix(characters(text).astype(np.uint64))


def fingerprints(hashes: np.ndarray) -> np.ndarray:
    """Returns one hash of a whole sequence, uint64[1]."""
    up, _ = _powers(max(12, len(hashes).bit_length()))
    with np.errstate(over="ignore"):
        return mix(np.sum(hashes * up[: len(hashes)], keepdims=True) + np.uint64(len(hashes)))
