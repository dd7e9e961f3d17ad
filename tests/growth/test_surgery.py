"""Surgery against numpy indexing written by hand, and its promises against the reference forward in float64."""

import json

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import checkpoint, growth, surgery
from tele_jax.axes import flatten, unflatten
from tele_jax.errors import UserError
from tests import reference
from tests.checkpoint.trees import assert_same
from tests.growth.strategies import without_compiling
from tests.growth.test_apply import relative_difference, same_bits, tokens_of

CFG = tele.ModelConfig(
    **dict(num_layers=4, embed_dim=6, num_heads=8, num_kv_heads=4, head_dim=4, mlp_dim=7, vocab_size=13),
    **dict(padded_vocab_size=16, output_biases=True, embed_norm=True, rms_eps=1e-3, mup_base_width=3),
    **dict(dtype="float64", param_dtype="float64"),
)
PARAMS = reference.random_params(CFG, np.random.default_rng(0), 1.0)
# Where each axis is in each leaf, as the table of the design says.
AXES = {
    "embed.table": ("vocab", "embed"),
    "embed_norm.scale": ("embed",),
    "final_norm.scale": ("embed",),
    "layers.attn.k": ("layers", "embed", "kv_heads", "head_dim"),
    "layers.attn.o": ("layers", "heads", "head_dim", "embed"),
    "layers.attn.o_bias": ("layers", "embed"),
    "layers.attn.q": ("layers", "embed", "heads", "head_dim"),
    "layers.attn.v": ("layers", "embed", "kv_heads", "head_dim"),
    "layers.attn_norm.scale": ("layers", "embed"),
    "layers.mlp.down": ("layers", "mlp", "embed"),
    "layers.mlp.down_bias": ("layers", "embed"),
    "layers.mlp.gate": ("layers", "embed", "mlp"),
    "layers.mlp.up": ("layers", "embed", "mlp"),
    "layers.mlp_norm.scale": ("layers", "embed"),
    "lm_head.kernel": ("embed", "vocab"),
}


@pytest.fixture(autouse=True)
def numpy_only():
    with without_compiling():
        yield


def by_hand(params, **ids):
    """Every leaf, with np.take along the axes named."""
    out = {}
    for name, leaf in flatten(params).items():
        for axis, units in ids.items():
            if axis in AXES[name]:
                leaf = np.take(leaf, list(units), axis=AXES[name].index(axis))
        out[name] = leaf
    return unflatten(out)


def made(plan, params=PARAMS):
    """What a plan makes, after a look at its text, its JSON and its counts."""
    again = growth.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and str(again) == str(plan)
    big = growth.apply(plan, params)
    assert {name: leaf.shape for name, leaf in flatten(big).items()} == {n: s.shape for n, s in plan.dst_spec.items()}
    for name, spec in plan.dst_spec.items():
        assert sum(plan.tally(name).values()) == spec.size
    growth.check(plan)
    return big


def logits(cfg, params, tokens):
    return reference.forward(cfg, params, tokens)


def keeps(plan, params=PARAMS):
    """A plan that says so keeps the logits of the reference; what it makes."""
    assert plan.preserving and plan.notes == ()
    big, tokens = made(plan, params), tokens_of(CFG)
    assert reference.shapes(plan.dst_cfg) == {name: leaf.shape for name, leaf in flatten(big).items()}
    assert relative_difference(logits(CFG, params, tokens), logits(plan.dst_cfg, big, tokens)) <= 1e-12
    assert growth.verify_stored(plan, params, big).ok
    return big


def changes(plan, *why):
    """A plan that says that it does not, and why: true as well; what it makes."""
    assert not plan.preserving and plan.notes == why
    assert "does not preserve the function" in str(plan) and all(f"note: {note}" in str(plan) for note in why)
    big = made(plan)
    if plan.is_model and plan.dst_cfg.vocab_size == CFG.vocab_size:
        tokens = tokens_of(CFG)
        assert relative_difference(logits(CFG, PARAMS, tokens), logits(plan.dst_cfg, big, tokens)) > 1e-6
        report = growth.verify_stored(plan, PARAMS, big)
        assert report.ok and not report.altered
    return big


