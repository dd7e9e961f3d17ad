"""Merging against float64 numpy written from the published formulas, on random trees."""

import jax
import ml_dtypes
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import surgery
from tele_jax.axes import flatten, unflatten
from tele_jax.errors import UserError
from tele_jax.growth import merging

CFG = tele.ModelConfig(
    num_layers=3, embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=20, vocab_size=24, output_biases=True
)
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def random_tree(seed, dtype=np.float32, cfg=CFG):
    rng = np.random.default_rng(seed)
    return unflatten({n: rng.normal(size=s.shape).astype(dtype) for n, s in flatten(tele.spec(cfg)).items()})


def tensors(tree):
    """Float64 arrays, one for every layer of a leaf that has layers: what mergekit calls a tensor."""
    for name, leaf in flatten(tree).items():
        leaf = np.asarray(leaf)
        parts = leaf if name.startswith("layers.") else [leaf]
        yield from (np.asarray(part, np.float64) for part in parts)


def assert_rounded(merged, expected, dtype):
    """Every tensor is the float64 result, rounded once (what lies half way between two numbers may fall either way).

    Float64 leaves differ by the order of a sum of numbers near 1.
    """
    for have, want in zip(tensors(merged), expected, strict=True):
        exact = np.asarray(want, np.float64).astype(dtype).astype(np.float64)
        info = ml_dtypes.finfo(dtype)
        atol = 8 * info.eps if dtype == np.float64 else info.tiny
        np.testing.assert_allclose(have, exact, rtol=float(info.eps), atol=float(atol))
        assert dtype == np.float64 or np.mean(have == exact) > 0.999
    assert all(leaf.dtype == dtype for leaf in flatten(merged).values())


def slerp(t, a, b):
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def trimmed(task, share):
    """Keeps the top share of the entries by magnitude."""
    flat = np.sort(np.abs(task.ravel()).astype(np.float32))
    return np.where(np.abs(task).astype(np.float32) >= flat[-max(1, int(share * flat.size))], task, 0)


