"""Checking and indexing text files: nothing is lost or invented, and everything bad is named."""

import bz2
import gzip
import hashlib
import json
import lzma
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tele_jax.data import documents, sources, vocabulary_training
from tele_jax.errors import UserError
from tele_jax.files import expand

LINES = st.lists(st.text() | st.sampled_from(["\n", "\r\n", "中文字", "a b c\n" * 5]), min_size=1).map("".join)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@given(text=LINES.filter(lambda text: text.strip("\ufeff")), span_bytes=st.integers(8, 64))
@settings(max_examples=100)
def test_spans_of_a_text_file_join_to_the_file(tmp_path_factory, text, span_bytes):
    path = write(tmp_path_factory.mktemp("text") / "a.txt", text)
    corpus = sources.index("x", "x", [path], "text", span_bytes=span_bytes)
    spans = [corpus.document(i).content for i in range(len(corpus))]
    assert "".join(spans) == text.removeprefix("\ufeff")
    assert [len(span.encode()) for span in spans] == corpus.spans["num_bytes"].tolist()
    assert corpus.spans["num_bytes"].max() <= span_bytes
    assert corpus.spans["last"].tolist() == [False] * (len(spans) - 1) + [True]


@given(texts=st.lists(LINES, min_size=1, max_size=4).filter(any), span_bytes=st.integers(8, 64))
@settings(max_examples=100)
def test_spans_of_json_lines_join_to_the_documents(tmp_path_factory, texts, span_bytes):
    lines = "\n".join(json.dumps({"text": text, "more": 1}, ensure_ascii=len(text) % 2 == 0) for text in texts)
    path = write(tmp_path_factory.mktemp("jsonl") / "a.jsonl", "\n" + lines + "\n\n")
    corpus = sources.index("x", "x", [path], "jsonl", span_bytes=span_bytes)
    documents, current = [], ""
    for i in range(len(corpus)):
        current += corpus.document(i).content
        if corpus.spans["last"][i]:
            documents.append(current)
            current = ""
    assert documents == [text for text in texts if text]
    assert corpus.spans["num_bytes"].sum() == sum(len(text.encode()) for text in texts)


def test_a_long_document_is_cut_after_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(200))
    corpus = sources.index("x", "x", [write(tmp_path / "a.txt", text)], "text", span_bytes=100)
    assert all(corpus.document(i).content.endswith("\n") for i in range(len(corpus)))
    assert len(corpus) < 2 * len(text) / 100 + 1


def test_a_path_that_exists_is_that_file_whatever_its_name(tmp_path):
    for name in ("run[1]", "a*b", "what?"):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name / "a.txt", "one")
        assert expand([path], "x") == (path,)
    other = write(tmp_path / "run1", "two")
    assert expand([f"{tmp_path}/run[1]"], "x") == (other,), "a directory is no file, so this is a pattern"
    with pytest.raises(UserError, match=r"x: no file matches .*run\[2\]"):
        expand([f"{tmp_path}/run[2]"], "x")
    os.mkfifo(tmp_path / "pipe")
    for pattern in ("pipe", "pip*"):
        with pytest.raises(UserError, match="pipe is not a plain file"):
            expand([f"{tmp_path}/{pattern}"], "x")