# ---- take, drop, duplicate, cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "ids", "why"),
    [
        ("layers", [3, 1], "2 of 4 layers are dropped: the function changes"),
        ("layers", [0, 1, 1, 3], "1 of 4 layers are dropped and 1 layers are repeated: the function changes"),
        ("layers", [1, 0, 2, 3], "layers are in another order"),
        ("embed", [5, 0, 2], "3 of 6 embed are dropped: the function changes"),
        ("mlp", [6, 1, 0], "4 of 7 mlp are dropped: the function changes"),
    ],
)
def test_take_is_numpy_s_take_along_every_leaf_that_has_the_axis(axis, ids, why):
    same_bits(changes(surgery.take(CFG, axis, ids), why), by_hand(PARAMS, **{axis: ids}))


def test_take_of_tokens_makes_their_places_their_ids_and_drops_padding():
    plan = surgery.take(CFG, "vocab", [4, 12, 0])
    same_bits(changes(plan, "10 of 13 vocab are dropped: the function changes"), by_hand(PARAMS, vocab=[4, 12, 0]))
    assert (plan.dst_cfg.vocab_size, plan.dst_cfg.padded_vocab_size) == (3, 3)
    tokens = np.array([[2, 0, 1, 1]])
    before = logits(CFG, PARAMS, np.array([[0, 4, 12, 12]]))[..., [4, 12, 0]]
    after = logits(plan.dst_cfg, growth.apply(plan, PARAMS), tokens)
    assert relative_difference(before, after) <= 1e-12
    order = [*range(1, 13), 0]
    assert surgery.take(CFG, "vocab", order).notes == ("tokens have other ids",)
    assert surgery.take(CFG, "vocab", range(13)).preserving  # only the padding goes
    dropped = surgery.drop(CFG, "vocab", [0])
    assert dropped.dst_cfg.padded_vocab_size == dropped.dst_cfg.vocab_size == 12
    same_bits(growth.apply(dropped, PARAMS), by_hand(PARAMS, vocab=range(1, 13)))


def test_a_smaller_vocabulary_is_verified_on_the_tokens_that_are_left(x64):
    cfg = CFG.replace(num_layers=1, num_kv_heads=8, remat="none", output_biases=False, embed_norm=False)
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    plan = surgery.take(cfg, "vocab", [4, 12, 0, 7])
    small = growth.apply(plan, params)
    report = growth.verify(plan, params, small, np.array([[4, 0, 12, 7, 7]]))
    assert report.ok and max(report.parts.values()) <= 1e-11
    assert report.max_rel <= 1e-12 and report.dead == report.locked == ()
    with pytest.raises(
        tele.UserError, match="verify: tokens: the source and the grown model do not both have the ids 1, 2"
    ):
        growth.verify(plan, params, small, np.array([[4, 0, 1, 2]]))


def test_heads_take_the_keys_and_values_they_have_along():
    plan = surgery.take(CFG, "heads", [3, 2, 6, 7])  # of groups of two
    big = changes(plan, "4 of 8 heads are dropped: the function changes")
    same_bits(big, by_hand(PARAMS, heads=[3, 2, 6, 7], kv_heads=[1, 3]))
    assert (plan.dst_cfg.num_heads, plan.dst_cfg.num_kv_heads, plan.dst_cfg.head_dim) == (4, 2, 4)
    one_of_each = surgery.take(CFG, "heads", [0, 3, 5, 6])
    same_bits(growth.apply(one_of_each, PARAMS), by_hand(PARAMS, heads=[0, 3, 5, 6], kv_heads=[0, 1, 2, 3]))
    groups = surgery.take(CFG, "kv_heads", [2, 0])
    same_bits(growth.apply(groups, PARAMS), by_hand(PARAMS, heads=[4, 5, 0, 1], kv_heads=[2, 0]))


