"""Growth on a mesh: the bits of growth on one device, and no device that ever holds a whole axis of what is cut."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import tele_jax as tele
from tele_jax import growth, surgery
from tele_jax.aot import counts, hlo
from tele_jax.aot.jobs import sharded_bytes
from tele_jax.axes import flatten, unflatten
from tele_jax.growth.opt_state import AdamState
from tele_jax.growth.sharded import exchange
from tele_jax.growth.verify import liveness
from tele_jax.model.spec import abstract_params
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests import reference
from tests.growth import oracle

SRC = tele.ModelConfig(
    **dict(num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=12, vocab_size=16)
)


@given(st.data())
def test_rounds_bring_every_entry_to_where_it_belongs(data):
    """Carried out in numpy: a device sends to one other in a round and receives from one, and takes from no others."""
    ways, size, made = (data.draw(st.integers(1, n)) for n in (6, 4, 5))
    src = np.arange(ways * size)
    index = np.array(data.draw(st.lists(st.integers(-1, len(src) - 1), min_size=ways * made, max_size=ways * made)))
    plan = exchange(index, len(src), ways)
    blocks = src.reshape(ways, size)
    held = [[*block] for block in blocks]
    for step in plan.rounds:
        senders, receivers = zip(*step.pairs, strict=True)
        assert len(set(senders)) == len(set(receivers)) == len(step.pairs)
        arrived = {receiver: blocks[sender][step.send[sender]] for sender, receiver in step.pairs}
        for device, values in enumerate(held):
            values.extend(arrived.get(device, [-9] * step.send.shape[1]))
    taken = np.concatenate([np.array(values)[take] for values, take in zip(held, plan.take, strict=True)])
    np.testing.assert_array_equal(taken[index >= 0], index[index >= 0])
    needed = [{*part[part >= 0] // size} - {device} for device, part in enumerate(index.reshape(ways, made))]
    places = [sum(device in n for n in needed) for device in range(ways)]
    assert len(plan.rounds) <= max(0, 2 * max([*map(len, needed), *places]) - 1)


@pytest.mark.parametrize(
    ("policy", "mesh", "dtype"),
    [
        ("exact", MeshConfig(fsdp=4, tensor=2), "float32"),
        ("copy", MeshConfig(data=2, fsdp=2, tensor=2), "bfloat16"),
    ],
)
def test_growth_on_a_mesh_gives_the_bits_of_one_device(policy, mesh, dtype):
    src = SRC.replace(param_dtype=dtype)
    dst = src.replace(embed_dim=40, num_heads=10, num_kv_heads=2, mlp_dim=28, num_layers=3, vocab_size=24)
    plan = growth.plan(src, dst, policy=policy, seed=5)
    draw = lambda seed: jax.tree.map(  # noqa: E731
        lambda x: jnp.asarray(x, dtype), reference.random_params(src, np.random.default_rng(seed), 1.0)
    )
    params, state = draw(0), AdamState(np.int32(7), draw(1), draw(2), {})
    mesh = make_mesh(mesh)
    lies = param_shardings(tele.spec(src), mesh)
    on_mesh = state._replace(mu=jax.device_put(state.mu, lies), nu=jax.device_put(state.nu, lies))
    big, grown = growth.sharded(plan, mesh, on_mesh)(jax.device_put(params, lies), on_mesh)
    shardings = flatten(param_shardings(tele.spec(plan.dst_cfg), mesh))
    expected = jax.jit(lambda state: growth.apply_opt(plan, state))(state)  # on one device, without the mesh
    for made, wanted in ((big, oracle.grow(plan, params)), (grown.mu, expected.mu), (grown.nu, expected.nu)):
        for name, leaf in flatten(made).items():
            assert leaf.sharding == shardings[name]
            assert np.asarray(leaf).tobytes() == np.asarray(flatten(wanted)[name]).tobytes(), name
    assert grown.count == 7


def test_surgery_on_a_mesh_gives_the_bits_of_one_device():
    """Units in another order, fewer, under another name: not a model any more, and laid on the mesh all the same."""
    order = np.random.default_rng(2).permutation(16)
    taken = {"embed": order, "mlp": order[order < 12][:8]}
    plan = surgery.take(surgery.take(SRC, "embed", taken["embed"]), "mlp", taken["mlp"])
    plan = surgery.rename(plan, {"lm_head.kernel": "head"})
    params = jax.tree.map(jnp.float32, reference.random_params(SRC, np.random.default_rng(0), 1.0))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    on_mesh = jax.device_put(params, param_shardings(tele.spec(SRC), mesh))
    state = AdamState(np.int32(7), on_mesh, on_mesh, {})
    made, grown = growth.sharded(plan, mesh, state)(on_mesh, state)
    assert made["head"].sharding.spec == grown.mu["head"].sharding.spec == P("fsdp", "tensor")
    for name, spec in flatten(tele.spec(SRC)).items():
        rows = [taken.get(axis, np.arange(size)) for axis, size in zip(spec.axes, spec.shape, strict=True)]
        wanted = np.asarray(flatten(params)[name])[np.ix_(*rows)]
        for tree in (made, grown.mu, grown.nu):
            leaf = flatten(tree)["head" if name == "lm_head.kernel" else name]
            assert np.asarray(leaf).tobytes() == wanted.tobytes(), name


def test_no_device_holds_a_whole_axis():
    """Read from the compiled program: nothing is gathered, and what a device receives is less than twice its part of
    the source. Taking along an axis that is cut gathers it: 11 times the part, and 7 times the part of the result in
    temporaries.
    """
    src = SRC.replace(embed_dim=512, num_heads=64, num_kv_heads=64, mlp_dim=1280, vocab_size=2048)
    plan = growth.plan(src, src.replace(embed_dim=640, num_heads=80, num_kv_heads=80, mlp_dim=1600, num_layers=3))
    mesh = make_mesh(MeshConfig(fsdp=8))
    lies = [param_shardings(tele.spec(cfg), mesh) for cfg in (src, plan.dst_cfg)]
    small, large = (abstract_params(cfg) for cfg in (src, plan.dst_cfg))
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), small, lies[0])
    program = growth.sharded(plan, mesh, None).lower(placed, None).compile()
    collectives = counts.count(hlo.parse(program.as_text())).collectives
    assert {c.kind for c in collectives} == {"collective-permute"}
    assert sum(c.times * c.result_bytes for c in collectives) < 2 * sharded_bytes(small, lies[0])
    assert program.memory_analysis().temp_size_in_bytes < 4 * sharded_bytes(large, lies[1])


def test_what_cannot_learn_is_found_on_a_mesh_without_reading_leaves(monkeypatch):
    """Twins and units without gradient, planted; what comes to the host is two numbers of every unit."""
    plan = growth.plan(SRC, SRC.replace(embed_dim=24, num_heads=8, mlp_dim=20, num_layers=4), layers=[0, 0, 1, 1])
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    rng = np.random.default_rng(0)
    leaves = {n: rng.standard_normal(s.shape).astype(np.float32) for n, s in plan.dst_spec.items()}
    for name in ("layers.mlp.gate", "layers.mlp.up"):
        leaves[name][..., 13] = leaves[name][..., 3]
    leaves["layers.mlp.down"][:, 13] = leaves["layers.mlp.down"][:, 3]
    leaves["layers.mlp.gate"][..., 17] = leaves["layers.mlp.gate"][..., 4]  # in one leaf only: no twin
    for leaf in leaves.values():
        if leaf.shape[0] == 4:
            leaf[1] = leaf[0]
    read = []
    monkeypatch.setattr(liveness, "to_host", lambda array: read.append(array.size) or np.asarray(array))
    lies = param_shardings(tele.spec(plan.dst_cfg), mesh)
    assert liveness.locked(plan, jax.device_put(unflatten(leaves), lies)) == (
        "mlp[13] = mlp[3]",
        "layers[1] = layers[0]",
    )
    leaves["layers.attn.q"][:, :, 6] = leaves["layers.mlp.up"][1] = leaves["lm_head.kernel"][20] = 0
    dead = {"heads[6] in layers.attn.q", "layers[1] in layers.mlp.up", "embed[20] in lm_head.kernel"}
    assert set(liveness.dead(plan, jax.device_put(unflatten(leaves), lies))) == dead
    assert 0 < max(read) <= 2 * max(m.dst_size for axis, m in plan.maps.items() if axis != "vocab")


@pytest.mark.usefixtures("quick_compilation")  # for the last test of the module: the others look at programs
def test_liveness_needs_two_gradients_and_moments_beside_the_parameters(monkeypatch):
    """Arrays that are there after each program that it runs."""
    src = SRC.replace(remat="none", dtype="float32")
    plan = growth.plan(src, src.replace(embed_dim=128, mlp_dim=256, vocab_size=512))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = reference.random_params(plan.dst_cfg, np.random.default_rng(0), 0.1)
    big = jax.device_put(jax.tree.map(np.float32, params), param_shardings(tele.spec(plan.dst_cfg), mesh))
    live = lambda: sum(array.nbytes for array in jax.live_arrays())  # noqa: E731
    before, after = live(), []

    def measured(function, **how):
        compiled = jax.jit(function, **how)

        def run(*arguments):
            out = jax.block_until_ready(compiled(*arguments))
            after.append(live())
            return out

        return run

    monkeypatch.setattr(liveness, "jax", types.SimpleNamespace(**{**vars(jax), "jit": measured}))
    liveness.liveness(plan, big, np.arange(8 * 9, dtype=np.int32).reshape(8, 9) % 16)
    assert len(after) >= 8 and max(after) - before < 4.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(big))
