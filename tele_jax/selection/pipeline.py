"""A selection from beginning to end, into a directory. Results of finished chunks are kept until the end, or for ever.

DIR/selected.jsonl   {"messages", "category", "id"} a line, in the order of the pool
DIR/manifest.jsonl   a line for each sample of the pool: where it is, its scores, its cluster, and its fate:
                     whether it was selected, and if not, why
DIR/report.html      counts, clusters, lengths, and samples that were taken and dropped
DIR/summary.json     the counts and the page; written last: with it the selection is complete
DIR/unfinished/      until the selection is complete: results of chunks, if no other directory is named for them
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
    results: str | Path | None = None,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Table:
    """Selects `config.count` samples, writes them to the directory `out`, and returns the summary.

    The files are the same on any number of workers, and after any number of interruptions.

    Args:
      out: does not exist, or holds an unfinished selection of the same files and page, which goes on. The page may have
        another count, method, quotas, balance, bands or choice among clusters, see SelectConfig.of_results.
      results: directory of the results of chunks, which is kept, and serves other selections in the same way; None:
        in `out`, until the selection is complete.
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
    judges = _examine(config)
    pool = samples.index(config.sources)
    say(f"{len(pool):,} samples in {len(pool.files):,} {'file' if len(pool.files) == 1 else 'files'}")
    identity = _identity(config, pool) | judges
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_held(out / "unfinished", out, identity))
        if results is not None:
            directory = stack.enter_context(_held(Path(results), Path(results), identity))
        processes = stack.enter_context(work.Workers(workers))
        table = Run(config, pool, directory, processes, progress).all()
        summary = output.write(out, directory, config, pool, table)
        write_json(out / "summary.json", summary)
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    return summary


def _examine(config: SelectConfig) -> Table:
    """Returns the identities of the benchmarks and of the model.

    Raises UserError where one of them or a package is missing: now, and not after the reading.
    """
    copies = "duplicates" in config.stages and "minhash" in config.duplicates.methods
    packages = {"sklearn.cluster": True, "rensa": copies, "pycld2": "rules" in config.stages}
    for module in (name for name, is_needed in packages.items() if is_needed):
        need(module, how="pip install tele_jax[select]")
    benchmarks = None
    if "overlap" in config.stages and config.overlap is not None:
        benchmarks = hashlib.sha256(screening.load_benchmarks(config.overlap).tobytes()).hexdigest()
    return {"benchmarks": benchmarks, "model": None if config.model is None else scores.examine(config.model)}


def _identity(config: SelectConfig, pool: Pool) -> Table:
    """Returns what results of chunks depend on in the page and the files of the pool."""
    page = json.dumps(to_dict(config.of_results()), sort_keys=True)
    files = {path: list(file) for path, file in pool.files.items()}
    return {"format": FORMAT, "page": hashlib.sha256(page.encode()).hexdigest(), "files": files}


@contextlib.contextmanager
def _held(directory: Path, top: Path, identity: Table) -> Iterator[Path]:
    """Holds a directory of results; top: it, or the directory above it, which holds nothing else."""
    known, own = directory / "selection.json", "lock" if directory == top else directory.name
    if not known.exists() and top.exists() and (not top.is_dir() or set(os.listdir(top)) - {own}):
        raise UserError(f"{top}: is there already and holds something else; choose another directory")
    with held_alone(directory / "lock", f"{top}: another process is selecting into it"):
        if known.exists() and read_json(known) != identity:
            what = "results" if directory == top else "an unfinished selection"
            what += " of another page, other files or another model"
            raise UserError(f"{top}: holds {what}; remove it, or choose another directory")
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
        """Runs all phases; returns the columns, with whether each sample was selected, and if not, why."""
        self.on_chunks("read")
        table = self.columns()
        self.check_counts(table)
        if "duplicates" in self.config.stages:
            self.drop_copies(table)
            self.check_counts(table)
        if self.config.model is not None:
            self.score(table)
        left = np.flatnonzero(table.fate == LEFT)
        rows = self.cluster(table, left)
        candidates = choice.Candidates(
            left,
            np.array(table.categories)[table.category[left]],
            table.answer[left],
            table.cluster[left],
            table.distance[left],
            table.difficulty[left],
            rows,
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

    def check_counts(self, table: Columns) -> None:
        """Raises UserError, before what takes long, for quotas and a count that what is left does not fulfil."""
        left = np.bincount(table.category[table.fate == LEFT], minlength=len(table.categories))
        sizes = {name: int(size) for name, size in zip(table.categories, left, strict=True) if size}
        choice.allot(self.config, sizes, table.categories)

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
        fitted = self._fitted(left)
        if self.config.clusters.features == "hashed":  # of samples outside the bands too: other bands share the results
            read = (table.fate == LEFT) | table.dropped_by("difficulty", "perplexity")
            self._hash(set(self._fitted(np.flatnonzero(read)).tolist()))
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

    def _fitted(self, rows: np.ndarray) -> np.ndarray:
        """The rows that features or centres are computed from, in order."""
        order = np.argsort(choice.shuffled(rows, self.config.seed), kind="stable")
        return np.sort(rows[order[: self.config.clusters.fit_samples]])

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
