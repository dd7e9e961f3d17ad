"""Stages as Beam PTransforms from batches to batches; beside them every one gives its account (Tally).

Beam moves batches (some 256 documents), not documents: the cost of an element, of a shuffle's key and of a join is paid
once for many. Stages that compare documents send small tables of keys through the shuffle, never texts, and join what
is to be dropped with the batches that hold it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np

from tele_jax.clean import duplicates, paragraphs, reading, stages, urls, writing
from tele_jax.clean.document import OFFSET_BITS, Batch, Document, Drop, Reject, Tally, batches
from tele_jax.clean.settings import CleanConfig, OutputConfig

BATCH_DOCUMENTS = 256
BATCH_CHARS = 1 << 20


class Read(beam.PTransform):
    """Ranges of files -> (batches, (source, Reject) pairs, tallies)."""

    def __init__(self, config: CleanConfig):
        super().__init__()
        self.config = config

    def expand(self, parts):
        done = parts | beam.Reshuffle() | beam.ParDo(_ReadRange(self.config)).with_outputs(main="batches")
        return done.batches, done.rejects, done.tally


class _ReadRange(beam.DoFn):
    def __init__(self, config: CleanConfig):
        self.config = config

    def process(self, part: reading.Range):
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
                yield beam.pvalue.TaggedOutput("rejects", (item.source, item))
            yield beam.pvalue.TaggedOutput("tally", tally)


def _count_reject(tally: Tally, reject: Reject) -> None:
    shown = reject.data[:400].decode("utf-8", "backslashreplace")
    document = Document(reject.uid, "", reject.source, "", reject.origin)
    size = len(reject.data)
    tally.add(("read", reject.source, "in", ""), document, size=size)
    tally.add(("read", reject.source, "drop", reject.reason), document, reject.detail, text=shown, size=size)


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
        kept, tally = stages.account(self.name, batch.documents, self.apply(batch.documents))
        if kept:
            yield Batch(batch.key, tuple(kept))
        yield beam.pvalue.TaggedOutput("tally", tally)


class _Global(beam.PTransform):
    """A stage that compares documents: batches -> (batches, tallies).

    A subclass says which keyed tables a batch gives, which rows of what met are to be dropped, and how.
    """

    name: str

    def __init__(self, config: CleanConfig, partitions: int):
        super().__init__()
        self.config, self.partitions = config, partitions

    def tables(self, batch: Batch) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        """(group, table with `key`, payload of as many rows)."""
        raise NotImplementedError

    def decide(self, group: Any, table: np.ndarray, payload: np.ndarray) -> np.ndarray:
        """What follows from all rows of one group and partition."""
        raise NotImplementedError

    def gather(self, found):
        """PCollection of decisions -> PCollection of tables with `batch` and `uid`, what is to be dropped."""
        return found

    def apply(self, document: Document, rows: np.ndarray) -> Document | Drop:
        """The document without what `rows` name."""
        raise NotImplementedError

    def expand(self, pcoll):
        found = (
            pcoll
            | "Keys" >> beam.FlatMap(self._partition)
            | "Meet" >> beam.GroupByKey()
            | "Decide" >> beam.MapTuple(lambda key, parts: self.decide(key[0], *_joined(parts)))
        )
        dropped = self.gather(found) | "By batch" >> beam.FlatMap(_by_batch)
        keyed = pcoll | "Key" >> beam.Map(lambda batch: (batch.key, batch))
        done = (
            {"batch": keyed, "rows": dropped}
            | "Join" >> beam.CoGroupByKey()
            | "Drop" >> beam.FlatMapTuple(self._drop).with_outputs("tally", main="batches")
        )
        return done.batches, done.tally

    def _partition(self, batch: Batch):
        for group, table, payload in self.tables(batch):
            place = (table["key"] % np.uint64(self.partitions)).astype(np.int64)
            for partition in np.unique(place):
                rows = place == partition
                yield (group, int(partition)), (table[rows], payload[rows])

    def _drop(self, key: int, joined: dict[str, Iterable[Any]]):
        for batch in joined["batch"]:
            tables = list(joined["rows"])
            rows: dict[int, np.ndarray] = {}
            if tables:
                table = np.concatenate(tables)
                rows = {uid: table[table["uid"] == uid] for uid in np.unique(table["uid"]).tolist()}
            outcomes = [(self.apply(d, rows[d.uid]) if d.uid in rows else d, {}) for d in batch.documents]
            outcomes = [
                (result, {"shortened": ""} if isinstance(result, Document) and result is not before else {})
                for before, (result, _) in zip(batch.documents, outcomes)
            ]
            kept, tally = stages.account(self.name, batch.documents, outcomes)
            if kept:
                yield Batch(batch.key, tuple(kept))
            yield beam.pvalue.TaggedOutput("tally", tally)


def _joined(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    tables, payloads = zip(*parts)
    return np.concatenate(tables), np.concatenate(payloads)


def _by_batch(table: np.ndarray):
    order = np.argsort(table["batch"], kind="stable")
    table = table[order]
    names, starts = np.unique(table["batch"], return_index=True)
    yield from zip(names.tolist(), np.split(table, starts[1:]))


def reference(uid: int) -> str:
    """A document in a detail: report.py puts its path there."""
    return f"{{{uid >> OFFSET_BITS}@{uid & ((1 << OFFSET_BITS) - 1)}}}"


class Urls(_Global):
    """The first document of every URL stays; those without pass."""

    name = "urls"

    def tables(self, batch):
        """One table of the URLs' hashes."""
        rows = [
            (paragraphs.key(urls.canonical(d.url, self.config.urls)), d.uid, batch.key)
            for d in batch.documents
            if d.url
        ]
        if rows:
            yield 0, np.array(rows, duplicates.KEYED), np.zeros((len(rows), 0), np.uint8)

    def decide(self, group, table, payload):
        """All but the first."""
        return duplicates.first_of_key(table)

    def apply(self, document, rows):
        """Goes as a whole."""
        return Drop("repeated URL", f"{document.url}, as {reference(int(rows['kept'][0]))}")


