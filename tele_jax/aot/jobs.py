"""Programs that can be planned for a TPU slice: a training step, a growth, a step of decoding.

The first two are the programs that a run uses; a step of decoding is one turn of the loop that generates, at a fixed
slot of the cache. Nothing is allocated, and the devices need not be there.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from tele_jax import growth
from tele_jax.aot.topology import Slice
from tele_jax.axes import PyTree
from tele_jax.config import ModelConfig, checked, require
from tele_jax.files import Table
from tele_jax.inference.generate import State, cache_shardings, cache_slots, decode_step, rope_length_of, sampling
from tele_jax.model import decoder
from tele_jax.model.spec import abstract_params, spec
from tele_jax.settings import MeshConfig, OptimizerConfig, TrainStage
from tele_jax.sharding import MESH_AXES, batch_sharding, param_shardings
from tele_jax.stages import find_kind
from tele_jax.train.compiler_options import SETS, Options
from tele_jax.train.optimizer import optimizer
from tele_jax.train.step import flops_per_token, lower_step, state_shardings

_OPTIMIZER = OptimizerConfig(learning_rate=1e-4)
Arrays = Table  # trees of jax.ShapeDtypeStruct with shardings, by kind


@checked
class Job(abc.ABC):
    """A program on a mesh over the devices of a slice. `shown` names the fields that people read in its figures."""

    slice: Slice
    mesh: MeshConfig

    kind: ClassVar[str]
    shown: ClassVar[tuple[str, ...]]

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

    @property
    def settings(self) -> Table:
        return {name: getattr(self, name) for name in self.shown}

    @property
    def tokens(self) -> int:
        """Tokens of one execution, over all devices."""
        return 0

    @property
    def model_flops(self) -> float:
        """FLOPs of the model's formula for one execution, over all devices."""
        return 0.0

    @abc.abstractmethod
    def check(self) -> None:
        """Raises UserError, naming the leaf or the figure to change, for shapes that do not divide over the mesh."""

    @abc.abstractmethod
    def arrays(self, mesh: Mesh) -> Arrays:
        """The arrays that are in memory all the while, inputs of the program first."""

    @abc.abstractmethod
    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The program before compilation."""

    def held(self, mesh: Mesh) -> dict[str, int]:
        """Bytes of `arrays` on one device."""
        return {
            kind: sharded_bytes(tree, jax.tree.map(lambda x: x.sharding, tree))
            for kind, tree in self.arrays(mesh).items()
        }


@checked
class ModelJob(Job):
    """A job of one model. batch_size: sequences over all devices; seq_len: tokens of each."""

    cfg: ModelConfig
    batch_size: int
    seq_len: int

    microbatches = 1
    shown = ("batch_size", "seq_len")

    def __post_init__(self):
        super().__post_init__()
        require(
            self.batch_size % self.microbatches == 0,
            f"batch_size={self.batch_size} does not divide into microbatches={self.microbatches}",
        )
        self.cfg.require_positions(self.seq_len)

    def check(self) -> None:
        param_shardings(spec(self.cfg), self.abstract_mesh)
        batch_sharding(self.abstract_mesh, self.batch_size // self.microbatches)


@checked
class TrainJob(ModelJob):
    """A training step."""

    microbatches: int = 1
    optimizer: OptimizerConfig = _OPTIMIZER
    stage: TrainStage | None = None  # whose loss and batches the step has; None: those of pretraining
    masks: dict[str, int] = dataclasses.field(default_factory=dict)  # size of every axis that has a mask in the step
    # Options of the compiler; None: the first set of the generation (train/compiler_options.py), as training takes it.
    compiler_options: dict[str, bool | int | str] | None = None

    kind = "train"
    shown = ("batch_size", "seq_len", "microbatches", "remat", "masks", "compiled_with")

    @property
    def remat(self) -> str:
        return self.cfg.remat

    @property
    def compiled_with(self) -> Options:
        return next(iter(self.option_sets.values())) if self.compiler_options is None else self.compiler_options

    @property
    def option_sets(self) -> Mapping[str, Options]:
        """The sets of compiler options of the generation, by name; the first is what training takes."""
        return SETS[self.slice.generation.name]

    @property
    def tokens(self) -> int:
        shapes = self._own_shapes()
        return self.batch_size * self.seq_len if shapes is None else math.prod(shapes["loss_weights"].shape)

    def _own_shapes(self) -> dict[str, jax.ShapeDtypeStruct] | None:
        """The arrays of a batch of the stage; None where they are those of pretraining."""
        if self.stage is None or not hasattr(kind := find_kind(self.stage.kind), "shapes"):
            return None
        sizes = {name: getattr(self, name) for name in ("batch_size", "seq_len", "microbatches")}
        return kind.shapes(dataclasses.replace(self.stage, **sizes))

    @property
    def model_flops(self) -> float:
        return flops_per_token(self.cfg, self.seq_len) * self.tokens

    def arrays(self, mesh: Mesh) -> Arrays:
        return _state(self.cfg, self.optimizer, mesh)

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        sizes = ("batch_size", "seq_len", "microbatches", "compiler_options")
        how: Table = {name: getattr(self, name) for name in sizes}
        if (shapes := self._own_shapes()) is not None:
            assert self.stage is not None
            how |= {"loss": functools.partial(find_kind(self.stage.kind).loss, self.stage), "batch": shapes}
        if self.masks:
            how["masks"] = {axis: jax.ShapeDtypeStruct((size,), jnp.float32) for axis, size in self.masks.items()}
        return lower_step(self.cfg, _transformation(self.cfg, self.optimizer), mesh, **how)


@checked
class GrowJob(Job):
    """A growth on the mesh, of parameters and optimizer state, as a run does it between two stages of training."""

    plan: growth.Plan
    optimizer: OptimizerConfig = _OPTIMIZER
    optimizer_state: bool = True

    kind = "grow"
    shown = ("policy", "optimizer_state")

    @property
    def policy(self) -> str:
        return self.plan.policy

    def check(self) -> None:
        for cfg in (self.plan.src_cfg, self.plan.dst_cfg):
            param_shardings(spec(cfg), self.abstract_mesh)

    def arrays(self, mesh: Mesh) -> Arrays:
        """The model before and after: neither goes until the growth is verified."""
        src, dst = self.plan.src_cfg, self.plan.dst_cfg
        before = _state(src, self.optimizer, mesh)
        after = _placed(abstract_params(dst), param_shardings(spec(dst), mesh))
        if not self.optimizer_state:
            return {"parameters": before["parameters"], "grown parameters": after}
        state = before["optimizer"]
        grown = jax.eval_shape(lambda state: growth.apply_opt(self.plan, state), state)
        grown = _placed(grown, growth.state_shardings(self.plan, mesh, state))
        return {**before, "grown parameters": after, "grown optimizer": grown}

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        arrays = self.arrays(mesh)
        state = arrays.get("optimizer")
        with jax.set_mesh(mesh):
            return growth.sharded(self.plan, mesh, state).lower(arrays["parameters"], state)


@checked
class DecodeJob(ModelJob):
    """One step of greedy decoding: a token for each of batch_size rows, against a cache full of seq_len tokens each."""

    kind = "decode"

    @property
    def tokens(self) -> int:
        return self.batch_size

    @property
    def model_flops(self) -> float:
        """Two FLOPs for every parameter of a kernel and token, and attention to all of the cache."""
        attention = self.cfg.num_layers * self.cfg.num_heads * self.cfg.head_dim * self.seq_len
        kernels = flops_per_token(self.cfg, 0) / 6
        return self.batch_size * (2.0 * kernels + 4.0 * attention)

    def arrays(self, mesh: Mesh) -> Arrays:
        """Parameters in the dtypes that generate.prepare gives them, and the cache."""
        cfg = self.cfg
        cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if leaf.role == "scale" else cfg.dtype)  # noqa: E731
        slots = cache_slots(self.seq_len, cfg.max_seq_len)
        cache = jax.eval_shape(lambda: decoder.empty_cache(cfg, self.batch_size, slots))
        return {
            "parameters": _placed(jax.tree.map(cast, spec(cfg)), param_shardings(spec(cfg), mesh)),
            "cache": _placed(cache, cache_shardings(cfg, mesh)),
        }

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        params, cache = itertools.islice(self.arrays(mesh).values(), 2)
        slots, by_rows = cache.k.shape[3], batch_sharding(mesh, self.batch_size)

        def rows(dtype: DTypeLike, *more: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.batch_size, *more), dtype, sharding=by_rows)

        per_row = dict(lengths=jnp.int32, token=jnp.int32, done=bool, broken=bool, keys=jax.random.key(0).dtype)
        step_number = jax.ShapeDtypeStruct((), jnp.int32)
        by_row: Table = {name: rows(dtype) for name, dtype in per_row.items()}
        by_row |= {
            "tokens": rows(jnp.int32, slots),
            "logprobs": rows(jnp.float32, slots),
            "step": step_number,
            "slot": None,
        }
        state = State(seen=None, **by_row)
        rope_length, how, stop_ids = rope_length_of(self.cfg, self.seq_len), sampling(), np.full(16, -1, np.int32)

        def step(params, state, cache):
            # The slot is a constant of this program: with it, the loop over the slots in use has a known length.
            state = state.replace(slot=jnp.int32(slots - 1))
            return decode_step(self.cfg, rope_length, params, state, cache, how, stop_ids)

        with jax.set_mesh(mesh):
            return jax.jit(step, donate_argnums=2).lower(params, state, cache)


@checked
class RolloutJob(DecodeJob):
    """A step of decoding in a rollout, while the state of training stays in memory."""

    optimizer: OptimizerConfig = _OPTIMIZER

    def arrays(self, mesh: Mesh) -> Arrays:
        """The arrays of decoding and the state of training; parameters that serve both as they are count once."""
        state = _state(self.cfg, self.optimizer, mesh)
        if self.cfg.dtype == self.cfg.param_dtype:
            del state["parameters"]
        return super().arrays(mesh) | {f"training {name}": tree for name, tree in state.items()}


def _transformation(cfg: ModelConfig, config: OptimizerConfig) -> PyTree:
    return optimizer(cfg, config, lambda step: jnp.float32(1.0))


def _state(cfg: ModelConfig, config: OptimizerConfig, mesh: Mesh) -> Arrays:
    """Parameters and optimizer state of a model in training."""
    shapes, tx = abstract_params(cfg), _transformation(cfg, config)
    params, state = state_shardings(cfg, tx, mesh)
    return {"parameters": _placed(shapes, params), "optimizer": _placed(jax.eval_shape(tx.init, shapes), state)}


def _placed(shapes: object, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def sharded_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Bytes of a tree of shapes on one device."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x, s in pairs)
