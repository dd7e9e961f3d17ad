"""Batches for training, from opened data (domains.py).

`open_feed` returns a LiveFeed, which reads files and seqio Tasks while training goes on, or a RowFeed, which reads rows
from a store: a cache on disk, or records in memory (record_rows.py).
"""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from tele_jax.data import order, packing
from tele_jax.data.documents import Documents
from tele_jax.data.domains import OpenData, RowStore
from tele_jax.data.order import Position
from tele_jax.data.templates import separator
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table

Batch = dict[str, np.ndarray]
Place = Callable[[Batch], Any]
Prepare = Callable[[Batch, np.ndarray], Batch]

AHEAD = 2  # batches that are read while training goes on


def open_feed(
    opened: OpenData,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
    place: Place = lambda batch: batch,
    known: Sequence[Position] = (),
    prepare: Prepare = lambda batch, places: batch,
    domains: Mapping[str, Documents] | None = None,
    rates: Mapping[str, float] | None = None,
    last: Mapping[str, int] | None = None,
    packed: bool = True,
) -> "LiveFeed | RowFeed":
    """Opens the feed of a stage.

    Args:
      opened: domains, rates and the tokenizer.
      batch_size: rows in a batch over all processes.
      seed: seed of the orders; a domain that goes on keeps the seed of the stage which began to read it.
      rows: numbers of the rows of every batch that this process needs; None: all. A live feed gives all rows.
      place: is given every batch in a thread ahead of time, to put it on devices; its result is what the feed returns.
      known: positions that earlier stages came to, the latest first; a domain goes on where it was left.
      prepare: prepare(batch, places) is given every batch on the host, before `place`; places, uint64 [rows], are the
        numbers of its rows, counted from the first batch of the stage.
      domains: what a live feed reads; None: those of `opened`.
      rates: relative rates of the domains; None: those of their sources.
      last, packed: see LiveFeed.

    Raises:
      UserError, DamageError: as OpenData.train and OpenData.cache.
    """
    how = {"batch_size": batch_size, "seed": seed, "place": place, "known": known, "prepare": prepare}
    domains = opened.train if domains is None else domains
    if rates is None:
        rates = {name: source.rate for name, source in opened.data.sources.items()}
    if opened.store is None:
        return LiveFeed(opened, domains, rates, last=last or {}, packed=packed, **how)
    return RowFeed(opened.store, rates, rows=rows if opened.store.reads_alone else None, **how)


def starts(
    opened: OpenData, domains: Mapping[str, Documents], known: Sequence[Position], *, seed: int
) -> tuple[dict[str, Position], dict[str, Position]]:
    """Returns (positions of earlier stages that domains go on from, where each begins), of what a live feed reads."""
    taken_over = order.choose(known, {name: each.checksum for name, each in domains.items()})
    how: Table = {"kind": opened.kind, "seq_len": opened.seq_len, "seed": seed}
    begins = {name: packing.go_on(taken_over.get(name), name, each, **how) for name, each in domains.items()}
    return taken_over, begins


class _Feed:
    """An endless iterator of batches that reads ahead, and whose place can be saved and restored.

    A batch is a dict of arrays [rows, seq_len]: tokens int32 (inputs), targets int32, loss_weights float32, segment_ids
    int32 (1, 2, ... in a row; 0 is padding), positions int32 (from 0 in every segment).

    Attributes:
      batches: number of batches that were given out, including those before a restore.
      taken_over: the positions of earlier stages at which domains go on, by name.
    """

    _saved_elsewhere: str  # message for a state of the other kind of feed
    _identity: Table  # what a state has to agree with
    batches: int
    taken_over: dict[str, Position]

    def __init__(self, place: Place, prepare: Prepare):
        self._place, self._prepare = place, prepare
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._pending: deque[Future] = deque()

    def _begin(self, starts: dict[str, Position], batches: int) -> None:
        """Sets where the next batch comes from, while nothing is being read."""
        self._starts, self._positions, self.batches = starts, starts, batches

    def _make(self, step: int) -> tuple[Any, dict[str, Position]]:
        """Makes the batch of a step, and the positions to be saved after it. Called in a thread, in order."""
        raise NotImplementedError

    def _restored(self, positions: dict[str, Position]) -> dict[str, Position]:
        """Checks saved positions; DamageError where no feed like this one can have come to them."""
        raise NotImplementedError

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> Any:
        """Returns the next batch, as `place` gives it.

        Raises:
          UserError: a file has changed, or is gone, since the feed was made.
          DamageError: a shard of the cache is damaged.
        """
        while len(self._pending) <= AHEAD:
            self._pending.append(self._pool.submit(self._make, self.batches + len(self._pending)))
        batch, self._positions = self._pending.popleft().result()
        self.batches += 1
        return batch

    def close(self) -> None:
        """Stops reading ahead; the feed cannot be used after."""
        self._stop_reading()
        self._pool.shutdown()

    def _stop_reading(self) -> None:
        for future in self._pending:
            future.cancel()
        wait([future for future in self._pending if not future.cancelled()])
        self._pending.clear()

    def positions(self) -> dict[str, Position]:
        """Returns the position of every domain after the last batch that was returned, for a later stage."""
        return self._positions

    def state(self) -> bytes:
        """Returns the place in the data after the last batch that was returned, for `restore`."""
        positions = {name: position.to_json() for name, position in self._positions.items()}
        return json.dumps({"batches": self.batches, **self._identity, "positions": positions}).encode()

    def restore(self, state: bytes) -> None:
        """Goes to a place that `state` gave, in this process or another; the next batch is the one that came after it.

        Raises:
          UserError: the state is of a feed of other data, rates, tokenizer, sizes or seed.
          DamageError: the bytes are not what `state` gave.
        """
        saved, batches, positions = order.parse_state(state)
        if saved.get("feed") in {"live", "cache"} - {self._identity["feed"]}:
            raise UserError(f"the position in the data was saved for {self._saved_elsewhere}")
        if changed := order.difference(saved, self._identity):
            raise UserError(
                f"the position in the data was saved for another feed: {changed}; go on with what it was saved for, or "
                "from the checkpoint in another work directory (config.start)"
            )
        starts = self._restored(positions)
        self._stop_reading()
        self._begin(starts, batches)


