"""A row cache: packed rows on disk, any of which can be read without the others. Made by caching.py.

    DIR/manifest.json                     what is in it; written last, with a checksum of its own
    DIR/tokenizer.model, or .json         a copy of the tokenizer that made it
    DIR/<domain>/00000.array_record       rows (packing.py), about 16,384 a shard
    DIR/<domain>/00000.rejected.jsonl     documents that could not be used, and why; absent if there are none

ArrayRecord checks every record that it reads; the manifest has the size and the CRC-32 of every shard.
"""

import collections
import dataclasses
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tele_jax.config import as_written, written_table
from tele_jax.data import packing
from tele_jax.data.encode import Kind
from tele_jax.data.vocabulary import tokenizer_in
from tele_jax.errors import DamageError, UserError
from tele_jax.extras import need
from tele_jax.files import Table, is_plain_name, parse_json
from tele_jax.settings import DEFAULT_DIALOGUES, DialogueConfig, SourceConfig

FORMAT = 1
MANIFEST = "manifest.json"
OPEN_SHARDS = 64  # an open one holds 8 bytes a row
LENGTH_BINS = 40  # of the histogram of document lengths: bin b has the lengths from 2**b to 2**(b+1) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of rows."""

    file: str  # relative to the cache
    rows: int
    file_bytes: int
    crc32: int
    text: str | None = None  # checksum of its text (shards.text_checksum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of documents, tokens and rows.

    Attributes:
      documents: documents or dialogues, without the rejected ones.
      shortened: dialogues that were longer than a row and lost turns or text (dialogue.samples).
      split: dialogues that were longer than a row and were split at turns.
      dropped: dialogues that were longer than a row and of which nothing is left.
      rejected: documents that could not be used.
      held_out: documents that the page of the cache holds out as well.
      text_bytes: UTF-8 bytes of text.
      text_tokens: tokens that spell text: neither ends of sequences nor markers.
      tokens: positions that are not padding.
      learned_tokens: positions with a loss weight of 1.
      rows, segments: rows, and segments in them.
      lengths: int [LENGTH_BINS], number of documents by the floor of log2 of their tokens.
    """

    documents: int = 0
    shortened: int = 0
    rejected: int = 0
    text_bytes: int = 0
    text_tokens: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    rows: int = 0
    segments: int = 0
    held_out: int = 0
    split: int = 0
    dropped: int = 0
    lengths: tuple[int, ...] = (0,) * LENGTH_BINS

    def __add__(self, other: "Counts") -> "Counts":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)[:-1]}
        return Counts(**sums, lengths=tuple(a + b for a, b in zip(self.lengths, other.lengths, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """One domain of a cache."""

    counts: Counts
    shards: tuple[Shard, ...]
    source: SourceConfig  # as the page that made the cache had it
    text_files: tuple[int, ...] = ()  # bytes of the files that it was made from, in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a cache."""

    format: int
    kind: str
    seq_len: int
    seed: int  # of the order of documents
    tokenizer_sha256: str
    vocab_size: int
    pad_id: int  # fills the ends of rows
    domains: dict[str, Domain]
    template: str | None = None  # of the dialogues; None: there are none
    dialogues: DialogueConfig | None = None  # how dialogues were read; None: by a version that knew no such settings

    def to_text(self) -> str:
        """JSON, with a checksum of what it says."""
        content = dataclasses.asdict(self)
        return json.dumps({**content, "sha256": _digest(content)}, indent=1, ensure_ascii=False) + "\n"

    @property
    def digest(self) -> str:
        """Names the content: caches of the same rows have the same digest."""
        return _digest(dataclasses.asdict(self))

    def checksum(self, domain: str) -> str:
        """Names the rows of a domain, wherever the cache and the text it was made from lie."""
        shards = [(shard.rows, shard.file_bytes, shard.crc32) for shard in self.domains[domain].shards]
        shape = [self.kind, self.seq_len, self.tokenizer_sha256, self.vocab_size, self.pad_id, self.template]
        return hashlib.sha256(json.dumps([shape, shards]).encode()).hexdigest()[:32]


