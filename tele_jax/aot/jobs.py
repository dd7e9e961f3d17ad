"""The jobs that can be planned for a slice: a training step, a growth, a step of decoding.

The first two are the programs that a run uses; a step of decoding is one turn of the loop that generates, at a fixed
slot of the cache.

Every job has `slice`, `mesh`, `lower(mesh)`, `held(mesh)`, bytes by kind that one device holds all the while,
`tokens` and `model_flops` of one execution over all devices, and `settings`, its figures for people.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from tele_jax import growth
from tele_jax.aot import decoding
from tele_jax.aot.topology import Slice
from tele_jax.config import ModelConfig, require
from tele_jax.model.spec import abstract_params, spec
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import MESH_AXES, batch_sharding, param_shardings
from tele_jax.train.optimizer import optimizer
from tele_jax.train.step import flops_per_token, lower_step, state_shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnSlice:
    """A mesh over the devices of a slice."""

    slice: Slice
    mesh: MeshConfig

    def __post_init__(self):
        axes = f"data={self.mesh.data} x fsdp={self.mesh.fsdp} x tensor={self.mesh.tensor}"
        size = self.mesh.data * self.mesh.fsdp * self.mesh.tensor
        require(
            size == self.slice.num_devices,
            f"mesh {axes} = {size} devices, but {self.slice.name} has {self.slice.num_devices}; change the mesh",
        )
        slices = self.slice.num_slices
        require(
            self.mesh.data % slices == 0,
            f"mesh data={self.mesh.data}: there are {slices} slices, and only data may cross them; make it a multiple",
        )

    @property
    def abstract_mesh(self) -> AbstractMesh:
        return AbstractMesh((self.mesh.data, self.mesh.fsdp, self.mesh.tensor), MESH_AXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(OnSlice):
    """A training step on a slice. batch_size: sequences over all devices; seq_len: tokens."""

    cfg: ModelConfig
    batch_size: int
    seq_len: int
    microbatches: int = 1
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))

    kind = "train"

    def __post_init__(self):
        super().__post_init__()
        require(
            self.batch_size % self.microbatches == 0,
            f"batch_size={self.batch_size} does not divide into microbatches={self.microbatches}",
        )
        self.cfg.require_positions(self.seq_len)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def model_flops(self) -> float:
        return flops_per_token(self.cfg, self.seq_len) * self.tokens

    @property
    def settings(self) -> dict[str, Any]:
        names = ("batch_size", "seq_len", "microbatches")
        return {name: getattr(self, name) for name in names} | {"remat": self.cfg.remat}

    @functools.cached_property
    def _tx(self) -> Any:
        return optimizer(self.cfg, self.optimizer, lambda step: jnp.float32(1.0))

    def check(self) -> None:
        """What can be known to be wrong without compiling: shapes that do not divide over the mesh.

        Raises:
          UserError: naming the leaf or the figure to change.
        """
        param_shardings(spec(self.cfg), self.abstract_mesh)
        batch_sharding(self.abstract_mesh, self.batch_size // self.microbatches)

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        sizes = {name: getattr(self, name) for name in ("batch_size", "seq_len", "microbatches")}
        return lower_step(self.cfg, self._tx, mesh, **sizes)

    def held(self, mesh: Mesh) -> dict[str, int]:
        params, opt = state_shardings(self.cfg, self._tx, mesh)
        shapes = abstract_params(self.cfg)
        state = jax.eval_shape(self._tx.init, shapes)
        return {"parameters": sharded_bytes(shapes, params), "optimizer": sharded_bytes(state, opt)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowJob(OnSlice):
    """A growth on the mesh, of parameters and optimizer state: what a run does between two stages of training."""

    plan: growth.Plan
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))
    optimizer_state: bool = True

    kind = "grow"
    tokens, model_flops = 0, 0.0

    @property
    def settings(self) -> dict[str, Any]:
        return {"policy": self.plan.policy, "optimizer_state": self.optimizer_state}

    def _state(self, mesh: Mesh) -> tuple[Any, Any]:
        """(shapes, shardings) of the optimizer state before; (None, None) where it does not grow."""
        if not self.optimizer_state:
            return None, None
        tx = optimizer(self.plan.src_cfg, self.optimizer, lambda step: jnp.float32(1.0))
        shapes = jax.eval_shape(tx.init, abstract_params(self.plan.src_cfg))
        return shapes, state_shardings(self.plan.src_cfg, tx, mesh)[1]

    def check(self) -> None:
        """Raises UserError where one of the two models does not divide over the mesh."""
        for cfg in (self.plan.src_cfg, self.plan.dst_cfg):
            param_shardings(spec(cfg), self.abstract_mesh)

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        shapes, shardings = self._state(mesh)
        params = _placed(abstract_params(self.plan.src_cfg), param_shardings(spec(self.plan.src_cfg), mesh))
        state = None if shapes is None else _placed(shapes, shardings)
        with jax.set_mesh(mesh):
            return growth.sharded(self.plan, mesh, shapes).lower(params, state)

    def held(self, mesh: Mesh) -> dict[str, int]:
        """The model before and after: neither goes until the growth is verified."""
        sizes = {}
        shapes, shardings = self._state(mesh)
        for name, cfg in (("parameters", self.plan.src_cfg), ("grown parameters", self.plan.dst_cfg)):
            sizes[name] = sharded_bytes(abstract_params(cfg), param_shardings(spec(cfg), mesh))
        if shapes is not None:
            grown = jax.eval_shape(lambda state: growth.apply_opt(self.plan, state), shapes)
            sizes["optimizer"] = sharded_bytes(shapes, shardings)
            sizes["grown optimizer"] = sharded_bytes(grown, growth.state_shardings(self.plan, mesh, shapes))
        return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeJob(OnSlice):
    """One step of decoding against a full cache: a token for each of batch_size rows, seq_len tokens each before it."""

    cfg: ModelConfig
    batch_size: int
    seq_len: int

    kind = "decode"

    @property
    def tokens(self) -> int:
        return self.batch_size

    @property
    def model_flops(self) -> float:
        """Two per parameter of every kernel and token, and attention to all of the cache."""
        cfg = self.cfg
        attention = cfg.num_layers * cfg.num_heads * cfg.head_dim * self.seq_len
        kernels = flops_per_token(cfg, 0) / 6
        return self.batch_size * (2.0 * kernels + 4.0 * attention)

    @property
    def settings(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "seq_len": self.seq_len}

    def check(self) -> None:
        """Raises UserError where shapes do not divide over the mesh, or the model has no such positions."""
        self.cfg.require_positions(self.seq_len)
        param_shardings(spec(self.cfg), self.abstract_mesh)
        batch_sharding(self.abstract_mesh, self.batch_size)

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return decoding.lower_step(self.cfg, mesh, batch_size=self.batch_size, length=self.seq_len)

    def held(self, mesh: Mesh) -> dict[str, int]:
        params, cache = decoding.abstract_inputs(self.cfg, mesh, batch_size=self.batch_size, length=self.seq_len)
        return {"parameters": _placed_bytes(params), "cache": _placed_bytes(cache)}


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _placed_bytes(tree: Any) -> int:
    return sharded_bytes(tree, jax.tree.map(lambda x: x.sharding, tree))


def sharded_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x, s in pairs)
