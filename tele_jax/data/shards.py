"""From the files of a domain, or a seqio Task, to shards of packed rows: what one worker of `tele data cache` does.

A unit is some 65,536 * seq_len bytes of consecutive input, or a shard of a Task's source, and becomes one shard. It
does not depend on any other, so that units can be made in any order, anywhere, and again: the same unit gives the same
bytes. Inside a unit documents are shuffled by a hash; each keeps its tokens together, however long it is. What a row
mixes comes from one unit; the rows of all units are shuffled when they are read (order.py).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tele_jax.config import as_written
from tele_jax.data import apart, dialogue, examples, packing, records, sources
from tele_jax.data.cache import LENGTH_BINS, Counts, Shard, file_crc32
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import DamageError, FailedError, UserError
from tele_jax.extras import need
from tele_jax.files import expand, parse_json
from tele_jax.settings import CacheConfig, SourceConfig

if TYPE_CHECKING:
    from tele_jax.data.task_documents import TaskShard

BLOCK_BYTES = 1 << 20  # text that is tokenised at a time
BLOCK_EXAMPLES = 256  # of a Task, which are packed at a time
SPAN_BYTES = 16_384  # SentencePiece takes three times as long for a byte of a text of a megabyte as for one of these
DOCUMENT_BYTES = 1 << 24  # a text file beyond this becomes several documents, all but the last without an end
OPEN_ROWS = 64  # for fit_rows
ACCOUNTS = ".done"  # directory of accounts, while a cache is being made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a file. Of a file with a document a line, the lines that begin in it."""

    path: str
    begin: int
    end: int
    file_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What becomes one shard."""

    domain: str
    format: sources.Format | Literal["task"]
    number: int
    parts: tuple[Part, ...] = ()
    task: "TaskShard | None" = None  # instead of parts

    @property
    def name(self) -> str:
        """Path of the shard in the cache, without ending."""
        return f"{self.domain}/{self.number:05d}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The local files that it is made from."""
        if self.task is not None:
            return (self.task.file,) if self.task.file else ()
        return tuple(part.path for part in self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """What a unit became. `shard` is None if all of its documents were rejected."""

    shard: Shard | None
    counts: Counts
    first_reason: str | None  # of a rejection
    text: str  # `text_checksum` of what was read


def plan(config: CacheConfig) -> list[Unit]:
    """The units of all domains; only the sizes and the first bytes of the files are looked at.

    config: with a domain for every task of a Mixture (feed.resolve).

    Raises:
      UserError: a pattern that matches nothing, an empty or compressed file, fine-tuning on what is not dialogues; no
        such task or split.
    """
    units = []
    for domain, source in config.data.sources.items():
        if source.task:
            units += _task_units(domain, source, config.kind)
            continue
        examples.check_format(domain, source.format, config.kind)
        parts: dict[int, list[Part]] = {}
        before = 0
        for path in expand(source.files, f"sources.{domain}.files"):
            sources.check_plain(path)
            size = os.path.getsize(path)
            # Cuts fall on multiples of shard_bytes of all files together; a text file is one document, and stays whole.
            begin = 0
            while begin < size:
                number = (before + begin) // config.shard_bytes
                end = size if source.format == "text" else min(size, (number + 1) * config.shard_bytes - before)
                parts.setdefault(number, []).append(Part(path=path, begin=begin, end=end, file_bytes=size))
                begin = end
            before += size
        units += [
            Unit(domain=domain, format=source.format, number=i, parts=tuple(parts[number]))
            for i, number in enumerate(sorted(parts))
        ]
    return units


def _task_units(domain: str, source: SourceConfig, kind: examples.Kind) -> list[Unit]:
    from tele_jax.data import task_documents

    task_documents.check_features(task_documents.find(source.task), kind)
    parts = task_documents.list_shards(source.task, source.split)
    return [Unit(domain=domain, format="task", number=part.index, task=part) for part in parts]


@dataclasses.dataclass
class _Reader:
    """The documents of a unit, in the order in which they are packed, and those that cannot be used."""

    unit: Unit
    seed: int
    vocabulary: Vocabulary | None = None  # whose template has to have a place for the system messages
    rejected: list[sources.Reject] = dataclasses.field(default_factory=list)
    read: dict[Part, Any] = dataclasses.field(default_factory=dict)  # BLAKE2 of what was read of every part
    held_out: frozenset[bytes] = frozenset()  # apart.digest of lines
    num_held_out: int = 0  # of the lines so far

    @property
    def num_rejected(self) -> int:
        """The number of documents that cannot be used."""
        return len(self.rejected)

    @property
    def checksum(self) -> str:
        """A checksum of all that was read, in the order of the parts."""
        digests = b"".join(self.read[part].digest() for part in self.unit.parts)
        return hashlib.blake2b(digests, digest_size=16).hexdigest()

    def blocks(self, tokenizer: "_Tokenizer") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Examples in the order in which they are packed: int32 [3, N], and the length of each, block by block."""
        # A unit may begin in the middle of a long text.
        tokenizer.goes_on = self.unit.format == "text" and self.unit.parts[0].begin > 0
        return map(tokenizer.block, _blocks(self.documents()))

    def documents(self) -> Iterator[tuple[Any, bool]]:
        """(text or messages, whether the document ends with it)."""
        places = [(part, offset, line) for part in self.unit.parts for offset, line in self._lines(part)]
        for i in _shuffled(self.unit, self.seed, len(places)):
            part, offset, line = places[i]
            if line is None:
                yield from self._text(part)
            elif (value := self._read(part, offset, line)) is not None:
                if self.vocabulary is not None and self.unit.format == "dialogues":
                    examples.check_system(value, self.vocabulary, f"{part.path}: dialogue at byte {offset:,}")
                yield value, True

    def _lines(self, part: Part) -> Iterator[tuple[int, bytes | None]]:
        """(offset, line) of every line that begins in the part and is not blank; (0, None) for a text file."""
        if self.unit.format == "text":
            yield 0, None
            return
        with self._open(part) as file:
            file.seek(max(0, part.begin - 1))
            if part.begin:
                file.readline()  # the line that begins before; if it ends right at `begin`, this is its last byte
            while (offset := file.tell()) < part.end:
                if offset == 0:
                    offset = sources.begin_of(file)
                line = file.readline()
                self.read[part].update(line)
                if line.strip():
                    self.num_held_out += bool(self.held_out) and apart.digest(line) in self.held_out
                    yield offset, line

    @contextlib.contextmanager
    def _open(self, part: Part) -> Iterator[Any]:
        try:
            with open(part.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != part.file_bytes:
                    raise UserError(f"{part.path}: has changed since this cache was begun; remove what was begun")
                self.read[part] = hashlib.blake2b(digest_size=16)
                yield file
        except FileNotFoundError:
            raise UserError(f"{part.path}: was there when this cache was begun, and is gone") from None

    def _text(self, part: Part) -> Iterator[tuple[str, bool]]:
        for offset, data, last in self._stretches(part):
            if (text := self._read(part, offset, data)) is not None:
                yield text, last

    def _stretches(self, part: Part) -> Iterator[tuple[int, bytes, bool]]:
        """(offset, bytes, whether the file ends with them) of a text file."""
        with self._open(part) as file:
            offset = sources.begin_of(file)
            while offset < part.file_bytes:
                file.seek(offset)
                data = file.read(DOCUMENT_BYTES)
                if not data:
                    raise UserError(f"{part.path}: has become shorter while it was read")
                last = offset + len(data) >= part.file_bytes
                data = data if last else data[: sources.cut_bytes(data)]
                self.read[part].update(data)
                yield offset, data, last
                offset += len(data)

    def _read(self, part: Part, offset: int, data: bytes) -> Any:
        return sources.read_document(part.path, offset, data, self.unit.format, self.rejected.append)


def _shuffled(unit: Unit, seed: int, count: int) -> list[int]:
    """The order of the `count` documents of a unit."""
    prefix = f"{seed} {unit.domain} {unit.number} "
    order = [hashlib.blake2b(f"{prefix}{i}".encode(), digest_size=8).digest() for i in range(count)]
    return sorted(range(count), key=order.__getitem__)


def text_checksum(unit: Unit) -> str:
    """The checksum of the text of a unit, of which all is read.

    Raises:
      UserError: a file is gone, or has another size than when the plan was made; as task_documents.checksum.
    """
    if unit.task is not None:
        from tele_jax.data import task_documents

        return task_documents.checksum(unit.task)
    reader = _Reader(unit, seed=0)
    for part in unit.parts:
        for _ in reader._stretches(part) if unit.format == "text" else reader._lines(part):
            pass
    return reader.checksum


class _Tokenizer:
    """Documents to examples, block by block: int32 [3, N] (examples.COLUMNS), and the length of each example."""

    def __init__(self, vocabulary: Vocabulary, config: CacheConfig, threads: int):
        self.vocabulary, self._kind, self._seq_len, self._threads = vocabulary, config.kind, config.seq_len, threads
        self._spelled = np.array([len(spelled) for spelled in vocabulary.piece_bytes])
        self._separator = examples.separator(vocabulary)
        self.goes_on = False  # whether the last document was a part of one, which the next goes on with
        self.counts = Counts()

    def block(self, documents: Sequence[tuple[Any, bool]]) -> tuple[np.ndarray, np.ndarray]:
        dialogues = bool(documents) and not isinstance(documents[0][0], str)
        whole, shortened = len("".join([sources.text_of(value) for value, _ in documents]).encode()), 0
        if dialogues and self._kind == "sft":
            rendered = [self._answers(messages) for messages, _ in documents]
            shortened = sum(cut for _, cut in rendered)
            columns = np.concatenate([example for example, _ in rendered], axis=1)
            lengths = np.array([example.shape[1] for example, _ in rendered])
        else:
            targets, lengths, weights = self._all(documents) if dialogues else (*self._texts(documents), 1)
            columns = np.empty((3, len(targets)), np.int32)
            columns[0, 1:], columns[1], columns[2] = targets[:-1], targets, weights
            columns[0, np.cumsum(lengths) - lengths] = self._separator
        text_bytes = self._text_bytes(columns[1]) if shortened else whole
        self._count(columns, lengths, sum(ends for _, ends in documents), text_bytes, shortened)
        return columns, lengths

    def joined(self, rendered: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The block of examples that a Task gave, int32 [3, n] each."""
        columns, lengths = np.concatenate(rendered, axis=1), np.array([example.shape[1] for example in rendered])
        self._count(columns, lengths, len(rendered), self._text_bytes(columns[1]), 0)
        return columns, lengths

    def _count(self, columns: np.ndarray, lengths: np.ndarray, documents: int, text_bytes: int, shortened: int) -> None:
        self.counts += Counts(
            documents=documents,
            shortened=shortened,
            text_bytes=text_bytes,
            text_tokens=int(np.count_nonzero(self._spelled[columns[1]])),
            tokens=columns.shape[1],
            learned_tokens=int(np.count_nonzero(columns[2])),
            lengths=tuple(np.bincount(np.frexp(lengths)[1] - 1, minlength=LENGTH_BINS).tolist()),
        )

    def _texts(self, documents: Sequence[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
        """Targets and lengths of documents that are texts; spans are encoded apart and put together again."""
        spans, first_span, begins = [], [], []
        for text, ends in documents:
            first_span.append(len(spans))
            cut = [(0, len(text))] if 4 * len(text) <= SPAN_BYTES else sources.cut_text(text, SPAN_BYTES)
            parts = [text[begin:end] for begin, end in cut]
            spans += parts
            begins += [not self.goes_on, *[False] * (len(parts) - 1)]
            self.goes_on = not ends
        ids = self.vocabulary.encode_batch(spans, self._threads)
        if self.vocabulary.adds_dummy_prefix:  # there is no space where a document goes on
            for i in np.flatnonzero(~np.array(begins)):
                ids[i] = np.array(self.vocabulary.encode_continuation(spans[i]), np.int32)
        texts = np.concatenate(ids)
        lengths = np.add.reduceat(np.fromiter(map(len, ids), np.int64, len(ids)), first_span)
        ends = np.array([ends for _, ends in documents])
        targets = np.full(len(texts) + ends.sum(), self._separator, np.int32)
        targets[np.arange(len(texts)) + np.repeat(np.cumsum(ends) - ends, lengths)] = texts
        return targets, lengths + ends

    def _text_bytes(self, targets: np.ndarray) -> int:
        """UTF-8 bytes of text that the targets spell."""
        spelled = self._spelled[targets]
        spaces = np.count_nonzero(np.diff(spelled > 0, prepend=False) & (spelled > 0))  # before each stretch of text
        return int(spelled.sum()) - (int(spaces) if self.vocabulary.adds_dummy_prefix else 0)

    def _all(self, documents: Sequence[tuple[Any, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets, lengths and weights of dialogues that are learned whole, but for answers marked otherwise."""
        rendered = [dialogue.render(messages, self.vocabulary, given=1) for messages, _ in documents]
        targets = np.concatenate([np.array([*tokens, self._separator], np.int32) for tokens, _ in rendered])
        weights = np.concatenate([np.array([*weights, 1], np.int32) for _, weights in rendered])
        return targets, np.array([len(tokens) + 1 for tokens, _ in rendered]), weights

    def _answers(self, messages: Any) -> tuple[np.ndarray, bool]:
        """One dialogue of which the answers are learned, and whether it had to be shortened."""
        tokens, weights = dialogue.render(messages, self.vocabulary)
        shortened = len(tokens) > self._seq_len + 1
        if shortened:
            tokens, weights = dialogue.render(messages, self.vocabulary, max_tokens=self._seq_len + 1)
        return np.array([tokens[:-1], tokens[1:], weights[1:]], np.int32), shortened


def _blocks(documents: Iterator[tuple[Any, bool]]) -> Iterator[list[tuple[Any, bool]]]:
    block, characters = [], 0
    for document in documents:
        block.append(document)
        characters += len(sources.text_of(document[0]))
        if characters >= BLOCK_BYTES:
            yield block
            block, characters = [], 0
    if block:
        yield block


@dataclasses.dataclass
class _TaskReader:
    """A unit that is a part of a seqio Task, as _Reader is one of files."""

    unit: Unit
    config: CacheConfig
    vocabulary: Vocabulary
    held_out: frozenset[bytes] = frozenset()  # of files; a Task has other splits
    num_held_out: int = 0

    def __post_init__(self):
        from tele_jax.data import task_documents

        shape = (self.vocabulary, self.config.kind, self.config.seq_len)
        self._documents = task_documents.TaskDocuments(self.unit.task, *shape)
        self.checksum = self._documents.checksum
        self.rejected, self.num_rejected = self._documents.rejected, self._documents.num_rejected

    def blocks(self, tokenizer: _Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The blocks of examples, as those of _Reader.blocks."""
        order = _shuffled(self.unit, self.config.seed, len(self._documents))
        for first in range(0, len(order), BLOCK_EXAMPLES):
            yield tokenizer.joined([self._documents.example(i) for i in order[first : first + BLOCK_EXAMPLES]])


def _packed(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], vocabulary: Vocabulary, config: CacheConfig
) -> Iterator[np.ndarray]:
    """The rows of a unit, int32 [R, 5, S] at a time. The last ones are padded where the documents end."""
    pad_id = max(vocabulary.pad_id, 0)
    open_rows = packing.empty_rows(1 if config.kind == "pretrain" else OPEN_ROWS, config.seq_len, pad_id)
    for columns, lengths in blocks:
        if config.kind == "pretrain":
            separator = examples.separator(vocabulary)
            open_rows, rows = packing.cut_rows(open_rows, columns, lengths, separator=separator, pad_id=pad_id)
        else:
            parts = np.split(columns, np.cumsum(lengths)[:-1], axis=1)
            open_rows, rows = packing.fit_rows(open_rows, parts, pad_id=pad_id)
        yield rows
    yield open_rows[[packing.used(row) > 0 for row in open_rows]]


def write_unit(
    unit: Unit,
    config: CacheConfig,
    vocabulary: Vocabulary,
    out: Path,
    *,
    threads: int = 1,
    goes_on: bool = False,
    held_out: frozenset[bytes] = frozenset(),
) -> Done:
    """Writes the shard of a unit, whole or not at all, and last the account of it; does nothing if that is there.

    goes_on: whether the account may be of an earlier start, since which a Task may give something else. (For files the
      caller knows.)
    held_out: digests of the lines that are held out, to be counted (apart.py).

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
        write_rejected(out / f"{unit.name}.rejected.jsonl", rejected)
        replace(account, json.dumps(dataclasses.asdict(done)))
    except OSError as error:
        raise FailedError(
            f"{error.filename or out / unit.name}: {error.strerror or error}; start again to go on"
        ) from None
    return done


def _write(
    unit: Unit, config: CacheConfig, vocabulary: Vocabulary, out: Path, threads: int, held_out: frozenset[bytes]
) -> tuple[Done, list[sources.Reject]]:
    is_task = unit.task is not None
    reader = _TaskReader(unit, config, vocabulary) if is_task else _Reader(unit, config.seed, vocabulary)
    reader.held_out = held_out
    tokenizer = _Tokenizer(vocabulary, config, threads)
    dtype = records.id_type(vocabulary.vocab_size)
    target = out / f"{unit.name}.array_record"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    counts = Counts()
    array_record = need("array_record.python.array_record_module")
    try:
        # A group is what is compressed together, and so what has to be read to get at one row.
        writer = array_record.ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
        for rows in _packed(reader.blocks(tokenizer), vocabulary, config):
            for record in records.encode(rows, dtype):
                writer.write(record)
            segments = rows[:, packing.SEGMENT_IDS].max(axis=1, initial=0).sum()
            counts += Counts(rows=len(rows), segments=int(segments))
        writer.close()
        counts += dataclasses.replace(tokenizer.counts, rejected=reader.num_rejected, held_out=reader.num_held_out)
        shard = _keep(temporary, target, counts.rows, out)
    except RuntimeError as error:  # what ArrayRecord makes of any failure to write
        raise FailedError(f"{target}: {str(error).split(';')[0]}; start again to go on") from None
    finally:
        temporary.unlink(missing_ok=True)
    reason = sources.place(reader.rejected[0]) if reader.rejected else None
    if shard is not None:
        shard = dataclasses.replace(shard, text=reader.checksum)
    return Done(shard=shard, counts=counts, first_reason=reason, text=reader.checksum), reader.rejected


def _keep(temporary: Path, target: Path, rows: int, out: Path) -> Shard | None:
    """Gives a finished file its name, once it is on the disk."""
    if not rows:
        return None
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    crc32 = file_crc32(temporary)
    os.replace(temporary, target)
    return Shard(file=str(target.relative_to(out)), rows=rows, file_bytes=target.stat().st_size, crc32=crc32)


def account_file(out: Path, unit: Unit) -> Path:
    """Where the account of a finished unit is: a Done as JSON."""
    return out / ACCOUNTS / f"{unit.name}.json"


def finished(out: Path, unit: Unit) -> Done | None:
    """The account of a unit; None where it is not finished: no account, a damaged one, or a shard of another size."""
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


def write_rejected(path: Path, rejected: Sequence[sources.Reject]) -> None:
    """Writes a reject file atomically, an entry a line; without entries there is none when this returns."""
    if not rejected:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected))


def replace(path: Path, text: str) -> None:
    """Writes a file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
