"""A checkpoint opened without reading its arrays: each leaf reads just the chunks that are asked for."""

import dataclasses
import functools
import html
import re
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from jax.typing import DTypeLike

from tele_jax import tables
from tele_jax.axes import Params, unflatten
from tele_jax.checkpoint import layout, locate
from tele_jax.config import ModelConfig, written_table
from tele_jax.errors import DamageError, UserError, abridged
from tele_jax.files import PathLike, Table, parse_json

_HEADER = ("leaf", "shape", "bytes")


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """A stored array. Indexing it with integers and slices reads a numpy array, and only the chunks it lies in.

        q = open_lazy(path).params["layers"]["attn"]["q"]
        q.shape, q.chunks    # (80, 8192, 64, 128), (1, 4096, 64, 128)
        q[3]                 # one layer, numpy [8192, 64, 128]: reads 2 chunks

    name: with the item, "params/layers.attn.q".  path: directory of its zarr3 array.
    """

    name: str
    path: epath.Path
    leaf: layout.Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.spec.shape

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.spec.dtype

    @property
    def axes(self) -> tuple[str, ...]:
        """One axis name per dimension; () for state that belongs to no parameter, whose axes have no names."""
        return self.leaf.spec.axes

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return self.leaf.chunks

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.leaf.nbytes

    @functools.cached_property
    def indexes(self) -> dict[str, np.ndarray]:
        """The indexes of files that chunk_files has read, by path."""
        return {}

    @functools.cached_property
    def tensorstore(self) -> Any:
        """The open TensorStore, for concurrent reads."""
        return open_array(self.path, self.name)

    def __getitem__(self, key: object) -> np.ndarray:
        """Reads a part, by numpy's basic indexing with steps above 0: integers, slices, one Ellipsis.

        Raises:
          IndexError: as numpy, and for any other kind of index.
          DamageError: a chunk in that part is missing or damaged; names the leaf and the file.
        """
        return finish(self.tensorstore[basic_index(key, self.shape)].read(), self.name)

    def read(self) -> np.ndarray:
        """The whole array."""
        return self[...]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return self.read() if dtype is None else self.read().astype(dtype)

    def __repr__(self) -> str:
        return f"LazyArray({self.name}, {self.leaf}, axes={self.axes}, chunks={self.chunks})"


