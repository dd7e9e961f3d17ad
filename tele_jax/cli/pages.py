"""Config pages: a Python file with get_config() -> ConfigDict, and changes to it from the command line."""

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tele_jax.errors import UserError


def load_page(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The ConfigDict of a page, with overrides such as "--config.pretrain.steps=100" applied.

    "page.py:7b" calls get_config("7b"), as ml_collections' flags do.

    Raises:
      UserError: no such file, a page that fails or has no get_config, an override of a key that the page does not set.
    """
    file, arguments = Path(path), []
    if not file.exists() and ":" in path:
        name, _, argument = path.rpartition(":")
        file, arguments = Path(name), [argument]
    if not file.is_file():
        raise UserError(f"--config {path}: no such file")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("config_page", file))
    try:
        module.__spec__.loader.exec_module(module)
        page = module.get_config(*arguments)
    except UserError:
        raise
    except AttributeError as error:
        if "get_config" in str(error):
            raise UserError(f"--config {path}: the page defines no get_config()") from None
        raise UserError(f"--config {path}: the page fails: {error}") from error
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
    for depth, part in enumerate(tables):
        if not hasattr(table, "keys") or part not in table:
            raise UserError(f"{override}: the page has no table config.{'.'.join(tables[: depth + 1])}")
        table = table[part]
    if not hasattr(table, "keys"):
        raise UserError(f"{override}: config.{'.'.join(tables)} is a value, not a table")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    # A key that the page leaves at its default may be set too; run_config refuses keys that do not exist.
    with table.unlocked():
        if key in table:
            del table[key]
        try:
            table[key] = value
        except ValueError as error:  # a key inside the value that ml_collections does not take
            raise UserError(f"{override}: {error}") from None
