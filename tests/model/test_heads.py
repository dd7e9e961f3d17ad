"""The scalar head: a score or a value, one more leaf whose axis names say how it is grown, sharded and saved."""

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.errors import UserError
from tele_jax.model import decoder, heads

CFG = tele.ModelConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=64, scalar_head=True, dtype="float32"
)


def scalars(cfg, params, tokens):
    return np.asarray(heads.scalar_of(cfg, params, decoder.hidden(cfg, params, tokens)))


@pytest.fixture(scope="module")
def params():
    return tele.init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(64, size=(2, 9)).astype(np.int32)


def test_a_scalar_is_the_product_of_the_hidden_state_and_the_kernel(params, tokens):
    x = np.asarray(decoder.hidden(CFG, params, tokens), np.float64)
    by_hand = x @ np.asarray(params["scalar_head"]["kernel"], np.float64)[:, 0]
    np.testing.assert_allclose(scalars(CFG, params, tokens), by_hand, atol=1e-7)


def test_the_other_parameters_and_the_logits_are_those_of_the_model_without_the_head(params, tokens):
    plain = CFG.replace(scalar_head=False)
    without = {name: branch for name, branch in params.items() if name != "scalar_head"}
    jax.tree.map(np.testing.assert_array_equal, tele.init(plain, jax.random.key(0)), without)
    logits = tele.forward(plain, without, tokens)
    np.testing.assert_array_equal(tele.forward(CFG, params, tokens), logits)


def test_an_exact_growth_keeps_the_scalars_and_its_report_looks_at_them(params, tokens):
    plan = tele.growth.plan(CFG, CFG.replace(num_layers=3, embed_dim=21, mlp_dim=37, num_heads=3))
    big = tele.growth.apply(plan, params)
    np.testing.assert_allclose(scalars(plan.dst_cfg, big, tokens), scalars(CFG, params, tokens), atol=1e-6)
    assert tele.growth.verify(plan, params, big, tokens).ok
    moved = big | {"scalar_head": {"kernel": big["scalar_head"]["kernel"] + 0.1}}
    report = tele.growth.verify(plan, params, moved, tokens)
    assert not report.ok and report.max_abs > 1e-2  # the logits are where they were


def test_a_model_without_the_head_has_no_scalars(params):
    with pytest.raises(UserError, match=r"the model has no scalar head .* it is no reward model"):
        heads.scalar_of(CFG.replace(scalar_head=False), params, np.zeros((1, 16), np.float32))