class LiveFeed(_Feed):
    """A feed that reads, tokenises, packs and mixes documents while training goes on.

    Every epoch of a domain has every document once, in an order of its own. The shares of the domains in the rows are
    their rates. The same configuration, files and seed give the same batches, bit for bit, and a restored feed goes on
    as if nothing had happened, in any epoch. Documents are compared with the index when they are read: a document that
    has changed ends the run, and two versions are never mixed.
    """

    _saved_elsewhere = "a feed from a cache"

    def __init__(
        self,
        opened: OpenData,
        domains: Mapping[str, Documents],
        rates: Mapping[str, float],
        *,
        batch_size: int,
        seed: int,
        place: Place = lambda batch: batch,
        prepare: Prepare = lambda batch, places: batch,
        known: Sequence[Position] = (),
        last: Mapping[str, int] | None = None,
        packed: bool = True,
    ):
        """Documents are read from the first batch on. Arguments and errors as `open_feed`.

        Args:
          last: number of the first document that is not read any more, counted through all epochs, of domains of
            fine-tuning. Behind it come rows of padding.
          packed: whether a row of fine-tuning takes several dialogues, none of which sees another.
        """
        super().__init__(place, prepare)
        self._vocabulary, self._documents = opened.vocabulary, domains
        self._shape = {"kind": opened.kind, "seq_len": opened.seq_len}
        self._batch_size, self._last, self._packed = batch_size, last or {}, packed
        self._weights = order.integer_weights(list(rates.values()))
        self.taken_over, begins = starts(opened, domains, known, seed=seed)
        self._identity = {
            "feed": "live",
            **self._shape,
            "batch_size": batch_size,
            "seed": seed,
            "tokenizer": self._vocabulary.sha256,
            "order": order.VERSION,
            **({} if packed else {"packed": False}),
            "sources": {
                name: {"checksum": each.checksum, "format": each.format, "rate": rates[name]}
                for name, each in self._documents.items()
            },
        }
        self._begin(begins, 0)

    def _begin(self, starts: dict[str, Position], batches: int) -> None:
        super()._begin(starts, batches)
        self._packers: list[packing.CutRows | packing.WholeRows] = []
        self._broken: Exception | None = None

    def _open_packers(self) -> list[packing.CutRows | packing.WholeRows]:
        """Makes a packer for each domain; it reads again the documents of its open rows."""
        pad_id, made = max(self._vocabulary.pad_id, 0), []
        for name, documents in self._documents.items():
            start = self._starts[name]
            read = packing.Shuffled(documents.example, start)
            if self._shape["kind"] == "pretrain":
                made.append(packing.CutRows(read, start, separator=separator(self._vocabulary), pad_id=pad_id))
            else:
                how = {"last": self._last.get(name), "packed": self._packed}
                made.append(packing.WholeRows(read, start, pad_id=pad_id, **how))
        return made

    def _make(self, step: int) -> tuple[Any, dict[str, Position]]:
        if self._broken is not None:  # a packer may stand in the middle of a row
            raise self._broken
        try:
            self._packers = self._packers or self._open_packers()
            first = step * self._batch_size
            places = np.arange(first, first + self._batch_size)
            domain, _ = order.mixture(places, self._weights)
            rows = np.stack([self._packers[i].row() for i in domain.tolist()])
            positions = {name: packer.position() for name, packer in zip(self._documents, self._packers, strict=True)}
            return self._place(self._prepare(packing.to_batch(rows), places.astype(np.uint64))), positions
        except Exception as error:
            self._broken = error
            raise

    def _restored(self, positions: dict[str, Position]) -> dict[str, Position]:
        for name, documents in self._documents.items():
            packing.check_own(positions.get(name), name, documents, **self._shape)
        return {name: positions[name] for name in self._documents}


