"""Pairs of answers and prompts as rows in memory, read at random.

All rows of a batch are read together, for their width is that of the longest, rounded up to one of a few, so that few
programs are compiled: see `_widths`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax.data import domains, sources
from tele_jax.data.batches import Batches, HeldOut
from tele_jax.data.domains import OpenData
from tele_jax.data.encode import Kind
from tele_jax.data.feed import Batch, Prepare
from tele_jax.data.preferences import RecordKind
from tele_jax.data.records import Limits, Records
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.settings import DEFAULT_DIALOGUES, SourceConfig, TrainStage


class RecordRows:
    """The rows of all domains in memory, a domains.RowStore.

    The batch of pairs, B rows, has tokens, targets int32, loss_weights float32 (1 where the target is a token of an
    answer, its end included), segment_ids, positions int32, [B, 2, S] each; lengths int32 [B, 2]; margin and
    pair_weights float32 [B]; sequences int32 [B, 2], the numbers of the answers among all of the store. Of the two, the
    chosen answer is the first. A row holds a whole sequence, so that the last token is found by its length.

    The batch of prompts has tokens int32 [B, P], padded on the right; lengths int32 [B]; record int32 [B], the number
    of the record, for `fields`.
    """

    reads_alone = False

    def __init__(
        self, found: Mapping[str, Records], kind: RecordKind, vocabulary: Vocabulary, limits: Limits, batch_size: int
    ):
        """Reads nothing more; batch_size is the usual number of rows of a batch."""
        self._found, self._limits = dict(found), limits
        self._longest = limits.sequence if kind == "pairs" else limits.prompt
        self._kind, self._pad_id = kind, max(vocabulary.pad_id, 0)
        self.where = ", ".join(records.where for records in found.values())
        self.rows = {name: len(records.rows) for name, records in found.items()}
        template = getattr(vocabulary, "template", None)
        self.identity = {"feed": "records", "kind": kind, "tokenizer": vocabulary.sha256, "template": template}
        self.identity |= dataclasses.asdict(limits)
        counts = [len(records.answers) for records in found.values()], [len(records) for records in found.values()]
        answers, records = (dict(zip(found, np.cumsum([0, *count]).tolist())) for count in counts)
        self._first_answer, self._first_record = answers, records
        self.num_answers = sum(counts[0])
        alone = (
            self.lengths() if kind == "pairs" else np.concatenate([np.diff(r.prompts.starts) for r in found.values()])
        )
        rows = [self._first_answer[name] + records.rows for name, records in found.items()]
        together = alone[np.concatenate(rows)].max(axis=1) if kind == "pairs" else alone
        self._widths = _widths(together, batch_size, self._longest)

    def checksum(self, domain: str) -> str:
        """Names the rows of a domain, see Records.checksum."""
        return self._found[domain].checksum

    def close(self) -> None:
        """Does nothing: the rows stay in memory."""

    def fields(self, number: int) -> Table:
        """Returns the record of a prompt, by its number in a batch."""
        name = next(name for name, first in reversed(self._first_record.items()) if first <= number)
        return self._found[name].fields[number - self._first_record[name]]

    def read(self, domains: Sequence[str], rows: Sequence[int]) -> Batch:
        """Reads the rows `rows[i]` of `domains[i]` as one batch."""
        places = list(zip(domains, rows, strict=True))
        if self._kind == "prompts":
            found = [self._found[name].prompts[row] for name, row in places]
            numbers = [self._first_record[name] + row for name, row in places]
            tokens, lengths = self._padded(found)
            return {"tokens": tokens, "lengths": lengths, "record": np.array(numbers, np.int32)}
        numbers = np.array([self._found[name].rows[row] + self._first_answer[name] for name, row in places])
        batch = self.read_answers(numbers.ravel())
        batch = {name: array.reshape(-1, 2, *array.shape[1:]) for name, array in batch.items()}
        margins = np.array([self._found[name].margins[row] for name, row in places], np.float32)
        weights = np.array([self._found[name].weights[row] for name, row in places], np.float32)
        return {**batch, "margin": margins, "pair_weights": weights, "sequences": numbers.astype(np.int32)}

    def shown(self, domain: str, row: int) -> list[tuple[str, Batch, str]]:
        """Returns what people look at of a row: (its name, arrays [S] as a row of fine-tuning has them, a note)."""
        batch = self.read([domain], [row])
        if self._kind == "prompts":
            tokens = batch["tokens"][0, : batch["lengths"][0]]
            targets = np.append(tokens[1:], [self._pad_id])
            blank = np.zeros(len(tokens), np.int32)
            made = {"tokens": tokens, "targets": targets, "loss_weights": blank, "segment_ids": blank + 1}
            return [("prompt", _cut(made, len(tokens)), str(self.fields(int(batch["record"][0]))))]
        names = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
        margin, weight = float(batch["margin"][0]), float(batch["pair_weights"][0])
        note = f"margin {margin:g}, weight {weight:.3g}"
        sides = [{name: batch[name][0, side] for name in names} for side in (0, 1)]
        ends = batch["lengths"][0]
        return [(what, _cut(side, end), note) for what, side, end in zip(("chosen", "rejected"), sides, ends)]

    def lengths(self) -> np.ndarray:
        """Returns the tokens of every answer with its prompt, int64 [num_answers]."""
        found = self._found.values()
        own = [np.diff(r.prompts.starts)[r.of_answer] + np.diff(r.answers.starts) for r in found]
        return np.concatenate(own)

    def read_answers(self, numbers: np.ndarray) -> Batch:
        """Reads answers with their prompts, by their numbers among all: tokens, ..., lengths as in a batch of pairs."""
        sequences, prompts = [], []
        for number in numbers.tolist():
            name = next(name for name, first in reversed(self._first_answer.items()) if first <= number)
            records, own = self._found[name], number - self._first_answer[name]
            prompt = records.prompts[int(records.of_answer[own])]
            sequences.append(np.concatenate([prompt, records.answers[own]]))
            prompts.append(len(prompt))
        tokens, lengths = self._padded(sequences)
        places, ends, begins = np.arange(tokens.shape[1]), lengths[:, None], np.array(prompts)[:, None]
        targets = np.where(places < ends - 1, np.roll(tokens, -1, axis=1), self._pad_id)
        learned = (places >= begins - 1) & (places < ends - 1)
        inside = places < ends
        return {
            "tokens": tokens,
            "targets": targets.astype(np.int32),
            "loss_weights": learned.astype(np.float32),
            "segment_ids": inside.astype(np.int32),
            "positions": np.where(inside, places, 0).astype(np.int32),
            "lengths": lengths,
        }

    def _padded(self, lists: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens int32 [n, S], lengths int32 [n])."""
        lengths = np.array([len(each) for each in lists], np.int32)
        width = self._widths[np.searchsorted(self._widths, lengths.max())]
        tokens = np.full((len(lists), int(width)), self._pad_id, np.int32)
        for row, ids in zip(tokens, lists):
            row[: len(ids)] = ids
        return tokens, lengths