def elected_mean(tasks, weights):
    """Elects a sign by the weighted sum, and averages the entries that have it, one entry at a time."""
    out = np.zeros(tasks[0].shape)
    for place in np.ndindex(out.shape):
        values = [(w, task[place]) for w, task in zip(weights, tasks, strict=True)]
        sign = np.sign(sum(w * value for w, value in values))
        agree = [(w, value) for w, value in values if sign and np.sign(value) == sign]
        out[place] = sum(w * value for w, value in agree) / sum(w for w, _ in agree) if agree else 0
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_method_is_its_formula_in_float64(dtype):
    trees = [random_tree(seed, dtype) for seed in range(3)]
    a, b, base = (list(tensors(tree)) for tree in trees)
    linear = surgery.merge(CFG, trees, weights=(1, 2, 5))
    assert_rounded(linear, [(x + 2 * y + 5 * z) / 8 for x, y, z in zip(a, b, base, strict=True)], dtype)
    arc = surgery.merge(CFG, trees[:2], "slerp", t=0.3)
    assert_rounded(arc, [slerp(0.3, x, y) for x, y in zip(a, b, strict=True)], dtype)
    tasks = surgery.merge(CFG, trees[:2], "task_arithmetic", base=trees[2], weights=(1, -0.5), scale=0.4)
    expected = [z + 0.4 * ((x - z) - 0.5 * (y - z)) for x, y, z in zip(a, b, base, strict=True)]
    assert_rounded(tasks, expected, dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("held", [0, 2**22], ids=["counted", "sorted"])
def test_ties_is_its_formula_in_float64(dtype, scope, held, monkeypatch):
    monkeypatch.setattr(merging, "_SORTED", held)
    trees = [random_tree(seed, dtype) for seed in range(3)]
    how = {"density": 0.3, "scale": 0.7, "weights": (1.0, 2.0), "scope": scope}
    merged = surgery.merge(CFG, trees[:2], "ties", base=trees[2], **how)
    a, b, base = (list(tensors(tree)) for tree in trees)
    tasks = [[x - z for x, z in zip(model, base, strict=True)] for model in (a, b)]
    if scope == "model":
        sizes = np.cumsum([task.size for task in tasks[0]])[:-1]
        joined = [np.split(trimmed(np.concatenate([x.ravel() for x in task]), 0.3), sizes) for task in tasks]
        kept = [[x.reshape(z.shape) for x, z in zip(task, base, strict=True)] for task in joined]
    else:
        kept = [[trimmed(x, 0.3) for x in task] for task in tasks]
    expected = [z + 0.7 * elected_mean(pair, (1, 2)) for *pair, z in zip(*kept, base, strict=True)]
    assert_rounded(merged, expected, dtype)


def test_slerp_over_the_model_has_one_angle():
    a, b = random_tree(0, np.float64), random_tree(1, np.float64)
    merged = surgery.merge(CFG, [a, b], "slerp", t=0.6, scope="model")
    joined = [np.concatenate([x.ravel() for x in tensors(tree)]) for tree in (merged, a, b)]
    np.testing.assert_allclose(joined[0], slerp(0.6, *joined[1:]), rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_merged_with_itself_is_itself(dtype):
    tree = random_tree(0, dtype)
    ways = [("linear", {"weights": (0.3, 0.7)}), ("slerp", {"t": 0.3})]
    ways += [("task_arithmetic", {"base": tree}), ("ties", {"base": tree})]
    for method, how in ways:
        for have, want in zip(tensors(surgery.merge(CFG, [tree, tree], method, **how)), tensors(tree), strict=True):
            # float64 has nothing wider to round from
            np.testing.assert_allclose(have, want, rtol=2.3e-16 if dtype == np.float64 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_are_exact(dtype):
    a, b = random_tree(0, dtype), random_tree(1, dtype)
    for merged, end in (
        (surgery.merge(CFG, [a, b], "slerp", t=0), a),
        (surgery.merge(CFG, [a, b], "slerp", t=1), b),
        (surgery.merge(CFG, [a, b], weights=(0, 3)), b),
        (surgery.merge(CFG, [a], "passthrough", slices=[(0, 0, 3)]), a),
    ):
        assert surgery.diff(merged, end).equal


def test_passthrough_takes_layers_of_models_of_several_depths():
    cfg = CFG.replace(embed_norm=True)
    deep = cfg.replace(num_layers=5)
    a, b = random_tree(0, cfg=cfg), random_tree(1, cfg=deep)
    merged = surgery.merge([cfg, deep], [a, b], "passthrough", slices=[(1, 3, 5), (1, 0, 1), (0, 1, 3)])
    left, right = flatten(a), flatten(b)
    ends = {
        "embed.table": right,
        "embed_norm.scale": right,
        "final_norm.scale": left,
        "lm_head.kernel": left,
    }  # as mergekit takes them
    for name, leaf in flatten(merged).items():
        layered = name.startswith("layers.")
        parts = [right[name][3:5], right[name][:1], left[name][1:3]] if layered else [ends[name][name]]
        np.testing.assert_array_equal(leaf, np.concatenate(parts))


REFUSED = {
    "two models or more": dict(trees=[random_tree(0)]),
    "slerp merges two": dict(trees=[random_tree(0)] * 3, method="slerp", t=0.5),
    "slerp needs t": dict(method="slerp"),
    "weights: 3 for 2": dict(weights=(1, 2, 3)),
    "their sum is 0": dict(weights=(1, -1)),
    "next to it": dict(weights=(0.1 + 0.2, -0.3)),
    "sum is not finite": dict(weights=(1e308, 1e308)),
    "must be in \\[0, 1\\]": dict(method="slerp", t=5.0),
    "opposite directions": dict(
        method="slerp", t=0.5, trees=[random_tree(0), jax.tree.map(np.negative, random_tree(0))]
    ),
    "must be above 0": dict(method="ties", base=random_tree(0), weights=(1, -0.999)),
    "needs a base": dict(method="ties"),
    "base: method linear does not use it": dict(base=random_tree(0)),
    "density: method linear does not use it": dict(density=0.5),
    "above 0 and at most 1": dict(method="ties", base=random_tree(0), density=0.0),
    "no model 2": dict(method="passthrough", slices=[(2, 0, 1)]),
    "layers 1 to 3 of model 0": dict(method="passthrough", slices=[(0, 1, 4)]),
    "is not \\(model": dict(method="passthrough", slices=[(0, 1)]),
    "trees\\[1\\] does not fit.*mlp": dict(trees=[random_tree(0), random_tree(0, cfg=CFG.replace(mlp_dim=8))]),
    "trees\\[1\\].*float16, and float32": dict(trees=[random_tree(0), random_tree(0, np.float16)]),
    "weigths": dict(weigths=(1, 2)),
    "not one of 'linear'": dict(method="mean"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(message):
    how = dict(REFUSED[message])
    with pytest.raises(UserError, match=message):
        surgery.merge(CFG, how.pop("trees", [random_tree(0), random_tree(1)]), how.pop("method", "linear"), **how)


@pytest.mark.parametrize(
    "how",
    [dict(weights=(2, 1)), dict(method="slerp", t=0.3), dict(method="task_arithmetic"), dict(method="ties")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_leaf_and_model(how, value):
    a, b, base = random_tree(0), random_tree(1), random_tree(2)
    b["layers"]["mlp"]["up"][1, 2, 1] = value
    base = dict(base=base) if how.get("method", "")[:1] == "t" else {}
    whose = "values or their squares are" if how.get("method") == "slerp" else "model 1 .*holds values that are"
    with pytest.raises(UserError, match=rf"layers\.mlp\.up\[1\]: {whose} not finite"):
        surgery.merge(CFG, [a, b], **how, **base)


def test_sums_too_large_for_the_dtype_are_refused():
    trees = [random_tree(seed, np.float16) for seed in range(3)]
    with pytest.raises(UserError, match="merged values are too large for float16; choose a smaller scale"):
        surgery.merge(CFG, trees[:2], "task_arithmetic", base=trees[2], scale=1e6)


def test_slerp_of_models_that_are_close_is_the_arc_all_the_same():
    a = random_tree(0, np.float64)
    b = jax.tree.map(lambda x, noise: x + 1e-3 * noise, a, random_tree(1, np.float64))
    merged = surgery.merge(CFG, [a, b], "slerp", t=0.3)
    for x, y, found in zip(tensors(a), tensors(b), tensors(merged), strict=True):
        np.testing.assert_allclose(found, slerp(0.3, x, y), rtol=1e-9)


@pytest.mark.parametrize(
    "other", [dict(embed_dim=16), dict(mlp_dim=1), dict(rope={"theta": 5e5}), dict(tie_embeddings=True)]
)
@pytest.mark.parametrize("method, how", [("linear", {}), ("passthrough", {"slices": [(0, 0, 1), (1, 0, 1)]})])
def test_models_of_other_configs_are_refused_by_field(other, method, how):
    wrong = CFG.replace(**other)
    with pytest.raises(UserError, match=f"cfg\\[1\\] differs from cfg\\[0\\] in {next(iter(other))}"):
        surgery.merge([CFG, wrong], [random_tree(0), random_tree(1, cfg=wrong)], method, **how)