def test_drop_and_duplicate_and_cut():
    same_bits(growth.apply(surgery.drop(CFG, "layers", [1]), PARAMS), by_hand(PARAMS, layers=[0, 2, 3]))
    same_bits(growth.apply(surgery.drop(CFG, "mlp", {6, 0}), PARAMS), by_hand(PARAMS, mlp=range(1, 6)))
    same_bits(
        growth.apply(surgery.drop(CFG, "kv_heads", [1]), PARAMS),
        by_hand(PARAMS, heads=[0, 1, 4, 5, 6, 7], kv_heads=[0, 2, 3]),
    )
    plan = surgery.duplicate(CFG, (3, 1))
    same_bits(changes(plan, "2 layers are repeated: the function changes"), by_hand(PARAMS, layers=[0, 1, 1, 2, 3, 3]))
    same_bits(growth.apply(surgery.cut(CFG, "mlp", 4), PARAMS), by_hand(PARAMS, mlp=range(4)))
    same_bits(growth.apply(surgery.cut(CFG, "heads", 4), PARAMS), by_hand(PARAMS, heads=range(4), kv_heads=range(2)))
    same_bits(growth.apply(surgery.cut(CFG, "vocab", 9), PARAMS), by_hand(PARAMS, vocab=range(9)))
    for plan in (surgery.drop(CFG, "layers", []), surgery.duplicate(CFG, []), surgery.cut(CFG, "layers", 4)):
        same_bits(keeps(plan), PARAMS)


def test_cutting_padding_keeps_the_function():
    plan = surgery.cut(CFG, "vocab", 14)
    same_bits(keeps(plan), by_hand(PARAMS, vocab=range(14)))
    assert (plan.dst_cfg.vocab_size, plan.dst_cfg.padded_vocab_size) == (13, 14)


def test_a_submodel_is_its_parts_taken_in_turn():
    plan = surgery.submodel(CFG, layers=range(0, 4, 2), heads=[2, 3, 4, 5], mlp=range(3), embed=[0, 5, 1])
    ids = dict(layers=[0, 2], heads=[2, 3, 4, 5], kv_heads=[1, 2], mlp=range(3), embed=[0, 5, 1])
    same_bits(made(plan), by_hand(PARAMS, **ids))
    assert not plan.preserving and len(plan.notes) == 4 and plan.is_model
    assert reference.shapes(plan.dst_cfg) == {name: leaf.shape for name, leaf in flatten(made(plan)).items()}


# ---- what keeps the function -------------------------------------------------------------------------------------


@st.composite
def reorderings(draw):
    """(axis, all its units in another order), within what grouped queries allow."""
    axis = draw(st.sampled_from(["embed", "mlp", "heads", "kv_heads"]))
    if axis != "heads":
        return axis, draw(st.permutations(range({"embed": 6, "mlp": 7, "kv_heads": 4}[axis])))
    groups = draw(st.permutations([[0, 1], [2, 3], [4, 5], [6, 7]]))
    return axis, [head for group in groups for head in draw(st.permutations(group))]


@settings(max_examples=25)
@given(st.lists(reorderings(), min_size=1, max_size=3))
def test_any_order_of_channels_units_and_heads_keeps_the_function(orders):
    plan = CFG
    for axis, ids in orders:
        plan = surgery.take(plan, axis, ids)
    keeps(plan)
    same_bits(growth.shrink(plan, growth.apply(plan, PARAMS)), PARAMS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("axis", "size"), [("heads", 12), ("mlp", 10), ("layers", 6), ("vocab", 24)])