def _widths(lengths: np.ndarray, batch_size: int, longest: int, most: int = 8) -> np.ndarray:
    """Returns the widths that batches of rows as long as `lengths` may have, ascending; the last is `longest`.

    `most` of them make the expected width of a batch of batch_size drawn rows least: with F the share of rows up to a
    length, the distribution of the longest is F^batch_size. Below are eighths of `longest`, for batches of short rows
    that are read in order. All but the last are multiples of 128, which TPU kernels of attention ask for, where
    `longest` is at least 1,024, and of a 64th of it, rounded down, where it is less.
    """
    grid = 128 if longest >= 1024 else max(1, longest // 64)
    counts = np.bincount(-(-lengths // grid))  # by cells of the grid: cell i holds lengths up to i * grid
    ends, reached = np.flatnonzero(counts), np.cumsum(counts) / len(lengths)
    below = np.concatenate([[0], reached[ends] ** batch_size])
    # best[i]: least expected width of the batches whose longest row is in the first i cells, and its widths.
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(np.inf, [])] * len(ends)]
    for _ in range(min(most, len(ends))):
        last = [((below[i + 1] - below[: i + 1]) * end, end) for i, end in enumerate(ends.tolist())]
        best = [
            (0.0, []),
            *(min((best[j][0] + cost, [*best[j][1], end]) for j, cost in enumerate(costs)) for costs, end in last),
        ]
    widths = np.minimum(np.array(best[-1][1]) * grid, longest)
    eighths = np.arange(1, 9) * -(-longest // 8 // grid) * grid
    return np.unique([*eighths[eighths < widths[0]], *widths, longest])


def _cut(row: Batch, length: int) -> Batch:
    """The inputs of a sequence that have a target in it."""
    return {name: array[: length - 1] for name, array in row.items()}


class OpenRecords(OpenData):
    """A DataConfig whose domains are pairs or prompts, read into memory."""

    train: Mapping[str, Records]
    held_out: Mapping[str, Records]

    def __init__(self, stage: TrainStage, records: RecordKind, limits: Limits, **how: Any):
        """Reads the tokenizer; how: as OpenData.

        Raises:
          UserError: a cache, which holds no pairs and no prompts; settings of dialogues that have no sense here.
        """
        if stage.data.cache is not None:
            raise UserError(f"data.cache: {records} are read from files; name them in data.sources")
        for name in ("learned", "next_user", "too_long"):
            if getattr(stage.data.dialogues, name) != getattr(DEFAULT_DIALOGUES, name):
                raise UserError(
                    f"data.dialogues.{name}: is of fine-tuning, and {records} have no use for it; leave it out"
                )
        self.records: RecordKind = records
        self.limits, self._batch_size = limits, stage.batch_size
        super().__init__(stage.data, kind="sft", seq_len=stage.seq_len, **how)  # learns answers to dialogues

    @functools.cached_property
    def store(self) -> RecordRows:
        """All rows to train on."""
        return self.rows_of(self.train)

    def rows_of(self, found: Mapping[str, Any]) -> RecordRows:
        """Makes a store of domains of `train` or `held_out`."""
        return RecordRows(found, self.records, self.vocabulary, self.limits, self._batch_size)

    def _open_files(self, name: str, source: SourceConfig, field: str) -> Any:
        if source.format != self.records:
            what = f"sources.{name}.format: the stage reads {self.records}, so it has to be {self.records!r}"
            raise UserError(f"{what}, not {source.format!r}")
        return self._opened(
            f"sources.{name}.{field}", lambda made: made.read(getattr(source, field), self.data.dialogues)
        )

    def _open_task(self, source: SourceConfig, where: str, split: str) -> Any:
        if self.records == "pairs":
            raise UserError(f"{where}: pairs are read from files, not from a seqio Task")
        return self._opened(where, lambda made: made.read_task(source.task, split))

    def _opened(self, where: str, read: Callable[[Records], None]) -> Records:
        def make() -> Records:
            made = Records(where, self.records, self.vocabulary, self.limits)
            read(made)
            return made.close(self.data.dialogues.max_rejected)

        key = ("records", where, self.records, self.limits, repr(self.data), self.vocabulary.sha256)
        return self.index.once(key, make)


class RecordBatches(Batches):
    """The pairs or prompts of a training stage; used as Batches is.

    Attributes:
      store: the rows to train on.
    """

    def __init__(
        self,
        stage: TrainStage,
        records: RecordKind,
        index: sources.Indexes,
        *,
        prepare: Prepare = lambda batch, places: batch,
        room: int = 0,
    ):
        """Opens and checks all that `stage.data` names.

        Args:
          records: "pairs" or "prompts".
          prepare: as in feed.open_feed.
          room: tokens that an answer may take behind a prompt alone.

        Raises:
          UserError: as Batches; not one record of a domain can be used; a cache.
        """
        self._records: RecordKind = records
        self._tables: dict[str, tuple[np.ndarray, Mapping[str, np.ndarray]]] = {}
        self._prepare_rows = prepare
        self._limits = Limits(sequence=stage.seq_len, prompt=stage.seq_len - room)
        super().__init__(stage, "sft", index, prepare=self._tabulated)

    def _open(self, stage: TrainStage, kind: Kind, index: sources.Indexes) -> OpenData:
        how = {"index": index, "on_rejects": lambda domain: None}
        self._own = domains.checked(OpenRecords(stage, self._records, self._limits, **how))
        return self._own

    @property
    def store(self) -> RecordRows:
        """The rows to train on, with what rewards and references look up in them."""
        return self._own.store

    def tabulate(self, name: str, train: np.ndarray, held_out: Mapping[str, np.ndarray]) -> None:
        """Adds an array of this name to all batches of pairs that are made from now on: the values of both answers.

        Args:
          train: [num_answers], a value of every answer of `store`.
          held_out: by domain, values of the answers of held_out_store that are evaluated.
        """
        self._tables[name] = (train, held_out)

    def _tabulated(self, batch: Batch, places: np.ndarray) -> Batch:
        more = {name: train[batch["sequences"]] for name, (train, _) in self._tables.items()}
        return self._prepare_rows({**batch, **more}, places)

    @property
    def held_out(self) -> dict[str, HeldOut]:
        """The first records of every domain that is held out, until their lines have data.eval_bytes, in batches.

        The last batch is filled with copies of the last row, whose pair_weights are 0, or whose record is -1.
        """
        found = {}
        for domain, held in self._held_rows.items():
            more = {name: values[domain] for name, (_, values) in self._tables.items()}
            batches = [
                {**batch, **{name: values[batch["sequences"]] for name, values in more.items()}}
                for batch in held.batches
            ]
            found[domain] = dataclasses.replace(held, batches=batches)
        return found

    @functools.cached_property
    def _held_rows(self) -> dict[str, HeldOut]:
        size = self._stage.batch_size // self._stage.microbatches
        return {name: _held_out(self._own, name, records, size) for name, records in self._own.held_out.items()}

    def sample(self, num_rows: int, num_tokens: int) -> np.ndarray:
        """Returns at most int32[num_rows, num_tokens] of the first rows to train on, both answers of each pair."""
        name, count = next(iter(self.store.rows.items()))
        count = min(num_rows, count)
        tokens = self.store.read([name] * count, list(range(count)))["tokens"]
        return tokens.reshape(-1, tokens.shape[-1])[:num_rows, :num_tokens]

    def held_out_store(self, domain: str) -> RecordRows:
        """The rows of a domain that is held out, with what rewards and references look up in them."""
        return self._own.rows_of({domain: self._own.held_out[domain]})


def _held_out(opened: OpenRecords, name: str, records: Records, size: int) -> HeldOut:
    begins = np.cumsum(records.sizes) - records.sizes
    count = max(1, int((begins < opened.data.eval_bytes).sum()))
    store, batches, tokens = opened.rows_of({name: records}), [], 0
    for first in range(0, count, size):
        rows = np.minimum(np.arange(first, first + size), count - 1)
        batch, filled = store.read([name] * size, rows.tolist()), np.arange(first, first + size) >= count
        if opened.records == "pairs":
            batch["pair_weights"][filled] = 0
            tokens += int(batch["loss_weights"][~filled].sum())
        else:
            batch["record"][filled] = -1
            tokens += int(batch["lengths"][~filled].sum())
        batches.append(batch)
    return HeldOut(batches, int(records.sizes[:count].sum()), tokens)
