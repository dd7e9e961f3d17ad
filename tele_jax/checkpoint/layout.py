"""The layout of a step directory, as pure functions that touch no file.

    <step>/params/<leaf>/zarr.json, c/<i>/<j>/...     one zarr3 array per leaf, <leaf> its dotted name; a file holds
                                                      some chunks (packing.py)
    <step>/adapters/<leaf>/...                        instead of params: adapters of parameters that lie elsewhere
    <step>/opt_state/<leaf>/...                       the same; left out where nothing was given
    <step>/data/state/...                             the position of the data feed, as uint8[n]
    <step>/meta/meta.json                             the Meta below, with its own checksum

Every item also has Orbax's own `_METADATA`, so that plain Orbax restores it; nothing here reads that.

Chunks hold one index of every stacked axis, so that a layer is read alone, and end in a CRC-32C, so that every zarr
reader that has this codec raises an error for a chunk that was damaged (but for one accident in 2^32). They are not
compressed: float weights shrink by less than a tenth, and zstd halves the speed (tried on 2026-11-23).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tele_jax.axes import Leaves, Params, ParamSpec, PyTree
from tele_jax.config import ModelConfig, as_written, from_dict, to_dict, written_table
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table, is_plain_name, parse_json
from tele_jax.settings import LoraConfig

FORMATS = (1, 2)  # 1: a chunk a file; 2: leaves may have `files`
ITEMS = ("params", "adapters", "opt_state", "data")
META_FILE = "meta.json"  # in the item "meta"
CHUNK_BYTES = 128 * 2**20  # largest chunk, before its checksum
CRC_BYTES = 4
PACKAGES = ("tele-jax", "jax", "jaxlib", "numpy", "orbax-checkpoint", "tensorstore")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One stored array: its shape, dtype and axes, and the shape of its chunks.

    scalar: it was a Python bool, int or float, and comes back as one.
    files: shape of the part of the array that one file holds, a multiple of chunks; None where a chunk is a file.
    """

    spec: ParamSpec
    chunks: tuple[int, ...]
    scalar: bool = False
    files: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return self.spec.size * self.spec.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Size of every chunk with its checksum: chunks at the edge are stored whole."""
        return math.prod(self.chunks) * self.spec.dtype.itemsize + CRC_BYTES

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each dimension."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.spec.shape, self.chunks, strict=True))

    @property
    def file_grid(self) -> tuple[int, ...]:
        """Number of files along each dimension."""
        return tuple(-(-size // part) for size, part in zip(self.spec.shape, self.files or self.chunks, strict=True))

    @property
    def per_file(self) -> tuple[int, ...]:
        """Number of chunks in a file along each dimension."""
        return tuple(part // chunk for part, chunk in zip(self.files or self.chunks, self.chunks, strict=True))

    def __str__(self) -> str:
        return describe(self.spec.shape, self.spec.dtype)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Description of the adapters in a checkpoint, and of the checkpoint whose parameters they adapt.

    base: paths of its step directory to try one after another, relative ones from the directory of the adapters.
    fingerprint: of its content, see adapted.fingerprint.
    """

    lora: LoraConfig
    base: tuple[str, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Meta:
    """The document of a checkpoint. items: {"params": {leaf name: Leaf}, "opt_state": ..., "data": ...}."""

    cfg: ModelConfig
    step: int
    provenance: tuple[Table, ...]
    items: dict[str, dict[str, Leaf]]
    versions: dict[str, str]
    adapter: Adapter | None = None  # where there are adapters in place of params


def summary(items: Mapping[str, Mapping[str, Any]]) -> str:
    """The leaves of a checkpoint in a few words; they have .shape.

    >>> import numpy as np
    >>> summary({"params": {"w": np.zeros((4, 8))}, "opt_state": {"count": np.zeros(())}})
    '32 parameters in 1 leaf; opt_state of 1 leaf'
    """
    counts = {item: f"{len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'}" for item, leaves in items.items()}
    own = "params" if "params" in items else "adapters"
    size = sum(math.prod(leaf.shape) for leaf in items[own].values())
    others = [f"{item} of {count}" for item, count in counts.items() if item != own]
    what = "parameters" if own == "params" else "parameters of adapters"
    return "; ".join([f"{size:,} {what} in {counts[own]}", *others])


def describe(shape: Sequence[int], dtype: DTypeLike) -> str:
    """Describes an array in a few characters, such as float32[4,8,2]."""
    return f"{jnp.dtype(dtype).name}[{','.join(map(str, shape))}]"


def named_leaves(tree: PyTree) -> Table:
    """Flattens any pytree to {dotted name: leaf}; names join dict keys, field names and positions.

    >>> import optax
    >>> named_leaves({"a": (optax.ScaleByAdamState(count=0, mu={"w": 1.5}, nu={"w": 2.5}), optax.EmptyState())})
    {'a.0.count': 0, 'a.0.mu.w': 1.5, 'a.0.nu.w': 2.5}

    Raises:
      UserError: a key that cannot be part of a name, or two leaves of one name.
    """
    leaves: Table = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [_key_name(key) for key in path] or ["value"]
        for part in parts:
            if "." in part:
                raise UserError(f"{'.'.join(parts)}: the key {part!r} cannot be stored: it has . in it")
        name = ".".join(parts)
        if problem := name_problem(name):
            raise UserError(f"{name}: cannot be stored: {problem}")
        if name in leaves:
            raise UserError(f"{name}: two leaves have this name; a dict mixes keys such as 1 and '1'")
        leaves[name] = leaf
    return leaves


def _key_name(key: object) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def matching_param(name: str, shape: Sequence[int], params: Params) -> str | None:
    """Finds the parameter that a leaf of an optimizer state belongs to: its name ends the leaf's, and shapes agree.

    >>> matching_param("0.mu.layers.attn.q", (4, 64, 4, 16), {"layers.attn.q": jnp.zeros((4, 64, 4, 16))})
    'layers.attn.q'
    """
    parts = name.split(".")
    for start in range(len(parts)):
        candidate = ".".join(parts[start:])
        if candidate in params and tuple(params[candidate].shape) == tuple(shape):
            return candidate
    return None


def chunk_shape(
    shape: Sequence[int],
    itemsize: int,
    *,
    stacked: int = 0,
    shard: Sequence[int] | None = None,
    limit: int = CHUNK_BYTES,
) -> tuple[int, ...]:
    """Shape of a chunk: 1 along the leading `stacked` dimensions, whole or cut evenly along the others.

    shard: the piece that one process writes, where several do. Chunks then never straddle two pieces, because two
      processes cannot write one file.
    limit: bytes; reached only by cutting, so a chunk of 1 element may be above it.

    >>> chunk_shape((80, 8192, 21824), 4, stacked=1)
    (1, 1366, 21824)
    """
    shard = shape if shard is None else shard
    chunk = [1 if axis < stacked else max(1, size) for axis, size in enumerate(shard)]
    while (num_bytes := math.prod(chunk) * itemsize) > limit and max(chunk) > 1:
        choices = []
        for axis, size in enumerate(chunk):
            piece = max(1, size * limit // num_bytes)
            if shard[axis] != shape[axis]:
                piece = next(p for p in range(piece, 0, -1) if shard[axis] % p == 0)
            piece = -(-size // -(-size // piece)) if shard[axis] == shape[axis] else piece
            if size > 1:
                choices.append((num_bytes // size * piece, axis, piece))
        fitting = [choice for choice in choices if choice[0] <= limit]
        # The first axis that leaves a good size, for rows then stay contiguous; where none fits, the one that shrinks
        # most, and again.
        _, axis, piece = max(fitting, key=lambda c: (min(c[0], limit // 2), -c[1])) if fitting else min(choices)
        chunk[axis] = piece
    return tuple(chunk)


def zarr_metadata(leaf: Leaf) -> Table:
    """The zarr3 metadata of an array, for TensorStore to create it by."""
    little = {"configuration": {"endian": "little"}}
    codecs = [{"name": "bytes", **(little if leaf.spec.dtype.itemsize > 1 else {})}, {"name": "crc32c"}]
    if leaf.files is not None:  # zarr3 calls such a file a shard
        of_index = [{"name": "bytes", **little}, {"name": "crc32c"}]
        inside = {"chunk_shape": list(leaf.chunks), "codecs": codecs, "index_codecs": of_index}
        codecs = [{"name": "sharding_indexed", "configuration": inside}]
    return {
        "shape": list(leaf.spec.shape),
        "data_type": leaf.spec.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(leaf.files or leaf.chunks)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": codecs,
    }


def zarr_difference(stored: Mapping[str, object], leaf: Leaf) -> str | None:
    """Names a difference between a parsed zarr.json and the meta document; None where they agree."""
    expected = zarr_metadata(leaf)
    for key in ("shape", "data_type", "chunk_grid", "codecs"):
        if stored.get(key) != expected[key]:
            return f"{key} is {json.dumps(stored.get(key))}, written as {json.dumps(expected[key])}"
    return None


def chunk_key(index: Sequence[int]) -> str:
    """Path of a chunk inside its array's directory: c/2/0/1; of a scalar, c."""
    return "/".join(["c", *map(str, index)])


def meta_to_json(meta: Meta) -> Table:
    """Serialises the document. Raises UserError where the provenance is not JSON, or a leaf cannot be stored."""
    for item, leaves in meta.items.items():
        for name in leaves:
            if problem := name_problem(name):
                raise UserError(f"{item}: {name}: cannot be stored: {problem}")
    has_files = any(leaf.files is not None for leaves in meta.items.values() for leaf in leaves.values())
    content = {
        "format": 2 if has_files else 1,
        "step": meta.step,
        "config": to_dict(meta.cfg),
        "provenance": list(meta.provenance),
        "items": {
            item: {name: _leaf_to_json(leaf) for name, leaf in leaves.items()} for item, leaves in meta.items.items()
        },
        "versions": meta.versions,
        **({} if meta.adapter is None else {"adapter": to_dict(meta.adapter)}),
    }
    try:
        return {"sha256": _digest(content), **content}
    except (TypeError, ValueError) as error:
        raise UserError(f"provenance: every entry must be a dict of JSON values; {error}") from None


def meta_from_json(text: str | bytes, where: str) -> Meta:
    """Reads the document back.

    Raises:
      DamageError: not JSON, a field is missing, or the checksum differs.
      UserError: written in a format, or with config fields, that this version does not know.
    """
    document = written_table(parse_json(text, where), where, {})
    content = {key: value for key, value in document.items() if key != "sha256"}
    if document.get("sha256") != _digest(content):
        raise DamageError(f"{where}: damaged, its content does not have the checksum that was written with it")
    if content.get("format") not in FORMATS:
        raise UserError(
            f"{where}: format {content.get('format')!r}, but this version of tele_jax reads formats 1 and 2"
        )
    known = as_written(_Document, content, where)
    own = "params" if known.adapter is None else "adapters"
    if own not in known.items:
        raise DamageError(f"{where}: items.{own}: damaged, it is missing")
    return Meta(
        cfg=from_dict(ModelConfig, known.config, f"{where}: config"),
        step=known.step,
        provenance=known.provenance,
        items={item: _leaves(item, leaves, f"{where}: items.{item}") for item, leaves in known.items.items()},
        versions=known.versions,
        adapter=known.adapter,
    )


@dataclasses.dataclass(frozen=True)
class _Document:
    """The document as JSON, without its checksum."""

    format: int
    step: int
    config: Table
    provenance: tuple[Table, ...]
    items: dict[str, dict[str, Table]]
    versions: dict[str, str]
    adapter: Adapter | None = None


def package_versions() -> dict[str, str]:
    """Versions of the packages that write checkpoints, those that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            continue
    return versions


def _digest(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _leaf_to_json(leaf: Leaf) -> Table:
    files = {} if leaf.files is None else {"files": list(leaf.files)}
    return {**leaf.spec.to_json(), "chunks": list(leaf.chunks), **files, **({"scalar": True} if leaf.scalar else {})}


def _leaves(item: str, leaves: Leaves, where: str) -> dict[str, Leaf]:
    if item not in ITEMS:
        raise DamageError(f"{where}: damaged, the items of a checkpoint are {', '.join(ITEMS)}")
    for name in leaves:
        if problem := name_problem(name):
            raise DamageError(f"{where}: damaged, {name!r} is not the name of a leaf: {problem}")
    return {name: _leaf_from_json(leaf, f"{where}.{name}") for name, leaf in leaves.items()}


def name_problem(name: str) -> str | None:
    """Says why a name cannot be that of a leaf, which is a directory inside its item; None where it can."""
    if name.startswith("_"):
        return "Orbax keeps names that begin with _ for itself"
    for part in name.split("."):
        if not part or not is_plain_name(part):
            return "it has an empty key" if not part else f"the key {part!r} leads elsewhere: / \\ or a zero byte"
    return None if is_plain_name(name) else "it is longer than a file name may be (255 bytes)"


def _leaf_from_json(values: Mapping[str, object], where: str) -> Leaf:
    chunks = as_written(tuple[int, ...], values.get("chunks"), f"{where}.chunks")
    scalar = as_written(bool, values.get("scalar", False), f"{where}.scalar")
    files = as_written(tuple[int, ...] | None, values.get("files"), f"{where}.files")
    own = ("chunks", "scalar", "files")
    try:
        spec = ParamSpec.from_json({key: value for key, value in values.items() if key not in own})
    except UserError as error:
        raise DamageError(f"{where}: damaged, {error}") from None
    if len(chunks) != len(spec.shape) or min(chunks, default=1) < 1:
        raise DamageError(f"{where}.chunks: damaged, {list(chunks)} does not cut {list(spec.shape)}")
    if files is not None and (len(files) != len(chunks) or any(f < c or f % c for f, c in zip(files, chunks))):
        raise DamageError(f"{where}.files: damaged, {list(files)} does not hold whole chunks {list(chunks)}")
    return Leaf(spec, chunks, scalar, files)
