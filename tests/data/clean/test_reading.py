"""Files of every format and compression, and what cannot be read."""

import bz2
import gzip
import json
import lzma
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tele_jax.data.clean import reading
from tele_jax.data.clean.document import Document, Reject, batches
from tele_jax.data.clean.settings import SourceConfig

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


def warc(path):
    """By hand, from ISO 28500."""
    pages = [
        (b"text/html", b"<p>Plain page</p>"),
        (b"image/png", b"\x89PNG"),
        (b"text/html", "<meta charset=gbk><p>中文网页</p>".encode("gbk")),
        (b"text/html", b"<p>\xff\xfe broken \xc3\x28"),
    ]
    with open(path, "wb") as file:
        for i, (kind, body) in enumerate(pages):
            head = b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
            block = head + body
            fields = f"WARC-Type: response\r\nWARC-Target-URI: https://a.org/{i}\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
            fields += f"WARC-Record-ID: <urn:uuid:{i}>\r\nContent-Type: application/http; msgtype=response\r\n"
            file.write(f"WARC/1.0\r\n{fields}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n")


def test_warc_is_read_in_the_encoding_of_each_page(tmp_path):
    pytest.importorskip("fastwarc", reason="fastwarc is not installed: extra [clean]")
    path = tmp_path / "a.warc"
    warc(path)
    items = read(path, "warc")
    assert texts(items) == ["<p>Plain page</p>", "<meta charset=gbk><p>中文网页</p>", "! not UTF-8"]
    assert [i.url for i in items[:2]] == ["https://a.org/0", "https://a.org/2"] and items[0].html
    packed = tmp_path / "a.warc.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert texts(read(packed, "warc")) == texts(items)


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
