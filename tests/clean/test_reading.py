"""Files of every format and compression, and what cannot be read."""

import bz2
import functools
import gzip
import json
import lzma
import os
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tele_jax.clean import reading
from tele_jax.clean.document import Document, Reject, batches
from tele_jax.clean.settings import SourceConfig

TEXT = "Grüße aus 北京 und anderswo.\nSecond line."


def read(path, format, **fields):
    config = SourceConfig(files=(str(path),), format=format, domain="d", **fields)
    size = os.path.getsize(path) if os.path.exists(path) else 0
    parts = list(reading.ranges(3, str(path), size, "s", config))
    items = [item for part in parts for item in reading.read(part, config)]
    assert all(item.uid >> 40 == 3 for item in items)
    return items


def texts(items):
    return [item.text if isinstance(item, Document) else f"! {item.reason}" for item in items]


def zstd(data):
    """By another library than what reads it; Beam brings it."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: extra [clean]")
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: extra [clean]")

    half = len(data) // 2  # two frames, as parallel compressors write
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_text_and_jsonl_are_read_compressed_or_not(tmp_path, suffix, pack):
    plain = tmp_path / f"a.txt{suffix}"
    plain.write_bytes(pack(TEXT.encode()))
    assert texts(read(plain, "text")) == [TEXT]
    lines = tmp_path / f"a.jsonl{suffix}"
    records = [{"text": TEXT, "url": "https://a.org"}, {"text": "two"}]
    lines.write_bytes(pack("".join(json.dumps(r) + "\n\n" for r in records).encode()))
    first, second = read(lines, "jsonl")
    assert (first.text, first.url, second.text, second.url) == (TEXT, "https://a.org", "two", None)
    assert first.uid < second.uid and first.origin.startswith(str(lines))


def test_parquet_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: extra [clean]")
    import pyarrow

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": [TEXT, None, "three"], "link": ["u", "v", None], "other": [1, 2, 3]})
    parquet.write_table(table, path)
    items = read(path, "parquet", text_field="body", url_field="link")
    assert texts(items) == [TEXT, "! no text", "three"]
    assert (items[0].url, items[2].url) == ("u", None)
    assert texts(read(path, "parquet")) == ["! no text"]
    path.write_bytes(path.read_bytes()[:200])
    assert texts(read(path, "parquet", text_field="body")) == ["! unreadable"]


def response(url, body, status="200 OK", kind="text/html", **fields):
    """A record of a response, by hand from ISO 28500 and RFC 9112."""
    names = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    block = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{names}\r\n".encode() + body
    head = f"WARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
    head += "WARC-Record-ID: <urn:uuid:0>\r\nContent-Type: application/http; msgtype=response\r\n"
    return f"WARC/1.0\r\n{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"


def chunked(body, size=7):
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%X;x=y\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.fixture
def warc(tmp_path):
    pytest.importorskip("fastwarc", reason="fastwarc is not installed: extra [clean]")

    def found(*records, pack=bytes, cut=None):
        path = tmp_path / ("a.warc.gz" if pack is gzip.compress else "a.warc")
        path.write_bytes(pack(b"".join(records))[:cut])
        return read(path, "warc")

    return found


def test_warc_is_read_in_the_encoding_of_each_page(warc):
    records = [
        response("https://a.org/0", b"<p>Plain page</p>"),
        response("https://a.org/1", b"\x89PNG", kind="image/png"),
        response("https://a.org/2", "<meta charset=gbk><p>中文网页</p>".encode("gbk")),
        response("https://a.org/3", b"<p>\xff\xfe broken \xc3\x28"),
    ]
    items = warc(*records)
    assert texts(items) == ["<p>Plain page</p>", "! not a page", "<meta charset=gbk><p>中文网页</p>", "! not UTF-8"]
    assert [items[i].url for i in (0, 2)] == ["https://a.org/0", "https://a.org/2"] and items[0].html
    assert items[1].detail == "https://a.org/1: image/png"
    assert texts(warc(*records, pack=gzip.compress)) == texts(items)


PAGE = "<p>Grüße aus 北京, eine Seite.</p>".encode()
# Without the time of day: the names of the tests below come from their arguments.
gzipped = functools.partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (chunked(PAGE), dict(Transfer_Encoding="chunked")),
        (gzipped(PAGE), dict(Content_Encoding="gzip")),
        (zlib.compress(PAGE), dict(Content_Encoding="deflate")),
        (zlib.compress(PAGE)[2:-4], dict(content_encoding="DEFLATE")),
        (chunked(gzipped(PAGE)), dict(Transfer_Encoding="chunked", Content_Encoding="gzip")),
        (chunked(gzipped(PAGE)), dict(Transfer_Encoding="gzip, chunked")),
        (gzipped(zlib.compress(PAGE)), dict(Content_Encoding="deflate, gzip")),
        (PAGE, dict(Content_Encoding="gzip")),  # whoever wrote the archive has decoded it
        (PAGE, dict(Transfer_Encoding="chunked")),
        (PAGE, dict(Content_Encoding="br")),
        (PAGE, dict(Content_Encoding="identity")),
        (PAGE, dict(Content_Encoding="utf-8")),  # which is none
    ],
    ids=range(12),
)
def test_bodies_of_a_warc_are_decoded(warc, body, fields):
    items = warc(response("https://a.org", body, **fields), response("https://b.org", PAGE))
    assert texts(items) == [PAGE.decode()] * 2


def test_bodies_compressed_by_other_libraries_are_decoded(warc):
    brotli = pytest.importorskip("brotli", reason="brotli is not installed: extra [clean]")
    bodies = [(brotli.compress(PAGE), "br"), (zstd(PAGE), "zstd")]
    items = warc(*(response("https://a.org", body, Content_Encoding=name) for body, name in bodies))
    assert texts(items) == [PAGE.decode()] * 2


def test_responses_that_are_no_success_are_counted_by_their_status(warc):
    statuses = ["200 OK", "301 Moved Permanently", "404 Not Found", "500 Internal Server Error", "204 No Content"]
    items = warc(*(response(f"https://a.org/{status[:3]}", PAGE, status) for status in statuses))
    assert texts(items) == [PAGE.decode(), *(f"! HTTP status {status[:3]}" for status in statuses[1:])]


@pytest.mark.parametrize(
    ("body", "fields", "reason"),
    [
        (gzipped(PAGE)[:-12], dict(Content_Encoding="gzip"), "damaged body"),
        (chunked(PAGE)[:20], dict(Transfer_Encoding="chunked"), "damaged body"),
        (b"words", dict(Content_Encoding="gzip"), "damaged body"),
        (gzipped(PAGE), dict(Content_Encoding="zzz"), "unknown encoding"),
    ],
    ids=range(4),
)
def test_a_damaged_body_is_set_aside_and_the_next_is_read(warc, body, fields, reason):
    items = warc(response("https://a.org", body, **fields), response("https://b.org", PAGE))
    assert texts(items) == [f"! {reason}", PAGE.decode()] and "https://a.org" in items[0].detail


def test_a_warc_that_is_cut_off_says_so(warc):
    records = [response(f"https://a.org/{i}", PAGE + random.Random(i).randbytes(300).hex().encode()) for i in range(20)]
    whole = b"".join(records)
    for count in (1, 10, 20):  # records, the last of them without its last bytes
        items = warc(whole, cut=sum(map(len, records[:count])) - 50)
        assert [text == "! damaged body" for text in texts(items)] == [False] * (count - 1) + [True]
    items = warc(whole, pack=gzip.compress, cut=-2000)
    assert texts(items)[-1] == "! unreadable" and len(items) > 2


def test_bad_records_are_set_aside_with_their_bytes(jsonl):
    bad = [
        '{"text": "中文"}'.encode("gbk"),
        b'{"text": "cut',
        b"[1]",
        b'{"text": 3}',
        b'{"text": "  "}',
        b'{"text": "\\ud800"}',
    ]
    items = read(jsonl("a.jsonl", [{"text": "first"}, *bad, {"text": "last"}]), "jsonl")
    reasons = ["not UTF-8", "not JSON", "no text", "no text", "no text", "not UTF-8"]
    assert texts(items) == ["first", *(f"! {r}" for r in reasons), "last"]
    assert items[1].data == bad[0] + b"\n" and items[2].data == bad[1] + b"\n"
    assert len({item.uid for item in items}) == len(items)


def test_another_encoding_is_read_where_the_page_allows_it(jsonl):
    path = jsonl("a.jsonl", ['{"text": "中文网页"}'.encode("gb18030")])
    assert texts(read(path, "jsonl", encodings=("utf-8", "gb18030"))) == ["中文网页"]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", lambda data: bz2.compress(data, 1)), (".xz", lzma.compress), (".zst", zstd)],
)
def test_a_damaged_or_missing_file_gives_what_was_readable_and_one_reject(tmp_path, suffix, pack):
    noise = random.Random(0)
    lines = "".join(
        json.dumps({"text": f"text {i} {noise.randbytes(40 * (i % 7)).hex()}"}) + "\n" for i in range(6_000)
    ).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    data = pack(lines)
    path.write_bytes(data[: 2 * len(data) // 3])
    items = read(path, "jsonl")
    assert isinstance(items[-1], Reject) and items[-1].reason == "unreadable"
    good = items[:-1]
    assert len(good) > 10 and texts(good) == [json.loads(line)["text"] for line in lines.splitlines()[: len(good)]]
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: extra [clean]")
    (tmp_path / "b.txt.zst").write_bytes(b"no zstd")
    (tmp_path / "c.jsonl.xz").write_bytes(b"no xz")
    for name, format in (("b.txt.zst", "text"), ("c.jsonl.xz", "jsonl"), ("missing.txt", "text")):
        assert texts(read(tmp_path / name, format)) == ["! unreadable"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(alphabet="a中\n", min_size=0, max_size=12), max_size=12), st.integers(1, 40))
def test_ranges_of_any_size_give_every_line_once(tmp_path_factory, lines, step):
    path = tmp_path_factory.mktemp("r") / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"#{line}"}, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "RANGE_BYTES", step)
        assert texts(read(path, "jsonl")) == [f"#{line}" for line in lines]


def test_batches_hold_at_most_what_they_may():
    docs = [Document(i, "x" * (10 * (i % 5)), "s", "d", "o") for i in range(50)]
    groups = list(batches([*docs[:20], Reject(99, "s", "o", "r", ""), *docs[20:]], max_documents=8, max_chars=100))
    found = [g for g in groups if not isinstance(g, Reject)]
    assert [d for g in found for d in g.documents] == docs
    assert all(len(g.documents) <= 8 and g.key == g.documents[0].uid for g in found) and len(groups) == len(found) + 1
