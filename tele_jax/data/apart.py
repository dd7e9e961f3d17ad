"""Training text and held-out text are apart: the same file as both is refused, documents that are in both are counted.

Held-out text is small, and training text may be large: of this, sizes are looked at, and what its index holds.
"""

import dataclasses
import filecmp
import hashlib
import os
import zlib
from collections.abc import Sequence

import numpy as np

from tele_jax.data import sources
from tele_jax.errors import UserError
from tele_jax.files import expand
from tele_jax.settings import DataConfig


def require_other_files(data: DataConfig) -> None:
    """Raises UserError where a file, by its path or its content, or a split of a Task is trained on and held out.

    Files of a cache that are not here any more are not compared.
    """
    trained: dict[str, str] = {}  # real path -> its domain
    splits: dict[tuple[str, str], str] = {}
    for name, source in data.sources.items():
        if source.task:
            splits[source.task, source.split] = name
        for path in _files(source.files, f"sources.{name}.files", missing_ok=data.cache is not None):
            trained[os.path.realpath(path)] = name
    sizes: dict[int, list[str]] = {}
    for path in trained if any(source.validation_files for source in data.sources.values()) else ():
        sizes.setdefault(os.path.getsize(path), []).append(path)
    for name, source in data.sources.items():
        if (other := splits.get((source.task, source.validation_split))) is not None:
            raise UserError(
                f"sources.{name}.validation_split: {source.validation_split!r} is what {other} is trained on"
            )
        for path in _files(source.validation_files, f"sources.{name}.validation_files", missing_ok=False):
            real = os.path.realpath(path)
            same = [real] if real in trained else sizes.get(os.path.getsize(path), [])
            for each in same:
                if each == real or filecmp.cmp(each, path, shallow=False):
                    raise UserError(
                        f"sources.{name}.validation_files: {path} is trained on as well (sources.{trained[each]}.files"
                        f"{'' if each == real else f', {each} is the same text'}); hold other text out"
                    )


def _files(patterns: Sequence[str], where: str, *, missing_ok: bool) -> tuple[str, ...]:
    try:
        return expand(patterns, where) if patterns else ()
    except UserError:
        if missing_ok:
            return ()
        raise


@dataclasses.dataclass(frozen=True)
class HeldOutLines:
    """The lines of held-out files that hold a document each, to be found again among those that are trained on.

    Attributes:
      digests: of the lines, without what ends them.
      keys: uint64, sorted: size and CRC-32 of each line, as an index has them, with every end that it may have.
    """

    digests: frozenset[bytes]
    keys: np.ndarray

    @classmethod
    def of(cls, corpora: Sequence[sources.Corpus]) -> "HeldOutLines":
        """Reads all lines of some indexes. (A text file is a document by itself: `require_other_files`.)"""
        digests, keys = set(), [np.zeros(0, np.uint64)]
        for corpus in corpora:
            for i in _lines(corpus):
                line = corpus.line(i)
                digests.add(digest(line))
                ended = [line + end for end in (b"", b"\n", b"\r\n")]
                keys.append(_keys(np.array([len(e) for e in ended]), np.array([zlib.crc32(e) for e in ended])))
        return cls(frozenset(digests), np.unique(np.concatenate(keys)))

    def count(self, corpus: sources.Corpus) -> int:
        """Counts the documents of an index that are held out as well; reads only those whose size and CRC-32 agree."""
        lines = _lines(corpus)
        found = lines[np.isin(_keys(corpus.length[lines], corpus.crc32[lines]), self.keys)]
        return sum(digest(corpus.line(i)) in self.digests for i in found.tolist())


def digest(line: bytes) -> bytes:
    """Names a line, without what ends it."""
    return hashlib.blake2b(line.rstrip(b"\r\n"), digest_size=16).digest()


def _lines(corpus: sources.Corpus) -> np.ndarray:
    """The spans that a line begins with."""
    return np.flatnonzero(corpus.begin == 0) if corpus.format != "text" else np.zeros(0, np.int64)


def _keys(lengths: np.ndarray, crc32: np.ndarray) -> np.ndarray:
    return (lengths.astype(np.uint64) << np.uint64(32)) | crc32.astype(np.uint64)
