"""Policies, which make a plan from two configs: axis names say which entries of a leaf are zero, fresh or scaled.

The residual stream is the axis `embed`: a leaf with embed among its outputs writes to it, one with embed among its
inputs reads from it. Growth keeps the function when, on every grown axis, exactly one of the two sides is zero.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tele_jax.axes import ParamSpec, fresh_std
from tele_jax.config import ModelConfig, check_seed, require, require_config, require_known, whole
from tele_jax.errors import UserError
from tele_jax.growth import axis_map
from tele_jax.growth.axis_map import AxisMap
from tele_jax.growth.layers import choose
from tele_jax.growth.leaf import LeafPlan
from tele_jax.growth.plan import Plan, Step
from tele_jax.model.decoder import MASKED_AXES
from tele_jax.model.spec import flat_spec

# The zero side of a new unit in exact growth. The other side is random, so that the first step moves the zero side.
ZERO_SIDE = {"embed": "outputs", "mlp": "inputs", "heads": "inputs"}

# Fields that growth may change; any other difference is another model, not a larger one.
_GROWN = {"num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "padded_vocab_size"}
_FREE = {"rms_eps", "input_mult", "output_mult", "mup_base_width", "init_std", "matrix_init_std"}
_FREE |= {"max_seq_len", "dtype", "remat", "attention"}


def plan(
    src_cfg: ModelConfig,
    dst_cfg: ModelConfig,
    *,
    policy: str = "exact",
    layers: str | Sequence[int] = "uniform",
    seed: int = 0,
    scores: Sequence[float] | None = None,
    epsilon: str = "scale",
) -> Plan:
    """Plans the growth of a model of src_cfg into one of dst_cfg.

    Args:
      policy: "exact" keeps the function for any ratio without masks; "msg" (Masked Structural Growth, arXiv
        2305.02869) keeps it behind masks that start at 0 and fills everything new with random values or copies;
        "copy" splits every unit into copies (Net2Net, HyperCloning) and keeps the function, but copies stay copies;
        "stack" repeats the whole stack of layers (G_stack, arXiv 2405.15319), "interleave" puts each copy after its
        source, and "random" starts everything new at random: these change the function, and are here to compare with.
      layers: which layers are copied, see growth.layers.choose.
      seed: seed of the fresh values.
      scores: one per source layer, for layers="distance".
      epsilon: exact growth of embed either scales the norms' epsilon by d/d' ("scale"), or keeps it as published and
        divides what is written to the residual stream instead ("keep").

    Raises:
      UserError: an axis that would shrink; a difference between the configs that is neither a size nor a multiplier,
        init std, epsilon, length, dtype or how it is computed; groups that do not hold the heads; what a tied table
        cannot do (epsilon="keep", copies by a ratio that is no integer); an unknown policy.

    >>> small = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, mlp_dim=172, vocab_size=512)
    >>> plan(small, small.replace(embed_dim=80, mlp_dim=300))
    <Plan exact: embed 64 -> 80, mlp 172 -> 300; 164,672 -> 267,280 parameters; print it for its leaves>
    """
    require_config(src_cfg, "plan: src_cfg")
    require_config(dst_cfg, "plan: dst_cfg")
    if policy not in POLICIES:
        raise UserError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    if epsilon not in ("scale", "keep"):
        raise UserError(f"epsilon {epsilon!r} is not one of 'scale', 'keep'")
    seed = check_seed(seed)
    _check(src_cfg, dst_cfg)
    if policy in ("stack", "random") and not (isinstance(layers, str) and layers == "uniform"):
        raise UserError(f"layers={layers!r}: policy {policy} places the layers itself; leave it out")
    made = POLICIES[policy](src_cfg, dst_cfg, _maps(src_cfg, dst_cfg, layers, scores), seed, epsilon)
    notes = (*made.notes, *_notes(src_cfg, dst_cfg, made.dst_cfg))
    return Plan((dataclasses.replace(made, notes=notes),))


def _notes(src: ModelConfig, dst: ModelConfig, made: ModelConfig) -> list[str]:
    """Notes on an epsilon that was asked for and is not kept, and on what a larger vocabulary means."""
    notes = []
    if not (math.isclose(dst.rms_eps, src.rms_eps) or math.isclose(dst.rms_eps, made.rms_eps)):
        notes.append(f"rms_eps={dst.rms_eps:g} was asked for, but is {made.rms_eps:g} to keep the function")
    if (added := dst.vocab_size - src.vocab_size) > 0:
        notes.append(
            f"{added:,} new tokens: the logits of the {src.vocab_size:,} old ones stay, but the new ones take part in "
            "the softmax"
        )
        if taken := min(dst.vocab_size, src.padded_vocab_size) - src.vocab_size:
            notes.append(f"{taken:,} of the new tokens take over padding rows of the source as they are")
    return notes


def _check(src: ModelConfig, dst: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(src, field.name), getattr(dst, field.name)
        if field.name in _GROWN:
            if after < before:
                raise UserError(f"{field.name} would shrink, {before} -> {after}: growth only adds; see growth.shrink")
        elif field.name not in _FREE and before != after:
            raise UserError(f"{field.name} differs, {before} -> {after}: growth cannot change it")


def _maps(src: ModelConfig, dst: ModelConfig, how: str | Sequence[int], scores) -> dict[str, AxisMap]:
    try:
        heads, kv_heads = axis_map.grouped_heads(src.num_heads, src.num_kv_heads, dst.num_heads, dst.num_kv_heads)
    except ValueError as error:
        raise UserError(f"num_kv_heads: {error}") from None
    ids = choose(how, src.num_layers, dst.num_layers, scores)
    maps = {"layers": axis_map.repeat("layers", src.num_layers, ids), "heads": heads, "kv_heads": kv_heads}
    return maps | {
        axis: axis_map.widen(axis, size, dst.axis_sizes[axis])
        for axis, size in src.axis_sizes.items()
        if axis not in maps
    }


def _keep_logit_mult(src: ModelConfig, dst: ModelConfig) -> tuple[ModelConfig, float, float]:
    """(destination config, coefficient of the embedding, coefficient of the head) that keep both multipliers' effect.

    An untied model folds a changed multiplier into the table or the kernel. A tied one has a single table for both,
    so that its multipliers have to stay what they were in effect.
    """
    if src.tie_embeddings:
        output_mult = src.logit_mult * dst.width_ratio
        return dst.replace(input_mult=src.input_mult, output_mult=output_mult), 1.0, 1.0
    return dst, src.input_mult / dst.input_mult, src.logit_mult / dst.logit_mult


def _fill(cfg: ModelConfig, spec: ParamSpec) -> dict:
    """The fill of fresh entries: the values that a newly initialised model has."""
    if spec.role == "scale":
        return {"fill": "constant", "value": 1.0}
    if spec.role == "bias":
        return {"fill": "constant", "value": 0.0}
    return {"fill": "normal", "value": fresh_std(cfg, spec.inputs, spec.outputs)}


def _is_writer(spec: ParamSpec) -> bool:
    """True where the leaf adds to the residual stream; a norm scale that sits in it only passes on."""
    return "embed" in spec.outputs and spec.role != "scale"


def _multiplier(spec: ParamSpec, embedding: float, head: float) -> float:
    """The part of a changed multiplier that is folded into this leaf."""
    if spec.role == "table":
        return embedding
    return head if "vocab" in spec.outputs else 1.0


def _exact(src: ModelConfig, dst: ModelConfig, maps: dict[str, AxisMap], seed: int, epsilon: str) -> Step:
    dst, embedding, head = _keep_logit_mult(src, dst)
    # A norm divides by the root of the mean over embed; zeros in the new channels make that mean smaller by d/d'.
    shrinkage = math.sqrt(src.embed_dim / dst.embed_dim)
    written = 1.0 if epsilon == "scale" else 1.0 / shrinkage
    dst = dst.replace(rms_eps=src.rms_eps * src.embed_dim / dst.embed_dim if epsilon == "scale" else src.rms_eps)
    leaves = {}
    for name, spec in flat_spec(src).items():
        coefficient = _multiplier(spec, embedding, head)
        if spec.role == "scale":
            zero: tuple[str, ...] = ()
            # A norm that writes to the stream is divided like every writer; s * (1/s) leaves it unchanged.
            coefficient = shrinkage * (written if "embed" in spec.outputs else 1.0)
        else:
            zero = tuple(axis for axis, side in ZERO_SIDE.items() if axis in getattr(spec, side))
            if _is_writer(spec):
                coefficient *= written
                zero = spec.stack + zero  # a copied layer writes nothing at first
        if src.tie_embeddings and spec.role == "table" and epsilon == "keep" and shrinkage != 1.0:
            raise UserError('epsilon="keep" divides the embedding, which is also the head of a tied model; use "scale"')
        leaves[name] = LeafPlan(coefficient, zero, **_fill(dst, spec))
    return Step(src, dst, "exact", maps, leaves, seed)


def _msg(src: ModelConfig, dst: ModelConfig, maps: dict[str, AxisMap], seed: int, epsilon: str) -> Step:
    del epsilon  # the mask weighs the norm's mean, so that epsilon means the same before and after
    dst, embedding, head = _keep_logit_mult(src, dst)
    dst = dst.replace(rms_eps=src.rms_eps)
    leaves = {
        name: LeafPlan(_multiplier(spec, embedding, head), **_fill(dst, spec)) for name, spec in flat_spec(src).items()
    }
    masked = any(maps[axis].fresh.any() for axis in MASKED_AXES)  # a larger vocabulary alone needs none
    return Step(src, dst, "msg", maps, leaves, seed, masked=masked)


def _random(src: ModelConfig, dst: ModelConfig, maps: dict[str, AxisMap], seed: int, epsilon: str) -> Step:
    base = _msg(src, dst, maps | {"layers": axis_map.widen("layers", src.num_layers, dst.num_layers)}, seed, epsilon)
    note = "everything new is random and takes part at once: the function changes"
    return dataclasses.replace(base, policy="random", masked=False, preserving=False, notes=(note,))


def _interleave(src: ModelConfig, dst: ModelConfig, maps: dict[str, AxisMap], seed: int, epsilon: str) -> Step:
    base = _exact(src, dst, maps, seed, epsilon)
    leaves = {
        name: dataclasses.replace(leaf, zero=tuple(axis for axis in leaf.zero if axis != "layers"))
        for name, leaf in base.leaves.items()
    }
    deeper = dst.num_layers > src.num_layers
    notes = ("copies of layers take part at once: the function changes",) if deeper else ()
    return dataclasses.replace(base, policy="interleave", leaves=leaves, preserving=not deeper, notes=notes)


def _stack(src: ModelConfig, dst: ModelConfig, maps: dict[str, AxisMap], seed: int, epsilon: str) -> Step:
    stacked = axis_map.repeat("layers", src.num_layers, [i % src.num_layers for i in range(dst.num_layers)])
    return dataclasses.replace(_interleave(src, dst, maps | {"layers": stacked}, seed, epsilon), policy="stack")


def _copy(src: ModelConfig, dst: ModelConfig, maps: dict[str, AxisMap], seed: int, epsilon: str) -> Step:
    del epsilon  # copies keep the mean of squares, so that epsilon means the same before and after
    dst, embedding, head = _keep_logit_mult(src, dst)
    dst = dst.replace(rms_eps=src.rms_eps)
    if src.tie_embeddings and dst.embed_dim % src.embed_dim:
        raise UserError("policy copy: a tied embedding can be copied by an integer ratio only; use exact or msg")
    for axis in ("embed", "mlp"):
        index = [i % maps[axis].src_size for i in range(maps[axis].dst_size)]
        maps[axis] = axis_map.copies(axis, maps[axis].src_size, index, keep_norm=axis == "embed")
    maps["heads"], maps["kv_heads"] = axis_map.copied_heads(
        src.num_heads, src.num_kv_heads, dst.num_heads, dst.num_kv_heads
    )
    leaves = {}
    for name, spec in flat_spec(src).items():
        elementwise = spec.role == "scale"
        leaves[name] = LeafPlan(
            _multiplier(spec, embedding, head),
            spec.stack if _is_writer(spec) else (),
            # A norm passes copies on with the scale that they came with; keys and values are not split but repeated.
            () if elementwise else tuple(axis for axis in spec.outputs if axis in ("embed", "mlp")),
            () if elementwise else tuple(axis for axis in spec.inputs if axis in ("embed", "mlp", "heads")),
            **_fill(dst, spec),
        )
    if src.tie_embeddings and dst.embed_dim > src.embed_dim:
        # The tied head reads n copies with the same weights that write them: the sum is n times as large.
        dst = dst.replace(output_mult=dst.output_mult * src.embed_dim / dst.embed_dim)
    note = "copies get equal gradients and stay copies, unless something else tells them apart"
    return Step(src, dst, "copy", maps, leaves, seed, lively=False, notes=(note,))


POLICIES = {
    "exact": _exact,
    "msg": _msg,
    "copy": _copy,
    "stack": _stack,
    "interleave": _interleave,
    "random": _random,
}


# ---- one axis at a time; growth.compose puts such plans together
# `how`: policy, seed and epsilon, as `plan` takes them.


def widen_embed(cfg: ModelConfig, embed_dim: int, **how: object) -> Plan:
    """Widens the residual stream to embed_dim channels."""
    return _changed(cfg, how, embed_dim=embed_dim)


def widen_mlp(cfg: ModelConfig, mlp_dim: int, **how: object) -> Plan:
    """Widens the hidden layer of every mlp to mlp_dim units."""
    return _changed(cfg, how, mlp_dim=mlp_dim)


def widen_heads(cfg: ModelConfig, num_heads: int, num_kv_heads: int | None = None, **how: object) -> Plan:
    """Widens attention to num_heads query heads: by more groups, larger groups, or groups split into several.

    Args:
      num_kv_heads: the number of groups; by default as many as before, or one a head where the model is multi-head.

    Raises:
      UserError: too few groups to hold the heads that there are, or heads that do not divide into them.
    """
    groups = {} if num_kv_heads is None else {"num_kv_heads": num_kv_heads}
    return _changed(cfg, how, num_heads=num_heads, **groups)


def insert_layers(cfg: ModelConfig, layers: int | Sequence[int], **how: object) -> Plan:
    """Deepens to `layers` layers, copies spread evenly, or to the source layers listed, where repeated ids are copies.

    >>> cfg = ModelConfig(num_layers=3, embed_dim=8, num_heads=2, mlp_dim=12, vocab_size=10)
    >>> insert_layers(cfg, [0, 1, 1, 2]).maps["layers"]
    <AxisMap layers: 3 -> 4, 1 fresh>
    """
    require_config(cfg, "insert_layers: cfg")
    if isinstance(layers, (int, str)) or not hasattr(layers, "__len__"):
        more = whole(layers, "layers") >= cfg.num_layers
        require(more, f"insert_layers: layers={layers}, but the model has {cfg.num_layers} layers, and none is removed")
        return _changed(cfg, how, num_layers=layers)
    ids = choose(layers, cfg.num_layers, len(layers), None)
    return _changed(cfg, {"layers": ids} | how, num_layers=len(ids))


def expand_blocks(cfg: ModelConfig, blocks: int) -> Plan:
    """Adds `blocks` layers, each after one of so many equal groups, as copy of its last (LLaMA-Pro, arXiv 2401.02415).

    What a copy writes to the residual stream is 0, so that the function stays, to the bit. A stage that trains the new
    layers alone: config.STAGE.optimizer.trained = "new".

    >>> cfg = ModelConfig(num_layers=4, embed_dim=8, num_heads=2, mlp_dim=12, vocab_size=10)
    >>> expand_blocks(cfg, 2).maps["layers"].index.tolist()
    [0, 1, 1, 2, 3, 3]

    Raises:
      UserError: the layers do not make so many groups of one size.
    """
    require_config(cfg, "expand_blocks: cfg")
    fits = 0 < whole(blocks, "blocks") <= cfg.num_layers and cfg.num_layers % blocks == 0
    require(fits, f"expand_blocks: {cfg.num_layers} layers do not make {blocks} groups of one size")
    group = cfg.num_layers // blocks
    return insert_layers(cfg, [i for i in range(cfg.num_layers) for _ in range(1 + (i % group == group - 1))])


def grow_vocab(cfg: ModelConfig, vocab_size: int, padded_vocab_size: int | None = None, **how: object) -> Plan:
    """Adds tokens up to vocab_size after the old ones, whose logits stay.

    Args:
      padded_vocab_size: rows of the embedding; by default as many as there are, or vocab_size where that is more.
    """
    require_config(cfg, "cfg")
    rows = max(whole(vocab_size, "vocab_size"), cfg.padded_vocab_size)
    rows = rows if padded_vocab_size is None else padded_vocab_size
    return _changed(cfg, how, vocab_size=vocab_size, padded_vocab_size=rows)


def pad_vocab(cfg: ModelConfig, multiple: int, **how: object) -> Plan:
    """Pads the rows of the vocabulary to a multiple, so that they divide over a mesh; the function stays."""
    require_config(cfg, "cfg")
    require(whole(multiple, "multiple") > 0, f"pad_vocab: multiple={multiple} must be above 0")
    return _changed(cfg, how, padded_vocab_size=-(-cfg.padded_vocab_size // multiple) * multiple)


def change_multipliers(
    cfg: ModelConfig,
    *,
    input_mult: float | None = None,
    output_mult: float | None = None,
    mup_base_width: int | None = None,
) -> Plan:
    """Changes the multipliers that are given, and folds the change into the embedding and the head.

    A tied model has one table for both, and keeps its effective multipliers (see plan.dst_cfg).
    """
    given = {"input_mult": input_mult, "output_mult": output_mult, "mup_base_width": mup_base_width}
    return _changed(cfg, {}, **{name: value for name, value in given.items() if value is not None})


def _changed(cfg: ModelConfig, how: Mapping[str, Any], **changes: Any) -> Plan:
    require_config(cfg, "cfg")
    for name in how:
        require_known(name, plan.__kwdefaults__ or (), f"growth of one axis: unknown argument {name!r}")
    return plan(cfg, cfg.replace(**changes), **how)