def test_padding_with_zeros_keeps_the_function(axis, size, tied):
    cfg = CFG.replace(tie_embeddings=tied)
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    plan = surgery.pad(cfg, axis, size)
    assert plan.lively is (axis == "vocab")
    growth.check(plan)
    big, tokens = growth.apply(plan, params), tokens_of(cfg)
    for name, leaf in flatten(big).items():
        axes = {axis, "kv_heads"} if axis == "heads" else {axis}
        want = flatten(params)[name]
        pad = [(0, new - old) for old, new in zip(want.shape, leaf.shape, strict=True)]
        assert all(b == 0 or a in axes for a, (_, b) in zip(AXES[name], pad, strict=True))
        np.testing.assert_array_equal(leaf, np.pad(want, pad))
    assert relative_difference(logits(cfg, params, tokens), logits(plan.dst_cfg, big, tokens)) <= 1e-12
    assert growth.verify_stored(plan, params, big).ok
    same_bits(growth.shrink(plan, big), params)


def test_reordered_groups_may_be_split_and_keep_the_function():
    """Two groups of four become four of two, each with the keys and values it had."""
    cfg = CFG.replace(num_kv_heads=2)
    params = reference.random_params(cfg, np.random.default_rng(0), 1.0)
    plan = surgery.take(cfg, "heads", [0, 1, 4, 5, 2, 3, 6, 7])
    assert plan.preserving and plan.dst_cfg.num_kv_heads == 4
    big = growth.apply(plan, params)
    same_bits(big, by_hand(params, heads=[0, 1, 4, 5, 2, 3, 6, 7], kv_heads=[0, 1, 0, 1]))
    tokens = tokens_of(cfg)
    assert relative_difference(logits(cfg, params, tokens), logits(plan.dst_cfg, big, tokens)) <= 1e-12


def test_surgery_goes_on_from_a_growth():
    small = growth.plan(CFG, CFG.replace(embed_dim=9, num_layers=5))
    plan = surgery.pad(surgery.take(small, "embed", [8, 7, 6, 5, 4, 3, 2, 1, 0]), "mlp", 8)
    assert plan.preserving and not plan.lively
    big = growth.apply(plan, PARAMS)
    tokens = tokens_of(CFG)
    assert relative_difference(logits(CFG, PARAMS, tokens), logits(plan.dst_cfg, big, tokens)) <= 1e-12
    assert growth.verify_stored(plan, PARAMS, big).ok


# ---- leaves ------------------------------------------------------------------------------------------------------


def test_find_by_path_axis_side_and_role():
    assert surgery.find(CFG, "layers.mlp.*") == tuple(n for n in sorted(AXES) if n.startswith("layers.mlp."))
    assert surgery.find(CFG, axis="kv_heads") == ("layers.attn.k", "layers.attn.v")
    assert surgery.find(CFG, writes="embed", role="kernel") == ("layers.attn.o", "layers.mlp.down")
    assert surgery.find(CFG, reads="mlp") == ("layers.mlp.down",)
    assert surgery.find(CFG, role="bias") == ("layers.attn.o_bias", "layers.mlp.down_bias")
    assert surgery.find(CFG, "*.?", reads="embed", axis="heads") == ("layers.attn.q",)
    assert surgery.find(CFG) == tuple(sorted(AXES))
    with pytest.raises(tele.UserError, match=r"no leaf fits path='layers\.mpl\.\*', axis='mlp'; leaves: embed\.table"):
        surgery.find(CFG, "layers.mpl.*", axis="mlp")


def test_select_keeps_some_leaves_as_they_are():
    plan = surgery.select(CFG, "layers.attn.*")
    names = [name for name in AXES if name.startswith("layers.attn.")]
    part = changes(plan, "keeps 5 of 15 leaves: not a model")
    same_bits(part, unflatten({name: flatten(PARAMS)[name] for name in names}))
    assert not plan.is_model
    again = surgery.take(plan, "layers", [2])
    same_bits(growth.apply(again, PARAMS), by_hand(part, layers=[2]))
    one = surgery.take(surgery.select(CFG, ["layers.attn.o"]), "heads", [0, 1])
    same_bits(growth.apply(one, PARAMS), {"layers": {"attn": {"o": PARAMS["layers"]["attn"]["o"][:, :2]}}})
    assert surgery.select(CFG, "*").preserving