def _digest(content: Table) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def incomplete(path: Path) -> Path:
    """Returns the directory of a cache while it is being made."""
    whole = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    return whole.with_name(whole.name + ".incomplete")


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of the cache in the directory `path`.

    Raises:
      UserError: there is no complete cache, or one of a format that this version does not know.
      DamageError: the manifest is not what was written.
    """
    where = str(path / MANIFEST)
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError:
        what = "it is not complete yet" if incomplete(path).exists() else f"it holds no {MANIFEST}"
        raise UserError(f"{path}: not a row cache, {what}; make it with: tele data cache") from None
    content = written_table(parse_json(text, where), where, {})
    if content and not {"sha256", "seq_len"} & set(content):
        raise UserError(f"{path}: not a row cache, its {MANIFEST} is of something else")
    if _digest({key: value for key, value in content.items() if key != "sha256"}) != content.pop("sha256", None):
        raise DamageError(f"{where}: damaged or edited, its checksum does not match")
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise UserError(f"{path}: a cache of format {found!r}, this version reads format {FORMAT}; make it again")
    manifest = as_written(Manifest, content, where)
    if problem := _problem(manifest):
        raise DamageError(f"{where}: damaged, {problem}")
    return manifest


def _problem(manifest: Manifest) -> str | None:
    """Names what a manifest says that no cache can say of itself; None where there is nothing."""
    if manifest.seq_len < 1 or manifest.vocab_size < 1 or manifest.kind not in ("pretrain", "sft"):
        return f"kind {manifest.kind!r}, seq_len {manifest.seq_len}, vocab_size {manifest.vocab_size}"
    for name, domain in manifest.domains.items():
        if not is_plain_name(name) or len(domain.counts.lengths) != LENGTH_BINS:
            return f"domains.{name}: no name of a directory, or not {LENGTH_BINS} counts of lengths"
        for shard in domain.shards:
            directory, _, file = shard.file.rpartition("/")
            if not (directory in ("", name) and is_plain_name(file) and shard.rows > 0 and shard.file_bytes > 0):
                return f"domains.{name}: {shard.file!r} with {shard.rows} rows in {shard.file_bytes} bytes"
    return None


class RowCache:
    """An open cache. Reading is thread-safe; nothing is read ahead, nothing is kept but open files."""

    reads_alone = True

    def __init__(self, path: str | Path):
        """Reads the manifest and looks whether every shard has its size.

        Raises:
          UserError, DamageError: as read_manifest; a shard is missing or has another size.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._array_record = need("array_record.python.array_record_module")
        self._dtype = packing.id_type(self.manifest.vocab_size)
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._first_rows = {}
        for name, domain in self.manifest.domains.items():
            for shard in domain.shards:
                self._check_size(shard)
            self._first_rows[name] = np.cumsum([0, *(shard.rows for shard in domain.shards)])

    def _check_size(self, shard: Shard) -> None:
        file = self.path / shard.file
        try:
            size = file.stat().st_size
        except OSError:
            raise DamageError(f"{file}: this shard of the cache is missing") from None
        if size != shard.file_bytes:
            raise DamageError(f"{file}: damaged, {size} bytes instead of {shard.file_bytes}")

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by domain."""
        return {name: domain.counts.rows for name, domain in self.manifest.domains.items()}

    @property
    def where(self) -> str:
        """The directory, for messages."""
        return str(self.path)

    @property
    def identity(self) -> Table:
        """Names what the rows depend on, as a saved place in the data has it (feed.RowStore)."""
        kind, seq_len, tokenizer = self.manifest.kind, self.manifest.seq_len, self.manifest.tokenizer_sha256
        return {"feed": "cache", "kind": kind, "seq_len": seq_len, "tokenizer": tokenizer}

    def checksum(self, domain: str) -> str:
        """Names the rows of a domain, see Manifest.checksum."""
        return self.manifest.checksum(domain)

    def tokenizer(self) -> Path:
        """Returns the copy of the tokenizer that made the cache.

        Raises:
          DamageError: it is missing, or another one.
        """
        file = tokenizer_in(self.path)
        if file is None:
            raise DamageError(f"{self.path}: its copy of the tokenizer is missing")
        if hashlib.sha256(file.read_bytes()).hexdigest() != self.manifest.tokenizer_sha256:
            raise DamageError(f"{file}: damaged, not the tokenizer that made this cache")
        return file

    def read(self, domains: Sequence[str], rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Reads the rows `rows[i]` of `domains[i]` as one batch of arrays [R, S] (packing.to_batch).

        Raises:
          DamageError: a shard does not hold what was written.
        """
        wanted: dict[Shard, tuple[list[int], list[int]]] = {}
        for i, (name, row) in enumerate(zip(domains, rows, strict=True)):
            first = self._first_rows[name]
            number = int(np.searchsorted(first, row, side="right")) - 1
            shard = self.manifest.domains[name].shards[number]
            places, inside = wanted.setdefault(shard, ([], []))
            places.append(i)
            inside.append(int(row - first[number]))
        found: list[bytes] = [b""] * len(domains)
        for shard, (places, inside) in wanted.items():
            for i, record in zip(places, self._records(shard, inside), strict=True):
                found[i] = record
        try:
            return packing.from_records(found, self.manifest.seq_len, self._dtype, self.manifest.pad_id)
        except DamageError as error:
            raise DamageError(f"{self.path}: damaged, {error}") from None

    def _records(self, shard: Shard, rows: list[int]) -> Sequence[bytes]:
        with self._lock:
            try:
                return self._reader(shard).read(rows)
            except (RuntimeError, IndexError, ValueError) as error:
                reason = str(error).split("; ")[0].splitlines()[0]
                raise DamageError(
                    f"{self.path / shard.file}: damaged ({reason}); remove the cache and make it again"
                ) from None

    def _reader(self, shard: Shard) -> Any:
        if shard.file in self._readers:
            self._readers.move_to_end(shard.file)
            return self._readers[shard.file]
        if len(self._readers) >= OPEN_SHARDS:
            self._readers.popitem(last=False)[1].close()
        reader = self._array_record.ArrayRecordReader(
            str(self.path / shard.file), options="readahead_buffer_size:0", file_reader_buffer_size=16_384
        )
        if reader.num_records() != shard.rows:
            raise RuntimeError(f"{reader.num_records()} rows instead of {shard.rows}")
        self._readers[shard.file] = reader
        return reader

    def close(self) -> None:
        """Closes the files; they are opened again when something is read."""
        with self._lock:
            while self._readers:
                self._readers.popitem()[1].close()

    def verify(self) -> Iterator[tuple[Shard, str | None]]:
        """Reads every shard to its last byte, and yields it with what is wrong, or None."""
        for domain in self.manifest.domains.values():
            for shard in domain.shards:
                try:
                    same = file_crc32(self.path / shard.file) == shard.crc32
                    yield shard, None if same else "its bytes are not those that were written"
                except OSError as error:
                    yield shard, f"it cannot be read ({error.strerror})"


