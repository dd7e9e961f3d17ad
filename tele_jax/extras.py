"""Imports of optional packages on use: those of the extras `[data]`, `[beam]` and `[clean]`."""

import contextlib
import importlib
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence

from tele_jax.errors import UserError

# Start-up lines of TensorFlow: information, warnings, and the error that there is no GPU.
_CHATTER = re.compile(rb"[IW]0000 |E0000 .*cuInit|WARNING: All log messages before absl::InitializeLog\(\)")

# Packages that come with `[clean]` and not with `[data]`. (Beam alone comes with `[beam]` too.)
_CLEAN = frozenset(
    ["ahocorasick_rs", "apache_beam", "fastwarc", "pyarrow", "pycld2", "rensa", "resiliparse", "scipy", "sklearn"]
)

# TensorFlow imports Keras, which imports these where they are installed, for parts that nothing here uses. Hiding them
# makes importing seqio a fifth faster.
_FOR_KERAS_ALONE = ("sklearn", "matplotlib", "IPython")


def need(module: str, *, how: str | None = None) -> types.ModuleType:
    """Imports a module of an optional package.

    TensorFlow (which seqio imports) is kept off accelerators, since those belong to JAX, and kept quiet.

    Args:
      module: full name of the module.
      how: advice for the message where the package is missing; None: install the extra that has it.

    Raises:
      UserError: the package is not installed.
    """
    loaded = sys.modules.get(module)
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        return loaded  # AutoGraph, which reads the functions that a dataset is made with, stumbles over import_module
    loud = module.split(".")[0] in ("tensorflow", "tensorflow_text", "seqio") and "tensorflow" not in sys.modules
    try:
        if not loud:
            return importlib.import_module(module)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with _without_chatter(), hidden(_FOR_KERAS_ALONE):
            tensorflow = importlib.import_module("tensorflow")
            keep_off_accelerators()
            tensorflow.constant(0)  # looks for devices now, not later when nothing is held back
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = "clean" if _CLEAN & {module.split(".")[0], error.name} else "data"
        how = how or f"pip install tele_jax[{extra}]"
        raise UserError(f"{module} needs the package {error.name!r}, which is not installed: {how}") from None


def keep_off_accelerators() -> None:
    """Keeps a loaded TensorFlow off accelerators, which belong to JAX."""
    tensorflow = sys.modules["tensorflow"]
    for kind in ("GPU", "TPU"):
        # Too late when the caller has used TensorFlow's devices before; then they are the caller's choice.
        with contextlib.suppress(RuntimeError, ValueError):
            tensorflow.config.set_visible_devices([], kind)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Drops TensorFlow's start-up lines from standard error, and passes everything else on at the end.

    TensorFlow's C++ code writes them to the file descriptor before it reads its log levels.
    """
    try:
        real = os.dup(2)
    except OSError:  # no standard error at all
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            for line in held:
                if not _CHATTER.match(line):
                    with contextlib.suppress(OSError):
                        os.write(2, line)


@contextlib.contextmanager
def hidden(packages: Sequence[str]) -> Iterator[None]:
    """Makes packages that are not loaded yet look uninstalled while the body imports one that can do without."""
    absent = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # pyright: ignore[reportCallIssue, reportArgumentType] - None: its import fails
    try:
        yield
    finally:
        for package in absent:
            if sys.modules[package] is None:
                del sys.modules[package]