@pytest.mark.parametrize("name", ["/outside", "../x", "a/b", "a\\b", "_hidden", "n" * 300, "", "a..b"])
def test_a_leaf_cannot_be_renamed_to_what_no_checkpoint_can_hold(name):
    with pytest.raises(UserError, match="rename: "):
        surgery.rename(CFG, {"embed.table": name})


def test_rename_moves_leaves_and_back():
    names = {"embed.table": "wte", "layers.attn.q": "h.attn.query", "layers.mlp.gate": "layers.mlp.w1"}
    plan = surgery.rename(CFG, names)
    assert plan.preserving and not plan.is_model
    assert plan.notes == ("the leaves have other names than those of a model",)
    renamed = {names.get(name, name): leaf for name, leaf in flatten(PARAMS).items()}
    same_bits(made(plan), unflatten(renamed))
    assert plan.dst_spec["wte"].axes == ("vocab", "embed")
    back = surgery.rename(plan, {new: old for old, new in names.items()})
    assert back.preserving and back.is_model
    same_bits(growth.apply(back, PARAMS), PARAMS)
    same_bits(growth.shrink(plan, unflatten(renamed)), PARAMS)


def test_leaves_that_change_places_change_the_function():
    plan = surgery.rename(CFG, {"layers.mlp.gate": "layers.mlp.up", "layers.mlp.up": "layers.mlp.gate"})
    swapped = changes(
        plan,
        "layers.mlp.up takes the place of layers.mlp.gate: the function changes",
        "layers.mlp.gate takes the place of layers.mlp.up: the function changes",
    )
    np.testing.assert_array_equal(swapped["layers"]["mlp"]["up"], PARAMS["layers"]["mlp"]["gate"])


def test_rescale_multiplies_and_the_last_pattern_counts():
    plan = surgery.rescale(CFG, {"layers.mlp.*": 3.0, "layers.mlp.up": 0.5, "lm_head.kernel": -1, "embed.table": 1})
    big = flatten(made(plan))
    factors = {n: 3.0 for n in AXES if n.startswith("layers.mlp.")} | {"layers.mlp.up": 0.5, "lm_head.kernel": -1.0}
    for name, leaf in flatten(PARAMS).items():
        np.testing.assert_array_equal(big[name], leaf * factors.get(name, 1.0))
    assert not plan.preserving
    assert set(plan.notes) == {f"{name} is multiplied by {factor:g}" for name, factor in factors.items()}
    back = growth.shrink(plan, growth.apply(plan, PARAMS))
    for name, leaf in flatten(back).items():
        np.testing.assert_allclose(leaf, flatten(PARAMS)[name], rtol=1e-15)
    assert surgery.rescale(CFG, {"*": 1.0}).preserving


# ---- what plans can do -------------------------------------------------------------------------------------------


def test_the_optimizer_state_follows():
    plan = surgery.rescale(
        surgery.take(surgery.drop(CFG, "layers", [1]), "embed", [5, 3, 1, 0, 2, 4]), {"embed.*": 4.0}
    )
    mu, nu = (reference.random_params(CFG, np.random.default_rng(seed), 1.0) for seed in (1, 2))
    state = {"count": np.int32(3), "mu": mu, "nu": nu, "born": {"layers": np.array([0, 1, 2, 3], np.int32)}}
    state = (optax.EmptyState(), state)
    grown = growth.apply_opt(plan, state)[1]
    for moment, power in (("mu", 1), ("nu", 2)):
        expected = by_hand(state[1][moment], layers=[0, 2, 3], embed=[5, 3, 1, 0, 2, 4])
        expected["embed"]["table"] = expected["embed"]["table"] / 4.0**power
        same_bits(grown[moment], expected)
    assert grown["born"]["layers"].tolist() == [0, 2, 3] and grown["count"] == 3
    names = {"embed.table": "wte"}
    renamed = growth.apply_opt(surgery.rename(CFG, names), state)[1]["mu"]
    same_bits(renamed, unflatten({names.get(name, name): leaf for name, leaf in flatten(state[1]["mu"]).items()}))
    part = growth.apply_opt(surgery.select(CFG, "layers.*"), state)[1]
    assert part["mu"].keys() == {"layers"}


