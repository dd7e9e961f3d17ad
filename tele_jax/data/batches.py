"""The data of a training stage, opened once: its tokenizer, its feed and its held-out text."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tele_jax.data import domains, sources
from tele_jax.data import feed as feeds
from tele_jax.data import held_out as held
from tele_jax.data.encode import Kind
from tele_jax.data.order import Position
from tele_jax.settings import TrainStage


class Batches:
    """The data of a training stage, for training, for evaluation and for the verification of a growth.

    Attributes:
      vocabulary: the tokenizer.
      domains: names of the domains that are trained on.
      corpora: the domains that were opened, by place ("sources.code.files"); their `rejected` cannot be used.
    """

    def __init__(self, stage: TrainStage, kind: Kind, index: sources.Indexes):
        """Opens and checks all that `stage.data` names; errors as domains.check. The stages of a run share `index`."""
        self._stage = stage
        self._opened = domains.check(stage.data, kind=kind, seq_len=stage.seq_len, index=index)
        self.vocabulary, self.domains = self._opened.vocabulary, sorted(self._opened.data.sources)
        opened = (*self._opened.train.values(), *self._opened.held_out.values())
        self.corpora = {documents.where: documents for documents in opened}

    def feed(
        self,
        *,
        rows: Sequence[int] | None = None,
        place: Callable[[feeds.Batch], Any] = lambda batch: batch,
        known: Sequence[Position] = (),
    ) -> feeds.LiveFeed | feeds.CachedFeed:
        """Opens the batches to train on; arguments as feed.open_feed."""
        how = {"batch_size": self._stage.batch_size, "seed": self._stage.seed}
        return feeds.open_feed(self._opened, **how, rows=rows, place=place, known=known)

    @functools.cached_property
    def held_out(self) -> dict[str, held.HeldOut]:
        """Held-out text by domain, in batches of the rows that go through the devices at once in training."""
        return held.held_out(self._opened, batch_size=self._stage.batch_size // self._stage.microbatches)

    def shared(self) -> list[str]:
        """Returns a line for each domain with documents that are held out and trained on."""
        return self._opened.shared()

    def sample(self, num_rows: int, num_tokens: int) -> np.ndarray:
        """Returns at most int32[num_rows, num_tokens] of held-out text of every domain in turn, or of training text."""
        if not self.held_out:
            with contextlib.closing(self.feed()) as feed:
                return np.asarray(next(feed)["tokens"])[:num_rows, :num_tokens]
        size = self._stage.batch_size
        rows = [
            np.concatenate([batch["tokens"] for batch in domain.batches])[:size] for domain in self.held_out.values()
        ]
        turns = [part[i] for i in range(min(len(part) for part in rows)) for part in rows]
        return np.stack(turns)[:num_rows, :num_tokens]
