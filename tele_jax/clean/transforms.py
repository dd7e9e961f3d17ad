"""Stages as Beam PTransforms from batches to batches; beside them every one gives its account (Tally).

Beam moves batches (some 256 documents), not documents: the cost of an element, of a shuffle's key and of a join is paid
once for many. Stages that compare documents send small tables of keys through the shuffle, never texts, and join what
is to be dropped with the batches that hold it.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import TaggedOutput

from tele_jax.clean import duplicates, output, reading, stages
from tele_jax.clean.document import Batch, Document, Drop, Reject, Tally, batches
from tele_jax.clean.settings import CleanConfig, OutputConfig

BATCH_DOCUMENTS = 256
BATCH_CHARS = 1 << 20


class Read(beam.PTransform):
    """Reads ranges of files -> (batches, (source, Reject) pairs, tallies)."""

    def __init__(self, config: CleanConfig):
        super().__init__()
        self.config = config

    def expand(self, parts):
        done = parts | beam.Reshuffle() | beam.FlatMap(self._read).with_outputs("rejects", "tally", main="batches")
        return done.batches, done.rejects, done.tally

    def _read(self, part: reading.Range):
        documents = reading.read(part, self.config.sources[part.source])
        for item in batches(documents, BATCH_DOCUMENTS, BATCH_CHARS):
            tally = Tally()
            if isinstance(item, Batch):
                for document in item.documents:
                    tally.add(("read", document.source, "in", ""), document)
                    tally.add(("read", document.source, "out", ""), document)
                yield item
            else:
                _count_reject(tally, item)
                yield TaggedOutput("rejects", (item.source, item))
            yield TaggedOutput("tally", tally)


def _count_reject(tally: Tally, reject: Reject) -> None:
    shown = reject.data[:400].decode("utf-8", "backslashreplace")
    document = Document(reject.uid, "", reject.source, "", reject.origin)
    size = len(reject.data)
    tally.add(("read", reject.source, "in", ""), document, size=size)
    tally.add(("read", reject.source, "drop", reject.reason), document, reject.detail, text=shown, size=size)


def _accounted(stage: str, batch: Batch, outcomes: Sequence[stages.Outcome]):
    """Yields the batch of the documents that stay, where any do, and the tally of the stage."""
    kept, tally = stages.account(stage, batch.documents, outcomes)
    if kept:
        yield Batch(batch.key, tuple(kept))
    yield TaggedOutput("tally", tally)


class Local(beam.PTransform):
    """A stage that looks at one document at a time: batches -> (batches, tallies)."""

    def __init__(self, name: str, config: CleanConfig):
        super().__init__()
        self.name, self.config = name, config

    def expand(self, pcoll):
        done = pcoll | beam.ParDo(_Local(self.name, self.config)).with_outputs(main="batches")
        return done.batches, done.tally


class _Local(beam.DoFn):
    def __init__(self, name: str, config: CleanConfig):
        self.name, self.config = name, config

    def setup(self):
        self.apply = stages.build(self.name, self.config)

    def process(self, batch: Batch):
        yield from _accounted(self.name, batch, self.apply(batch.documents))


Keys = Mapping[Any, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A stage that compares documents, as functions; each takes the table of the page last.

    Attributes:
      keys: (documents, key of the batch) -> by group, a table with the fields `key`, `uid` and `batch`, and payloads
        of as many rows. Rows of one group and key meet.
      decide: (group, table, payloads) -> a table with `uid` and `batch`: what is to be dropped; or edges for `merge`.
      apply: (document, its rows of what is to be dropped) -> the document without that, or Drop.
      merge: all that was decided -> what is to be dropped. It runs in one place; None where `decide` says that.
    """

    keys: Callable[[Sequence[Document], int, Any], Keys]
    decide: Callable[[Any, np.ndarray, np.ndarray, Any], np.ndarray]
    apply: Callable[[Document, np.ndarray, Any], Document | Drop]
    merge: Callable[[np.ndarray], np.ndarray] | None = None


def _of_equals(
    keys: Callable[[Sequence[Document], int, Any], np.ndarray],
    apply: Callable[[Document, np.ndarray, Any], Document | Drop],
) -> Comparison:
    """A comparison in which the first of all rows with an equal key stays."""

    def one_group(documents: Sequence[Document], batch: int, config: object) -> Keys:
        table = keys(documents, batch, config)
        return {0: (table, np.zeros((len(table), 0), np.uint8))}

    return Comparison(one_group, lambda group, table, payload, config: duplicates.repeated(table), apply)


