"""The data of a training stage, opened once: its tokenizer, its feed, and held-out text to be evaluated."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax.data import domains, packing, sources
from tele_jax.data import feed as feeds
from tele_jax.data.documents import Documents
from tele_jax.data.domains import OpenData
from tele_jax.data.encode import Kind
from tele_jax.data.order import Position
from tele_jax.data.shuffled_domains import ShuffledDomains, count_rows
from tele_jax.data.templates import separator
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.settings import TrainStage


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out text of one domain.

    Weights are 1 on tokens of text only: not on the end-of-sequence token, nor on `<_end>`. So the loss summed over
    the weights, in bits, over num_bytes is exactly the number of bits per byte of text, whatever the tokenizer and
    however the text falls into documents. (Training does count these tokens.)

    Attributes:
      batches: batches as those of a feed; the last one is filled up with rows of padding.
      num_bytes: UTF-8 bytes whose tokens are predicted.
      num_tokens: number of these tokens: the sum of all loss_weights.
    """

    batches: list[dict[str, np.ndarray]]
    num_bytes: int
    num_tokens: int


def held_out(opened: OpenData, *, batch_size: int) -> dict[str, HeldOut]:
    """Reads the first data.eval_bytes of the text that is held out of each domain, always as the same batches.

    A document longer than what is left of eval_bytes is cut at a character; a dialogue or an example of a Task is not,
    and the last one may go beyond; of these, learned tokens count. Documents longer than seq_len are cut into pieces,
    each with the separator as its only context. Documents that cannot be used are left out.

    Raises:
      UserError: as OpenData.held_out.
    """
    held = {}
    for name, documents in opened.held_out.items():
        how = (opened.vocabulary, opened.seq_len, batch_size, opened.data.eval_bytes)
        key = ("held out", documents.where, documents.checksum, documents.format, opened.kind)
        key = (*key, *how, opened.vocabulary.template)
        text = opened.index.once(key, lambda documents=documents, how=how: _batches(documents, *how))
        if text is None:
            raise UserError(f"eval_bytes={opened.data.eval_bytes} holds no character of {documents.where}; give more")
        held[name] = text
    return held


def _batches(
    documents: Documents, vocabulary: Vocabulary, seq_len: int, batch_size: int, max_bytes: int
) -> HeldOut | None:
    """Returns None where max_bytes holds no character."""
    sizes = np.array([len(spelled) for spelled in vocabulary.piece_bytes])
    spaced = np.array([spelled[:1] == b" " for spelled in vocabulary.piece_bytes])
    num_bytes, num_tokens, pieces = 0, 0, []
    for example, begins in documents.in_order(lambda: max_bytes - num_bytes):  # noqa: B023  counts on
        example = np.stack([*example[:2], example[2] > 0]).astype(np.int32)  # a weight is of the loss of training alone
        _, targets, weights = example
        weights *= sizes[targets] > 0
        num_tokens += int(weights.sum())
        num_bytes += int((sizes[targets] * weights).sum())
        # At the start of each stretch of text, the dummy prefix is a space that is not in the text.
        if vocabulary.adds_dummy_prefix and begins:
            num_bytes -= int(np.count_nonzero(spaced[targets] & (np.diff(weights, prepend=0) == 1)))
        for start in range(0, example.shape[1], seq_len):
            piece = example[:, start : start + seq_len].copy()
            if start:
                piece[0, 0] = separator(vocabulary)
            pieces.append(piece)
        if num_bytes >= max_bytes:
            break
    if not num_bytes:
        return None
    pad_id = max(vocabulary.pad_id, 0)
    open_rows, full_rows = packing.fit_rows(packing.empty_rows(64, seq_len, pad_id), pieces, pad_id=pad_id)
    rows = np.stack([*full_rows, *filter(packing.used, open_rows)])
    padding = packing.empty_rows(-len(rows) % batch_size, seq_len, pad_id)
    batches = np.concatenate([rows, padding]).reshape(-1, batch_size, *rows.shape[1:])
    return HeldOut([packing.to_batch(batch) for batch in batches], num_bytes, num_tokens)


def _copies(stage: TrainStage, opened: OpenData) -> dict[str, float] | None:
    """Copies of each dialogue in an epoch, by domain; None where domains are drawn by rates."""
    sources = opened.data.sources
    found = {name: source.copies for name, source in sources.items() if source.copies is not None}
    if (found or stage.epochs is not None) and opened.kind != "sft":
        raise UserError(f"{'copies' if found else 'epochs'}: counted in fine-tuning alone; give rates and steps")
    if found or stage.epochs is None:
        return found or None
    rated = [name for name, source in sources.items() if source.rate != 1]
    if rated and len(sources) > 1:
        raise UserError(f"epochs: the domains {', '.join(rated)} have rates; give every domain copies instead")
    return dict.fromkeys(sources, 1.0)


