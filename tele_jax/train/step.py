"""The training step, one pure function compiled for a mesh, and bits per byte of held-out text."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tele_jax.axes import Params, PyTree, map_param_subtrees
from tele_jax.config import ModelConfig
from tele_jax.model.loss import next_token_loss
from tele_jax.model.spec import abstract, abstract_params, spec
from tele_jax.sharding import BATCH, batch_sharding, param_shardings, put_batch, replicated
from tele_jax.train.compiler_options import Options, options_of, refused

Step = Callable[..., tuple[PyTree, PyTree, dict[str, jax.Array]]]
# loss(cfg, params, batch, masks, beside) -> (sum, weight, {name: sum}): that of a kind, given its stage
Loss = Callable[[ModelConfig, PyTree, Mapping[str, jax.Array], PyTree, PyTree], tuple[jax.Array, jax.Array, dict]]


def _next_token(cfg, params, batch, masks, beside):
    return *next_token_loss(cfg, params, batch, masks), {}


def trained_as(cfg: ModelConfig) -> ModelConfig:
    """The config that a model is trained in: bfloat16 parameters become float32, which holds each of them exactly.

    bfloat16 resolves 2^-8 of a value. An update is often less, and would be rounded away; products are computed in
    cfg.dtype all the same.
    """
    return cfg.replace(param_dtype="float32") if cfg.param_dtype == "bfloat16" else cfg


def widened(cfg: ModelConfig, params: PyTree, shardings: PyTree) -> PyTree:
    """The parameters, cast to cfg.param_dtype where that is wider (trained_as), so that none changes."""
    dtype = jnp.dtype(cfg.param_dtype)
    if all(leaf.dtype == dtype for leaf in jax.tree.leaves(params)):
        return params
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree), out_shardings=shardings)(params)


def state_shardings(
    cfg: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, trained: Params | None = None
) -> tuple[PyTree, PyTree]:
    """Shardings of parameters and optimizer state: moments lie with their parameters, the rest lies everywhere.

    trained: as `make_step` takes it.
    """
    trained = spec(cfg) if trained is None else trained
    params = param_shardings(trained, mesh)
    opt_state = jax.eval_shape(tx.init, abstract(trained))
    return params, map_param_subtrees(lambda path, tree: params, opt_state, trained, lambda *_: replicated(mesh))


def make_step(
    cfg: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    batch_size: int,
    microbatches: int = 1,
    loss: Loss = _next_token,
    trained: Params | None = None,
    compiler_options: Options | None = None,
) -> Step:
    """step(params, opt_state, batch, masks=None, beside=None) -> (params, opt_state, figures).

    figures: "loss", "grad_norm", "weight" (the sum of the loss weights), "counted" (how many are not 0)
    and "positions" (how many there are).

    params and opt_state are donated. batch holds arrays [batch_size, S] as data.feed gives them; the loss, and what
    else it returns by name, is the mean over the weights of the whole batch, however many microbatches it is computed
    in; gradients are accumulated in float32 or better. masks (see growth.masks) and beside (arrays that the loss reads)
    may change without compiling again; masks=None is the plain model, compiled on its own. trained: tree of ParamSpec
    of params, where they are not all of the model, and the loss finds the rest in beside. compiler_options: None takes
    those of the mesh's TPU generation (train/compiler_options.py), {} the compiler's own. Warns of bfloat16 parameters,
    which lose small updates: see `trained_as`.
    """
    if trained is None and trained_as(cfg) != cfg:
        warnings.warn(
            f"param_dtype={cfg.param_dtype!r}: updates below 2^-9 of a parameter are rounded away; cast the parameters "
            "to float32 and train with trained_as(cfg)",
            stacklevel=2,
        )
    compiled = _jitted(cfg, tx, mesh, batch_size, microbatches, loss, trained, compiler_options)

    def run(params, opt_state, batch, masks=None, beside=None):
        with jax.set_mesh(mesh), refused():
            return compiled(params, opt_state, batch, masks, beside)

    return run


def lower_step(
    cfg: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    batch_size: int,
    seq_len: int,
    microbatches: int = 1,
    loss: Loss = _next_token,
    batch: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    masks: PyTree = None,
    compiler_options: Options | None = None,
) -> jax.stages.Lowered:
    """The step of a stage for batches [batch_size, seq_len], by default that of pretraining, ready to be compiled.

    Nothing is allocated, and the devices of the mesh need not be there. batch: its arrays, where they are others.
    masks: shapes of the masks {axis: float32[size]} of a growth; None: the plain model. compiler_options: as in
    `make_step`.
    """
    params = abstract_params(cfg)
    if batch is None:
        whole = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}
        dtypes, rows = {**whole, "loss_weights": jnp.float32}, (batch_size, seq_len)
        batch = {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in dtypes.items()}
    with jax.set_mesh(mesh):
        step = _jitted(cfg, tx, mesh, batch_size, microbatches, loss, None, compiler_options)
        return step.lower(params, jax.eval_shape(tx.init, params), batch, masks, None)


def _jitted(
    cfg: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    batch_size: int,
    microbatches: int,
    loss: Loss,
    trained: Params | None,
    compiler_options: Options | None,
):
    if compiler_options is None:
        compiler_options = options_of(mesh.devices.flat[0].device_kind)
    params_sharding, opt_sharding = state_shardings(cfg, tx, mesh, trained)
    rows = batch_sharding(mesh, batch_size // microbatches)

    def one(params, batch, masks, beside):
        def loss_sum(params):
            total, weight, figures = loss(cfg, params, batch, masks, beside)
            return total, (weight, figures)

        (total, (weight, figures)), gradients = jax.value_and_grad(loss_sum, has_aux=True)(params)
        return (total, weight, gradients), figures

    def accumulate(params, batch, masks, beside):
        if microbatches == 1:
            return one(params, batch, masks, beside)
        cut = NamedSharding(mesh, P(None, BATCH))

        def part(x):
            # Every microbatches-th row: each device's own rows spread over all parts, and none has to move. Blocks of
            # rows would have to, and even across slices.
            parts = x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(parts, cut)

        def add(carry, part):
            sums, figures = one(params, part, masks, beside)
            return jax.tree.map(lambda total, new: total + new.astype(total.dtype), carry, sums), figures

        scalar = jnp.zeros([], jnp.promote_types(cfg.dtype, jnp.float32))
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
        sums, figures = jax.lax.scan(add, (scalar, scalar, zeros), jax.tree.map(part, batch))
        return sums, {name: jnp.sum(parts, axis=0) for name, parts in figures.items()}

    def step(params, opt_state, batch, masks, beside):
        (total, weight, gradients), figures = accumulate(params, batch, masks, beside)
        # A batch without a single counted token has no gradient, instead of a division by zero.
        scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
        gradients = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), gradients, params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        metrics = {"loss": total * scale, "grad_norm": optax.tree.norm(gradients), "weight": weight}
        metrics |= {name: value * scale for name, value in figures.items()}
        if "loss_weights" in batch:
            metrics["counted"] = jnp.count_nonzero(batch["loss_weights"])
            metrics["positions"] = jnp.float32(batch["loss_weights"].size)
        return optax.apply_updates(params, updates), opt_state, metrics

    return jax.jit(
        step,
        in_shardings=(params_sharding, opt_sharding, rows, replicated(mesh), None),
        out_shardings=(params_sharding, opt_sharding, replicated(mesh)),
        donate_argnums=(0, 1),
        compiler_options=dict(compiler_options) or None,
    )


def flops_per_token(cfg: ModelConfig, seq_len: int, trained: Params | None = None) -> float:
    """Model FLOPs to train on one token: 6 per parameter of every kernel, and causal attention.

    Neither recomputation nor the masked half of attention counts (arXiv 2204.02311, appendix B, has the latter).
    trained: spec of adapters, where they alone are trained: they count 6, and the kernels, which need no gradient, 4.
    """
    head = cfg.padded_vocab_size * cfg.embed_dim if cfg.tie_embeddings else 0
    kernels = head + sum(leaf.size for leaf in jax.tree.leaves(spec(cfg)) if leaf.role == "kernel")
    products = 6.0 * kernels if trained is None else 4.0 * kernels + 6.0 * sum(s.size for s in jax.tree.leaves(trained))
    return products + 6.0 * cfg.num_layers * cfg.num_heads * cfg.head_dim * seq_len


@functools.partial(jax.jit, static_argnums=0)
def _loss(cfg, params, batch, masks):
    return next_token_loss(cfg, params, batch, masks)


def bits_per_byte(
    cfg: ModelConfig, params: Params, held_out: Mapping[str, Any], mesh: Mesh, masks: PyTree = None
) -> dict[str, float]:
    """Bits per byte of every domain, comparable across tokenizers: sum of losses / ln 2 / bytes (arXiv 2404.16645).

    held_out: what data.batches.held_out returns, by domain: `batches` of rows and `num_bytes` of text in them. The
    number of rows has to divide over the mesh, over which they are cut. Every process has all rows, and gets all
    figures.
    """
    result = {}
    with jax.set_mesh(mesh):
        for domain, text in held_out.items():
            total = 0.0
            for batch in text.batches:
                placed = put_batch(batch, mesh, len(batch["tokens"]))
                total += float(_loss(cfg, params, placed, masks)[0])
            result[domain] = total / math.log(2) / text.num_bytes
    return result
