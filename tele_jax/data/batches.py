"""The data of a training stage, opened once: its tokenizer, its feed and its held-out text."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tele_jax.data import feed as feeds
from tele_jax.data import sources
from tele_jax.data.encode import Kind
from tele_jax.data.feed import Batch
from tele_jax.data.order import Position
from tele_jax.settings import TrainStage


class Batches:
    """The data of a training stage, for training, for evaluation and for the verification of a growth.

    Attributes:
      vocabulary: the tokenizer.
      domains: names of the domains that are trained on.
      corpora: by place, the indexes that feed and held_out have opened; their `rejected` cannot be used.
    """

    def __init__(self, stage: TrainStage, kind: Kind, index: sources.Indexes):
        """Checks all that `stage.data` names; raises as feed.check. index: makes each index of text once for a run."""
        self._stage, self._index = stage, index
        self._shape: dict[str, Any] = {"kind": kind, "seq_len": stage.seq_len}
        self.vocabulary = feeds.check(stage.data, **self._shape, index=index)
        self.domains = sorted(feeds.resolve(stage.data).sources)
        self.corpora: dict[str, Any] = {}

    def _keep(self, corpus: Any) -> None:
        self.corpora[corpus.where] = corpus

    def feed(
        self,
        *,
        rows: Sequence[int] | None = None,
        place: Callable[[Batch], Any] = lambda batch: batch,
        known: Sequence[Position] = (),
    ) -> "feeds.LiveFeed | feeds.CachedFeed":
        """The batches to train on; arguments as feed.open_feed."""
        how = {"rows": rows, "place": place, "known": known, "aside": self._keep, "index": self._index}
        return feeds.open_feed(
            self._stage.data, **self._shape, batch_size=self._stage.batch_size, seed=self._stage.seed, **how
        )

    @functools.cached_property
    def held_out(self) -> dict[str, feeds.HeldOut]:
        """Held-out text by domain, in batches of the rows that go through the devices at once in training."""
        rows = self._stage.batch_size // self._stage.microbatches
        return feeds.held_out(self._stage.data, **self._shape, batch_size=rows, aside=self._keep, index=self._index)

    def shared(self) -> list[str]:
        """Lines for people, one for each domain with documents that are held out and trained on."""
        return feeds.shared(self._stage.data, self._stage.seq_len, index=self._index)

    def sample(self, num_rows: int, num_tokens: int) -> np.ndarray:
        """At most int32[num_rows, num_tokens]: held-out text of every domain in turn, else what is trained on."""
        if not self.held_out:
            with contextlib.closing(self.feed()) as feed:
                return np.asarray(next(feed)["tokens"])[:num_rows, :num_tokens]
        size = self._stage.batch_size
        rows = [
            np.concatenate([batch["tokens"] for batch in domain.batches])[:size] for domain in self.held_out.values()
        ]
        turns = [part[i] for i in range(min(len(part) for part in rows)) for part in rows]
        return np.stack(turns)[:num_rows, :num_tokens]