def file_crc32(path: Path) -> int:
    """Computes the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def check_fits(
    manifest: Manifest,
    where: str,
    *,
    kind: Kind,
    seq_len: int,
    tokenizer: str,
    sha256: str,
    template: str | None,
    dialogues: DialogueConfig,
) -> None:
    """Raises UserError unless the rows are what a stage asks for.

    Args:
      manifest: manifest of the cache.
      where: names the cache in messages.
      kind, seq_len: kind and row length of the stage.
      tokenizer, sha256: path and hash of the stage's tokenizer.
      template: dialogue template of the stage; None where it does not say.
      dialogues: how the page of the stage reads dialogues.
    """
    if manifest.tokenizer_sha256 != sha256:
        raise UserError(
            f"{where}: was made with another tokenizer than {tokenizer} (SHA-256 {manifest.tokenizer_sha256[:12]}, not "
            f"{sha256[:12]}); its own is {tokenizer_in(Path(where)) or 'missing'}"
        )
    if template not in (None, manifest.template):
        made = "holds no dialogues" if manifest.template is None else f"has dialogues by template {manifest.template!r}"
        raise UserError(f"{where}: {made}, the stage asks for template={template!r}")
    made = manifest.dialogues or DEFAULT_DIALOGUES
    if dialogues not in (DEFAULT_DIALOGUES, made):
        raise UserError(f"{where}: was made with another data.dialogues, {made}; make it again, or leave dialogues out")
    for name, wanted, found in (("kind", kind, manifest.kind), ("seq_len", seq_len, manifest.seq_len)):
        if wanted != found:
            raise UserError(f"{where}: its rows have {name}={found}, the stage asks for {name}={wanted}")
