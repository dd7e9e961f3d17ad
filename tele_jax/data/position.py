"""The place of a run in the data of one domain, as numbers that a checkpoint's provenance holds.

A position is found again by the checksum of what is read, whatever the domain is called and wherever its files lie. It
counts rows of a cache or documents of a live feed, and not steps, so that a later stage with another batch size (and,
live, with another row length) goes on where the earlier one ended; live_feed.go_on says when not to the document.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tele_jax.config import from_dict
from tele_jax.errors import DamageError, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """The part of a domain that has been read.

    Attributes:
      checksum: of what is read: the rows of a cache, or the files of a live feed.
      name, seed: of the domain and of the stage that began to read it; the orders of all epochs come from them.
      total: rows or documents in an epoch.
      next: the number of the next one, counted on through all epochs.
      kind, seq_len: of the live feed that was here ("pretrain" or "sft", tokens in a row).
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

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON, without the fields that say nothing."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value not in ("", ()) or name in ("checksum", "name")}


def from_json(value: Any, where: str) -> Position:
    """The inverse of `to_json`.

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


def in_provenance(provenance: Sequence[Mapping[str, Any]]) -> list[Position]:
    """The positions that a checkpoint's provenance knows, the latest first.

    Raises:
      DamageError: an entry is not what was written.
    """
    found = []
    for number, entry in reversed(list(enumerate(provenance))):
        data = entry.get("data")
        positions = data.get("positions", {}) if isinstance(data, Mapping) else {}
        if not isinstance(positions, Mapping):
            raise DamageError(f"provenance[{number}].data.positions: damaged, not a table")
        found += [from_json(value, f"provenance[{number}].data.positions.{name}") for name, value in positions.items()]
    return found


def choose(known: Sequence[Position], domains: Mapping[str, str]) -> dict[str, Position]:
    """The latest position of every domain that has one.

    Where several domains read the same, the name decides among them, so that none takes the place of another.

    Args:
      known: the latest first.
      domains: checksum by name.
    """
    chosen: dict[str, Position] = {}
    for name, checksum in domains.items():
        same = [position for position in known if position.checksum == checksum]
        by_name = [position for position in same if position.name == name]
        if by_name or (same and _single(checksum, domains.values())):
            chosen[name] = (by_name or same)[0]
    return chosen


def _single(checksum: str, checksums: Iterable[str]) -> bool:
    return sum(other == checksum for other in checksums) == 1
