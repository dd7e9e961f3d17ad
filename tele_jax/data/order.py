"""The order of rows and documents, a pure function of the seed and the place in the whole training run; positions.

A stage that goes on in data which an earlier one has read begins where that one ended (Order.begins). A `Position` says
where, in the provenance of a checkpoint. It is found again by the checksum of the data, whatever the domain is called
and wherever its files lie. It counts rows of a cache or documents of a live feed, not steps, so that a later stage with
another batch size (and, live, another row length) goes on where the earlier one ended; packing.go_on has the exception.

The order is two pieces of integer arithmetic, with no buffer:

    mixture       place in the run -> (domain, how many rows of it came before)     shares to a few rows, at any length
    permutation   how many came before -> (epoch, row)                              every row once an epoch

The arithmetic is written out here because a run depends on it for months: the order must not change with the next
release of a library. Grain's index_shuffle is under `experimental`, and its `mix` rounds rates to whole percents of the
smallest, 0.25% off for rates of 1 and 1.0099; docs/data.md has the comparison.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax.config import from_dict
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table, parse_json

VERSION = 1  # of the arithmetic, whose change would change every order
ROUNDS = 6
WEIGHT_SUM = 1 << 24  # shares are exact to 6e-8
MAX_ROWS = 1 << 39  # rows in a run: their number times WEIGHT_SUM has to fit 63 bits


def integer_weights(rates: Sequence[float]) -> tuple[int, ...]:
    """Returns whole numbers in proportion to `rates`, at least 1, whose sum is WEIGHT_SUM (largest remainders)."""
    total = math.fsum(rates)
    exact = [rate / total * WEIGHT_SUM for rate in rates]
    weights = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: (weights[i] - exact[i], i))
    for i in by_remainder[: max(0, WEIGHT_SUM - sum(weights))]:
        weights[i] += 1
    weights[int(np.argmax(weights))] -= sum(weights) - WEIGHT_SUM  # domains so rare that they were given a 1
    return tuple(weights)


def mixture(index: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (domain, number of rows of that domain before), int64 [n] each, for the places `index`, int64 [n].

    The first domain takes a place where floor(k * its share) moves on; the places that are left over are shared out in
    the same way among the rest. After any number of rows each domain is off its share by fewer rows than there are
    domains: by 7.3 at most in the first million rows at the rates of configs/data/tele_flm.py, which has eleven.
    """
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < MAX_ROWS:
        raise ValueError(f"places {int(index.min())} to {int(index.max())} are not all in the {MAX_ROWS} rows of a run")
    domain = np.full(index.shape, -1, np.int64)
    before = np.zeros(index.shape, np.int64)
    here, after, remaining = index.astype(np.int64), index.astype(np.int64) + 1, sum(weights)
    for i, weight in enumerate(weights):
        left_here = here * (remaining - weight) // remaining
        left_after = after * (remaining - weight) // remaining
        taken = (domain < 0) & (left_after == left_here)
        domain[taken] = i
        before[taken] = (here - left_here)[taken]
        here, after, remaining = left_here, left_after, remaining - weight
    return domain, before