class Duplicates(_Global):
    """The first of every group of exact, SimHash and MinHash duplicates stays."""

    name = "duplicates"

    def tables(self, batch):
        """A table for every method and band or block."""
        for group, (table, payload) in duplicates.keys(batch.documents, batch.key, self.config.duplicates).items():
            yield group, table, payload

    def decide(self, group, table, payload):
        """Verified pairs."""
        return duplicates.pairs(group[0], table, payload, self.config.duplicates)

    def gather(self, found):
        """Components of all pairs. They meet in one place: 33 bytes a pair, of copies only."""
        return (
            found
            | beam.Map(lambda edges: (None, edges))
            | beam.GroupByKey()
            | beam.MapTuple(lambda _, edges: duplicates.components(np.concatenate(list(edges))))
        )

    def apply(self, document, rows):
        """Goes as a whole."""
        kind = duplicates.KINDS[int(rows["kind"][0])]
        reason = "exact duplicate" if kind == "exact" else f"near duplicate ({kind})"
        return Drop(reason, f"of {reference(int(rows['kept'][0]))}")


class Paragraphs(_Global):
    """The first of equal long paragraphs stays."""

    name = "paragraphs"

    def tables(self, batch):
        """One table of the paragraphs' hashes."""
        table = paragraphs.paragraph_keys(batch.documents, batch.key, self.config.paragraphs)
        if len(table):
            yield 0, table, np.zeros((len(table), 0), np.uint8)

    def decide(self, group, table, payload):
        """All but the first."""
        return paragraphs.repeated(table)

    def apply(self, document, rows):
        """Loses its repeated paragraphs, or goes."""
        return paragraphs.without(document, rows["index"].tolist(), self.config.paragraphs)


GLOBAL = {stage.name: stage for stage in (Urls, Duplicates, Paragraphs)}


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
            split = writing.split_of(document, self.config.validation_share)
            shard = writing.shard_of(document.uid, self._shards(document.domain, split))
            parts[document.domain, split, shard].append(document)
        yield from parts.items()

    def _shards(self, domain: str, split: str) -> int:
        share = self.config.validation_share if split == writing.VALIDATION else 1.0
        return max(1, round(self.shards[domain] * share))

    def _write(self, key: tuple[str, str, int], parts: Iterable[list[Document]]):
        domain, split, shard = key
        documents = [document for part in parts for document in part]
        shards = self._shards(domain, split)
        return domain, writing.write_shard(self.directory, domain, split, shard, shards, documents, self.config)


class MergeTallies(beam.CombineFn):
    """All accounts as one."""

    def create_accumulator(self):
        """An empty one."""
        return Tally()

    def add_input(self, accumulator, tally):
        """Adds one."""
        return accumulator.merge(tally)

    def merge_accumulators(self, accumulators):
        """Adds many."""
        total = Tally()
        for tally in accumulators:
            total.merge(tally)
        return total

    def extract_output(self, accumulator):
        """As it is."""
        return accumulator