def test_stages_that_read_the_same_files_share_an_index(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    index = sources.Indexes()
    first, second = (index(where, name, [path], "text") for where, name in (("x.files", "x"), ("y.files", "y")))
    assert (second.where, second.name) == ("y.files", "y") and second.spans is first.spans
    write(tmp_path / "b.txt", "two")
    os.replace(tmp_path / "b.txt", path)
    assert index("x", "x", [path], "text").checksum == checksum_of(b"two"), "another file is read again"


def test_patterns_find_every_file_once_in_order(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    paths = [write(tmp_path / name, name) for name in ("b.txt", "a.txt", "deep/er/c.txt")]
    found = expand([f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt", f"{tmp_path}/**"], "here")
    assert list(found) == sorted(paths)


def checksum_of(*contents):
    """What a corpus of files with these bytes is known by."""
    made = hashlib.blake2b(digest_size=16)
    for content in contents:
        made.update(content + len(content).to_bytes(8, "little"))
    return made.hexdigest()


def test_the_checksum_is_of_all_bytes_in_order(tmp_path):
    data = [json.dumps({"text": "x" * 100}) + "\n\n", json.dumps({"text": "y"})]
    files = [write(tmp_path / f"{i}.jsonl", each) for i, each in enumerate(data)]
    corpus = sources.index("x", "x", files, "jsonl", span_bytes=16)
    assert corpus.checksum == checksum_of(*(each.encode() for each in data))
    text = "long text\n" * 50
    corpus = sources.index("x", "x", [write(tmp_path / "a.txt", text)], "text", span_bytes=16)
    assert corpus.checksum == checksum_of(text.encode())


def test_dialogues_are_read_whole(tmp_path):
    messages = [{"role": "user", "content": "q" * 100}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "d.jsonl", json.dumps({"messages": messages}) + "\n")
    corpus = sources.index("x", "x", [path], "dialogues", span_bytes=8)
    assert len(corpus) == 1 and corpus.document(0).content == messages and corpus.spans["num_bytes"].tolist() == [101]


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("format", "data", "message"),
    [
        ("text", b"", r"bad\.x: the file is empty"),
        ("jsonl", b"", r"bad\.x: the file is empty"),
        ("text", b"\xef\xbb\xbf", r"bad\.x: the file is empty"),
        ("jsonl", b"\n \n", "NONE; its files hold nothing but blank lines"),
        ("text", b"fine " * 20 + b"\xe4\xb8", r"NONE; the first is .*bad\.x, byte 96: not UTF-8 at byte 100 \(0xe4\)"),
        ("text", b"\x80", r"NONE; the first is .*bad\.x, byte 0: not UTF-8 at byte 0 \(0x80\)"),
        ("text", b"\x80" * 100, r"NONE; the first is .*bad\.x, byte 0: not UTF-8 at byte 0 \(0x80\)"),
        ("jsonl", b'\n{"text": "\xff"}\n', r"NONE; the first is .*bad\.x, line 2: not UTF-8 at byte 11 \(0xff\)"),
        ("jsonl", b'\n{"text": \n', r"NONE; the first is .*bad\.x, line 2: not JSON: Expecting value"),
        ("jsonl", b"[" * 100_000, r"NONE; the first is .*bad\.x, line 1: not JSON: maximum recursion depth"),
        ("jsonl", b'["text"]\n', r'NONE; the first is .*bad\.x, line 1: not a table with the key "text"'),
        ("jsonl", b'{"texts": "a"}\n', r'NONE; the first is .*bad\.x, line 1: not a table with the key "text"'),
        ("jsonl", b'{"text": 7}\n', r'NONE; the first is .*bad\.x, line 1: "text" is not a string'),
        ("jsonl", b'{"text": ""}\n', r"NONE; the first is .*bad\.x, line 1: the text is empty"),
        ("jsonl", b'{"text": "ab\\ud800"}\n', r"NONE; the first is .*bad\.x, line 1: character 2 .* half a surrogate"),
        ("dialogues", b'{"text": "a"}\n', r'NONE; the first is .*bad\.x, line 1: not a table with the key "messages"'),
        (
            "dialogues",
            b'{"messages": []}\n',
            r"NONE; the first is .*bad\.x, line 1: the last message has to be an answe",
        ),
        (
            "dialogues",
            json.dumps({"messages": [USER]}).encode(),
            r"NONE; the first is .*bad\.x, line 1: the last message has to be an answer",
        ),
    ],
)
def test_a_domain_without_a_document_is_refused_with_the_place(tmp_path, format, data, message):
    write(tmp_path / "bad.x", data)
    message = message.replace("NONE", r"^sources\.code\.files: not one document can be used")
    with pytest.raises(UserError, match=message):
        sources.index("sources.code.files", "code", [f"{tmp_path}/*.x"], format, span_bytes=16)


def test_lines_that_cannot_be_used_are_kept_aside(tmp_path):
    a = write(tmp_path / "a.jsonl", b'\n{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "' + b"long " * 9 + b'"}\n')
    b = write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + b"x" * 300 + b'\n \n{"text": "\xe4\xb8\xad"}\n{"text": ""}')
    write(tmp_path / "c.jsonl", "\n\n")
    corpus = sources.index("sources.code.files", "code", [f"{tmp_path}/*"], "jsonl", span_bytes=16)
    not_json = "not JSON: Expecting value: line 1 column 1 (char 0)"
    assert corpus.rejected == (
        {"file": a, "line": 3, "byte": 17, "reason": "not UTF-8 at byte 30 (0xe9)", "sample": '{"text": "caf\\xe9"}\n'},
        {"file": b, "line": 1, "byte": 3, "reason": not_json, "sample": "x" * 200},
        {"file": b, "line": 4, "byte": 322, "reason": "the text is empty", "sample": '{"text": ""}'},
    )
    assert corpus.account() == (
        f"sources.code.files: 3 of 6 documents cannot be used; the first is {a}, line 3: not UTF-8 at byte 30 (0xe9)"
    )
    texts = [corpus.document(i).content for i in range(len(corpus))]
    assert len(texts) > 3 and "".join(texts) == "one" + "long " * 9 + "中" and corpus.spans["last"].sum() == 3
    raw = [(tmp_path / name).read_bytes().removeprefix(b"\xef\xbb\xbf") for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    assert corpus.checksum == checksum_of(*raw), "of what cannot be used as well"


def test_of_many_documents_that_cannot_be_used_the_first_are_kept_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "KEPT", 2)
    a = write(tmp_path / "a.jsonl", b'{"text": ""}\n' * 3 + b'{"text": "one"}\n' + b'{"text": ""}\n')
    corpus = sources.index("sources.a.files", "a", [a], "jsonl")
    assert [reject["line"] for reject in corpus.rejected] == [1, 2]
    assert corpus.account().startswith("sources.a.files: 4 of 5 documents cannot be used; the first is")
    with pytest.raises(UserError, match=r"4 of 5 documents cannot be used; .*; leave them out"):
        list(vocabulary_training.sample_texts([a], max_bytes=None, seed=0))


def test_of_a_text_file_that_is_not_utf8_nothing_is_used(tmp_path):
    raw = [b"one\n" * 5, b"two\n" * 10 + b"\xff" + b"two\n" * 10, b"three\n" * 5]
    files = [write(tmp_path / f"{i}.txt", data) for i, data in enumerate(raw)]
    corpus = sources.index("sources.code.files", "code", files, "text", span_bytes=16)
    sample = "two\n" * 2 + "\\xff" + "two\n"  # of the span that was read
    reject = {"file": files[1], "byte": 32, "reason": "not UTF-8 at byte 40 (0xff)", "sample": sample}
    assert corpus.rejected == (reject,)
    assert "".join(corpus.document(i).content for i in range(len(corpus))) == "one\n" * 5 + "three\n" * 5
    assert corpus.account().startswith("sources.code.files: 1 of 3 documents cannot be used; the first is")
    assert corpus.checksum == checksum_of(*raw)


def test_a_reject_of_a_file_whose_name_is_not_utf8_can_be_written(tmp_path):
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / os.fsdecode(b"caf\xe9.txt"), b"\xff")
    corpus = sources.index("x", "x", [f"{tmp_path}/*.txt"], "text")
    documents.write_rejected(tmp_path / "deep" / "x.jsonl", corpus.rejected)
    (line,) = (tmp_path / "deep" / "x.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["file"] == f"{tmp_path}/caf\\xe9.txt"
    documents.write_rejected(tmp_path / "deep" / "x.jsonl", ())
    assert not list((tmp_path / "deep").iterdir()), "nothing is left of an earlier start"


def test_a_byte_order_mark_is_no_text(tmp_path):
    record = json.dumps({"text": "two\nlines"})
    for format, data, expected in (
        ("text", "one\ntwo\n", ["one\ntwo\n"]),
        ("jsonl", f"{record}\n" * 2, ["two\nlines"] * 2),
    ):
        path = write(tmp_path / f"a.{format}", b"\xef\xbb\xbf" + data.encode())
        corpus = sources.index("x", "x", [path], format)
        assert [corpus.document(i).content for i in range(len(corpus))] == expected
        assert corpus.spans["num_bytes"].sum() == sum(len(text.encode()) for text in expected)


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_compressed_file_is_named_as_what_it_is(tmp_path, pack, name):
    path = write(tmp_path / "a.jsonl", pack(b'{"text": "a"}'))
    with pytest.raises(UserError, match=rf"a\.jsonl: is compressed \({name}\), .*; unpack it"):
        sources.index("x", "x", [path], "jsonl")


def test_a_file_that_is_found_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "text")
    (tmp_path / "link.txt").symlink_to("a.txt")
    assert len(expand(["a.txt", "./a.txt", f"{tmp_path}/*.txt"], "x")) == 1


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(UserError, match=r"sources\.code\.files: no file matches .*absent\*"):
        sources.index("sources.code.files", "code", [f"{tmp_path}/absent*"], "text")
    with pytest.raises(UserError, match=r"is a directory; give a pattern, e\.g\. .*/\*\.txt"):
        sources.index("sources.code.files", "code", [str(tmp_path)], "text")


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_a_file_that_changed_after_the_check_is_named(tmp_path, format):
    path = write(tmp_path / "a.x", '{"text": "中文中文中文"}')
    corpus = sources.index("x", "x", [path], format)
    write(tmp_path / "a.x", b"\xff" * 100)
    with pytest.raises(UserError, match=r"a\.x: has changed"):
        corpus.document(0)