CFG32 = CFG.replace(dtype="float32", param_dtype="float32")
STREAMED = {
    "drop_and_reorder": lambda: surgery.take(surgery.drop(CFG32, "layers", [1]), "embed", [5, 3, 1, 0, 2, 4]),
    "grow_and_cut": lambda: surgery.cut(growth.widen_mlp(CFG32, 12), "heads", 4),
    "pad_all": lambda: surgery.pad(surgery.pad(surgery.pad(CFG32, "heads", 10), "mlp", 9), "layers", 5),
    "rescale": lambda: surgery.rescale(CFG32, {"layers.mlp.*": 0.3}),
    "tokens": lambda: surgery.take(CFG32, "vocab", [3, 1, 12]),
    "rename": lambda: surgery.rename(CFG32, {"embed.table": "wte", "layers.attn.q": "h.q"}),
    "select": lambda: surgery.select(CFG32, "layers.attn.*"),
}


@pytest.mark.parametrize("name", STREAMED)
def test_streaming_gives_the_bits_of_apply(name, tmp_path):
    plan = STREAMED[name]()
    params, mu = (
        jax.tree.map(np.float32, reference.random_params(CFG, np.random.default_rng(seed), 1.0)) for seed in (0, 1)
    )
    born = {axis: np.zeros(size, np.int32) for axis, size in CFG.axis_sizes.items()}
    state = {"count": np.int32(3), "mu": mu, "nu": jax.tree.map(np.square, mu), "born": born}
    checkpoint.save(tmp_path / "src", CFG32, params, opt_state=state)
    growth.stream(plan, tmp_path / "src", tmp_path / "dst", opt=True, chunk_bytes=400, memory_gb=0.2)
    lazy = checkpoint.open_lazy(tmp_path / "dst")
    assert lazy.cfg == plan.dst_cfg and lazy.provenance[-1]["policy"] == plan.policy
    read = jax.tree.map(lambda leaf: leaf.read(), lazy.params)
    assert_same(read, jax.tree.map(np.asarray, growth.apply(plan, params)))
    assert_same(
        jax.tree.map(lambda leaf: leaf.read(), lazy.opt_state), jax.tree.map(np.asarray, growth.apply_opt(plan, state))
    )
    if plan.is_model:
        assert_same(jax.tree.map(np.asarray, checkpoint.load(tmp_path / "dst").params), read)
        assert growth.verify_stored(plan, checkpoint.open_lazy(tmp_path / "src").params, lazy.params).ok


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            lambda: surgery.drop(CFG, "layers", [1]),
            r"shrink: policy surgery has no inverse: layers: units \[1\] of the",
        ),
        (
            lambda: surgery.cut(CFG, "mlp", 4),
            r"has no inverse: mlp: units \[4, 5, 6\] of the source are not in the dest",
        ),
        (lambda: surgery.select(CFG, "layers.*"), r"policy select has no inverse: it drops embed\.table, embed_norm"),
    ],
)
def test_what_was_dropped_cannot_be_brought_back(plan, message):
    plan = plan()
    with pytest.raises(tele.UserError, match=message):
        growth.shrink(plan, growth.apply(plan, PARAMS))


# ---- two trees ---------------------------------------------------------------------------------------------------