def counts_before(place: int, weights: Sequence[int]) -> list[int]:
    """Counts by domain the first `place` places, in the time that one place takes."""
    found, here, remaining = [], place, sum(weights)
    for weight in weights:
        left = here * (remaining - weight) // remaining
        found.append(here - left)
        here, remaining = left, remaining - weight
    return found


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Permutes range(size) at the places `index`, int64 [n], as chosen by `key`, uint64 [ROUNDS].

    A Feistel network over the pairs (left, right) of digits to the base ceil(sqrt(size)). It permutes the square of
    that base; what falls beyond `size` is permuted again until it falls below (Black and Rogaway, 2002, "cycle
    walking"), which one in sqrt(size) has to.
    """
    base = np.uint64(math.isqrt(size - 1) + 1)
    value = index.astype(np.uint64)
    walking = np.arange(len(value))
    while len(walking):
        left, right = np.divmod(value[walking], base)
        for k in key:
            left, right = right, (left + _mix(right + k) % base) % base
        value[walking] = left * base + right
        walking = walking[value[walking] >= np.uint64(size)]
    return value.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """Mixes 64 bits: the finalizer of splitmix64 (Steele, Lea, Flood, 2014; constants of Stafford's variant 13)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def in_epoch(index: np.ndarray, size: int, seed: int, domain: str, epoch: int) -> np.ndarray:
    """Returns the rows (or documents), of `size` in a domain, at the places `index`, int64 [n], of an epoch."""
    return permute(index, size, _key(seed, domain, epoch))


@functools.lru_cache(maxsize=4096)
def _key(seed: int, domain: str, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed} {epoch} {domain}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a run's rows.

    Attributes:
      domains: names; their order here does not matter.
      rows: number of rows of each domain.
      rates: relative rate of each domain.
      seed: seed of the permutations. The mixture has none: every run has the same domain at the same place.
      begins: where a domain goes on that an earlier stage has read, by name: (rows of it before, name and seed of the
        permutations there).
    """

    domains: tuple[str, ...]
    rows: tuple[int, ...]
    rates: tuple[float, ...]
    seed: int
    begins: Mapping[str, tuple[int, str, int]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _canonical(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """Domains by name, and their weights, so that the order in which a page lists them does not matter."""
        by_name = sorted(range(len(self.domains)), key=self.domains.__getitem__)
        return np.array(by_name), integer_weights([self.rates[i] for i in by_name])

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (domain, epoch, row), int64 [n] each, of the rows at the places `index`, int64 [n], of the run.

        The time it takes does not depend on how far into the run they are.
        """
        by_name, weights = self._canonical
        place, before = mixture(np.asarray(index, np.int64), weights)
        domain = by_name[place]
        begins = [self.begins.get(name, (0, name, self.seed)) for name in self.domains]
        before = before + np.array([begin for begin, _, _ in begins])[domain]
        epoch, row = np.divmod(before, np.array(self.rows)[domain])
        for i, number in set(zip(domain.tolist(), epoch.tolist())):
            here = (domain == i) & (epoch == number)
            _, name, seed = begins[i]
            row[here] = in_epoch(row[here], self.rows[i], seed, name, number)
        return domain, epoch, row

    def counts(self, rows: int) -> dict[str, int]:
        """Counts by domain the first `rows` rows of a run, without computing which ones they are."""
        by_name, weights = self._canonical
        found = np.zeros(len(weights), np.int64)
        found[by_name] = counts_before(rows, weights)
        return dict(zip(self.domains, found.tolist(), strict=True))

    def epochs(self, rows: int) -> dict[str, float]:
        """Returns how often each domain is gone through in the first `rows` rows of a run."""
        total = math.fsum(self.rates)
        return {name: rows * rate / total / n for name, rate, n in zip(self.domains, self.rates, self.rows)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """The part of a domain that has been read.

    Attributes:
      checksum: checksum of the rows of a cache, or of the files of a live feed.
      name, seed: name of the domain, and seed of the stage that began to read it, which fix the orders of all epochs.
      total: rows or documents in an epoch.
      next: the number of the next one, counted on through all epochs.
      kind, seq_len: kind ("pretrain" or "sft") and row length of the live feed that was here.
      cut: bytes at which the live feed cuts long documents into several; 0 where none is that long.
      turn: rows of the live feed so far.
      open: documents that a live feed has begun to put into rows, as (number, tokens of it that are given out), for
        each of its open rows.
      first: documents that come before `next`, which an earlier feed had begun to put into rows of another length.
    """

    checksum: str
    name: str
    seed: int
    total: int
    next: int = 0
    kind: str = ""
    seq_len: int = 0
    cut: int = 0
    turn: int = 0
    open: tuple[tuple[tuple[int, ...], ...], ...] = ()
    first: tuple[int, ...] = ()

    @property
    def epochs(self) -> float:
        """Number of times that the domain has been gone through."""
        return self.next / self.total

    def to_json(self) -> Table:
        """Returns a dict for JSON, without empty fields."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value not in ("", ()) or name in ("checksum", "name")}


def position_from_json(value: Any, where: str) -> Position:
    """Reads what `to_json` gave.

    Raises:
      DamageError: the value is not what `to_json` gave.
    """
    try:
        position = from_dict(Position, value, where)
    except UserError as error:
        raise DamageError(f"the saved position in the data is damaged: {error}") from None
    pairs = [pair for row in position.open for pair in row]
    numbers = [position.next, position.turn, position.seed, *position.first, *(i for pair in pairs for i in pair)]
    if position.total < 1 or min(numbers) < 0 or any(len(pair) != 2 for pair in pairs):
        raise DamageError(f"the saved position in the data is damaged: {where} counts below 0, or by no pairs")
    return position


def parse_state(state: bytes) -> tuple[Table, int, dict[str, Position]]:
    """Takes apart what a feed's `state` gave: (identity of the feed, batches given out, positions by domain).

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
    found = {name: position_from_json(value, f"positions.{name}") for name, value in positions.items()}
    return saved, batches, found


def difference(saved: Table, current: Table, path: str = "") -> str:
    """Lists what differs, by name; empty if nothing does."""
    parts = []
    for key in sorted({*saved, *current}):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(difference(old, new, f"{path}{key}."))
        elif old != new:
            parts.append(f"{path}{key} was {old!r}, now {new!r}")
    return "; ".join(filter(None, parts))


def positions_in(provenance: Sequence[Table]) -> list[Position]:
    """Reads the positions in a checkpoint's provenance, the latest first.

    Raises:
      DamageError: an entry is not what was written.
    """
    found = []
    for number, entry in reversed(list(enumerate(provenance))):
        data = entry.get("data")
        positions = data.get("positions", {}) if isinstance(data, Mapping) else {}
        if not isinstance(positions, Mapping):
            raise DamageError(f"provenance[{number}].data.positions: damaged, not a table")
        found += [
            position_from_json(value, f"provenance[{number}].data.positions.{name}")
            for name, value in positions.items()
        ]
    return found


def choose(known: Sequence[Position], domains: Mapping[str, str]) -> dict[str, Position]:
    """Returns the latest position of every domain that has one.

    Where several domains read the same data, only a position of the same name is taken.

    Args:
      known: positions, the latest first.
      domains: checksum by name.
    """
    chosen: dict[str, Position] = {}
    for name, checksum in domains.items():
        same = [position for position in known if position.checksum == checksum]
        by_name = [position for position in same if position.name == name]
        if by_name or (same and list(domains.values()).count(checksum) == 1):
            chosen[name] = (by_name or same)[0]
    return chosen
