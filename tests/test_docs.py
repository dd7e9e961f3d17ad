"""What the documents name is there: links, paths of the repository, names of its files; and every page says its use."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")), *PAGES]

LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path from the root of the repository, also in a command; and in backticks a file that is named in another way.
FOLDERS = ("tele_jax", "tests", "docs", "configs", "benchmarks", "launch", "notebooks")
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
STANDS_FOR_ANY = re.compile(r"(^|_)[A-Z]+$")  # KIND.py, test_VERB.py: any file of the folder
NAMED = re.compile(r"`([\w/-]+\.(?:py|sh|ipynb))\b[^`\n]*`")


def links(document: Path) -> list[str]:
    """Relative links to nothing. Pages of docs/ become a site, so that theirs have to lead to files in docs/."""
    found = []
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if re.match(r"\w+:|#", target):
            continue
        path = (document.parent / target.partition("#")[0]).resolve()
        outside = document in PAGES and not path.is_relative_to(DOCS)
        if outside or not path.exists():
            found.append(target + (" (outside docs/: name it in backticks)" if outside else ""))
    return found


def paths(document: Path, files: set[str]) -> list[str]:
    """Paths and names of files that are not there."""
    text = document.read_text(encoding="utf-8")
    named = [path for path in PATH.findall(text) if not _is_there(ROOT / path)]
    for name in NAMED.findall(text):
        known = name in files or STANDS_FOR_ANY.search(Path(name).stem)
        if not PATH.match(name) and ("/" in name or not known):
            named.append(name + (" (write the path from the root)" if "/" in name else ""))
    return named


def _is_there(path: Path) -> bool:
    return path.exists() or (path.parent.is_dir() and bool(STANDS_FOR_ANY.search(path.stem)) and path.stem != "README")


def test_what_the_documents_name_is_there():
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    stale = {
        f"{document.relative_to(ROOT)}: {name}"
        for document in DOCUMENTS
        for name in (*links(document), *paths(document, files))
    }
    assert not stale, "\n" + "\n".join(sorted(stale))


def test_the_files_that_code_names_are_there():
    code = [
        path for folder in ("tele_jax", "configs", "benchmarks", "launch") for path in (ROOT / folder).rglob("*.py")
    ]
    stale = {
        f"{file.relative_to(ROOT)}: {path}"
        for file in code
        for path in PATH.findall(file.read_text(encoding="utf-8"))
        if Path(path).suffix and not _is_there(ROOT / path)
    }
    assert not stale, "\n" + "\n".join(sorted(stale))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_begins_with_what_its_reader_can_do_and_stands_in_index_and_navigation(page):
    title, first = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert title.startswith("# ")
    assert re.match(r"After this page you (can|know) ", first)
    name = str(page.relative_to(DOCS))
    assert f": {name}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert name == "index.md" or f"]({name})" in (DOCS / "index.md").read_text(encoding="utf-8")


def test_the_page_of_keys_is_what_the_settings_say():
    command = [sys.executable, str(DOCS / "make_configuration.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr or f"run {DOCS.name}/make_configuration.py, which writes it anew"


def test_every_key_of_a_page_has_a_meaning():
    rows = [line for line in (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    assert len(rows) > 100
    assert [row for row in rows if not re.split(r"(?<!\\)\|", row)[4].strip()] == []