def test_diff_says_what_differs_and_by_how_much(tmp_path):
    a = jax.tree.map(np.float32, PARAMS)
    b = flatten(jax.tree.map(np.array, a))
    assert surgery.diff(a, a).equal and "values" not in str(surgery.diff(a, a))
    b["layers.mlp.up"][1, 2, 3] += 0.5
    b["layers.mlp.up"][3, 0, 0] -= 0.25
    b["layers.attn.q"] = b["layers.attn.q"][:3]
    b["final_norm.scale"] = b["final_norm.scale"].astype(np.float64)
    b["extra"] = b.pop("lm_head.kernel")
    found = surgery.diff(a, unflatten(b))
    assert not found.equal and not found.to_json()["equal"]
    leaves = {leaf.name: leaf for leaf in found.leaves}
    assert (leaves["layers.mlp.up"].what, leaves["layers.mlp.up"].different) == ("values", 2)
    assert leaves["layers.mlp.up"].max_abs == pytest.approx(0.5)
    what = {leaf.name: leaf.what for leaf in found.leaves}
    assert (what["layers.attn.q"], what["final_norm.scale"], what["embed.table"]) == ("shape", "dtype", "equal")
    assert (what["lm_head.kernel"], what["extra"]) == ("only in a", "only in b")
    lines = str(found).splitlines()
    assert "layers.mlp.up  float32[4,6,7]  values  2 entries, by 0.5 at most" in lines
    assert "layers.attn.q  float32[4,6,8,4] | float32[3,6,8,4]  shape" in lines
    assert "extra  float32[6,16]  only in b" in lines
    checkpoint.save(tmp_path / "a", CFG32, a)
    checkpoint.save(tmp_path / "b", CFG32, jax.tree.map(lambda x: x * np.float32(1.5), a))
    stored = surgery.diff(*(checkpoint.open_lazy(tmp_path / name).params for name in "ab"))
    assert all(
        leaf.what == "values" and leaf.different == np.prod(reference.shapes(CFG)[leaf.name]) for leaf in stored.leaves
    )
    for leaf in stored.leaves:
        assert leaf.max_abs == pytest.approx(0.5 * np.abs(flatten(a)[leaf.name]).max(), rel=1e-6)


def test_diff_of_numbers_that_are_none():
    a, b = (np.array([1.0, np.nan, np.nan, np.inf, 0.0]) for _ in range(2))
    b[2], b[4] = 7.0, -0.0
    (leaf,) = surgery.diff({"x": a}, {"x": b}).leaves
    assert (leaf.what, leaf.different, leaf.max_abs) == ("values", 1, np.inf)
    assert surgery.diff({"x": a}, {"x": a}).equal and surgery.diff({"x": np.float32(1)}, {"x": np.float32(1)}).equal


# ---- what is refused ---------------------------------------------------------------------------------------------