COMPARISONS = {
    "urls": _of_equals(duplicates.url_keys, duplicates.drop_page),
    "duplicates": Comparison(
        duplicates.keys,
        lambda group, table, payload, config: duplicates.pairs(group[0], table, payload, config),
        duplicates.drop_copy,
        merge=duplicates.components,  # of 33 bytes a pair, of copies only
    ),
    "paragraphs": _of_equals(duplicates.paragraph_keys, duplicates.without_paragraphs),
}


class Compare(beam.PTransform):
    """A stage of COMPARISONS: batches -> (batches, tallies)."""

    def __init__(self, name: str, config: CleanConfig, partitions: int):
        super().__init__()
        self.name, self.table, self.partitions = name, getattr(config, name), partitions

    def expand(self, pcoll):
        dropped = pcoll | "Keys" >> beam.FlatMap(self._partition) | beam.GroupByKey() | beam.MapTuple(self._decide)
        if merge := COMPARISONS[self.name].merge:
            together = dropped | "Together" >> beam.Map(lambda table: (None, table)) | "Meet" >> beam.GroupByKey()
            dropped = together | beam.MapTuple(lambda _, found: merge(np.concatenate(list(found))))
        keyed = pcoll | "Key" >> beam.Map(lambda batch: (batch.key, batch))
        done = (
            {"batch": keyed, "rows": dropped | "By batch" >> beam.FlatMap(_by_batch)}
            | "Join" >> beam.CoGroupByKey()
            | "Drop" >> beam.FlatMapTuple(self._drop).with_outputs("tally", main="batches")
        )
        return done.batches, done.tally

    def _partition(self, batch: Batch):
        for group, (table, payload) in COMPARISONS[self.name].keys(batch.documents, batch.key, self.table).items():
            place = (table["key"] % np.uint64(self.partitions)).astype(np.int64)
            for partition in np.unique(place):
                rows = place == partition
                yield (group, int(partition)), (table[rows], payload[rows])

    def _decide(self, key: tuple[Any, int], parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        table, payload = map(np.concatenate, zip(*parts))
        return COMPARISONS[self.name].decide(key[0], table, payload, self.table)

    def _drop(self, key: int, joined: dict[str, Iterable[Any]]):
        tables = list(joined["rows"])
        table = np.concatenate(tables) if tables else np.zeros(0, [("uid", np.int64)])
        for batch in joined["batch"]:
            outcomes = []
            for document in batch.documents:
                rows = table[table["uid"] == document.uid]
                result = COMPARISONS[self.name].apply(document, rows, self.table) if len(rows) else document
                shortened = isinstance(result, Document) and result is not document
                outcomes.append((result, {"shortened": ""} if shortened else {}))
            yield from _accounted(self.name, batch, outcomes)


def _by_batch(table: np.ndarray):
    order = np.argsort(table["batch"], kind="stable")
    names, starts = np.unique(table["batch"][order], return_index=True)
    yield from zip(names.tolist(), np.split(table[order], starts[1:]))


class Shards(beam.PTransform):
    """Batches -> entries of the manifest: (domain, entry), one for every shard that was written.

    A document is of the split TRAIN or VALIDATION by the hash of its text.
    """

    def __init__(self, directory: str, shards: dict[str, int], config: OutputConfig):
        super().__init__()
        self.directory, self.shards, self.config = directory, shards, config

    def expand(self, pcoll):
        return pcoll | beam.FlatMap(self._split) | beam.GroupByKey() | beam.MapTuple(self._write)

    def _split(self, batch: Batch):
        parts = defaultdict(list)
        for document in batch.documents:
            split = output.split_of(document, self.config.validation_share)
            shard = output.shard_of(document.uid, self._shards(document.domain, split))
            parts[document.domain, split, shard].append(document)
        yield from parts.items()

    def _shards(self, domain: str, split: str) -> int:
        share = self.config.validation_share if split == output.VALIDATION else 1.0
        return max(1, round(self.shards[domain] * share))

    def _write(self, key: tuple[str, str, int], parts: Iterable[list[Document]]):
        domain, split, shard = key
        documents = [document for part in parts for document in part]
        shards = self._shards(domain, split)
        return domain, output.write_shard(self.directory, domain, split, shard, shards, documents, self.config)


def merged(tallies: Iterable[Tally]) -> Tally:
    """All accounts as one."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return total
