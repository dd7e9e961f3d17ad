"""The text inside the Python installation and inside three packages of PyPI, as documents and dialogues.

Packages are data here: their files are read, their code is never imported.
"""

import ast
import csv
import dataclasses
import inspect
import json
import sqlite3
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

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
