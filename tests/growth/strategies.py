"""Random growths for hypothesis, and the means to run hundreds of them without compiling anything.

`without_compiling()` puts numpy in the place of jax.numpy inside the growth package: the library's own plan, apply,
shrink and apply_opt then run on float64 numpy arrays. XLA would compile some 50 small programs for every new set of
shapes, 5 seconds of work for a model of a thousand parameters. What is put in place is tested against what it
replaces: the fresh values in test_kernels.py, the specs in test_plan.py, apply as a whole in test_apply.py.
"""

import contextlib
import dataclasses
import functools
import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax.axes import ParamSpec
from tests.growth import oracle

GROWTH = {
    name: importlib.import_module(f"tele_jax.growth.{name}")
    for name in ("apply", "check", "kernel", "plan", "policies")
}
SURGERY = importlib.import_module("tele_jax.growth.surgery")
FLAT_SPEC = importlib.import_module("tele_jax.model.spec").flat_spec


def flat_spec(cfg):
    """What tele_jax.model.spec.flat_spec gives, from the axis names of a small model with the same options."""
    sizes = cfg.axis_sizes
    return {
        name: dataclasses.replace(leaf, shape=tuple(sizes[axis] for axis in leaf.axes), dtype=np.dtype(cfg.param_dtype))
        for name, leaf in _template(cfg.tie_embeddings, cfg.output_biases, cfg.embed_norm).items()
    }


@functools.cache
def _template(tie_embeddings: bool, output_biases: bool, embed_norm: bool) -> dict[str, ParamSpec]:
    options = dict(tie_embeddings=tie_embeddings, output_biases=output_biases, embed_norm=embed_norm)
    sizes = dict(num_layers=1, embed_dim=2, num_heads=1, head_dim=2, mlp_dim=1, vocab_size=2)
    return FLAT_SPEC(tele.ModelConfig(**sizes, **options))


def _normal(key, where, shape, std):
    whole = oracle.normal(key, shape, std)
    return whole[np.ix_(*where)]


@contextlib.contextmanager
def without_compiling():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GROWTH["apply"], "jnp", np)
        patch.setattr(GROWTH["kernel"], "jnp", np)
        patch.setattr(GROWTH["kernel"], "normal", _normal)
        for module in (GROWTH["check"], GROWTH["plan"], GROWTH["policies"], SURGERY):
            patch.setattr(module, "flat_spec", flat_spec)
        yield


@dataclasses.dataclass(frozen=True)
class Growth:
    """A source config, a destination config, the other arguments of growth.plan, and a source of parameters."""

    src: tele.ModelConfig
    dst: tele.ModelConfig
    kwargs: dict[str, Any]
    embedding_scale: float
    params_seed: int


MULTIPLIERS = st.floats(0.05, 20.0)


@st.composite
def layer_orders(draw, src_layers, dst_layers):
    """How to choose layers: a name, or ids in which every source layer first occurs in order."""
    how = draw(st.sampled_from(["uniform", "last", "middle", "ids"]))
    if how != "ids":
        return how
    ids = list(range(src_layers))
    for _ in range(dst_layers - src_layers):
        place = draw(st.integers(1, len(ids)))
        ids.insert(place, draw(st.sampled_from(sorted(set(ids[:place])))))
    return ids


@st.composite
def sources(draw, dtype="float64"):
    """A small model with any options."""
    group, num_kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    vocab_size = draw(st.integers(2, 9))
    return tele.ModelConfig(
        num_layers=draw(st.integers(1, 3)),
        embed_dim=draw(st.integers(1, 13)),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        mlp_dim=draw(st.integers(1, 11)),
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size + draw(st.integers(0, 3)),
        rms_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3, 0.1])),
        input_mult=draw(MULTIPLIERS),
        output_mult=draw(MULTIPLIERS),
        mup_base_width=draw(st.none() | st.integers(1, 16)),
        tie_embeddings=draw(st.booleans()),
        output_biases=draw(st.booleans()),
        embed_norm=draw(st.booleans()),
        dtype=dtype,
        param_dtype=dtype,
    )


@st.composite
def growths(draw, policy=None, dtype="float64", src=None):
    """Any mixture of grown axes: each alone, several together, by any ratio, grouped queries regrouped or split.

    Of `src`, or of any model. Within what the policy can do: "copy" grows a tied embedding only by an integer ratio.
    """
    src = draw(sources(dtype)) if src is None else src
    num_kv_heads, group = src.num_kv_heads, src.num_heads // src.num_kv_heads
    grown = draw(st.sets(st.sampled_from(["layers", "embed", "heads", "mlp", "vocab", "multipliers"]), min_size=1))
    changes: dict[str, Any] = dict.fromkeys(("init_std", "matrix_init_std"), draw(st.sampled_from([0.02, 1.0, 30.0])))
    if "layers" in grown:
        changes["num_layers"] = src.num_layers + draw(st.integers(1, 4))
    if "embed" in grown:
        whole = policy == "copy" and src.tie_embeddings
        changes["embed_dim"] = (
            src.embed_dim * draw(st.integers(2, 4)) if whole else src.embed_dim + draw(st.integers(1, 17))
        )
    if "mlp" in grown:
        changes["mlp_dim"] = src.mlp_dim + draw(st.integers(1, 13))
    if "heads" in grown:
        dst_group = draw(st.integers(1, 5))
        needed = num_kv_heads * -(-group // dst_group)
        kv_heads = needed + draw(st.integers(0, 3))
        changes |= {"num_kv_heads": kv_heads, "num_heads": kv_heads * dst_group}
    if "vocab" in grown:
        changes["vocab_size"] = src.vocab_size + draw(st.integers(0, 5))
        changes["padded_vocab_size"] = max(changes["vocab_size"], src.padded_vocab_size) + draw(st.integers(0, 3))
    if "multipliers" in grown:
        changes |= {"input_mult": draw(MULTIPLIERS), "output_mult": draw(MULTIPLIERS)}
        changes |= {"mup_base_width": draw(st.none() | st.integers(1, 16)), "rms_eps": draw(st.floats(1e-8, 1.0))}
    dst = src.replace(**changes)
    policy = draw(st.sampled_from(["exact", "msg"])) if policy is None else policy
    can_keep = policy == "exact" and not (src.tie_embeddings and "embed" in grown)
    kwargs = {
        "policy": policy,
        "layers": draw(layer_orders(src.num_layers, dst.num_layers)),
        "seed": draw(st.integers(0, 2**31)),
        "epsilon": draw(st.sampled_from(["scale", "keep"])) if can_keep else "scale",
    }
    embedding_scale = draw(st.sampled_from([1.0, 1.0, 0.1, 1e-3, 1e-4, 1e-5]))
    return Growth(src, dst, kwargs, embedding_scale, draw(st.integers(0, 2**31)))
