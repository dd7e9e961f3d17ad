"""Loading a checkpoint, compared first with what is expected, onto any mesh; and checking the sums of its chunks."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from tele_jax import axes
from tele_jax.axes import Leaf, Leaves, Params, ParamSpec, PyTree
from tele_jax.checkpoint import layout, packing
from tele_jax.checkpoint.adapted import unfold
from tele_jax.checkpoint.lazy import Lazy, LazyArray, Read, finish, open_lazy
from tele_jax.config import ModelConfig, differing_fields, require, require_config, require_known
from tele_jax.errors import DamageError, UserError, abridged
from tele_jax.files import PathLike, Table
from tele_jax.model import adapters
from tele_jax.model.spec import flat_spec
from tele_jax.sharding import Device, param_shardings, require_mesh

_CHECKED_BYTES = 512 * 2**20  # read and not yet checked, by `verify`
_IN_FLIGHT_BYTES = 2 * 2**30  # host memory for what has been read and is not yet on the devices


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint in memory. opt_state and data_state are None where none was saved or asked for.

    adapters: of a checkpoint that holds adapters, where asked for; `adapter` describes them.
    """

    cfg: ModelConfig
    params: Params
    opt_state: PyTree
    step: int
    provenance: tuple[Table, ...]
    data_state: bytes | None
    adapters: Params | None = None
    adapter: layout.Adapter | None = None

    def __repr__(self) -> str:
        items = {"params": axes.flatten(self.params)}
        items |= {} if self.adapters is None else {"adapters": axes.flatten(self.adapters)}
        items |= {} if self.opt_state is None else {"opt_state": layout.named_leaves(self.opt_state)}
        return f"<Loaded step {self.step}: {layout.summary(items)}>"


def load(
    path: PathLike,
    mesh: jax.sharding.Mesh | None = None,
    *,
    shardings: Leaves | None = None,
    opt_state_like: PyTree = None,
    cfg: ModelConfig | None = None,
    expect: Leaves | None = None,
    items: Collection[str] = ("params", "opt_state", "data"),
    base: PathLike | None = None,
) -> Loaded:
    """Reads a checkpoint onto a mesh, which need not be the one it was saved from.

    path: step directory, directory of steps, stage directory or work directory; see locate.find_step.
    mesh: parameters are cut by sharding.param_shardings. Without mesh and shardings all goes to the default device.
    shardings: tree of NamedSharding like params, instead of mesh. Moments in the optimizer state lie like their
      parameters, the rest of it on every device.
    opt_state_like: the optimizer state's structure, of arrays or jax.ShapeDtypeStruct; a NamedSharding that a leaf
      carries is followed. Without it the state comes as nested dicts (keys are field names, dict keys, positions).
    cfg: the model that is expected; it may differ from the stored one in EXECUTION_FIELDS, and is Loaded.cfg then.
    expect: tree of ParamSpec, where params are not those of the config.
    items: what to read; ("params",) needs a third of the memory. Of a checkpoint that holds adapters (adapted.py),
      "params" are those of its base with the adapters merged into them, and have no optimizer state; "adapters" are
      the adapters alone, whose moments "opt_state" then are.
    base: where a checkpoint that was adapted lies, if it was moved: the base, or the lowest of a chain of adapters.

    Raises:
      UserError: no checkpoint there; another model, or other leaves, shapes or dtypes than expected, each named;
        float64 or int64 leaves without jax_enable_x64; adapters whose base is not there or has other parameters;
        `base` where none is read.
      DamageError: something is missing or not what was written; names the leaf and the file.
    """
    for item in (items,) if isinstance(items, str) else items:
        require_known(item, layout.ITEMS, f"load: items: no {item!r} in a checkpoint")
    if cfg is not None:
        require_config(cfg, "load: cfg")
    if mesh is not None:
        require_mesh(mesh, "load: mesh")
    lazy = open_lazy(path)
    if lazy.adapter is not None and "params" in items:
        how: Table = {"mesh": mesh, "shardings": shardings, "cfg": cfg}
        return _merged(lazy, items, base, opt_state_like, **how)
    require(base is None, f"{lazy.path}: base={base}: only for a checkpoint of adapters (LoRA) whose params are loaded")
    own = "params" if lazy.adapter is None else "adapters"
    _check_x64(lazy, items)
    _check_expected(lazy, own, cfg, expect)
    placed = _place_params(lazy.items[own], mesh, shardings)
    like = None if opt_state_like is None else layout.named_leaves(opt_state_like)
    arrays = {item: lazy.items[item] for item in ("params", "adapters") if item in items}
    if "opt_state" in items and ("opt_state" in lazy.items or like is not None):
        arrays["opt_state"] = _opt_arrays(lazy, like)
    where = {
        array.name: _place(
            name, array, (like or {}).get(name) if item == "opt_state" else None, lazy.items[own], placed
        )
        for item, named in arrays.items()
        for name, array in named.items()
    }
    values = dict(_read_all([array for named in arrays.values() for array in named.values()], where))
    trees = {item: {name: values[array.name] for name, array in named.items()} for item, named in arrays.items()}
    opt_state = trees.get("opt_state")
    if opt_state is not None:
        opt_state = axes.unflatten(opt_state) if like is None else _fill(opt_state_like, like, opt_state)
    return Loaded(
        cfg=lazy.cfg if cfg is None else cfg,
        params=axes.unflatten(trees.get("params", {})),
        opt_state=opt_state,
        step=lazy.step,
        provenance=lazy.provenance,
        data_state=lazy.data_state() if "data" in items else None,
        adapters=axes.unflatten(trees["adapters"]) if "adapters" in trees else None,
        adapter=lazy.adapter,
    )


