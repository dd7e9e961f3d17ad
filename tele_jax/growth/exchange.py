"""Index maps along axes that are cut over the devices of a mesh, without a device holding a whole axis.

jnp.take along such an axis makes the compiler gather all of it on every device. Here each device sends the others what
they take from its own part: widening 8,192 channels on 256 devices to 10,240, each needs the parts of two or three.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tele_jax.growth.axis_map import NEW


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """Each device sends to one other at most, and receives from one.

    pairs: (sender, receiver). send: int32[ways, n], the entries of its own part that each device sends.
    """

    pairs: tuple[tuple[int, int], ...]
    send: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """Rounds, and then what each device takes, int32[ways, n], from its part and all it received, one after another."""

    rounds: tuple[Round, ...]
    take: np.ndarray


def exchange(index: np.ndarray, src_size: int, ways: int) -> Exchange:
    """How the entries `index`, int[dst_size], of an axis of src_size come to where they belong; NEW may be anything.

    Both sizes are cut into `ways` equal parts. Where no part is needed in more than d places, nor a place needs more
    than d, there are fewer than 2d rounds.
    """
    size = src_size // ways
    wanted = index.reshape(ways, -1)
    take = np.zeros(wanted.shape, np.int32)
    pairs: list[dict[int, int]] = []  # of each round, receiver -> sender
    for receiver, entries in enumerate(wanted):
        for sender in np.unique(entries[entries != NEW] // size).tolist():
            if sender != receiver:
                free = (r for r in pairs if receiver not in r and sender not in r.values())
                chosen = next(free, None)
                if chosen is None:
                    pairs.append(chosen := {})
                chosen[receiver] = sender
    for receiver, entries in enumerate(wanted):
        own = (entries != NEW) & (entries // size == receiver)
        take[receiver, own] = entries[own] - receiver * size
    rounds, before = [], size
    for found in pairs:
        parts = {}
        for receiver, sender in found.items():
            entries = wanted[receiver]
            of_sender = (entries != NEW) & (entries // size == sender)
            parts[receiver, sender], place = np.unique(entries[of_sender] - sender * size, return_inverse=True)
            take[receiver, of_sender] = before + place
        longest = max(map(len, parts.values()))
        send = np.zeros((ways, longest), np.int32)
        for (_, sender), part in parts.items():
            send[sender, : len(part)] = part
        rounds.append(Round(tuple((sender, receiver) for receiver, sender in found.items()), send))
        before += longest
    return Exchange(tuple(rounds), take)


def take(array: jax.Array, indices: Sequence[np.ndarray], cuts: Sequence[str | None], mesh: Mesh) -> jax.Array:
    """The entries of an array at `indices`, one int array per dimension, NEW for those that may be anything.

    cuts: the mesh axis that each dimension is cut over, before and after; None where it is whole.
    """
    changes = [
        (dimension, index)
        for dimension, index in enumerate(indices)
        if not np.array_equal(index, np.arange(array.shape[dimension]))
    ]
    # What travels should be small: axes that are cut before those that are whole, those that grow most last.
    changes.sort(key=lambda change: (cuts[change[0]] is None, len(change[1]) / array.shape[change[0]]))
    sizes = array.shape

    def local(block: jax.Array) -> jax.Array:
        for dimension, index in changes:
            cut = cuts[dimension]
            if cut is None:
                block = _at(block, np.maximum(index, 0), dimension)
            else:
                block = _exchanged(block, exchange(index, sizes[dimension], mesh.shape[cut]), dimension, cut)
        return block

    return jax.shard_map(local, mesh=mesh, in_specs=P(*cuts), out_specs=P(*cuts))(array)


def _exchanged(block: jax.Array, plan: Exchange, dimension: int, cut: str) -> jax.Array:
    here = jax.lax.axis_index(cut)
    received = [jax.lax.ppermute(_at(block, jnp.asarray(r.send)[here], dimension), cut, r.pairs) for r in plan.rounds]
    return _at(jnp.concatenate([block, *received], dimension), jnp.asarray(plan.take)[here], dimension)


def _at(block: jax.Array, index: jax.Array | np.ndarray, dimension: int) -> jax.Array:
    return jnp.take(block, index, axis=dimension, mode="clip")