class RowFeed(_Feed):
    """A feed that reads rows from a store: each batch is a pure function of seed, step and earlier stages.

    The rows of step t are those at the places t * batch_size ... (t + 1) * batch_size - 1 of one order (order.py). So
    going to a step takes no time, and the batches do not depend on how many processes read them. The state is the step
    and what the order depends on: the checksums of the rows, not the path of a cache.
    """

    _saved_elsewhere = "a feed without a cache"

    def __init__(
        self,
        store: RowStore,
        rates: Mapping[str, float],
        *,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
        place: Place = lambda batch: batch,
        prepare: Prepare = lambda batch, places: batch,
        known: Sequence[Position] = (),
    ):
        """Reads no row yet; rows are read from the first batch on.

        Args:
          store: the rows.
          rates: relative rates of the domains to draw from.
          batch_size, seed, place, prepare, known: as `open_feed`.
          rows: numbers of the rows of every batch that this process reads; None: all. Process h of H that share a batch
            evenly: range(h * batch_size // H, (h + 1) * batch_size // H).

        Raises:
          UserError: a rate of a domain that the store does not have.
          ValueError: rows that are not in a batch.
        """
        super().__init__(place, prepare)
        for name in rates:
            if name not in store.rows:
                raise UserError(f"{store.where}: has no domain {name!r}; it has {', '.join(store.rows)}")
        self._store = store
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
        if not ((self._rows >= 0) & (self._rows < batch_size)).all():
            raise ValueError(f"rows {self._rows.tolist()} are not all in a batch of {batch_size}")
        self._batch_size, self._rates, self._seed = batch_size, rates, seed
        self._checksums = {name: store.checksum(name) for name in rates}
        self._identity = {
            **store.identity,
            "batch_size": batch_size,
            "seed": seed,
            "order": order.VERSION,
            "sources": {name: {"checksum": self._checksums[name], "rate": rates[name]} for name in rates},
        }
        self.taken_over = order.choose(known, self._checksums)
        self._begin(self._complete(self.taken_over), 0)

    def _complete(self, positions: dict[str, Position]) -> dict[str, Position]:
        """Adds the beginning of every domain that has no position."""
        total, checksums = self._store.rows, self._checksums
        return {
            name: positions.get(name)
            or Position(checksum=checksums[name], name=name, seed=self._seed, total=total[name])
            for name in self._rates
        }

    def _begin(self, starts: dict[str, Position], batches: int) -> None:
        super()._begin(starts, batches)
        begins = {name: (start.next, start.name, start.seed) for name, start in starts.items()}
        rows = tuple(self._store.rows[name] for name in self._rates)
        self.order = order.Order(tuple(self._rates), rows, tuple(self._rates.values()), self._seed, begins)

    def read(self, step: int) -> Batch:
        """Reads the rows of a step's batch that this process needs, as arrays [len(rows), ...].

        Raises:
          DamageError: a shard of the cache is damaged.
        """
        domain, _, row = self.order.locate(step * self._batch_size + self._rows)
        return self._store.read([self.order.domains[i] for i in domain.tolist()], row.tolist())

    def _make(self, step: int) -> tuple[Any, dict[str, Position]]:
        places = (step * self._batch_size + self._rows).astype(np.uint64)
        return self._place(self._prepare(self.read(step), places)), self._starts

    def close(self) -> None:
        """Stops reading ahead and closes the files; the feed cannot be used after."""
        super().close()
        self._store.close()

    def positions(self) -> dict[str, Position]:
        """Returns the position of every domain after the last batch that was returned, for a later stage."""
        counts = self.order.counts(self.batches * self._batch_size)
        return {
            name: dataclasses.replace(start, next=start.next + counts[name]) for name, start in self._starts.items()
        }

    def _restored(self, positions: dict[str, Position]) -> dict[str, Position]:
        for name, start in positions.items():
            if name not in self._rates or start.total != self._store.rows[name]:
                raise DamageError(f"the saved position in the data is damaged: positions.{name} is not of these rows")
        return self._complete(positions)