def _merged(
    lazy: Lazy,
    items: Collection[str],
    base: PathLike | None,
    opt_state_like: PyTree,
    *,
    mesh: jax.sharding.Mesh | None,
    shardings: Leaves | None,
    cfg: ModelConfig | None,
) -> Loaded:
    """Loads a checkpoint of adapters, and its base with the adapters merged into it, the lowest of a chain first."""
    wanted = {"adapters", *items} - {"params"} - (set() if "adapters" in items else {"opt_state"})
    bottom, upon = unfold(lazy, base)
    params = load(bottom.path, mesh, shardings=shardings, cfg=cfg, items=("params",)).params
    mesh = mesh if shardings is None else jax.tree.leaves(shardings)[0].mesh
    like = opt_state_like if "opt_state" in wanted else None
    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    merge = jax.jit(adapters.merge, static_argnums=(0, 3), donate_argnums=1, out_shardings=where)
    for below in upon[:-1]:
        more = load(below.path, mesh, cfg=cfg, items=("adapters",))
        assert below.adapter is not None  # as unfold says
        params = merge(more.cfg, params, more.adapters, below.adapter.lora)
    assert lazy.adapter is not None
    own = load(lazy.path, mesh, opt_state_like=like, cfg=cfg, items=tuple(wanted))
    params = merge(own.cfg, params, own.adapters, lazy.adapter.lora)
    return dataclasses.replace(own, params=params, adapters=own.adapters if "adapters" in items else None)


def differences(found: Leaves, expected: Leaves, verb: str = "stored") -> list[str]:
    """Lists a line for every leaf whose name, shape or dtype differs; leaves have .shape and .dtype.

    >>> x, y = np.zeros((4, 8), np.float32), np.zeros((4, 16), np.float32)
    >>> differences({"w": x}, {"w": y, "b": x[:, 0]})
    ['b: missing, expected float32[4]', 'w: stored float32[4,8], expected float32[4,16]']
    """
    lines = []
    for name in sorted({*found, *expected}):
        have, want = (layout.describe(t[name].shape, t[name].dtype) if name in t else None for t in (found, expected))
        if have is None:
            lines.append(f"{name}: missing, expected {want}")
        elif want is None:
            lines.append(f"{name}: {verb} {have}, not expected")
        elif have != want:
            lines.append(f"{name}: {verb} {have}, expected {want}")
    return lines


