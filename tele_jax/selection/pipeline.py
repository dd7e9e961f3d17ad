"""A selection from beginning to end, into a directory. What is finished of each chunk is kept until the end.

DIR/selected.jsonl   {"messages", "category", "id"} a line, in the order of the pool
DIR/manifest.jsonl   a line for each sample of the pool: where it is, its scores, its cluster, and its fate
DIR/report.html      counts, clusters, lengths, and samples of what was taken and dropped
DIR/summary.json     the counts and the page; written last: with it the selection is complete
DIR/unfinished/      results of chunks, until the selection is complete
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tele_jax.clean import duplicates, screening
from tele_jax.config import to_dict
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import Table, held_alone, read_json, replacing, write_file, write_json
from tele_jax.selection import choice, features, output, samples, scores
from tele_jax.selection import chunks as work
from tele_jax.selection.columns import LEFT, SELECTED, Columns
from tele_jax.selection.samples import Pool
from tele_jax.selection.settings import BandConfig, SelectConfig

FORMAT = 1  # of the unfinished directory and of the manifest
Progress = Callable[[str, int, int], None]


def select(
    config: SelectConfig,
    out: str | Path,
    *,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Table:
    """Selects `config.count` samples, writes them to the directory `out`, and returns the summary.

    The files are the same on any number of workers, and after any number of interruptions.

    Args:
      out: does not exist, or holds an unfinished selection of the same page and files, which goes on.
      workers: processes for what needs no model.
      say: gets lines about what takes long.
      progress: gets the name of a phase, and how many of how many chunks are done.

    Raises:
      UserError: the page and the files do not fit together, `out` holds something else, too few samples are left.
      FailedError: the model's numbers are not finite.
    """
    out = Path(out)
    if (out / "summary.json").exists():
        raise UserError(f"{out}: holds a complete selection, and is not overwritten; choose another directory")
    _check(config)
    pool = samples.index(config.sources)
    say(f"{len(pool):,} samples in {len(pool.files):,} files")
    with _unfinished(out, _identity(config, pool)) as directory, work.Workers(workers) as processes:
        table = Run(config, pool, directory, processes, progress).all()
        summary = output.write(out, directory, config, pool, table)
        write_json(out / "summary.json", summary)
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    return summary


def _check(config: SelectConfig) -> None:
    """Raises UserError for packages, benchmarks and models that are missing: now, and not after the reading."""
    for module in ("sklearn.cluster", "rensa", "pycld2"):
        need(module, how="pip install tele_jax[select]")
    if "overlap" in config.stages and config.overlap is not None:
        screening.load_benchmarks(config.overlap)


def _identity(config: SelectConfig, pool: Pool) -> Table:
    """Returns all that results of chunks depend on: how many samples are chosen at the end, and how, is no part."""
    model = None if config.model is None else scores.examine(config.model)
    page = to_dict(config)
    for name in ("count", "method", "quotas", "balance"):
        del page[name]
    for name in ("within", "balance"):
        del page["clusters"][name]
    digest = hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()
    files = {path: list(file) for path, file in pool.files.items()}
    return {"format": FORMAT, "page": digest, "files": files, "model": model}


@contextlib.contextmanager
def _unfinished(out: Path, identity: Table) -> Iterator[Path]:
    directory = out / "unfinished"
    known = directory / "selection.json"
    if not known.exists() and out.exists() and (not out.is_dir() or set(os.listdir(out)) - {directory.name}):
        raise UserError(f"{out}: is there already and holds something else; choose another directory")
    with held_alone(directory / "lock", f"{out}: another process is selecting into it"):
        if known.exists() and read_json(known) != identity:
            what = "another page, other files or another model"
            raise UserError(f"{out}: holds an unfinished selection of {what}; remove it, or choose another directory")
        write_json(known, identity)
        yield directory


@dataclasses.dataclass
class Run:
    """The phases of a selection, on the results of chunks in a directory."""

    config: SelectConfig
    pool: Pool
    directory: Path
    workers: work.Workers
    progress: Progress

    def all(self) -> Columns:
        """Runs all phases; returns the fate of every sample."""
        self.on_chunks("read")
        table = self.columns()
        if "duplicates" in self.config.stages:
            self.drop_copies(table)
        if self.config.model is not None:
            self.score(table)
        left = np.flatnonzero(table.fate == LEFT)
        features = self.cluster(table, left)
        candidates = choice.Candidates(
            left,
            np.array(table.categories)[table.category[left]],
            table.answer[left],
            table.cluster[left],
            table.distance[left],
            table.difficulty[left],
            features,
        )
        chosen = choice.choose(self.config, candidates, table.categories)
        table.fate[left[chosen]] = SELECTED
        return table

    def on_chunks(self, what: str) -> None:
        """Makes the results of chunks that are missing; what: a name in chunks.WORK."""
        told = functools.partial(self.progress, what)
        self.workers.run(what, self.config, self.directory, self.pool.chunks, told)

    def columns(self) -> Columns:
        """The columns after reading; raises UserError where too many records are no dialogues."""
        table = Columns(len(self.pool))
        for chunk in self.pool.chunks:
            table.add(chunk, work.Read.load(self.directory, chunk.number))
        unreadable = table.count("read", "unreadable")
        if unreadable > self.config.max_unreadable * len(self.pool):
            first = int(np.flatnonzero(table.fate == table.code("read", "unreadable"))[0])
            chunk = next(c for c in reversed(self.pool.chunks) if c.first <= first)
            why = work.Read.load(self.directory, chunk.number).drops[first - chunk.first][2]
            raise UserError(
                f"{unreadable:,} of {len(self.pool):,} records are no dialogues, above max_unreadable="
                f"{self.config.max_unreadable:g}; the first is {chunk.path}, {chunk.unit} "
                f"{chunk.spans[first - chunk.first, 2]}: {why}"
            )
        return table

    def drop_copies(self, table: Columns) -> None:
        """Drops all but the first of the samples that are alike."""
        dropped = work.find_duplicates(self.directory, self.pool.chunks, self.config)
        for kind, name in enumerate(duplicates.KINDS):
            reason = "exact duplicate" if name == "exact" else "near duplicate"
            rows = dropped[dropped["kind"] == kind]
            if len(rows):
                table.fate[rows["uid"]] = table.code("duplicates", reason)
                table.copy_of[rows["uid"]] = rows["kept"]

    def score(self, table: Columns) -> None:
        """Fills in the losses, and drops what is outside the bands."""
        assert self.config.model is not None
        scorer: scores.Scorer | None = None
        for done, chunk in enumerate(self.pool.chunks):
            rows = np.flatnonzero(table.fate[chunk.first : chunk.first + chunk.count] == LEFT)
            path = work.result_of(self.directory, "scores", chunk.number)
            self.progress("scores", done, len(self.pool.chunks))
            if not path.exists():
                scorer = scorer or scores.Scorer(self.config.model)
                wanted = set(rows.tolist())
                read = samples.read(chunk, self.config.sources[chunk.source])
                found = scorer.score([sample for i, sample in enumerate(read) if i in wanted])
                states = np.zeros((chunk.count, found.states.shape[1]), np.float32)
                states[rows] = found.states
                arrays = {"tokens": found.tokens, "loss": found.loss, "alone": found.alone, "states": states}
                work.save(path, arrays)
            with np.load(path) as arrays:
                for name in ("tokens", "loss", "alone"):
                    getattr(table, name)[chunk.first + rows] = arrays[name]
        self.progress("scores", len(self.pool.chunks), len(self.pool.chunks))
        without = (table.fate == LEFT) & np.isnan(table.loss)
        table.drop(without, "model", "too long, or no token to learn")
        for name, band in (("difficulty", self.config.difficulty), ("perplexity", self.config.perplexity)):
            if name in self.config.stages:
                self._drop_outside(table, name, band)

    def _drop_outside(self, table: Columns, name: str, band: BandConfig) -> None:
        values = getattr(table, name)
        if band.max is not None:
            table.drop((table.fate == LEFT) & ~(values <= band.max), name, f"{name} above {band.max:g}")
        if band.min is not None:
            table.drop((table.fate == LEFT) & ~(values >= band.min), name, f"{name} below {band.min:g}")

    def cluster(self, table: Columns, left: np.ndarray) -> "_Rows":
        """Fills in clusters, distances and places in the picture of the samples `left`, and returns their features."""
        most = self.config.clusters.fit_samples
        fitted = np.sort(left[np.argsort(choice.shuffled(left, self.config.seed), kind="stable")[:most]])
        if self.config.clusters.features == "hashed":
            self._hash(set(fitted.tolist()))
        every = self._features()
        mean = every[fitted].mean(0, dtype=np.float64) if len(fitted) else np.zeros(every.shape[1])
        rows = _Rows(every, left, mean)
        if len(left):
            centred = rows[np.searchsorted(left, fitted)]
            centres, axes = choice.centres(centred, self.config.clusters, self.config.seed), choice.axes(centred)
            for start in range(0, len(left), choice.BLOCK):
                part, places = rows[start : start + choice.BLOCK], left[start : start + choice.BLOCK]
                table.cluster[places], table.distance[places] = choice.assign(part, centres)
                table.place[places] = part @ axes
            table.centres = centres @ axes
        return rows

    def _hash(self, fitted: set[int]) -> None:
        """Makes the hashed features of all chunks."""
        path = self.directory / "hashed.npz"
        if not path.exists():
            texts = [
                sample.text()
                for chunk in self.pool.chunks
                if not fitted.isdisjoint(chunk.ids)
                for sample in samples.read(chunk, self.config.sources[chunk.source])
                if sample.id in fitted
            ]
            hashed = features.fit(texts, self.config.clusters.dims, self.config.seed)
            write_file(path, hashed.to_bytes())
        self.on_chunks("features")

    def _features(self) -> np.ndarray:
        """The features of all samples, float32[N, D], in a file that is read where it is needed."""
        what, name = ("features", "features") if self.config.clusters.features == "hashed" else ("scores", "states")
        path = self.directory / f"{name}.npy"
        if not path.exists():
            with np.load(work.result_of(self.directory, what, 0)) as arrays:
                dims = arrays[name].shape[1]
            with replacing(path) as part:
                every = np.lib.format.open_memmap(part, "w+", np.float32, (len(self.pool), dims))
                for chunk in self.pool.chunks:
                    with np.load(work.result_of(self.directory, what, chunk.number)) as arrays:
                        every[chunk.first : chunk.first + chunk.count] = arrays[name]
                every.flush()
        return np.load(path, mmap_mode="r")


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Features of some samples, by their place among these: less the mean, and of length 1."""

    every: np.ndarray
    rows: np.ndarray
    mean: np.ndarray

    def __getitem__(self, places: np.ndarray | slice) -> np.ndarray:
        centred = self.every[self.rows[places]] - self.mean
        length = np.sqrt((centred**2).sum(-1, keepdims=True))
        return centred / np.where(length > 0, length, 1)