class _Named(dict):
    """A dict that says which names there are where one is missing."""

    where: object = "the checkpoint"

    def __missing__(self, name: object):
        if name == "params" and "adapters" in self:
            raise UserError(
                f"{self.where}: holds adapters (LoRA) and no parameters; tele.checkpoint.load(path) merges them into "
                "their base, tele.checkpoint.save writes the result"
            )
        raise UserError(f"the checkpoint has no {name!r}; it has {abridged(self) or 'nothing here'}")


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A checkpoint whose arrays are still on disk.

    params: nested dict of LazyArray.  opt_state: the same (keys are field names, dict keys and positions), or None.
    items: all of it flat, {"params": {"layers.attn.q": LazyArray}, "opt_state": ..., "data": ...}.
    adapter: describes the adapters where items has "adapters" in place of "params"; opt_state is None then, and the
      moments of the adapters are in items.
    """

    path: epath.Path
    cfg: ModelConfig
    step: int
    provenance: tuple[Table, ...]
    versions: dict[str, str]
    items: dict[str, dict[str, LazyArray]]
    adapter: layout.Adapter | None = None

    def __repr__(self) -> str:
        return f"<Lazy {self.path}: step {self.step}; {layout.summary(self.items)}; print it for its leaves>"

    def __str__(self) -> str:
        return "\n".join([f"{self.path}: step {self.step}", tables.text(self._rows(), _HEADER)])

    def _repr_html_(self) -> str:
        return f"<div>{html.escape(f'{self.path}: step {self.step}')}</div>{tables.html(self._rows(), _HEADER)}"

    def _rows(self) -> list[tuple[str, str, str]]:
        arrays = [array for named in self.items.values() for array in named.values()]
        return [(a.name, layout.describe(a.shape, a.dtype), f"{a.nbytes:,}") for a in arrays]

    @property
    def params(self) -> Params:
        return unflatten(self.items["params"])

    @property
    def opt_state(self) -> Params | None:
        has_state = "opt_state" in self.items and self.adapter is None
        return unflatten(self.items["opt_state"]) if has_state else None

    def data_state(self) -> bytes | None:
        """Reads the position of the data feed."""
        return self.items["data"]["state"].read().tobytes() if "data" in self.items else None


def open_lazy(path: PathLike) -> Lazy:
    """Opens a checkpoint and checks its structure, reading no array.

    path: as locate.find_step takes it.

    Raises:
      UserError: there is no checkpoint, or it was written in a format that this version does not know.
      DamageError: the meta document, an item, or an array's zarr.json is missing, damaged, or not what was written;
        names every array that is.
    """
    step_dir = locate.find_step(path)
    meta_file = step_dir / "meta" / layout.META_FILE
    try:
        text = meta_file.read_bytes()
    except FileNotFoundError:
        raise DamageError(f"{meta_file}: missing; damaged, or not a checkpoint of tele_jax") from None
    meta = layout.meta_from_json(text, str(meta_file))
    items = _Named()
    items.where = step_dir
    for item, leaves in meta.items.items():
        items[item] = _Named({n: LazyArray(f"{item}/{n}", step_dir / item / n, leaf) for n, leaf in leaves.items()})
    _check_structure(step_dir, items)
    return Lazy(step_dir, meta.cfg, meta.step, meta.provenance, meta.versions, items, meta.adapter)


def _check_structure(step_dir: epath.Path, items: dict[str, dict[str, LazyArray]]) -> None:
    problems = []
    for item, arrays in items.items():
        if arrays and not (step_dir / item).is_dir():
            problems.append(f"{item}: the item is missing")
            continue
        for array in arrays.values():
            if problem := _zarr_problem(array):
                problems.append(f"{array.name}: {problem}")
    if problems:
        raise DamageError(f"{step_dir}: damaged: " + ";\n  ".join(problems))


def _zarr_problem(array: LazyArray) -> str | None:
    try:
        stored = written_table(parse_json((array.path / "zarr.json").read_bytes(), "zarr.json"), "zarr.json", {})
    except FileNotFoundError:
        return "zarr.json is missing"
    except DamageError as error:
        return str(error)
    difference = layout.zarr_difference(stored, array.leaf)
    return f"zarr.json: {difference}" if difference else None


def basic_index(key: object, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Translates numpy's basic index to TensorStore, where -1 is a coordinate and slices must lie inside.

    >>> basic_index((-1, slice(2, 99)), (4, 8, 3))
    (3, slice(2, 8, 1), slice(0, 3, 1))
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    ellipses = [i for i, part in enumerate(keys) if part is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    position = ellipses[0] if ellipses else len(keys)
    explicit = len(keys) - len(ellipses)
    if explicit > len(shape):
        raise IndexError(f"too many indices: the array has {len(shape)} dimensions, but {explicit} were indexed")
    keys[position : position + 1] = [slice(None)] * (len(shape) - explicit)
    return tuple(_basic_index(part, size, axis) for axis, (part, size) in enumerate(zip(keys, shape, strict=True)))


def _basic_index(part: Any, size: int, axis: int) -> int | slice:
    if isinstance(part, slice):
        start, stop, step = part.indices(size)
        if step < 1:
            raise IndexError(f"axis {axis}: slices of a LazyArray need a step above 0, got {step}")
        return slice(start, max(start, stop), step)
    if isinstance(part, (bool, np.bool_)) or not hasattr(part, "__index__"):
        raise IndexError(f"axis {axis}: a LazyArray takes integers and slices, not {type(part).__name__}")
    index = part.__index__()
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for axis {axis} with size {size}")
    return index % size


# --------------------------------------------------------- reading by TensorStore

Read = ts.Future  # a read that is under way; `finish` gives its numpy array

_CONTEXT = ts.Context({"file_io_concurrency": {"limit": 32}})


def kvstore(path: PathLike) -> Params | str:
    """Returns TensorStore's spec of a directory, a path or an address such as gs://bucket/name."""
    return f"{path}/" if "://" in str(path) else {"driver": "file", "path": f"{path}/"}


def open_array(path: PathLike, name: str) -> ts.TensorStore:
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
    """Waits for a read and returns its array. Raises DamageError naming the leaf and the file."""
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError) as error:
        raise explain(name, error) from None


def explain(name: str, error: Exception) -> UserError | DamageError:
    """Makes one line of TensorStore's error, without its status code and its dump of the spec."""
    text = str(error).split(" [tensorstore_spec=")[0]
    code, _, reason = text.partition(": ") if re.match(r"[A-Z_]+: ", text) else ("", "", text)
    if code == "PERMISSION_DENIED":
        return UserError(f"{name}: {reason}")
    return DamageError(f"{name}: damaged: {reason}")
