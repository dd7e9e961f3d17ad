"""What a step directory looks like; pure functions, no files touched.

    <step>/params/<leaf>/zarr.json, c/<i>/<j>/...     one zarr3 array per leaf, <leaf> its dotted name
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

from tele_jax.axes import ParamSpec
from tele_jax.config import ModelConfig, from_dict, to_dict
from tele_jax.errors import DamageError, UserError

FORMAT = 1
META_FILE = "meta.json"  # in the item "meta"
CHUNK_BYTES = 128 * 2**20  # largest chunk, before its checksum
CRC_BYTES = 4
PACKAGES = ("tele-jax", "jax", "jaxlib", "numpy", "orbax-checkpoint", "tensorstore")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One stored array: what it is, and how it is cut.

    scalar: it was a Python bool, int or float, and comes back as one.
    """

    spec: ParamSpec
    chunks: tuple[int, ...]
    scalar: bool = False

    @property
    def nbytes(self) -> int:
        return self.spec.size * self.spec.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Size of every chunk file: chunks at the edge are stored whole."""
        return math.prod(self.chunks) * self.spec.dtype.itemsize + CRC_BYTES

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each dimension."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.spec.shape, self.chunks, strict=True))

    def __str__(self) -> str:
        return describe(self.spec.shape, self.spec.dtype)


@dataclasses.dataclass(frozen=True)
class Meta:
    """The document of a checkpoint. items: {"params": {leaf name: Leaf}, "opt_state": ..., "data": ...}."""

    cfg: ModelConfig
    step: int
    provenance: tuple[dict[str, Any], ...]
    items: dict[str, dict[str, Leaf]]
    versions: dict[str, str]


def describe(shape: Sequence[int], dtype: Any) -> str:
    """float32[4,8,2]"""
    return f"{jnp.dtype(dtype).name}[{','.join(map(str, shape))}]"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Any pytree as {dotted name: leaf}: dict keys, field names and positions, joined; empty nodes have no name.

    >>> named_leaves({"a": (optax.ScaleByAdamState(count=0, mu={"w": x}, nu={"w": y}), optax.EmptyState())})
    {"a.0.count": 0, "a.0.mu.w": x, "a.0.nu.w": y}

    Raises:
      UserError: a key that cannot be part of a name, or two leaves of one name.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [_key_name(key) for key in path] or ["value"]
        for part in parts:
            if not part or set(part) & set("./\\"):
                raise UserError(
                    f"{'.'.join(parts)}: the key {part!r} cannot be stored: it is empty, or has . / or \\ in it"
                )
        name = ".".join(parts)
        if name.startswith("_"):
            raise UserError(f"{name}: cannot be stored; Orbax keeps names that begin with _ for itself")
        if name in leaves:
            raise UserError(f"{name}: two leaves have this name; a dict mixes keys such as 1 and '1'")
        leaves[name] = leaf
    return leaves


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def matching_param(name: str, shape: Sequence[int], params: Mapping[str, Any]) -> str | None:
    """The parameter that a leaf of an optimizer state belongs to: its name ends in the parameter's, and shapes agree.

    >>> matching_param("0.mu.layers.attn.q", (4, 64, 4, 16), params)
    "layers.attn.q"
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


def zarr_metadata(leaf: Leaf) -> dict[str, Any]:
    """The zarr3 metadata of an array, for TensorStore to create it by."""
    order = {"configuration": {"endian": "little"}} if leaf.spec.dtype.itemsize > 1 else {}
    return {
        "shape": list(leaf.spec.shape),
        "data_type": leaf.spec.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(leaf.chunks)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", **order}, {"name": "crc32c"}],
    }


def zarr_difference(stored: Mapping[str, Any], leaf: Leaf) -> str | None:
    """What a parsed zarr.json says otherwise than the meta document, or None."""
    expected = zarr_metadata(leaf)
    for key in ("shape", "data_type", "chunk_grid", "codecs"):
        if stored.get(key) != expected[key]:
            return f"{key} is {json.dumps(stored.get(key))}, written as {json.dumps(expected[key])}"
    return None


def chunk_key(index: Sequence[int]) -> str:
    """Path of a chunk inside its array's directory: c/2/0/1; of a scalar, c."""
    return "/".join(["c", *map(str, index)])


def meta_to_json(meta: Meta) -> dict[str, Any]:
    """The document as it is written. Raises UserError where the provenance is not JSON."""
    content = {
        "format": FORMAT,
        "step": meta.step,
        "config": to_dict(meta.cfg),
        "provenance": list(meta.provenance),
        "items": {
            item: {name: _leaf_to_json(leaf) for name, leaf in leaves.items()} for item, leaves in meta.items.items()
        },
        "versions": meta.versions,
    }
    try:
        return {"sha256": _digest(content), **content}
    except (TypeError, ValueError) as error:
        raise UserError(f"provenance: every entry must be a dict of JSON values; {error}") from None


def meta_from_json(text: str, where: str) -> Meta:
    """Reads the document back.

    Raises:
      DamageError: not JSON, a field is missing, or the checksum differs.
      UserError: written in a format, or with config fields, that this version does not know.
    """
    try:
        document = json.loads(text)
        stored, content = document["sha256"], {k: v for k, v in document.items() if k != "sha256"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{where}: damaged, not the JSON document of a checkpoint ({error})") from None
    if stored != _digest(content):
        raise DamageError(f"{where}: damaged, its content does not have the checksum that was written with it")
    if content["format"] != FORMAT:
        raise UserError(f"{where}: format {content['format']}, but this version of tele_jax reads format {FORMAT}")
    return Meta(
        cfg=from_dict(ModelConfig, content["config"], f"{where}: config"),
        step=content["step"],
        provenance=tuple(content["provenance"]),
        items={
            item: {name: _leaf_from_json(leaf) for name, leaf in leaves.items()}
            for item, leaves in content["items"].items()
        },
        versions=content["versions"],
    )


def package_versions() -> dict[str, str]:
    """Versions of the packages that write checkpoints, those that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            continue
    return versions


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    return {**leaf.spec.to_json(), "chunks": list(leaf.chunks), **({"scalar": True} if leaf.scalar else {})}


def _leaf_from_json(values: Mapping[str, Any]) -> Leaf:
    return Leaf(ParamSpec.from_json(values), tuple(values["chunks"]), values.get("scalar", False))
