"""Reading every chunk of a checkpoint to see that it is what was written."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator

from etils import epath

from tele_jax.checkpoint import layout, store
from tele_jax.checkpoint.lazy import Lazy, LazyArray
from tele_jax.errors import DamageError

_IN_FLIGHT_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Damage:
    """One chunk that is not what was written. leaf: with its item, "params/layers.attn.q"."""

    leaf: str
    file: epath.Path
    problem: str


def verify(lazy: Lazy) -> Iterator[Damage]:
    """Yields every chunk that is missing, of another size, or without its checksum.

    What is read and not yet checked is 512 MiB, or one chunk where that is larger.
    """
    for arrays in lazy.items.values():
        for array in arrays.values():
            yield from _verify_array(array)


def _verify_array(array: LazyArray) -> Iterator[Damage]:
    pending: collections.deque = collections.deque()
    window = max(1, _IN_FLIGHT_BYTES // array.leaf.chunk_bytes)
    for index in itertools.product(*(range(count) for count in array.leaf.grid)):
        file = array.path / layout.chunk_key(index)
        if problem := _size_problem(array, file):
            yield Damage(array.name, file, problem)
            continue
        if len(pending) == window:
            yield from _checked(array, *pending.popleft())
        part = tuple(
            slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, array.chunks, array.shape, strict=True)
        )
        pending.append((file, array.tensorstore[part].read()))
    for file, future in pending:
        yield from _checked(array, file, future)


def _size_problem(array: LazyArray, file: epath.Path) -> str | None:
    try:
        size = file.stat().length
    except FileNotFoundError:
        return "missing"
    return None if size == array.leaf.chunk_bytes else f"{size:,} bytes, expected {array.leaf.chunk_bytes:,}"


def _checked(array: LazyArray, file: epath.Path, future: store.Read) -> Iterator[Damage]:
    try:
        store.finish(future, array.name)
    except DamageError:
        yield Damage(array.name, file, "its checksum is not that of its content")
