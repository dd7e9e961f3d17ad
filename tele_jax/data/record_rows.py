"""Pairs of answers and prompts as rows in memory, read at random.

Answers are packed: a batch of pairs has a fixed number of rows, and each of its answers, with the prompt before it,
lies whole in one of them, as a segment of its own: see `places`. All rows of a batch are read together, for their width
is that of the fullest, rounded up to one of a few, so that few programs are compiled: see `_widths`.
"""

import dataclasses
import functools
import heapq
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

    The batch of B pairs has tokens, targets int32, loss_weights float32 (1 where the target is a token of an answer,
    its end included), segment_ids, positions int32, [R, S] each, in whose R rows the answers lie. Of each pair, the
    chosen answer first, it has ends int32 [B, 2], the index of the last token of an answer in the R * S of the rows;
    answer_lengths float32 [B, 2], tokens of an answer without its prompt; sequences int32 [B, 2], the numbers of the
    answers among all of the store; and margin, pair_weights float32 [B]. The segment id of answer j of pair i is
    1 + 2 i + j. Of M microbatches, number m has the pairs and the rows m, m + M, ...: answers lie in rows of their own
    microbatch, and ends and segment ids count through it alone.

    The batch of prompts has tokens int32 [B, P], padded on the right; lengths int32 [B]; record int32 [B], the number
    of the record, for `fields`.

    Attributes:
      longest: tokens that an answer may have with its prompt.
    """

    reads_alone = False

    def __init__(
        self,
        found: Mapping[str, Records],
        kind: RecordKind,
        vocabulary: Vocabulary,
        limits: Limits,
        batch_size: int,
        rows: int,
        microbatches: int,
    ):
        """Reads nothing more.

        Args:
          batch_size: pairs or prompts in a batch of training.
          rows: rows that hold the answers of such a batch; other batches have as many in proportion.
          microbatches: parts that such a batch is cut into.
        """
        self._found, self._shape = dict(found), (batch_size, rows, microbatches)
        self._kind, self._pad_id, self.longest = kind, max(vocabulary.pad_id, 0), limits.sequence
        self.where = ", ".join(records.where for records in found.values())
        self.rows = {name: len(records.rows) for name, records in found.items()}
        template = getattr(vocabulary, "template", None)
        self.identity = {"feed": "records", "kind": kind, "tokenizer": vocabulary.sha256, "template": template}
        self.identity |= dataclasses.asdict(limits)
        counts = [len(records.answers) for records in found.values()], [len(records) for records in found.values()]
        answers, records = (dict(zip(found, np.cumsum([0, *count]).tolist())) for count in counts)
        self._first_answer, self._first_record = answers, records
        self.num_answers = sum(counts[0])
        rng, draws = np.random.default_rng(0), max(64, 4096 // batch_size)
        if kind == "pairs":
            pairs = self.lengths[np.concatenate([answers[name] + records.rows for name, records in found.items()])]
            batches = (rng.choice(pairs, batch_size) for _ in range(draws))
            widths = np.array([places(batch, rows, microbatches)[2] for batch in batches])
            self._widths = _widths(widths, limits.sequence, -(-2 * batch_size // rows) * limits.sequence)
        else:
            alone = np.concatenate([np.diff(records.prompts.starts) for records in found.values()])
            widths = rng.choice(alone, (draws, batch_size)).max(axis=1)
            self._widths = _widths(widths, limits.prompt, limits.prompt)

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
            lengths = np.array([len(each) for each in found], np.int32)
            tokens = np.full((len(found), self._width(int(lengths.max()))), self._pad_id, np.int32)
            for row, ids in zip(tokens, found):
                row[: len(ids)] = ids
            return {"tokens": tokens, "lengths": lengths, "record": np.array(numbers, np.int32)}
        numbers = np.array([self._found[name].rows[row] + self._first_answer[name] for name, row in places])
        batch_size, _, microbatches = self._shape
        batch = self.read_answers(numbers, microbatches if len(numbers) == batch_size else 1)
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
        margin, weight = float(batch["margin"][0]), float(batch["pair_weights"][0])
        note = f"margin {margin:g}, weight {weight:.3g}"
        rows = {name: array for name, array in batch.items() if array.shape == batch["tokens"].shape}
        found = []
        for segment, what in enumerate(("chosen", "rejected"), 1):
            own = rows["segment_ids"] == segment
            side = {name: array[own] for name, array in rows.items()}
            found.append((what, _cut(side | {"segment_ids": side["segment_ids"] * 0 + 1}, int(own.sum())), note))
        return found

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of every answer with its prompt, int64 [num_answers]."""
        found = self._found.values()
        own = [np.diff(r.prompts.starts)[r.of_answer] + np.diff(r.answers.starts) for r in found]
        return np.concatenate(own)

    def read_answers(self, numbers: np.ndarray, microbatches: int = 1) -> Batch:
        """Reads answers with their prompts, by their numbers among all, [n, 2].

        Returns tokens, targets, loss_weights, segment_ids, positions, ends, answer_lengths as in a batch of pairs.
        """
        lengths = self.lengths[numbers]
        batch_size, of_batch, _ = self._shape
        count = max(microbatches, -(-len(numbers) * of_batch // batch_size))
        rows, begins, width = places(lengths, count, microbatches)
        shape = (count, self._width(width))
        found = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
        found |= {name: np.full(shape, self._pad_id, np.int32) for name in ("tokens", "targets")}
        weights, answer_lengths = np.zeros(shape, np.float32), np.zeros(numbers.shape, np.float32)
        for pair, side in np.ndindex(*numbers.shape):
            ids, prompt = self._sequence(int(numbers[pair, side]))
            row, begin, length = rows[pair, side], begins[pair, side], len(ids)
            found["tokens"][row, begin : begin + length] = ids
            found["targets"][row, begin : begin + length - 1] = ids[1:]
            found["segment_ids"][row, begin : begin + length] = 1 + 2 * (pair // microbatches) + side
            found["positions"][row, begin : begin + length] = np.arange(length)
            weights[row, begin + prompt - 1 : begin + length - 1] = 1
            answer_lengths[pair, side] = length - prompt
        ends = (rows // microbatches * shape[1] + begins + lengths - 1).astype(np.int32)
        return {**found, "loss_weights": weights, "ends": ends, "answer_lengths": answer_lengths}

    def _sequence(self, number: int) -> tuple[np.ndarray, int]:
        """The ids of an answer with its prompt, and how many of them are the prompt."""
        name = next(name for name, first in reversed(self._first_answer.items()) if first <= number)
        records, own = self._found[name], number - self._first_answer[name]
        prompt = records.prompts[int(records.of_answer[own])]
        return np.concatenate([prompt, records.answers[own]]), len(prompt)

    def _width(self, needed: int) -> int:
        return int(self._widths[np.searchsorted(self._widths, needed)])


def places(lengths: np.ndarray, count: int, microbatches: int = 1) -> tuple[np.ndarray, np.ndarray, int]:
    """Places the answers of n pairs into `count` rows.

    Of each microbatch, the longest answer comes first, and each goes into the row that has the fewest tokens so far
    (Graham's rule for jobs on machines, 1969). Where there are q answers a row on average, no row gets more tokens than
    q of the longest have: whenever one is placed, some row has fewer than q.

    Args:
      lengths: int64 [n, 2], tokens of the answers. Microbatches divide n and `count`.

    Returns (rows, begins, int64 [n, 2] each, and the width that the rows need).
    """
    rows, begins = (np.zeros(lengths.shape, np.int64) for _ in range(2))
    for first in range(microbatches):
        own, own_rows, own_begins = (array[first::microbatches] for array in (lengths, rows, begins))
        filled = [(0, row) for row in range(count // microbatches)]
        for answer in np.argsort(-own, axis=None, kind="stable").tolist():
            at = divmod(answer, 2)
            tokens, row = filled[0]
            own_rows[at], own_begins[at] = first + row * microbatches, tokens
            heapq.heapreplace(filled, (tokens + int(own[at]), row))
    return rows, begins, int((begins + lengths).max())


def _widths(needed: np.ndarray, sequence: int, longest: int, most: int = 8) -> np.ndarray:
    """Returns the widths that batches may have, ascending, where batches that were drawn at random need `needed`.

    `most` of them make the expected width least. Below and above are eighths of `longest`, for batches of short rows
    that are read in order, and for what chance did not show; the last is `longest`. All but the last are multiples of
    128, which TPU kernels of attention ask for, where a text may have `sequence` >= 1,024 tokens, and of a 64th of
    that, rounded down, where fewer.
    """
    grid = 128 if sequence >= 1024 else max(1, sequence // 64)
    counts = np.bincount(-(-needed // grid))  # by cells of the grid: cell i holds widths up to i * grid
    ends = np.flatnonzero(counts)
    below = np.concatenate([[0], np.cumsum(counts)[ends] / len(needed)])
    # best[i]: least expected width of the batches whose width is in the first i cells, and the widths they get.
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(np.inf, [])] * len(ends)]
    for _ in range(min(most, len(ends))):
        last = [((below[i + 1] - below[: i + 1]) * end, end) for i, end in enumerate(ends.tolist())]
        best = [
            (0.0, []),
            *(min((best[j][0] + cost, [*best[j][1], end]) for j, cost in enumerate(costs)) for costs, end in last),
        ]
    widths = np.minimum(np.array(best[-1][1]) * grid, longest)
    eighths = np.minimum(np.arange(1, 8) * -(-longest // 8 // grid) * grid, longest)
    return np.unique([*eighths[(eighths < widths[0]) | (eighths > widths[-1])], *widths, longest])


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
        self.limits, self._batch_size, self._microbatches = limits, stage.batch_size, stage.microbatches
        self._rows = stage.num_rows
        super().__init__(stage.data, kind="sft", seq_len=stage.seq_len, **how)  # learns answers to dialogues

    @functools.cached_property
    def store(self) -> RecordRows:
        """All rows to train on."""
        return self.rows_of(self.train, self._microbatches)

    def rows_of(self, found: Mapping[str, Any], microbatches: int = 1) -> RecordRows:
        """Makes a store of domains of `train` or `held_out`."""
        shape = (self._batch_size, self._rows, microbatches)
        return RecordRows(found, self.records, self.vocabulary, self.limits, *shape)

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
        """Returns at most int32[num_rows, num_tokens] of rows of the first pairs to train on."""
        name, count = next(iter(self.store.rows.items()))
        count = min(num_rows, count)
        # The answers of `count` pairs may stand in twice as many rows, see PairStage.rows.
        return self.store.read([name] * count, list(range(count)))["tokens"][:num_rows, :num_tokens]

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
            tokens += int(batch["answer_lengths"][~filled].sum())
        else:
            batch["record"][filled] = -1
            tokens += int(batch["lengths"][~filled].sum())
        batches.append(batch)
    return HeldOut(batches, int(records.sizes[:count].sum()), tokens)
