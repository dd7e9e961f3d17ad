"""The step of decoding that generate.py runs, as a program for devices that need not be there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tele_jax.config import ModelConfig
from tele_jax.inference.generate import State, cache_shardings, cache_slots, decode_step, rope_length_of, sampling
from tele_jax.model import decoder
from tele_jax.model.spec import spec
from tele_jax.sharding import BATCH, batch_sharding, param_shardings


def abstract_inputs(cfg: ModelConfig, mesh: Mesh, *, batch_size: int, length: int) -> tuple[Any, decoder.Cache]:
    """(params as `prepare` makes them, cache of `length` slots) of batch_size rows: shapes, with their places on mesh.

    Raises:
      UserError: a parameter or the rows do not divide over the mesh.
    """
    batch_sharding(mesh, batch_size)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype if leaf.role == "scale" else cfg.dtype, sharding=place
        ),
        spec(cfg),
        param_shardings(spec(cfg), mesh),
    )
    cache = jax.eval_shape(lambda: decoder.empty_cache(cfg, batch_size, cache_slots(length, cfg.max_seq_len)))
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return params, jax.tree.map(place, cache, cache_shardings(cfg, mesh))


def lower_step(cfg: ModelConfig, mesh: Mesh, *, batch_size: int, length: int) -> jax.stages.Lowered:
    """One step of greedy decoding against a cache of `length` tokens that is full, ready to be compiled: nothing is
    allocated, and the devices of the mesh need not be there.
    """
    params, cache = abstract_inputs(cfg, mesh, batch_size=batch_size, length=length)
    slots = cache.k.shape[3]
    rows = lambda dtype, *more: jax.ShapeDtypeStruct(  # noqa: E731
        (batch_size, *more), dtype, sharding=NamedSharding(mesh, P(BATCH))
    )
    state = State(
        tokens=rows(jnp.int32, slots),
        lengths=rows(jnp.int32),
        token=rows(jnp.int32),
        done=rows(bool),
        broken=rows(bool),
        step=jax.ShapeDtypeStruct((), jnp.int32),
        slot=None,
        keys=rows(jax.eval_shape(lambda: jax.random.key(0)).dtype),
        seen=None,
    )
    rope_length, how, stop_ids = rope_length_of(cfg, length), sampling(), np.full(16, -1, np.int32)

    def step(params, state, cache):
        # The slot is a constant of this program: with it, the loop over the slots in use has a known length.
        state = state.replace(slot=jnp.int32(slots - 1))
        return decode_step(cfg, rope_length, params, state, cache, how, stop_ids)

    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=2).lower(params, state, cache)
