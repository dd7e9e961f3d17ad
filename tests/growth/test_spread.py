"""Verification of models that lie on a mesh, unit by unit: the report is that on the same arrays in memory.

By several processes: tests/multiprocess/test_verify.py.
"""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tele_jax as tele
from tele_jax import growth, sharding
from tele_jax.aot import counts, hlo
from tele_jax.axes import flatten, unflatten
from tele_jax.growth.verify import entries
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests import reference
from tests.growth.strategies import without_compiling

SRC = tele.ModelConfig(
    **dict(num_layers=2, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=12, vocab_size=12),
    **dict(padded_vocab_size=16, output_biases=True, embed_norm=True, mup_base_width=4, dtype="float32"),
)
DST = SRC.replace(num_layers=4, embed_dim=12, num_heads=6, mlp_dim=40)


def grown(policy="exact", dtype="float32", wrong=()):
    """(plan, params, grown params) as numpy; wrong: (leaf, place, values before -> after) of what is altered."""
    src, dst = (cfg.replace(param_dtype=dtype) for cfg in (SRC, DST))
    params = reference.random_params(src, np.random.default_rng(0), 1.0)
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    with without_compiling():
        if policy == "composed":
            plan = growth.plan(src, dst.replace(num_layers=3))
            plan = growth.compose(plan, growth.plan(plan.dst_cfg, dst, policy="exact", epsilon="keep", seed=1))
        else:
            plan = growth.plan(src, dst, policy=policy, **({} if policy == "exact" else {"layers": "uniform"}))
        big = flatten(jax.tree.map(np.array, growth.apply(plan, params)))
    for name, place, change in wrong:
        big[name][place] = change(big[name][place])
    return plan, params, unflatten(big)


def on_mesh(mesh, plan, params, big):
    """The same, spread over a mesh; of each the process makes what its devices hold."""

    def spread(cfg, tree):
        put = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index])  # noqa: E731
        return jax.tree.map(put, tree, param_shardings(tele.spec(cfg), mesh))

    return plan, spread(plan.src_cfg, params), spread(plan.dst_cfg, big)


def put(value):
    return lambda before: value


WRONG = [
    ("layers.attn.v", (2, 3, 1, 2), put(7.0)),
    ("layers.attn.v", (1, 9, 0, 1), put(-3.0)),  # in an earlier layer: this is what is said of the leaf
    ("layers.mlp.gate", (3, 2, 39), put(np.nan)),
    ("layers.mlp.down", (0, 39, 1), put(2.0)),
    # Fresh values with a mean that all layers show together, and none alone.
    ("layers.mlp.up", (..., slice(12, None)), lambda before: before + 0.3 * before.std()),
    ("lm_head.kernel", (3, 5), put(0.5)),
    ("final_norm.scale", (0,), put(9.0)),
]


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, tensor=2, data=2), MeshConfig(fsdp=4, tensor=2)])
@pytest.mark.parametrize("policy", ["exact", "msg", "random", "composed"])
@pytest.mark.parametrize("wrong", [[], WRONG], ids=["right", "wrong"])
def test_the_report_on_a_mesh_is_that_on_arrays_in_memory(mesh, policy, wrong, monkeypatch):
    monkeypatch.setattr(sharding, "BLOCK_BYTES", 300)
    case = grown(policy, wrong=wrong)
    expected = growth.verify_stored(*case)
    assert expected.ok == (not wrong), str(expected)
    assert set(expected.altered) == {name for name, _, _ in wrong}
    case = on_mesh(make_mesh(mesh), *case)
    with jax.set_mesh(make_mesh(mesh)):  # as in a run
        assert growth.verify_stored(*case) == expected


@pytest.mark.parametrize("nbytes", [1, 100, 700, 2**20])
@pytest.mark.parametrize("spec", [P(), P(None, "fsdp", "tensor"), P(None, ("data", "fsdp")), P(None, None, "tensor")])
def test_what_is_fetched_is_the_array(spec, nbytes, monkeypatch):
    monkeypatch.setattr(sharding, "BLOCK_BYTES", nbytes)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    values = np.random.default_rng(0).standard_normal((3, 8, 6, 5)).astype(jnp.bfloat16)
    array = jax.device_put(values, NamedSharding(mesh, spec))
    for index in (None, 0, 2):
        found, expected = sharding.fetch(array, {0: index}), values if index is None else values[index]
        assert found.dtype == values.dtype and found.tobytes() == expected.tobytes()
    assert sharding.fetch(array, {1: 1}) is None
    assert sharding.fetch(array, {2: 0, 0: 1}).tobytes() == values[1].tobytes()


def test_a_block_is_all_that_travels():
    """Read from the compiled program; of array[layer, rows] all layers and rows are gathered on every device."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    array = jax.ShapeDtypeStruct((10, 64, 96), np.float32, sharding=NamedSharding(mesh, P(None, "fsdp", "tensor")))
    block = sharding._on_all.lower(array, (3, 4, 0), (1, 2, 48), array.sharding).compile()
    part, whole = (int(np.prod(shape)) * 4 for shape in ((1, 8, 96), (10, 64, 96)))

    def received(program):
        return sum(c.times * c.result_bytes for c in counts.count(hlo.parse(program.as_text())).collectives)

    assert received(block) <= 2 * part
    indexed = jax.jit(lambda x, i: jax.lax.dynamic_slice(x, (i, 8, 0), (1, 8, 96))).lower(array, 3).compile()
    assert received(indexed) > whole / 4


def test_one_unit_and_its_source_are_held_at_a_time(monkeypatch):
    alive, most = [], 0

    def counted(array, wanted):
        nonlocal most
        found = sharding.fetch(array, wanted)
        alive.append(weakref.ref(found))
        most = max(most, sum(one().nbytes for one in alive if one() is not None))
        return found

    monkeypatch.setattr(entries, "fetch", counted)
    case = on_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2)), *grown())
    assert growth.verify_stored(*case).ok
    plan = case[0]
    units = [
        sum(s.size // (cfg.num_layers if s.stack else 1) * 4 for s in spec.values() if bool(s.stack) == stacked)
        for cfg, spec in ((plan.src_cfg, plan.src_spec), (plan.dst_cfg, plan.dst_spec))
        for stacked in (False, True)
    ]
    assert most == max(units[0] + units[2], units[1] + units[3])


def test_a_layer_that_is_not_held_is_not_read():
    layer = entries.Layer(2, np.arange(6).reshape(2, 3))
    assert layer[2, 1].tolist() == [3, 4, 5] and layer[2:3, :, 1:].tolist() == [[[1, 2], [4, 5]]]
    for key in (1, (0, slice(None)), slice(1, 3), slice(None)):
        with pytest.raises(IndexError, match="only layer 2 is held here"):
            layer[key]
