"""The work on one chunk that needs no model, in any process: each result is a file, and is made only once."""

import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from tele_jax.clean import duplicates, screening, text
from tele_jax.clean.document import Document, Drop
from tele_jax.files import Table, write_file
from tele_jax.selection import features, rules, samples
from tele_jax.selection.samples import Chunk, Sample
from tele_jax.selection.settings import SelectConfig

Work = Callable[[SelectConfig, Path, Chunk], Mapping[str, np.ndarray]]


def result_of(directory: Path, what: str, chunk: int) -> Path:
    """The file that holds a result for a chunk."""
    return directory / what / f"{chunk:06d}.npz"


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a file of numpy, all of it or nothing."""
    with io.BytesIO() as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType] - a name of an array is no flag of savez
        write_file(path, file.getvalue())


class Workers(contextlib.AbstractContextManager):
    """So many processes, which start when there is work for more than one."""

    def __init__(self, count: int):
        self._count, self._pool = count, None

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self,
        what: str,
        config: SelectConfig,
        directory: Path,
        chunks: Sequence[Chunk],
        progress: Callable[[int, int], None],
    ) -> None:
        """Makes the results that are missing; raises what the work raises.

        what: a name in WORK, and of the directory of its results.
        """
        missing = [chunk for chunk in chunks if not result_of(directory, what, chunk.number).exists()]
        one = functools.partial(_one, what, config, directory)
        progress(len(chunks) - len(missing), len(chunks))
        for done, _ in enumerate(self._each(one, missing), start=1 + len(chunks) - len(missing)):
            progress(done, len(chunks))

    def _each(self, one: Callable[[Chunk], None], chunks: Sequence[Chunk]) -> Iterator[None]:
        if self._count == 1 or len(chunks) < 2:
            yield from map(one, chunks)
            return
        if self._pool is None:  # not forked: this process may have started the threads of JAX
            self._pool = ProcessPoolExecutor(self._count, multiprocessing.get_context("spawn"))
        for future in as_completed([self._pool.submit(one, chunk) for chunk in chunks]):
            yield future.result()


def _one(what: str, config: SelectConfig, directory: Path, chunk: Chunk) -> None:
    save(result_of(directory, what, chunk.number), WORK[what](config, directory, chunk))


# ---- read: rules, overlap, keys of duplicates ------------------------------------------------------------------------

# Numbers of a sample that `read` finds: how many turns, tokens of questions and tokens of answers it has.
ROW = np.dtype([("turns", "<i4"), ("question", "<i4"), ("answer", "<i4")])


@dataclasses.dataclass
class Read:
    """Findings about the samples of a chunk, before they are compared with others.

    Attributes:
      rows: ROW[n].
      categories: of each sample.
      drops: {row: (stage, reason, detail)}.
    """

    rows: np.ndarray
    categories: list[str]
    drops: dict[int, tuple[str, str, str]]

    @staticmethod
    def load(directory: Path, chunk: int) -> "Read":
        """Reads the result of a chunk."""
        with np.load(result_of(directory, "read", chunk)) as arrays:
            told = json.loads(arrays["told"].tobytes())
            drops = {int(row): tuple(drop) for row, drop in told["drops"].items()}
            return Read(arrays["rows"], told["categories"], drops)


@functools.lru_cache(maxsize=1)
def _benchmarks(config) -> np.ndarray:
    return screening.load_benchmarks(config)


def _read(config: SelectConfig, directory: Path, chunk: Chunk) -> dict[str, np.ndarray]:
    del directory
    rows = np.zeros(chunk.count, ROW)
    categories, drops, documents = [], {}, []
    for i, sample in enumerate(samples.read(chunk, config.sources[chunk.source])):
        categories.append(sample.category)
        if sample.messages is None:
            drops[i] = ("read", "unreadable", sample.reason)
            continue
        rows["turns"][i] = len(sample.turns())
        rows["question"][i], rows["answer"][i] = rules.lengths(sample)
        if (drop := _first_drop(sample, config)) is not None:
            drops[i] = drop
        elif "duplicates" in config.stages:
            documents.append(_document(sample))
    told: Table = {"categories": categories, "drops": drops}
    arrays = {"rows": rows, "told": np.frombuffer(json.dumps(told, ensure_ascii=False).encode(), np.uint8)}
    for (method, place), (table, payload) in _keys(documents, chunk.number, config).items():
        arrays[f"{method} {place}"] = table
        arrays[method] = payload  # all bands of a method have the same
    return arrays


def _first_drop(sample: Sample, config: SelectConfig) -> tuple[str, str, str] | None:
    if "rules" in config.stages:
        for drop in rules.violations(sample, config.rules):
            return ("rules", drop.reason, drop.detail)
    if "overlap" in config.stages and config.overlap is not None:
        found = screening.overlap(_document(sample), config.overlap, _benchmarks(config.overlap))
        if isinstance(found, Drop):
            return ("overlap", found.reason, found.detail)
    return None


def _document(sample: Sample) -> Document:
    body = sample.text()
    language = "code" if any(text.looks_like_code(answer) for _, answer in sample.turns()) else None
    return Document(sample.id, body, "", "", "", language=language)


def _keys(documents: list[Document], batch: int, config: SelectConfig) -> dict[tuple[str, int], Any]:
    return duplicates.keys(documents, batch, config.duplicates) if documents else {}


def find_duplicates(directory: Path, chunks: Sequence[Chunk], config: SelectConfig) -> np.ndarray:
    """Compares all samples that are left after `read`: duplicates.DROPPED, sorted by uid."""
    names: set[str] = set()
    for chunk in chunks:
        with np.load(result_of(directory, "read", chunk.number)) as arrays:
            names.update(name for name in arrays.files if " " in name)
    edges = [np.zeros(0, duplicates.EDGE)]
    for name in sorted(names):  # one band of all chunks at a time
        method = name.split()[0]
        found = []
        for chunk in chunks:
            with np.load(result_of(directory, "read", chunk.number)) as arrays:
                if name in arrays.files:
                    found.append((arrays[name], arrays[method]))
        table, payload = map(np.concatenate, zip(*found, strict=True))
        edges.append(duplicates.pairs(method, table, payload, config.duplicates))
    return duplicates.components(np.concatenate(edges))


# ---- features --------------------------------------------------------------------------------------------------------


def _features(config: SelectConfig, directory: Path, chunk: Chunk) -> dict[str, np.ndarray]:
    hashed = _hashed(directory / "hashed.npz")
    texts = [sample.text() for sample in samples.read(chunk, config.sources[chunk.source])]
    return {"features": hashed.transform(texts)}


@functools.lru_cache(maxsize=1)
def _hashed(path: Path) -> features.Hashed:
    return features.Hashed.load(path)


WORK: dict[str, Work] = {"read": _read, "features": _features}
