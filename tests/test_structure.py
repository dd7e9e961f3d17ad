"""The structure of the package: imports make no circle, and no file has outgrown its room."""

import ast
import re
from pathlib import Path

import grimp
import pytest

PACKAGE = Path(__file__).parent.parent / "tele_jax"


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """The modules that each module imports, also inside functions."""
    graph = grimp.build_graph("tele_jax", cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that can all be reached from each other: strongly connected components (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == order[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in order:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"d"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circle_of_files(imports):
    assert len(imports) > 50
    assert circles(imports) == []


def test_no_circle_of_packages(imports):
    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    edges: dict[str, set[str]] = {}
    for module, imported in imports.items():
        if module == "tele_jax":  # the public names: above all that it lists
            continue
        edges.setdefault(room(module), set()).update(room(other) for other in imported if room(other) != room(module))
    assert circles(edges) == []


def test_no_file_is_longer_than_a_reader_bears():
    longer = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert longer == {}


# Modules beside files.py that rename or lock for themselves, and why.
PROTOCOLS = {
    "checkpoint/saving.py": "renames what is to be deleted, also in a bucket, which has its own renaming",
    "checkpoint/unfinished.py": "the journals by which several processes and lives finish one checkpoint",
    "processes.py": "a lock held for life, by which workers know of Beam know that their command has ended",
}


def test_only_files_renames_and_locks():
    calls = re.compile(r"\bos\.(replace|rename)\(|\.rename\(|\bflock\(|\bshutil\.move\(")
    found = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if calls.search(p.read_text())}
    assert found - {"files.py"} == set(PROTOCOLS)


def test_a_docstring_begins_with_a_sentence_or_a_noun_phrase():
    """Other beginnings need what stands above to be understood."""
    vague = {
        "Of",
        "As",
        "What",
        "Whether",
        "It",
        "That",
        "Those",
        "These",
        "They",
        "Who",
        "Where",
        "How",
        "Which",
        "Why",
    }
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "Nothing").splitlines()[0]
                if first.split()[0] in vague or first.startswith("The same"):
                    found.append(f"{path.relative_to(PACKAGE)}: {first}")
    assert found == []
