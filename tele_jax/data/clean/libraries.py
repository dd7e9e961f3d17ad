"""Imports of what the extra `[clean]` installs, on use."""

import importlib
import types

from tele_jax.errors import UserError


def need(module: str) -> types.ModuleType:
    """Imports `module`, one of those that `pip install tele_jax[clean]` brings.

    Raises:
      UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{module} needs the package {error.name!r}, which is not installed: pip install tele_jax[clean]"
        ) from None
