"""Reading stored arrays by TensorStore; what goes wrong there gets the name of the leaf and of the file."""

import re
from typing import Any

import tensorstore as ts

from tele_jax.errors import DamageError, UserError

Read = ts.Future  # a read that is under way; its numpy array is had by `finish`

_CONTEXT = ts.Context({"file_io_concurrency": {"limit": 32}})


def kvstore(path: Any) -> dict[str, Any] | str:
    """TensorStore's spec of a directory: a path, or an address such as gs://bucket/name."""
    return f"{path}/" if "://" in str(path) else {"driver": "file", "path": f"{path}/"}


def open_array(path: Any, name: str) -> ts.TensorStore:
    """Opens a stored array for reading. A chunk that is missing is an error, never zeros; checksums are checked.

    Raises:
      DamageError: zarr.json is missing or damaged.
    """
    spec = {"driver": "zarr3", "kvstore": kvstore(path), "fill_missing_data_reads": False}
    try:
        return ts.open(spec, context=_CONTEXT, open=True, read=True, recheck_cached=False).result()
    except (ValueError, OSError, RuntimeError) as error:
        raise explain(name, error) from None


def finish(future: Read, name: str) -> Any:
    """The result of a read. Raises DamageError naming the leaf and the file."""
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError) as error:
        raise explain(name, error) from None


def explain(name: str, error: Exception) -> UserError | DamageError:
    """One line out of what TensorStore says: its status code and its dump of the spec are left out."""
    text = str(error).split(" [tensorstore_spec=")[0]
    code, _, reason = text.partition(": ") if re.match(r"[A-Z_]+: ", text) else ("", "", text)
    if code == "PERMISSION_DENIED":
        return UserError(f"{name}: {reason}")
    return DamageError(f"{name}: damaged: {reason}")
