"""Rotary tables as TeleChat rounds them; what the tables are otherwise, test_forward.py compares with numpy.

The released tables themselves are compared with torch in tests/convert/test_parity.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.errors import UserError
from tele_jax.model import attention, decoder, heads
from tests import reference


def test_rounding_to_float16_is_that_of_numpy_under_jit_too():
    """XLA may drop a conversion there and back, and has no subnormal numbers in reduce_precision."""
    generator = np.random.default_rng(0)
    values = [generator.uniform(-1.2, 1.2, 100_000), 10.0 ** generator.uniform(-9, 0.1, 100_000)]
    values += [2.0**-14 * (1 + np.array([-1, -0.5, 0, 0.5, 1]) * 2.0**-10), np.arange(64) * 2.0**-25, [0.0, -0.0, 1.0]]
    x = np.concatenate(values).astype(np.float32)
    for function in (attention._to_float16, jax.jit(attention._to_float16)):
        assert (np.asarray(function(x)) == x.astype(np.float16).astype(np.float32)).all()


def test_prefill_and_cached_decoding_agree_beyond_the_trained_length():
    """Token for token what one pass over the whole text would have drawn, with the tables of its final length.

    test_generate.py has the same for tables in float32.
    """
    cfg = tele.ModelConfig(
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=24,
        vocab_size=40,
        rope=tele.Rope(ntk=tele.Ntk(original_length=8, trained_length=16), tables="float16"),
        dtype="float32",
        remat="none",
    )
    params = reference.random_params(cfg, np.random.default_rng(3), 1.5)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    prompt = np.random.default_rng(4).integers(0, 40, 10).tolist()
    (found,) = tele.generate(cfg, params, [prompt], max_new_tokens=40)
    text = np.array([prompt + found], np.int32)
    x = decoder.hidden(cfg, params, text, rope_length=50)
    drawn = np.asarray(heads.logits_of(cfg, params, x)).argmax(-1)[0]
    assert drawn[len(prompt) - 1 : -1].tolist() == found
    assert len(set(found)) > 3
    short = decoder.hidden(cfg, params, text, rope_length=16)
    assert np.abs(np.asarray(short - x)).max() > 1e-2  # the final length matters


def test_rounded_tables_are_close_and_not_the_same():
    cfg = tele.get_model("telechat_7b")
    rounded = cfg.replace(rope=dataclasses.replace(cfg.rope, tables="float16"))
    positions = jnp.arange(300)
    for ours, theirs in zip(
        attention.rotary_tables(rounded, positions, 300), attention.rotary_tables(cfg, positions, 300), strict=True
    ):
        assert 1e-4 < np.abs(np.asarray(ours - theirs)).max() < 3e-4


def test_other_tables_are_refused():
    with pytest.raises(UserError, match=r"config.rope.tables: 'bfloat16' is not one of 'float32', 'float16'"):
        tele.config.from_dict(tele.Rope, {"tables": "bfloat16"}, "config.rope")
