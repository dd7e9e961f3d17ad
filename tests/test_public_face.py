"""What users see of the package: names, short representations, and errors that name the wrong argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=64, max_seq_len=32, dtype="float32"
)
LARGER = CFG.replace(num_layers=3, mlp_dim=30)


@pytest.fixture(scope="module")
def params():
    return tele.init(CFG, jax.random.key(0))


@pytest.mark.parametrize("module", [tele, tele.growth, tele.surgery, tele.checkpoint, tele.convert, tele.plots])
def test_dir_shows_what_can_be_used_and_nothing_else(module):
    assert dir(module) == sorted(module.__all__)
    assert all(getattr(module, name) is not None for name in dir(module))


def test_head_dim_follows_from_embed_and_heads():
    assert CFG.head_dim == 8
    assert CFG.replace(num_heads=4).head_dim == 8, "a head keeps its size when a model is changed"
    assert tele.get_model("tele_flm_52b").head_dim == 128


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda p: tele.init("tele_flm_52b", jax.random.key(0)),
            r"init: cfg: expected a ModelConfig, got str; tele.get",
        ),
        (lambda p: tele.init(CFG, 0), r"init: key: expected jax.random.key\(seed\), got int"),
        (lambda p: tele.forward({"num_layers": 2}, p, [[1, 2]]), "forward: cfg: expected a ModelConfig, got dict"),
        (lambda p: tele.forward(CFG, None, [[1, 2]]), "forward: params: expected a nested dict, got NoneType"),
        (lambda p: tele.forward(CFG, p, [1, 2]), r"tokens: expected int32\[B, S\], got int64\[2\]"),
        (lambda p: tele.forward(CFG, p, [[1.0, 2.0]]), r"tokens: expected int32\[B, S\], got float64\[1, 2\]"),
        (lambda p: tele.forward(CFG, p, [[1, 2], [3]]), "tokens: rows of unequal length"),
        (lambda p: tele.forward(CFG, p, [[1, 64]]), "tokens: id 64 is not in the vocabulary of 64 tokens"),
        (lambda p: tele.forward(CFG, p, [[-1, 2]]), "tokens: id -1 is not in the vocabulary"),
        (lambda p: tele.forward(CFG, p, np.ones((1, 33), np.int32)), "seq_len=33 is above the model's max_seq_len=32"),
        (lambda p: tele.forward(LARGER, p, [[1, 2]]), "forward: params are not those of cfg"),
        (lambda p: tele.forward(CFG.replace(embed_norm=True), p, [[1, 2]]), "forward: params are not those of cfg"),
        (lambda p: tele.spec("tele_flm_52b"), "cfg: expected a ModelConfig, got str"),
        (lambda p: tele.count_params(3), "cfg: expected a ModelConfig, got int"),
        (lambda p: tele.generate("x", p, [[1]], max_new_tokens=1), "generate: cfg: expected a ModelConfig, got str"),
        (lambda p: tele.get_model(3), "get_model: expected the name of a model, got int"),
        (
            lambda p: CFG.replace(num_layer=3),
            "replace: ModelConfig has no field 'num_layer'; did you mean 'num_layers'",
        ),
        (lambda p: tele.growth.plan("a", CFG), "expected a ModelConfig, got str"),
        (lambda p: tele.growth.plan(CFG, {"embed_dim": 32}), "expected a ModelConfig, got dict"),
        (lambda p: tele.growth.apply(CFG, p), "expected a Plan"),
        (lambda p: tele.growth.apply(tele.growth.plan(CFG, LARGER), {"w": 1}), "the parameters do not fit"),
        (lambda p: tele.growth.compose(CFG, LARGER), "expected a Plan"),
    ],
)
def test_a_wrong_argument_is_named(call, named, params):
    with pytest.raises(UserError, match=named):
        call(params)


def test_lists_are_taken_where_arrays_are(params):
    tokens = [[1, 2, 3], [4, 5, 6]]
    ours, theirs = (tele.forward(CFG, params, t) for t in (tokens, jnp.array(tokens, jnp.int32)))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_representations_are_short_and_tables_are_long(params, tmp_path):
    plan = tele.growth.plan(CFG, LARGER)
    big = tele.growth.apply(plan, params)
    report = tele.growth.verify(plan, params, big, np.array([[1, 2, 3, 4]], np.int32))
    tele.checkpoint.save(tmp_path / "c", CFG, params, opt_state={"count": 1}, step=3)
    lazy, loaded = tele.checkpoint.open_lazy(tmp_path / "c"), tele.checkpoint.load(tmp_path / "c")
    for value in (plan, report, lazy, loaded):
        assert len(repr(value)) < 400 and repr(value).count("\n") < 4
    for value in (plan, report, lazy):
        assert "<table" in value._repr_html_() and len(str(value).splitlines()) >= 4
    assert "6,480 parameters" in repr(lazy) and "layers.attn.q" in str(lazy)