def _check_x64(lazy: Lazy, items: Collection[str]) -> None:
    for item in ("params", "adapters", "opt_state"):
        for array in lazy.items.get(item, {}).values() if item in items else ():
            if not array.leaf.scalar and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
                raise UserError(
                    f"{lazy.path}: {array.name} is {array.dtype}, which JAX would cut to 32 bits; set JAX_ENABLE_X64=1"
                )


def _check_expected(lazy: Lazy, own: str, cfg: ModelConfig | None, expect: Leaves | None) -> None:
    lines = [] if cfg is None else config_differences(lazy.cfg, cfg)
    model = lazy.cfg if cfg is None else cfg
    if expect is None:
        expected = flat_spec(model)
        if lazy.adapter is not None:
            expected = axes.flatten(adapters.spec(model, lazy.adapter.lora))
    else:
        expected = axes.flatten(expect)
    lines += differences({name: array.leaf.spec for name, array in lazy.items[own].items()}, expected)
    if lines:
        raise UserError(f"{lazy.path}: not a checkpoint of the model that is expected: " + ";\n  ".join(lines))


def config_differences(stored: ModelConfig, expected: ModelConfig, where: str = "expected") -> list[str]:
    """Lists a line for every field in which two configs are different models."""
    found = differing_fields(stored, expected).items()
    return [f"config.{name}: stored {have!r}, {where} {want!r}" for name, (have, want) in found]


def _opt_arrays(lazy: Lazy, like: Leaves | None) -> dict[str, LazyArray]:
    """The arrays of the optimizer state, after a comparison with the structure they are to fill."""
    stored = lazy.items.get("opt_state")
    if stored is None:
        raise UserError(f"{lazy.path}: holds no optimizer state; start with a fresh one")
    if like is not None:
        expected = {name: _abstract(leaf, stored.get(name)) for name, leaf in like.items()}
        if lines := differences(stored, expected):
            raise UserError(f"{lazy.path}: opt_state: not what is expected: " + ";\n  ".join(lines))
    return stored


def _abstract(leaf: Leaf, stored: LazyArray | None) -> PyTree:
    """A leaf of the expected structure, with shape and dtype.

    A Python number has no dtype of its own, and takes that of what is stored; so does the place of a stored one.
    """
    shape = np.shape(leaf)
    if stored is not None and shape == () and (stored.leaf.scalar or isinstance(leaf, (bool, int, float))):
        return ParamSpec((), stored.dtype)
    return leaf if hasattr(leaf, "dtype") else ParamSpec(shape, np.asarray(leaf).dtype)


def _place_params(
    arrays: Mapping[str, LazyArray], mesh: jax.sharding.Mesh | None, shardings: Leaves | None
) -> dict[str, NamedSharding] | None:
    """The sharding of every parameter by name, or None for the default device."""
    if shardings is None:
        if mesh is None:
            return None
        specs = {name: array.leaf.spec for name, array in arrays.items()}
        shardings = param_shardings(axes.unflatten(specs), mesh)
    placed = axes.flatten(shardings)
    if wrong := set(placed) ^ set(arrays):
        raise UserError(f"shardings: must have the leaves of params; they differ in {abridged(sorted(wrong))}")
    return placed


def _place(
    name: str,
    array: LazyArray,
    like: PyTree,
    params: Mapping[str, LazyArray],
    placed: Mapping[str, NamedSharding] | None,
) -> Sharding | None:
    """Chooses the sharding of a leaf: that of `like`, else of the parameter that it belongs to, else on all devices."""
    if isinstance(asked := getattr(like, "sharding", None), NamedSharding):
        return asked
    if placed is None:
        return None
    owner = layout.matching_param(name, array.shape, params)
    return placed[owner] if owner is not None else NamedSharding(next(iter(placed.values())).mesh, P())


def _fill(tree: PyTree, names: Mapping[str, object], values: Mapping[str, object]) -> PyTree:
    # named_leaves goes through the leaves in the order of the tree.
    return jax.tree.unflatten(jax.tree.structure(tree), [values[name] for name in names])


