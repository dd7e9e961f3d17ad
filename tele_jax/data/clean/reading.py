"""Files as documents: text, jsonl, parquet, html and warc, plain or compressed; what cannot be read as rejects.

Paths may be local or anything that Beam's file systems open (gs://...).
"""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from tele_jax.data.clean.document import OFFSET_BITS, Document, Reject
from tele_jax.data.clean.settings import SourceConfig
from tele_jax.data.extras import need

RANGE_BYTES = 64 << 20  # a plain jsonl file is read in ranges of so many bytes, each by any worker
MAX_RECORD_BYTES = 256 << 20  # of one document: longer is a wrong format, not a text
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Bytes [begin, end) of a file; records that begin in it belong to it. end None: to the end."""

    number: int  # of the file
    path: str
    source: str
    begin: int = 0
    end: int | None = None


def compression(path: str) -> str:
    """gz, bz2, xz, zst or an empty string, by the name."""
    suffix = path.rsplit(".", 1)[-1].lower()
    return suffix if suffix in ("gz", "bz2", "xz", "zst") else ""


def open_raw(path: str) -> BinaryIO:
    """A binary, seekable file."""
    if "://" not in path:
        return open(path, "rb")
    filesystems = need("apache_beam.io.filesystems")
    return filesystems.FileSystems.open(path, compression_type="uncompressed")


def open_stream(path: str) -> BinaryIO:
    """The file's bytes, decompressed as its name says."""
    raw = open_raw(path)
    kind = compression(path)
    if kind == "gz":
        return gzip.GzipFile(fileobj=raw)
    if kind == "bz2":
        return bz2.BZ2File(raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    if kind == "zst":
        # Of the packages that read it, the one that takes many frames and says so where the last one is cut off.
        return io.BufferedReader(need("pyarrow").CompressedInputStream(raw, "zstd"))
    return raw


def ranges(number: int, path: str, size: int, source: str, config: SourceConfig) -> Iterator[Range]:
    """The parts that a file of `size` bytes is read in; several only where records can be found from any byte."""
    step = RANGE_BYTES if config.format == "jsonl" and not compression(path) else max(size, 1)
    for begin in range(0, max(size, 1), step):
        last = begin + step >= size
        yield Range(number, path, source, begin, None if last else begin + step)


def read(part: Range, config: SourceConfig) -> Iterator[Document | Reject]:
    """The documents of a part of a file, in order, and a Reject for each record or rest of a file that is none."""
    reader = _READERS[config.format]

    def uid(place: int) -> int:
        return part.number << OFFSET_BITS | place

    last = 0
    try:
        for place, origin, record in reader(part, config):
            last = place
            where = f"{part.path}{origin}"
            if isinstance(record, _Bad):
                yield Reject(uid(place), part.source, where, record.reason, record.detail, record.data)
                continue
            if not record.text.strip():
                yield Reject(uid(place), part.source, where, "no text", "empty or white space")
                continue
            html = config.html or config.format in ("html", "warc")
            yield Document(
                uid(place), record.text, part.source, config.domain, where, record.url, config.language, html
            )
    except READ_ERRORS as error:
        detail = f"{type(error).__name__}: {error}"
        yield Reject(uid(last + 1), part.source, part.path, "unreadable", detail)


@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    text: str
    url: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Bad:
    reason: str
    detail: str
    data: bytes


_Read = Iterator[tuple[int, str, _Record | _Bad]]


def decode(data: bytes, encodings: tuple[str, ...]) -> str | _Bad:
    """The text in the first encoding that fits to the last byte."""
    first = None
    for encoding in encodings:
        try:
            text = data.decode(encoding)
            return text.removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            first = first or error
    names = " or ".join(name.upper() for name in encodings)
    return _Bad(f"not {names}", f"byte {first.start}: {first.reason}", data)


_CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{2,40})""")
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252"}


def _page(data: bytes, encodings: tuple[str, ...], declared: str | None = None) -> str | _Bad:
    """An HTML page in `encodings`, or else in the one that HTTP or its head declares; strictly, and never guessed.

    Names mean what the WHATWG's Encoding Standard says they do on the web: gb2312 is gb18030, latin1 is windows-1252.
    """
    text = decode(data, encodings)
    if isinstance(text, str):
        return text
    found = _CHARSET.search(data[:4096])
    for name in filter(None, (declared, found and found.group(1).decode())):
        name = _SUPERSETS.get(name.lower(), name.lower())
        try:
            other = decode(data, (name,))
        except LookupError:
            continue
        if isinstance(other, str):
            return other
    return text


def _text(part: Range, config: SourceConfig) -> _Read:
    with open_stream(part.path) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        yield 0, "", _Bad("too long", f"more than {MAX_RECORD_BYTES:,} bytes in one document", b"")
        return
    text = _page(data, config.encodings) if config.format == "html" else decode(data, config.encodings)
    yield 0, "", _Record(text) if isinstance(text, str) else text


def _lines(part: Range, config: SourceConfig) -> _Read:
    with open_stream(part.path) as file:
        place = part.begin
        if part.begin:
            file.seek(part.begin - 1)
            # The line that is under way belongs to the range before, unless it has just ended.
            place += len(file.readline()) - 1
        while part.end is None or place < part.end:
            line = file.readline(MAX_RECORD_BYTES)
            if not line:
                return
            if line.strip():
                yield place, f"@{place}", _line(line, config)
            place += len(line)


def _line(line: bytes, config: SourceConfig) -> _Record | _Bad:
    text = decode(line, config.encodings)
    if isinstance(text, _Bad):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Bad("not JSON", str(error), line)
    return _fields(record, config, line)


def _fields(record: Any, config: SourceConfig, data: bytes) -> _Record | _Bad:
    if not isinstance(record, dict) or not isinstance(record.get(config.text_field), str):
        return _Bad("no text", f"no field {config.text_field!r} with a string", data)
    text = record[config.text_field]
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        return _Bad("not UTF-8", "a lone surrogate in the JSON string", data)
    url = record.get(config.url_field)
    return _Record(text, url if isinstance(url, str) and url else None)


def _parquet(part: Range, config: SourceConfig) -> _Read:
    parquet = need("pyarrow.parquet")
    arrow = need("pyarrow")
    try:
        file = parquet.ParquetFile(io.BytesIO(open_raw(part.path).read()) if "://" in part.path else part.path)
        names = [name for name in (config.text_field, config.url_field) if name in file.schema_arrow.names]
        if config.text_field not in names:
            yield 0, "", _Bad("no text", f"no column {config.text_field!r}", b"")
            return
        place = 0
        for batch in file.iter_batches(batch_size=1024, columns=names):
            for record in batch.to_pylist():
                yield place, f"#{place}", _fields(record, config, b"")
                place += 1
    except (arrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise OSError(str(error)) from error


def _warc(part: Range, config: SourceConfig) -> _Read:
    warc = need("fastwarc.warc")
    types = warc.WarcRecordType.response | warc.WarcRecordType.conversion
    with open_raw(part.path) as file:
        for place, record in enumerate(warc.ArchiveIterator(file, record_types=types, parse_http=True)):
            data = record.reader.read()
            kind = (record.http_content_type or "text/html").lower()
            if not kind.startswith(("text/html", "application/xhtml", "text/plain")):
                continue
            text = _page(data, config.encodings, record.http_charset)
            url = record.headers.get("WARC-Target-URI")
            yield place, f"#{place}", _Record(text, url) if isinstance(text, str) else text


_READERS: dict[str, Callable[[Range, SourceConfig], _Read]] = {
    "text": _text,
    "html": _text,
    "jsonl": _lines,
    "parquet": _parquet,
    "warc": _warc,
}
