"""Config pages: Python files with get_config() -> ConfigDict, and changes to them from the command line."""

import ast
import contextlib
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tele_jax.config import given, nearest
from tele_jax.errors import UserError
from tele_jax.files import require_regular
from tele_jax.stages import RunConfig

# Tables of a run that a page may leave at their defaults; all others are its stages.
_RUN_TABLES = tuple(field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type))


def load_page(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The ConfigDict of a page, with overrides such as "--config.pretrain.steps=100" applied.

    "page.py:7b" calls get_config("7b"), as ml_collections' flags do. A page can import the files beside it. An override
    makes the tables that lead to its key, where the page leaves them at their defaults; whoever reads the ConfigDict
    refuses keys that do not exist.

    Raises:
      UserError: no such file, a page that fails or has no get_config, an override that is not understood or leads
        through a value.
    """
    file, arguments = Path(path), []
    if not file.exists() and ":" in path:
        name, _, argument = path.rpartition(":")
        file, arguments = Path(name), [argument]
    require_regular(file, "--config ", missing="no such file")
    try:
        with _neighbours(file.resolve().parent):
            loader = importlib.machinery.SourceFileLoader("config_page", str(file))
            spec = importlib.util.spec_from_loader("config_page", loader)
            module = importlib.util.module_from_spec(given(spec, f"--config {path}: no page"))
            loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise UserError(f"--config {path}: the page defines no get_config()")
            page = module.get_config(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config {path}: the page fails: {type(error).__name__}: {error}") from error
    if not isinstance(page, ConfigDict):
        raise UserError(
            f"--config {path}: get_config() returned {type(page).__name__}, not an ml_collections.ConfigDict"
        )
    for override in overrides:
        _override(page, override)
    return page


def _override(page: ConfigDict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not name.startswith("--config.") or not equals:
        raise UserError(f"{override}: not understood; a change to the config looks like --config.pretrain.steps=100")
    *tables, key = name.removeprefix("--config.").split(".")
    table: Any = page
    if tables and "run" in page and tables[0] not in {*page, *_RUN_TABLES}:  # whoever reads one stage would not see it
        hint = nearest(tables[0], [*page, *_RUN_TABLES], "it has")
        raise UserError(f"{override}: the page has no table config.{tables[0]}; {hint}")
    for depth, part in enumerate(tables):
        with table.unlocked():
            if table.get(part) is None:
                table[part] = ConfigDict()
        table = table[part]
        if not isinstance(table, ConfigDict):
            raise UserError(f"{override}: config.{'.'.join(tables[: depth + 1])} is a value, not a table")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    with table.unlocked():
        if key in table:
            del table[key]
        try:
            table[key] = value
        except ValueError as error:  # a key inside the value that ml_collections does not take
            raise UserError(f"{override}: {error}") from None


@contextlib.contextmanager
def _neighbours(directory: Path) -> Iterator[None]:
    """Lets a page import the files beside it, as a script can.

    What was imported stays, as every module does. A neighbour of another page that has the name of one of this page is
    forgotten first.
    """
    here = {child.stem for child in directory.iterdir()}
    for name in here & sys.modules.keys():
        if _beside(sys.modules[name]) not in (None, directory):
            del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and directory in Path(file).resolve().parents:
                vars(sys.modules[name])["__page_directory__"] = directory


def _beside(module: object) -> Path | None:
    """The directory of the page that imported a module as its neighbour; None for every other module."""
    return getattr(module, "__page_directory__", None)