class Batches:
    """The data of a training stage, for training, for evaluation and for the verification of a growth.

    Attributes:
      vocabulary: the tokenizer.
      domains: names of the domains that the feed has.
      corpora: the domains that were opened, by place ("sources.code.files"); their `rejected` cannot be used.
    """

    def __init__(
        self,
        stage: TrainStage,
        kind: Kind,
        index: sources.Indexes,
        *,
        prepare: feeds.Prepare = lambda batch, places: batch,
        packed: bool = True,
    ):
        """Opens and checks all that `stage.data` names. The stages of a run share `index`.

        prepare, packed: as in feed.open_feed.

        Raises:
          UserError, DamageError: as domains.check; copies or epochs of what is no fine-tuning, or has rates.
        """
        self._stage, self._prepare, self._packed = stage, prepare, packed
        self._opened = self._open(stage, kind, index)
        self.vocabulary = self._opened.vocabulary
        opened = (*self._opened.train.values(), *self._opened.held_out.values())
        self.corpora = {documents.where: documents for documents in opened}
        self._copies = _copies(stage, self._opened)
        self._require_live("packed=False", packed)
        self.domains = sorted(self._fed) if self._opened.store is None else sorted(self._opened.data.sources)

    def _open(self, stage: TrainStage, kind: Kind, index: sources.Indexes) -> OpenData:
        return domains.check(stage.data, kind=kind, seq_len=stage.seq_len, index=index)

    def _require_live(self, what: str, fine: bool) -> None:
        if not fine and self._opened.store is not None:
            raise UserError(f"{what}: the rows of the cache {self._stage.data.cache} are packed; read the files live")

    @functools.cached_property
    def _fed(self) -> Mapping[str, Documents]:
        """The domains that a live feed reads: those of the page, or one in which they are shuffled together."""
        train = self._opened.train
        if self._copies is None:
            return train
        together = ShuffledDomains(train, self._copies)
        return {together.name: together}

    @functools.cached_property
    def _rates(self) -> dict[str, float]:
        """Relative rates of the domains that are fed; of rows with copies, how many an epoch has of each."""
        sources, store = self._opened.data.sources, self._opened.store
        if self._copies is None:
            return {name: source.rate for name, source in sources.items()}
        if store is None:
            return dict.fromkeys(self._fed, 1.0)
        return {name: copies * store.rows[name] for name, copies in self._copies.items()}

    @functools.cached_property
    def _last(self) -> dict[str, int]:
        """Number of the first document that is not read any more, where the stage has a number of epochs."""
        if self._stage.epochs is None or self._opened.store is not None:
            return {}
        return {name: round(self._stage.epochs * len(documents)) for name, documents in self._fed.items()}

    def count_steps(self) -> int:
        """Counts the steps that the epochs of the stage take, the last with rows of padding where it needs them.

        All dialogues are encoded for it, once in a run.

        Raises:
          UserError: the epochs hold no dialogue.
        """
        stage = self._stage
        assert stage.epochs is not None
        if self._opened.store is not None:  # of every domain to within the rows of a batch
            return math.ceil(stage.epochs * sum(self._rates.values()) / stage.batch_size)
        ((name, documents),) = self._fed.items()
        assert isinstance(documents, ShuffledDomains)
        lengths = self._opened.index.once((documents.checksum, stage.seq_len, repr(stage.data)), documents.lengths)
        _, begins = feeds.starts(self._opened, self._fed, (), seed=stage.seed)
        rows = count_rows(lengths, begins[name], self._last[name], packed=self._packed)
        if not rows:
            raise UserError(f"epochs={stage.epochs}: not one of {len(documents):,} dialogues is read; give more")
        return math.ceil(rows / stage.batch_size)

    def feed(
        self,
        *,
        rows: Sequence[int] | np.ndarray | None = None,
        place: Callable[[feeds.Batch], Any] = lambda batch: batch,
        known: Sequence[Position] = (),
    ) -> feeds.LiveFeed | feeds.RowFeed:
        """Opens the batches to train on; arguments as feed.open_feed."""
        if self._stage.epochs is not None:  # of this stage: its data begins anew
            known = ()
        how: dict[str, Any] = {"batch_size": self._stage.batch_size, "seed": self._stage.seed, "rates": self._rates}
        if self._opened.store is None:
            how |= {"domains": self._fed, "last": self._last, "packed": self._packed}
        return feeds.open_feed(self._opened, **how, prepare=self._prepare, rows=rows, place=place, known=known)

    @functools.cached_property
    def held_out(self) -> dict[str, HeldOut]:
        """Held-out text by domain, in batches of the rows that go through the devices at once in training."""
        return held_out(self._opened, batch_size=self._stage.batch_size // self._stage.microbatches)

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
