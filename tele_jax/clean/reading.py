"""Readers of files: each yields documents, and a Reject for every record that cannot be read.

The formats are text, jsonl, parquet, html and warc, plain or compressed. Paths are local, or of a file system that Beam
opens (gs://...).
"""

import bz2
import dataclasses
import functools
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from tele_jax.clean.document import OFFSET_BITS, Document, Reject
from tele_jax.clean.settings import SourceConfig
from tele_jax.extras import need

RANGE_BYTES = 64 << 20  # a plain jsonl file is read in ranges of this many bytes, each range by any worker
MAX_RECORD_BYTES = 256 << 20  # of one document; a longer one has another format than the page says
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Bytes [begin, end) of a file, with the records that begin in them. end None: the rest of the file."""

    number: int  # of the file
    path: str
    source: str
    begin: int = 0
    end: int | None = None


# Openers of compressed files, by the end of the name. They return the bytes before a damaged place, and then raise the
# error; a buffer around the reader would lose these bytes.
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gz": lambda raw: gzip.GzipFile(fileobj=raw),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    # pyarrow reads files of several frames and raises an error where the last frame is cut off; other packages do not.
    "zst": lambda raw: io.BufferedReader(need("pyarrow").CompressedInputStream(raw, "zstd")),
}


def compression(path: str) -> str:
    """Returns "gz", "bz2", "xz" or "zst" by the end of the path, or "" for a plain file."""
    suffix = path.rsplit(".", 1)[-1].lower()
    return suffix if suffix in _OPENERS else ""


def open_raw(path: str) -> BinaryIO:
    """Opens a file for reading bytes; it can seek."""
    if "://" not in path:
        return open(path, "rb")
    return need("apache_beam.io.filesystems").FileSystems.open(path, compression_type="uncompressed")


def open_stream(path: str) -> BinaryIO:
    """Opens a file for reading its bytes, decompressed as its name says."""
    raw, kind = open_raw(path), compression(path)
    return _OPENERS[kind](raw) if kind else raw


def ranges(number: int, path: str, size: int, source: str, config: SourceConfig) -> Iterator[Range]:
    """Yields the ranges in which a file of `size` bytes is read: several only for plain jsonl, the others in one."""
    step = RANGE_BYTES if config.format == "jsonl" and not compression(path) else max(size, 1)
    for begin in range(0, max(size, 1), step):
        last = begin + step >= size
        yield Range(number, path, source, begin, None if last else begin + step)


def read(part: Range, config: SourceConfig) -> Iterator[Document | Reject]:
    """Yields the documents of a range in order, and a Reject for each record or rest of a file that is unreadable."""
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
    """Returns the text in the first of the encodings in which every byte is valid."""
    errors: list[UnicodeDecodeError] = []
    for encoding in encodings:
        try:
            text = data.decode(encoding)
            return text.removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            errors.append(error)
    names = " or ".join(name.upper() for name in encodings)
    return _Bad(f"not {names}", f"byte {errors[0].start}: {errors[0].reason}", data)


_CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{2,40})""")
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252"}


