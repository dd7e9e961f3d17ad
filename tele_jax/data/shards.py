"""Makes shards of packed rows from parts of domains: the work of one worker of `tele data cache`.

A unit is some 65,536 * seq_len bytes of consecutive input, or a shard of a Task's source, and becomes one shard. Units
do not depend on each other, so that they can be made in any order, anywhere, and again: the same unit gives the same
bytes. Inside a unit documents are shuffled by a hash; each keeps its tokens together, however long it is. The rows of
all units are shuffled when they are read (order.py).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from tele_jax.config import as_written
from tele_jax.data import documents, domains, encode, packing, sources
from tele_jax.data.cache import LENGTH_BINS, Counts, Shard, file_crc32
from tele_jax.data.dialogue_formats import DIALOGUES
from tele_jax.data.documents import Document
from tele_jax.data.encode import Encoded, Kind
from tele_jax.data.templates import separator
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import DamageError, FailedError, UserError
from tele_jax.extras import need
from tele_jax.files import Table, parse_json, replacing, write_file
from tele_jax.settings import DEFAULT_DIALOGUES, CacheConfig, DialogueConfig, SourceConfig

if TYPE_CHECKING:
    from tele_jax.data.task_documents import TaskShard

BLOCK_BYTES = 1 << 20  # text that is tokenised at a time
BLOCK_EXAMPLES = 256  # examples of a Task that are packed at a time
PIECE_BYTES = 16_384  # SentencePiece takes three times as long for a byte of a text of a megabyte as for one of these
DOCUMENT_BYTES = 1 << 24  # a text file beyond this becomes several documents, all but the last without an end
OPEN_ROWS = 64  # for fit_rows
ACCOUNTS = ".done"  # directory of accounts, while a cache is being made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a file; if a document is a line, the lines that begin in it. A text file or array stays whole."""

    path: str
    begin: int
    end: int
    file_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """The input of one shard."""

    domain: str
    format: documents.AnyFormat
    number: int
    parts: tuple[Part, ...] = ()
    task: "TaskShard | None" = None  # instead of parts

    @property
    def name(self) -> str:
        """Path of the shard in the cache, without ending."""
        return f"{self.domain}/{self.number:05d}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The local files that the unit is made from."""
        if self.task is not None:
            return (self.task.file,) if self.task.file else ()
        return tuple(part.path for part in self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """The account of a finished unit. `shard` is None if all of its documents were rejected."""

    shard: Shard | None
    counts: Counts
    first_reason: str | None  # of a rejection
    text: str  # `text_checksum` of what was read


def plan(config: CacheConfig) -> list[Unit]:
    """Lists the units of all domains; only the sizes and the first bytes of the files are looked at.

    config: with a domain for every task of a Mixture (domains.resolve).

    Raises:
      UserError: a pattern that matches nothing, an empty or compressed file, fine-tuning on what is not dialogues; no
        such task or split.
    """
    units = []
    for domain, source in config.data.sources.items():
        if source.task:
            units += _task_units(domain, source, config.kind)
            continue
        domains.check_format(domain, source.format, config.kind)
        parts: dict[int, list[Part]] = {}
        before = 0
        for path in sources.expand_domain(source.files, f"sources.{domain}.files"):
            with documents.open_text(path) as file:
                size = os.fstat(file.fileno()).st_size
                is_whole = source.format == "text" or documents.is_array(file, source.format)
            # Cuts fall on multiples of shard_bytes of all files together.
            begin = 0
            while begin < size:
                number = (before + begin) // config.shard_bytes
                end = size if is_whole else min(size, (number + 1) * config.shard_bytes - before)
                parts.setdefault(number, []).append(Part(path=path, begin=begin, end=end, file_bytes=size))
                begin = end
            before += size
        units += [
            Unit(domain=domain, format=source.format, number=i, parts=tuple(parts[number]))
            for i, number in enumerate(sorted(parts))
        ]
    return units


def _task_units(domain: str, source: SourceConfig, kind: Kind) -> list[Unit]:
    from tele_jax.data import task_documents

    task_documents.check_features(task_documents.find(source.task), kind)
    parts = task_documents.list_shards(source.task, source.split)
    return [Unit(domain=domain, format="task", number=part.index, task=part) for part in parts]


@dataclasses.dataclass
class _Reader:
    """The documents of a unit of files, in the order in which they are packed, and the rejected ones."""

    unit: Unit
    seed: int
    vocabulary: Vocabulary | None = None  # its template must have a place for the system messages
    how: DialogueConfig = DEFAULT_DIALOGUES  # how dialogues are read
    held_out: frozenset[int] = frozenset()  # documents.digest of records
    num_held_out: int = 0  # records so far that are held out as well
    rejected: list[documents.Reject] = dataclasses.field(default_factory=list)
    read: dict[Part, Any] = dataclasses.field(default_factory=dict)  # BLAKE2 of what was read of every part

    @property
    def num_rejected(self) -> int:
        """Number of documents that cannot be used."""
        return len(self.rejected)

    @property
    def checksum(self) -> str:
        """A checksum of all that was read, in the order of the parts."""
        digests = b"".join(self.read[part].digest() for part in self.unit.parts)
        return hashlib.blake2b(digests, digest_size=16).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Reads the documents of the unit in their order; long text files in parts."""
        places = [(part, *record) for part in self.unit.parts for record in self.records(part)]
        for i in _shuffled(self.unit, self.seed, len(places)):
            part, offset, record, at = places[i]
            if record is None:
                begins = True
                for offset, data, last in self.stretches(part):
                    if (text := self._parsed(part, offset, data, at)) is not None:
                        yield Document(text, begins=begins, ends=last)
                        begins = last
            elif (value := self._parsed(part, offset, record, at)) is not None:
                if self.vocabulary is not None and self.unit.format in DIALOGUES:
                    encode.check_system(value, self.vocabulary, f"{part.path}: dialogue at byte {offset:,}")
                yield Document(value)

    def records(self, part: Part) -> Iterator[tuple[int, bytes | None, Table]]:
        """Reads (offset, bytes, place) of every record of the part; (0, None, {}) for a text file."""
        if self.unit.format == "text":
            yield 0, None, {}
            return
        with self._open(part) as file:
            found = self._lines(file, part, file.seek(documents.text_begin(file)))
            if documents.is_array(file, self.unit.format):
                found = documents.records(file, self.unit.format, self.read[part].update)
            for offset, data, at in found:
                self.num_held_out += bool(self.held_out) and documents.digest(data, self.unit.format) in self.held_out
                yield offset, data, at

    def _lines(self, file: BinaryIO, part: Part, begin: int) -> Iterator[tuple[int, bytes, Table]]:
        file.seek(max(0, part.begin - 1))
        if part.begin:
            file.readline()  # the line that begins before; if it ends right at `begin`, this is its last byte
        while (offset := file.tell()) < part.end:
            offset = file.seek(max(offset, begin))
            line = file.readline()
            self.read[part].update(line)
            if line.strip():
                yield offset, line, {}

    def stretches(self, part: Part) -> Iterator[tuple[int, bytes, bool]]:
        """Reads (offset, bytes, whether the file ends with them) of a text file."""
        with self._open(part) as file:
            file.seek(documents.text_begin(file))
            for _, offset, data, last in documents.stretches(file, (DOCUMENT_BYTES,), self.read[part].update):
                yield offset, data, last
            if file.tell() < part.file_bytes:
                raise UserError(f"{part.path}: has become shorter while it was read")

    @contextlib.contextmanager
    def _open(self, part: Part) -> Iterator[BinaryIO]:
        try:
            with open(part.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != part.file_bytes:
                    raise UserError(f"{part.path}: has changed since this cache was begun; remove what was begun")
                self.read[part] = hashlib.blake2b(digest_size=16)
                yield file
        except FileNotFoundError:
            raise UserError(f"{part.path}: was there when this cache was begun, and is gone") from None

    def _parsed(self, part: Part, offset: int, data: bytes, at: Table) -> Any:
        to = self.rejected.append
        return documents.read_document(part.path, offset, data, self.unit.format, to, at, how=self.how)


def _shuffled(unit: Unit, seed: int, count: int) -> list[int]:
    """Returns the order of the `count` documents of a unit."""
    prefix = f"{seed} {unit.domain} {unit.number} "
    order = [hashlib.blake2b(f"{prefix}{i}".encode(), digest_size=8).digest() for i in range(count)]
    return sorted(range(count), key=order.__getitem__)


def text_checksum(unit: Unit) -> str:
    """Reads all of the text of a unit, and returns its checksum.

    Raises:
      UserError: a file is gone, or has another size than when the plan was made; as task_documents.checksum.
    """
    if unit.task is not None:
        from tele_jax.data import task_documents

        return task_documents.checksum(unit.task)
    reader = _Reader(unit, seed=0)
    for part in unit.parts:
        for _ in reader.stretches(part) if unit.format == "text" else reader.records(part):
            pass
    return reader.checksum


class _Unit:
    """A unit while it becomes a shard: its examples and what is counted of them."""

    def __init__(self, unit: Unit, config: CacheConfig, vocabulary: Vocabulary, threads: int, held_out: frozenset[int]):
        self._unit, self._config, self._vocabulary, self._threads = unit, config, vocabulary, threads
        self._spelled = np.array([len(spelled) for spelled in vocabulary.piece_bytes])
        self._counts = Counts()
        if unit.task is None:
            self.source = _Reader(unit, config.seed, vocabulary, config.data.dialogues, held_out)
        else:
            from tele_jax.data import task_documents

            self.source = task_documents.TaskDocuments(unit.task, vocabulary, config.kind, config.seq_len)

    def _encoded(self) -> Iterator[Encoded]:
        config, source = self._config, self.source
        if isinstance(source, _Reader):
            for block in encode.blocks(source.documents(), BLOCK_BYTES):
                reading: Table = {"threads": self._threads, "piece_bytes": PIECE_BYTES, "how": config.data.dialogues}
                yield encode.encode(block, self._vocabulary, config.kind, config.seq_len, **reading)
            return
        order = _shuffled(self._unit, config.seed, len(source))
        for first in range(0, len(order), BLOCK_EXAMPLES):
            examples = [source.example(i) for i in order[first : first + BLOCK_EXAMPLES]]
            yield encode.joined(examples, len(examples))

    def rows(self) -> Iterator[np.ndarray]:
        """Makes the rows of the unit, int32 [R, 5, S] at a time. The last ones are padded where the documents end."""
        config, pad_id = self._config, max(self._vocabulary.pad_id, 0)
        open_rows = packing.empty_rows(1 if config.kind == "pretrain" else OPEN_ROWS, config.seq_len, pad_id)
        for block in self._encoded():
            self._count(block)
            if config.kind == "pretrain":
                how = {"separator": separator(self._vocabulary), "pad_id": pad_id}
                open_rows, full = packing.cut_rows(open_rows, block.columns, block.lengths, **how)
            else:
                examples = np.split(block.columns, np.cumsum(block.lengths)[:-1], axis=1)
                open_rows, full = packing.fit_rows(open_rows, examples, pad_id=pad_id)
            yield full
        yield open_rows[[packing.used(row) > 0 for row in open_rows]]

    def _count(self, block: Encoded) -> None:
        if block.columns.dtype != np.int32:
            why = "a cache cannot keep weights of answers other than 0 and 1; train on the files themselves"
            raise UserError(f"sources.{self._unit.domain}: {why}")
        spelled = self._spelled[block.columns[1]]
        text_bytes = block.text_bytes
        if text_bytes is None:
            # The dummy prefix puts a space before each stretch of text.
            spaces = np.count_nonzero(np.diff(spelled > 0, prepend=False) & (spelled > 0))
            text_bytes = int(spelled.sum()) - (int(spaces) if self._vocabulary.adds_dummy_prefix else 0)
        self._counts += Counts(
            **{name: getattr(block, name) for name in ("documents", "shortened", "split", "dropped")},
            text_bytes=text_bytes,
            text_tokens=int(np.count_nonzero(spelled)),
            tokens=block.columns.shape[1],
            learned_tokens=int(np.count_nonzero(block.columns[2])),
            lengths=tuple(np.bincount(np.frexp(block.lengths)[1] - 1, minlength=LENGTH_BINS).tolist()),
        )

    def counts(self) -> Counts:
        """Counts of the documents, after all rows were made; without those of the rows."""
        held_out = getattr(self.source, "num_held_out", 0)  # a Task has other splits
        return self._counts + Counts(rejected=self.source.num_rejected, held_out=held_out)


def write_unit(
    unit: Unit,
    config: CacheConfig,
    vocabulary: Vocabulary,
    out: Path,
    *,
    threads: int = 1,
    goes_on: bool = False,
    held_out: frozenset[int] = frozenset(),
) -> Done:
    """Writes the shard of a unit, whole or not at all, and last the account of it; does nothing if that is there.

    Args:
      out: directory of the cache while it is being made.
      goes_on: whether the account may be of an earlier start, since when a Task may give other examples. (Changed files
        are the caller's to notice.)
      held_out: digests of the lines that are held out, to be counted.

    Raises:
      UserError: a file has changed since the plan was made; as task_documents.TaskDocuments.
      FailedError: the disk is full, or something cannot be read or written.
    """
    done = finished(out, unit)
    is_stale = goes_on and unit.task is not None and done is not None and done.text != text_checksum(unit)
    if done is not None and not is_stale:
        return done
    account = account_file(out, unit)
    try:
        if is_stale:
            account.unlink()
        account.parent.mkdir(parents=True, exist_ok=True)
        (out / unit.domain).mkdir(exist_ok=True)
        done, rejected = _write(unit, config, vocabulary, out, threads, held_out)
        documents.write_rejected(out / f"{unit.name}.rejected.jsonl", rejected)
        write_file(account, json.dumps(dataclasses.asdict(done)))
    except OSError as error:
        raise FailedError(
            f"{error.filename or out / unit.name}: {error.strerror or error}; start again to go on"
        ) from None
    return done


def _write(
    unit: Unit, config: CacheConfig, vocabulary: Vocabulary, out: Path, threads: int, held_out: frozenset[int]
) -> tuple[Done, Sequence[documents.Reject]]:
    work = _Unit(unit, config, vocabulary, threads, held_out)
    dtype = packing.id_type(vocabulary.vocab_size)
    target = out / f"{unit.name}.array_record"
    counts, shard = Counts(), None
    array_record = need("array_record.python.array_record_module")
    try:
        with replacing(target) as temporary:
            # A group is what is compressed together, and so what has to be read to get at one row.
            writer = array_record.ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
            for rows in work.rows():
                for record in packing.to_records(rows, dtype):
                    writer.write(record)
                segments = rows[:, packing.SEGMENT_IDS].max(axis=1, initial=0).sum()
                counts += Counts(rows=len(rows), segments=int(segments))
            writer.close()
            counts, checksum = counts + work.counts(), work.source.checksum
            if counts.rows:
                size, crc32 = temporary.stat().st_size, file_crc32(temporary)
                file = str(target.relative_to(out))
                shard = Shard(file=file, rows=counts.rows, file_bytes=size, crc32=crc32, text=checksum)
            else:
                temporary.unlink()
    except RuntimeError as error:  # what ArrayRecord makes of any failure to write
        raise FailedError(f"{target}: {str(error).split(';')[0]}; start again to go on") from None
    rejected = work.source.rejected
    reason = documents.place(rejected[0]) if rejected else None
    return Done(shard=shard, counts=counts, first_reason=reason, text=checksum), rejected


def account_file(out: Path, unit: Unit) -> Path:
    """Returns the file of the account of a finished unit: a Done as JSON."""
    return out / ACCOUNTS / f"{unit.name}.json"


def finished(out: Path, unit: Unit) -> Done | None:
    """Returns the account of a unit; None where it is missing or damaged, or the shard has another size."""
    account = account_file(out, unit)
    try:
        done = as_written(Done, parse_json(account.read_bytes(), str(account)), str(account))
        shard = done.shard
        if shard is None:
            return done
        file = f"{unit.name}.array_record"
        return done if shard.file == file and (out / file).stat().st_size == shard.file_bytes else None
    except (OSError, DamageError):
        return None