def _read_all(arrays: Collection[LazyArray], shardings: Mapping[str, Sharding | None]) -> Iterator[tuple[str, Leaf]]:
    """Reads many arrays at once, but no more than _IN_FLIGHT_BYTES and one array at a time into host memory."""
    pending: collections.deque[tuple[LazyArray, Callable[[], Any]]] = collections.deque()
    in_flight = 0
    for array in arrays:
        while pending and in_flight + array.nbytes > _IN_FLIGHT_BYTES:
            done, finished = pending.popleft()
            in_flight -= done.nbytes
            yield done.name, finished()
        pending.append((array, _start_read(array, shardings[array.name])))
        in_flight += array.nbytes
    for done, finished in pending:
        yield done.name, finished()


def _start_read(array: LazyArray, sharding: Sharding | None) -> Callable[[], Any]:
    """Starts to read what this process needs of an array; the result is called for the jax.Array."""
    if sharding is None or array.leaf.scalar:
        future = array.tensorstore.read()
        return lambda: _on_default_device(finish(future, array.name), array.leaf.scalar)
    parts: dict[tuple[tuple[int, int], ...], Any] = {}  # a part that several devices hold is read once
    devices: dict[Device, tuple[tuple[int, int], ...]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), array.shape, strict=True))
        devices[device] = bounds
        if bounds not in parts:
            parts[bounds] = array.tensorstore[tuple(slice(*b) for b in bounds)].read()

    def finished() -> jax.Array:
        blocks = {bounds: finish(future, array.name) for bounds, future in parts.items()}
        placed = [jax.device_put(blocks[bounds], device) for device, bounds in devices.items()]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, placed)

    return finished


def _on_default_device(value: np.ndarray, scalar: bool) -> PyTree:
    return value.item() if scalar else jax.device_put(value)


# --------------------------------------------------------------------- checksums


@dataclasses.dataclass(frozen=True)
class Damage:
    """A chunk, or a file, that differs from what was written. leaf: name with the item, "params/layers.attn.q"."""

    leaf: str
    file: epath.Path
    problem: str


def verify(lazy: Lazy) -> Iterator[Damage]:
    """Yields every chunk that is missing, of another size, or without its checksum.

    What is read and not yet checked is 512 MiB, or one chunk where that is larger.
    """
    found = type(lazy).__name__
    require(isinstance(lazy, Lazy), f"verify: expected what checkpoint.open_lazy(path) returns, got {found}")
    arrays = (array for named in lazy.items.values() for array in named.values())
    return itertools.chain.from_iterable(map(_verify_array, arrays))


def _verify_array(array: LazyArray) -> Iterator[Damage]:
    pending: collections.deque = collections.deque()
    window = max(1, _CHECKED_BYTES // array.leaf.chunk_bytes)
    for index in itertools.product(*map(range, array.leaf.file_grid)):
        file = array.path / layout.chunk_key(index)
        if problem := _file_problem(array, file):
            yield Damage(array.name, file, problem)
            continue
        for chunk in packing.chunks_of(array.leaf, index):
            if len(pending) == window:
                yield from _checked(array, *pending.popleft())
            cuts = zip(chunk, array.chunks, array.shape, strict=True)
            part = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in cuts)
            pending.append((file, chunk, array.tensorstore[part].read()))
    for entry in pending:
        yield from _checked(array, *entry)


def _file_problem(array: LazyArray, file: epath.Path) -> str | None:
    """Says why no chunk of a file can be read; None where they can be looked at one by one."""
    leaf = array.leaf
    try:
        if leaf.files is None:
            size = file.stat().length
            return None if size == leaf.chunk_bytes else f"{size:,} bytes, expected {leaf.chunk_bytes:,}"
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - packing.index_bytes(leaf)))
            entries = packing.parse_index(leaf, stream.read())
    except FileNotFoundError:
        return "missing"
    return f"{size:,} bytes, and no index with its checksum at their end" if entries is None else None


def _checked(array: LazyArray, file: epath.Path, chunk: tuple[int, ...], future: Read) -> Iterator[Damage]:
    try:
        finish(future, array.name)
    except DamageError:
        which = "its checksum" if array.leaf.files is None else f"the checksum of chunk {list(chunk)}"
        yield Damage(array.name, file, f"{which} is not that of its content")
