"""Low-rank adapters: merged, unmerged and attached they are one function, and only they have gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.axes import flatten
from tele_jax.errors import UserError
from tele_jax.model.loss import next_token_loss
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, vocab_size=64,
    dtype="float32", output_biases=True, mup_base_width=16,
)  # fmt: skip
ALL = ("attn", "mlp")
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 12), np.int32)


def lora_of(targets=ALL, **fields):
    return tele.lora.LoraConfig(**{"rank": 4, "alpha": 6.0, "targets": targets} | fields)


def trees(cfg=CFG, lora=None, seed=0):
    """Parameters, and adapters of which b is not zero."""
    lora = lora or lora_of()
    adapters = tele.lora.init(cfg, lora, jax.random.key(seed + 1))
    noise = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.1 * noise.standard_normal(x.shape), x.dtype), adapters)
    return tele.init(cfg, jax.random.key(seed)), moved


# W + scale * a b in float64, by the letters of docs/architecture.md, written out for every kernel.
LETTERS = {
    **dict.fromkeys(("attn.q", "attn.k", "attn.v"), "ldr,lrnh->ldnh"),
    "attn.o": "lnhr,lrd->lnhd",
    **dict.fromkeys(("mlp.gate", "mlp.up"), "ldr,lrf->ldf"),
    "mlp.down": "lfr,lrd->lfd",
}


def merged_in_float64(params, adapters, scale):
    leaves, parts = flatten(params), flatten(adapters)
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)  # noqa: E731
    return {
        name: wide(leaves[f"layers.{name}"])
        + scale * np.einsum(letters, wide(parts[f"layers.{name}.a"]), wide(parts[f"layers.{name}.b"]))
        for name, letters in LETTERS.items()
    }


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 6.0 / 4), (True, 6.0 / 2)])
def test_merging_adds_alpha_over_rank_or_over_its_root_times_a_b(stabilized, scale):
    lora = lora_of(rank_stabilized=stabilized)
    params, adapters = trees()
    merged = flatten(tele.lora.merge(CFG, params, adapters, lora))
    for name, expected in merged_in_float64(params, adapters, scale).items():
        np.testing.assert_allclose(merged[f"layers.{name}"], expected, atol=1e-6)
    untouched = set(merged) - {f"layers.{name}" for name in LETTERS}
    assert all(merged[name] is flatten(params)[name] for name in untouched)
    back = flatten(tele.lora.unmerge(CFG, tele.lora.merge(CFG, params, adapters, lora), adapters, lora))
    assert max(float(jnp.abs(back[n] - x).max()) for n, x in flatten(params).items()) < 1e-6


def test_bfloat16_kernels_are_merged_in_float32_and_rounded_once():
    cfg = CFG.replace(param_dtype="bfloat16")
    params, adapters = trees(cfg)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    merged = flatten(jax.jit(tele.lora.merge, static_argnums=(0, 3))(cfg, params, adapters, lora_of()))
    for name, expected in merged_in_float64(params, adapters, 1.5).items():
        once = expected.astype(jnp.bfloat16).astype(np.float64)
        found = np.asarray(merged[f"layers.{name}"], np.float64)
        # Sums in float32 fall on the other side of a tie now and then, nothing else.
        assert merged[f"layers.{name}"].dtype == jnp.bfloat16
        assert np.mean(found != once) < 1e-3
        np.testing.assert_allclose(found, once, rtol=2**-7)


@pytest.mark.parametrize(("remat", "targets"), [("none", ALL), ("full", ("q", "mlp.down")), ("products", ("attn",))])
def test_attached_adapters_compute_what_merged_ones_do(remat, targets):
    cfg, lora = CFG.replace(remat=remat), lora_of(targets)
    params, adapters = trees(cfg, lora)
    plain = tele.forward(cfg, params, TOKENS)
    attached = tele.forward(cfg, tele.lora.attach(cfg, params, adapters, lora), TOKENS)
    merged = tele.forward(cfg, tele.lora.merge(cfg, params, adapters, lora), TOKENS)
    assert float(jnp.abs(merged - plain).max()) > 0.01
    np.testing.assert_allclose(attached, merged, atol=1e-5)


def test_fresh_adapters_change_nothing():
    params, _ = trees()
    adapters = tele.lora.init(CFG, lora_of(), jax.random.key(3))
    attached = tele.forward(CFG, tele.lora.attach(CFG, params, adapters, lora_of()), TOKENS)
    np.testing.assert_array_equal(attached, tele.forward(CFG, params, TOKENS))
    assert all(bool(jnp.any(x != 0)) == name.endswith(".a") for name, x in flatten(adapters).items())
    fewer = flatten(tele.lora.init(CFG, lora_of(("attn.q",)), jax.random.key(3)))
    np.testing.assert_array_equal(fewer["layers.attn.q.a"], flatten(adapters)["layers.attn.q.a"])


def test_attached_adapters_generate_and_score_as_merged_ones():
    params, adapters = trees(lora=lora_of(alpha=40.0))
    attached = tele.lora.attach(CFG, params, adapters, lora_of(alpha=40.0))
    merged = tele.lora.merge(CFG, params, adapters, lora_of(alpha=40.0))
    prompts = [[5, 6, 7], [8]]
    tokens = [tele.generate(CFG, tree, prompts, max_new_tokens=8) for tree in (params, attached, merged)]
    assert tokens[1] == tokens[2] != tokens[0]


def _loss_and_gradients(params, adapters, lora, mesh=None):
    batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1), "loss_weights": np.ones(TOKENS.shape, np.float32)}

    def loss(adapters, params):
        total, weight = next_token_loss(CFG, tele.lora.attach(CFG, params, adapters, lora), batch)
        return total / weight

    if mesh is None:
        return jax.jit(jax.value_and_grad(loss))(adapters, params)
    params = jax.device_put(params, param_shardings(tele.spec(CFG), mesh))
    adapters = jax.device_put(adapters, param_shardings(tele.lora.spec(CFG, lora), mesh))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss))(adapters, params)


def test_every_adapter_has_a_gradient_and_eight_devices_give_that_of_one():
    lora = lora_of()
    params, adapters = trees()
    loss, gradients = _loss_and_gradients(params, adapters, lora)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, adapters)
    for name, leaf in flatten(gradients).items():  # every layer of it
        assert bool(jnp.all(jnp.max(jnp.abs(leaf), axis=tuple(range(1, leaf.ndim))) > 0)), name
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    of_mesh, gradients_of_mesh = _loss_and_gradients(params, adapters, lora, mesh)
    np.testing.assert_allclose(of_mesh, loss, atol=1e-6)
    for name, leaf in flatten(gradients).items():
        np.testing.assert_allclose(flatten(gradients_of_mesh)[name], leaf, atol=1e-6, err_msg=name)


def test_the_gradient_of_a_merged_kernel_agrees_with_that_of_its_adapter():
    lora, (params, adapters) = lora_of(), trees()
    batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1), "loss_weights": np.ones(TOKENS.shape, np.float32)}
    merged = tele.lora.merge(CFG, params, adapters, lora)
    of_kernels = flatten(jax.grad(lambda tree: next_token_loss(CFG, tree, batch)[0] / TOKENS.size)(merged))
    gradients, parts = flatten(_loss_and_gradients(params, adapters, lora)[1]), flatten(adapters)
    for name, letters in LETTERS.items():  # dL/da = scale * dL/dW b^T, dL/db = scale * a^T dL/dW
        a, b, w = letters.replace("->", ",").split(",")
        of_w = np.asarray(of_kernels[f"layers.{name}"], np.float64)
        of_a = 1.5 * np.einsum(f"{w},{b}->{a}", of_w, parts[f"layers.{name}.b"])
        of_b = 1.5 * np.einsum(f"{w},{a}->{b}", of_w, parts[f"layers.{name}.a"])
        np.testing.assert_allclose(gradients[f"layers.{name}.a"], of_a, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradients[f"layers.{name}.b"], of_b, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("attn",), ["attn.k", "attn.o", "attn.q", "attn.v"]),
        (("self_attention.",), ["attn.k", "attn.o", "attn.q", "attn.v"]),
        (("mlp",), ["mlp.down", "mlp.gate", "mlp.up"]),
        (("q", "attn.v", "layers.mlp.up"), ["attn.q", "attn.v", "mlp.up"]),
        (("layers",), ["attn.k", "attn.o", "attn.q", "attn.v", "mlp.down", "mlp.gate", "mlp.up"]),
    ],
)
def test_targets_name_kernels_by_parts_of_their_names(targets, names):
    found = flatten(tele.lora.spec(CFG, lora_of(targets)))
    assert sorted({name.removeprefix("layers.")[:-2] for name in found}) == names
    q = found.get("layers.attn.q.a")
    assert q is None or q.axes == ("layers", "embed", "rank")


def test_no_gradient_of_a_frozen_kernel_is_computed():
    """It would take 2 operations per parameter and token: compiled, counted by XLA."""
    lora = lora_of()
    params, adapters = jax.eval_shape(trees)
    batch = {name: jax.ShapeDtypeStruct((8, 64), jnp.int32) for name in ("tokens", "targets", "loss_weights")}

    def loss(adapters, params, batch):
        return next_token_loss(CFG, tele.lora.attach(CFG, params, adapters, lora), batch)[0]

    def operations(argnums):
        compiled = jax.jit(jax.grad(loss, argnums)).lower(adapters, params, batch).compile()
        return compiled.cost_analysis()["flops"]

    kernels = sum(leaf.size for leaf in flatten(tele.spec(CFG)).values() if leaf.role == "kernel")
    assert operations((0, 1)) - operations(0) > 0.95 * 2 * kernels * 8 * 64


def test_trees_with_adapters_beside_them_are_refused_where_arrays_are_needed(tmp_path):
    params, adapters = trees()
    attached = tele.lora.attach(CFG, params, adapters, lora_of())
    with pytest.raises(UserError, match=r"layers\.attn\.k: Adapted, not an array"):
        tele.growth.apply(tele.growth.widen_mlp(CFG, 64), attached)
    for use in (
        lambda: tele.checkpoint.save(tmp_path / "c", CFG, attached),
        lambda: tele.convert.save_hf(tmp_path / "h", CFG, attached, format="llama"),
        lambda: tele.surgery.diff(params, attached),
    ):
        with pytest.raises(UserError, match=r"layers.attn.k, .*: with adapters beside them; tele.lora.merge makes"):
            use()


def test_what_cannot_be_is_named_in_one_line():
    params, adapters = trees()
    for targets, named in ((("attn.w",), "'attn.w' names none"), (("lm_head",), "'lm_head' names none of the kernels")):
        with pytest.raises(UserError, match=rf"lora.targets: {named}"):
            tele.lora.init(CFG, lora_of(targets), jax.random.key(0))
    with pytest.raises(UserError, match=r"LoraConfig.*rank=0 must be above 0|rank=0 must be above 0"):
        lora_of(rank=0)
    with pytest.raises(UserError, match="targets is empty"):
        lora_of(())
    with pytest.raises(
        UserError, match=r"lora: adapters are not those .*layers.attn.k.a: float32\[2, 32, 4\], expected"
    ):
        tele.lora.merge(CFG, params, adapters, lora_of(rank=5))
    with pytest.raises(UserError, match=r"lora: adapters are not those .*layers.mlp.down.a: not a parameter"):
        tele.lora.attach(CFG, params, adapters, lora_of(("attn",)))
    with pytest.raises(UserError, match=r"lora: params are not those of cfg: .*embed.table"):
        tele.lora.merge(CFG.replace(vocab_size=65), params, adapters, lora_of())
    with pytest.raises(UserError, match=r"layers.attn.k has an adapter already; merge it first"):
        tele.lora.merge(CFG, tele.lora.attach(CFG, params, adapters, lora_of()), adapters, lora_of())
    with pytest.raises(UserError, match=r"lora: expected a LoraConfig, got dict"):
        tele.lora.init(CFG, {"rank": 4}, jax.random.key(0))
    with pytest.raises(UserError, match=r"lora.init: key: expected jax.random.key"):
        tele.lora.init(CFG, lora_of(), 0)