def _page(data: bytes, encodings: tuple[str, ...], declared: str | None = None) -> str | _Bad:
    """Decodes an HTML page in `encodings`, or else in the encoding that HTTP or the head of the page declares.

    Decoding is strict, and no encoding is guessed. Names mean what they do in the Encoding Standard of the WHATWG:
    gb2312 is gb18030, latin1 is windows-1252.
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
            # A line that begins before this range belongs to the range before.
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


def _fields(record: object, config: SourceConfig, data: bytes) -> _Record | _Bad:
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
    # open_stream decompresses, because it raises an error where a file is cut off; the iterator itself just ends there.
    with open_stream(part.path) as file:
        # _response decodes the bodies: if the iterator does that, it ends without an error at the first record whose
        # header names an encoding that its body does not have.
        for place, record in enumerate(warc.ArchiveIterator(_AsItComes(file), record_types=types, parse_http=True)):
            yield place, f"#{place}", _response(record, config)


class _AsItComes(io.RawIOBase):
    """A file whose reads may return fewer bytes than asked for, so that all bytes before a damaged place are read."""

    def __init__(self, file: BinaryIO):
        super().__init__()
        self._file, self._place = file, 0
        self._some = getattr(file, "read1", file.read)

    def readable(self) -> bool:
        """True: the file can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer or the beginning of it, and returns the number of bytes."""
        data = self._some(len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def tell(self) -> int:
        """Returns the number of bytes read so far."""
        return self._place


def _response(record: Any, config: SourceConfig) -> _Record | _Bad:
    """Returns the page of a WARC record if its request succeeded and its content is text."""
    url, http = record.headers.get("WARC-Target-URI"), record.http_headers
    data = record.reader.read()
    if len(data) < record.content_length:
        return _Bad("damaged body", f"{url}: {len(data)} bytes of {record.content_length}: the file is cut off", data)
    status = None if http is None else http.status_code
    if status is not None and status not in config.statuses:
        return _Bad(f"HTTP status {status}", f"{url}", b"")
    kind = (record.http_content_type or "text/html").lower()
    if not kind.startswith(("text/html", "application/xhtml", "text/plain")):
        return _Bad("not a page", f"{url}: {kind}", b"")
    try:
        for name in _encodings(http):
            data = _decoded(data, name)
            if len(data) > MAX_RECORD_BYTES:
                return _Bad("too long", f"{url}: more than {MAX_RECORD_BYTES:,} bytes in one document", b"")
    except KeyError as error:
        return _Bad("unknown encoding", f"{url}: {error.args[0]}", data)
    except READ_ERRORS as error:
        return _Bad("damaged body", f"{url}: {error}", data)
    text = _page(data, config.encodings, record.http_charset)
    return _Record(text, url) if isinstance(text, str) else text


def _encodings(http: Any) -> list[str]:
    """Lists the encodings of a body as they are undone: Transfer-Encoding, then Content-Encoding, each from its end."""
    if http is None:
        return []
    fields = {name.lower(): value.lower() for name, value in http.items()}
    names = [
        name.strip()
        for field in ("transfer-encoding", "content-encoding")
        for name in reversed(fields.get(field, "").split(","))
    ]
    return [name for name in names if name not in ("", "identity")]


def _decoded(data: bytes, name: str) -> bytes:
    """Removes one encoding from a body. A body that is HTML already was decoded by the writer of the archive."""
    try:
        return _DECODERS[name](data)
    except (KeyError, *READ_ERRORS):  # servers also name things that are no encoding of a body, such as "utf-8"
        if data.lstrip()[:1] == b"<":
            return data
        raise


_CHUNK = re.compile(rb"[ \t]*([0-9A-Fa-f]+)[ \t]*(?:;[^\r\n]*)?\r?\n")


def _unchunk(data: bytes) -> bytes:
    """Joins the chunks of a chunked message (RFC 9112, section 7.1)."""
    parts, place = [], 0
    while True:
        size = _CHUNK.match(data, place)
        if size is None:
            raise OSError(f"chunked, but there is no chunk size at byte {place}")
        begin, length = size.end(), int(size[1], 16)
        if length == 0:
            return b"".join(parts)
        if begin + length > len(data):
            raise EOFError(f"chunked, but cut off after {len(data)} bytes")
        parts.append(data[begin : begin + length])
        place = begin + length
        place += 2 if data[place : place + 2] == b"\r\n" else 1


def _inflate(data: bytes, bits: int) -> bytes:
    inflater = zlib.decompressobj(bits)
    whole = inflater.decompress(data, MAX_RECORD_BYTES + 1)
    if not inflater.eof and len(whole) <= MAX_RECORD_BYTES:
        raise EOFError(f"compressed, but cut off after {len(data)} bytes")
    return whole


def _undeflate(data: bytes) -> bytes:
    """Inflates the encoding "deflate": a zlib stream by RFC 9110; some servers send one without its zlib header."""
    zlib_head = len(data) > 1 and data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
    return _inflate(data, zlib.MAX_WBITS if zlib_head else -zlib.MAX_WBITS)


def _unpacked(codec: str) -> Callable[[bytes], bytes]:
    def unpack(data: bytes) -> bytes:
        stream = need("pyarrow").CompressedInputStream(need("pyarrow").BufferReader(data), codec)
        return stream.read(MAX_RECORD_BYTES + 1)

    return unpack


_DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "chunked": _unchunk,
    "gzip": functools.partial(_inflate, bits=16 + zlib.MAX_WBITS),
    "x-gzip": functools.partial(_inflate, bits=16 + zlib.MAX_WBITS),
    "deflate": _undeflate,
    "br": _unpacked("brotli"),
    "zstd": _unpacked("zstd"),
}


_READERS: dict[str, Callable[[Range, SourceConfig], _Read]] = {
    "text": _text,
    "html": _text,
    "jsonl": _lines,
    "parquet": _parquet,
    "warc": _warc,
}
