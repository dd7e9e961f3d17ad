"""`CachedFeed`: batches of rows from a cache, each a pure function of seed, step, rows asked for and earlier stages."""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tele_jax.data import order
from tele_jax.data import position as positions_
from tele_jax.data.cache import RowCache
from tele_jax.data.position import Position
from tele_jax.errors import DamageError, UserError
from tele_jax.files import parse_json

Batch = dict[str, np.ndarray]

AHEAD = 2  # batches that are read while training goes on
ELSEWHERE = "go on with what it was saved for, or from the checkpoint in another work directory (config.start)"


class CachedFeed:
    """An endless iterator of batches from a row cache, with the interface of feed.LiveFeed.

    The rows of step t are those at the places t * batch_size ... (t + 1) * batch_size - 1 of one order (order.py), so
    that going to a step takes no time, and the batches do not depend on how many processes read them. The state is the
    step and what the order depends on: the checksums of the rows, not where the cache lies.
    """

    def __init__(
        self,
        cache: RowCache,
        rates: dict[str, float],
        *,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None = None,
        place: Callable[[Batch], Any] = lambda batch: batch,
        known: Sequence[Position] = (),
    ):
        """Nothing is read yet but the manifest; reading begins with the first batch.

        Args:
          cache: where rows come from.
          rates: of the domains to draw from, relative.
          batch_size: rows in a batch over all processes.
          seed: of the order.
          rows: which rows of every batch this process reads, by their place in it; None: all. Host h of H that share
            a batch evenly: range(h * batch_size // H, (h + 1) * batch_size // H).
          place: is given every batch, in a thread, before it is asked for: to put it on devices.
          known: positions that earlier stages came to, the latest first; a domain goes on where its rows were left.

        Raises:
          UserError: a rate of a domain that the cache does not have.
          ValueError: rows that are not in a batch.
        """
        for name in rates:
            if name not in cache.rows:
                raise UserError(f"{cache.path}: has no domain {name!r}; it has {', '.join(cache.rows)}")
        self._cache, self._place = cache, place
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
        if not ((self._rows >= 0) & (self._rows < batch_size)).all():
            raise ValueError(f"rows {self._rows.tolist()} are not all in a batch of {batch_size}")
        self._batch_size, self._rates, self._seed = batch_size, rates, seed
        manifest = cache.manifest
        self._checksums = {name: manifest.checksum(name) for name in rates}
        self.taken_over = positions_.choose(known, self._checksums)
        self._begin({name: self.taken_over.get(name) or self._beginning(name) for name in rates})
        self._identity = {
            "feed": "cache",
            "kind": manifest.kind,
            "seq_len": manifest.seq_len,
            "batch_size": batch_size,
            "seed": seed,
            "tokenizer": manifest.tokenizer_sha256,
            "order": order.VERSION,
            "sources": {name: {"checksum": self._checksums[name], "rate": rates[name]} for name in rates},
        }
        self._batches = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._pending: deque[Future] = deque()

    def _beginning(self, name: str) -> Position:
        return Position(checksum=self._checksums[name], name=name, seed=self._seed, total=self._cache.rows[name])

    def _begin(self, starts: dict[str, Position]) -> None:
        """Sets where the first batch of this stage comes from."""
        self._starts = starts
        begins = {name: (start.next, start.name, start.seed) for name, start in starts.items()}
        names = tuple(self._rates)
        rows, rates = tuple(self._cache.rows[name] for name in names), tuple(self._rates.values())
        self.order = order.Order(names, rows, rates, self._seed, begins)

    def read(self, step: int) -> Batch:
        """The rows of the batch of a step that this process reads, as arrays [len(rows), S].

        Raises:
          DamageError: a shard of the cache is damaged.
        """
        domain, _, row = self.order.locate(step * self._batch_size + self._rows)
        return self._cache.read([self.order.domains[i] for i in domain.tolist()], row.tolist())

    def __iter__(self) -> "CachedFeed":
        return self

    def __next__(self) -> Any:
        """The next batch, as `place` gives it.

        Raises:
          DamageError: as read.
        """
        while len(self._pending) <= AHEAD:
            step = self._batches + len(self._pending)
            self._pending.append(self._pool.submit(lambda step=step: self._place(self.read(step))))
        batch = self._pending.popleft().result()
        self._batches += 1
        return batch

    def close(self) -> None:
        """Stops reading ahead and closes the files; it cannot be used after."""
        self._forget()
        self._pool.shutdown()
        self._cache.close()

    def _forget(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    @property
    def batches(self) -> int:
        """How many batches have been given out, those before a restore included."""
        return self._batches

    def state(self) -> bytes:
        """The place in the data after the last batch that was returned."""
        starts = {name: start.to_json() for name, start in self._starts.items()}
        return json.dumps({"batches": self._batches, **self._identity, "positions": starts}).encode()

    def positions(self) -> dict[str, Position]:
        """The position of every domain after the last batch that was returned, for `known` of a later stage."""
        counts = self.order.counts(self._batches * self._batch_size)
        return {
            name: dataclasses.replace(start, next=start.next + counts[name]) for name, start in self._starts.items()
        }

    def restore(self, state: bytes) -> None:
        """Goes to a place that `state` gave, in this process or another, among any number of them.

        Raises:
          UserError: the state is of another feed: a live one, another cache, other rates, sizes or seed.
          DamageError: the bytes are not what `state` gave.
        """
        saved, batches, starts = parse_state(state)
        if saved.get("feed") == "live":
            raise UserError("the position in the data was saved for a feed without a cache")
        if changed := difference(saved, self._identity):
            raise UserError(f"the position in the data was saved for another feed: {changed}; {ELSEWHERE}")
        for name, start in starts.items():
            if name not in self._rates or start.total != self._cache.rows[name]:
                raise DamageError(f"the saved position in the data is damaged: positions.{name} is not of this cache")
        self._forget()
        self._begin({name: starts.get(name) or self._beginning(name) for name in self._rates})
        self._batches = batches


def parse_state(state: bytes) -> tuple[dict[str, Any], int, dict[str, Position]]:
    """(what the feed was, batches given out, positions by domain) from what a feed's `state` gave.

    Raises:
      DamageError: the bytes are not what `state` gave.
      UserError: they are of an earlier version.
    """
    earlier = UserError(
        "the position in the data was saved by an earlier version, in another form; start a new work directory "
        "from this checkpoint (config.start)"
    )
    if state[:2] == b"PK":
        raise earlier
    try:
        saved = parse_json(state, "the saved position in the data")
        if "batches" in saved and "cache" in saved and "positions" not in saved:
            raise earlier
        batches, positions = saved.pop("batches"), dict(saved.pop("positions").items())
    except UserError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamageError(f"the saved position in the data is damaged: {type(error).__name__}: {error}") from None
    if type(batches) is not int or batches < 0:
        raise DamageError(f"the saved position in the data is damaged: {batches!r} batches")
    return saved, batches, {name: positions_.from_json(value, f"positions.{name}") for name, value in positions.items()}


def difference(saved: dict[str, Any], current: dict[str, Any], path: str = "") -> str:
    """What differs, by name; empty if nothing does."""
    parts = []
    for key in sorted({*saved, *current}):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(difference(old, new, f"{path}{key}."))
        elif old != new:
            parts.append(f"{path}{key} was {old!r}, now {new!r}")
    return "; ".join(filter(None, parts))
