"""Rows that a stage reads live, with where the dialogues in them are from, for people to look at."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tele_jax.data import feed
from tele_jax.data.documents import Documents
from tele_jax.data.domains import OpenData
from tele_jax.data.shuffled_domains import ShuffledDomains
from tele_jax.errors import UserError


class _Noted:
    """Documents that note where the examples are from that they gave."""

    def __init__(self, name: str, documents: Documents, notes: dict[bytes, tuple[str, str]]):
        self._name, self._documents, self._notes = name, documents, notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._documents, name)

    def __len__(self) -> int:
        return len(self._documents)

    def example(self, i: int) -> np.ndarray:
        example = self._documents.example(i)
        origin = getattr(self._documents, "origin", None)  # examples of a Task have none
        self._notes[_key(example[1])] = self._name, "" if origin is None else origin(i)
        return example


def _key(targets: np.ndarray) -> bytes:
    return targets.astype(np.int32).tobytes()


def read(
    opened: OpenData, *, seed: int, first: int, count: int, copies: Mapping[str, float] | None, packed: bool
) -> Iterator[tuple[dict[str, np.ndarray], list[tuple[str, str]]]]:
    """Reads the rows `first`, `first` + 1, ... of a stage as (arrays [S], (domain, origin) of every segment).

    A segment that is a part of a document, as in pretraining, has neither: ("", "").

    Args:
      opened: what the stage reads, without a cache.
      seed: seed of the stage.
      first, count: which rows, in the order of the stage.
      copies: copies of each domain in an epoch, where the domains are shuffled together.
      packed: whether a row of fine-tuning takes several dialogues.

    Raises:
      UserError: as OpenData.train; the stage has no domain that is read live.
    """
    if not opened.train:
        raise UserError("the page reads a cache, and no files")
    notes: dict[bytes, tuple[str, str]] = {}
    domains: dict[str, Any] = {name: _Noted(name, each, notes) for name, each in opened.train.items()}
    rates = {name: opened.data.sources[name].rate for name in domains}
    if copies is not None:
        together = ShuffledDomains(domains, copies)
        domains, rates = {together.name: together}, {together.name: 1.0}
    batches = feed.open_feed(opened, batch_size=1, seed=seed, domains=domains, rates=rates, packed=packed)
    try:
        for number in range(first + count):
            batch = next(batches)
            if number >= first:
                row = {name: column[0] for name, column in batch.items()}
                parts = range(1, int(row["segment_ids"].max(initial=0)) + 1)
                yield row, [notes.get(_key(row["targets"][row["segment_ids"] == part]), ("", "")) for part in parts]
    finally:
        batches.close()