TIED_NAMES = {"embed.table": "x", "lm_head.kernel": "x"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: surgery.take(CFG, "layer", [0]),
            "axis 'layer' is not one of layers, embed, heads, kv_heads, mlp, vocab",
        ),
        (lambda: surgery.take(CFG, "head_dim", [0]), "axis 'head_dim' is not one of"),
        (lambda: surgery.take(CFG, "layers", []), "take: no ids; layers has to keep at least one"),
        (lambda: surgery.take(CFG, "layers", [0, 4, -1]), "take: layers has 4 units, 0 to 3; not -1, 4"),
        (lambda: surgery.take(CFG, "mlp", [0, 1, 1]), "take: mlp ids repeat"),
        (lambda: surgery.take(CFG, "mlp", 3), "take: mlp ids have to be a list of whole numbers, got 3"),
        (lambda: surgery.take(CFG, "mlp", [0, 1.5]), r"take: mlp ids\[1\]=1.5 must be a whole number"),
        (lambda: surgery.take(CFG, "vocab", [13]), "take: vocab has 13 units, 0 to 12; not 13"),
        (
            lambda: surgery.take(CFG, "heads", [0, 1, 2]),
            r"take: heads \[0, 1, 2\] leave groups of 1 and 2; a model has",
        ),
        (lambda: surgery.take(CFG, "heads", [0, 0]), "take: heads ids repeat"),
        (lambda: surgery.drop(CFG, "layers", range(4)), "take: no ids; layers has to keep at least one"),
        (lambda: surgery.drop(CFG, "layers", [7]), "drop: layers has 4 units, 0 to 3; not 7"),
        (lambda: surgery.drop(CFG, "heads", [1]), "leave groups of 1 and 2"),
        (lambda: surgery.duplicate(CFG, [4]), "duplicate: layers has 4 units, 0 to 3; not 4"),
        (lambda: surgery.duplicate(CFG, [1, 1]), "duplicate: layers are named twice"),
        (lambda: surgery.cut(CFG, "mlp", 8), "cut: mlp has 7 units, and cannot be cut to 8"),
        (lambda: surgery.cut(CFG, "mlp", 0), "cut: mlp has 7 units, and cannot be cut to 0"),
        (lambda: surgery.cut(CFG, "mlp", "3"), "cut: the size='3' must be a whole number"),
        (lambda: surgery.cut(CFG, "heads", 3), "leave groups of 1 and 2"),
        (lambda: surgery.pad(CFG, "embed", 8), r"pad: embed cannot be padded; widen it with growth\.plan"),
        (lambda: surgery.pad(CFG, "heads", 9), "pad: 9 heads do not make whole groups of 2"),
        (lambda: surgery.pad(CFG, "mlp", 6), r"pad: mlp has 7 units already, more than 6; see surgery\.cut"),
        (lambda: surgery.submodel(CFG), "submodel: name what to keep, of layers, embed"),
        (lambda: surgery.submodel(CFG, layer=[0]), "axis 'layer' is not one of"),
        (lambda: surgery.select(CFG, ["embed.tabel"]), r"select: no leaf embed\.tabel; leaves: embed\.table"),
        (lambda: surgery.select(CFG, "x*"), r"no leaf fits path='x\*'"),
        (lambda: surgery.select(CFG, []), "select: no leaf named"),
        (lambda: surgery.select(CFG, ["embed.table"] * 2), "select: a leaf is named twice"),
        (lambda: surgery.rename(CFG, {"a": "b"}), "rename: no leaf a; leaves:"),
        (lambda: surgery.rename(CFG, {}), "rename: no leaf named"),
        (lambda: surgery.rename(CFG, TIED_NAMES), "rename: two leaves would have one name"),
        (lambda: surgery.rename(CFG, {"embed.table": "lm_head.kernel"}), "rename: two leaves would have one name"),
        (
            lambda: surgery.rename(CFG, {"embed.table": "layers.mlp.up.x"}),
            r"would lie inside layers\.mlp\.up, which is",
        ),
        (
            lambda: surgery.rename(CFG, {"embed.table": "a..b"}),
            r"rename: 'a\.\.b' cannot be stored: it has an empty key",
        ),
        (
            lambda: surgery.rescale(CFG, {"embed.*": 0.0}),
            r"rescale: the factor of embed\.\* must not be 0",
        ),
        (lambda: surgery.rescale(CFG, {"embed.*": np.nan}), r"rescale: the factor of embed\.\*=nan"),
        (lambda: surgery.rescale(CFG, {"embed.*": "2"}), r"rescale: the factor of embed\.\*='2'"),
        (lambda: surgery.rescale(CFG, {"embedding": 2.0}), "no leaf fits path='embedding'"),
        (lambda: surgery.pad(surgery.select(CFG, "embed.*"), "mlp", 9), "no leaf of the tree has the axis mlp"),
    ],
)
def test_wrong_input_is_one_clear_line(call, message):
    with pytest.raises(tele.UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_two_plans_that_are_put_together_must_meet():
    with pytest.raises(
        tele.UserError, match="first plan produces another model than the second plan starts from: num_layers 3"
    ):
        growth.compose(surgery.drop(CFG, "layers", [1]), surgery.drop(CFG, "layers", [1]))
