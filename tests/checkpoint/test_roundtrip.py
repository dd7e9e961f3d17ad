"""What is saved comes back to the bit: every dtype, any optimizer state, any mesh; and other tools can read it."""

import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.axes import ParamSpec, flatten
from tele_jax.checkpoint import packing, read
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests.checkpoint.trees import CFG, all_bfloat16, assert_same, params
from tests.ports import free_port

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    optax.masked(optax.add_decayed_weights(0.1), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
)


def test_everything_comes_back(tmp_path):
    tree = params()
    state = OPTIMIZER.init(tree)
    provenance = [{"stage": "pretrain", "tokens": 10**12}, {"stage": "grow", "policy": "msg", "数据": ["代码", 0.1]}]
    path = tmp_path / "a" / "b" / "7"
    checkpoint.save(path, CFG, tree, opt_state=state, step=7, provenance=provenance, data_state=bytes(range(256)))
    loaded = checkpoint.load(path, opt_state_like=jax.eval_shape(OPTIMIZER.init, tree))
    assert_same(loaded.params, tree)
    assert_same(loaded.opt_state, state)
    assert (loaded.cfg, loaded.step, loaded.provenance) == (CFG, 7, tuple(provenance))
    assert loaded.data_state == bytes(range(256))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((loaded.params, loaded.opt_state)))


def test_what_was_not_saved_is_none(tmp_path):
    checkpoint.save(tmp_path / "0", CFG, params())
    loaded = checkpoint.load(tmp_path / "0")
    assert (loaded.opt_state, loaded.data_state, loaded.provenance, loaded.step) == (None, None, (), 0)


def test_items_choose_what_is_read(tmp_path):
    tree = params()
    checkpoint.save(tmp_path / "0", CFG, tree, opt_state=OPTIMIZER.init(tree), data_state=b"x")
    loaded = checkpoint.load(tmp_path / "0", items=("params",))
    assert_same(loaded.params, tree)
    assert loaded.opt_state is None and loaded.data_state is None


def test_an_optimizer_state_without_its_structure_is_nested_dicts(tmp_path):
    tree = params()
    state = OPTIMIZER.init(tree)
    checkpoint.save(tmp_path / "0", CFG, tree, opt_state=state)
    generic = checkpoint.load(tmp_path / "0").opt_state
    adam = generic["1"]["inner_state"]["0"]
    assert_same(adam["mu"], tree_zeros := jax.tree.map(jnp.zeros_like, tree))
    assert_same(adam["nu"], tree_zeros)
    assert_same(adam["count"], state[1].inner_state[0].count)
    assert_same(generic["1"]["hyperparams"]["learning_rate"], jnp.float32(1e-3))


class Odd(NamedTuple):
    """Every kind of node and leaf at once."""

    array: object
    nothing: object
    empty: object
    nested: object


def test_odd_optimizer_states_come_back(tmp_path):
    state = Odd(
        array=np.arange(6, dtype=np.int16).reshape(2, 3),
        nothing=None,
        empty=optax.EmptyState(),
        nested=({"flag": True, "count": 2**40, "rate": 0.1}, [], {}, [jnp.bfloat16(-0.0), np.float32(np.nan)]),
    )
    checkpoint.save(tmp_path / "0", CFG, params(), opt_state=state)
    loaded = checkpoint.load(tmp_path / "0", opt_state_like=state).opt_state
    assert_same(loaded, state)
    assert loaded.nested[0] == {"flag": True, "count": 2**40, "rate": 0.1}
    assert [type(v) for v in loaded.nested[0].values()] == [int, bool, float]  # dicts come back sorted
    assert isinstance(loaded.nested[0]["flag"], bool)
    generic = checkpoint.load(tmp_path / "0").opt_state
    assert generic["nested"]["0"] == {"flag": True, "count": 2**40, "rate": 0.1}
    assert set(generic) == {"array", "nested"}


@pytest.mark.parametrize("state", [(), optax.EmptyState(), {"a": ()}], ids=repr)
def test_a_state_without_leaves_is_a_state(tmp_path, state):
    checkpoint.save(tmp_path / "0", CFG, params(), opt_state=state)
    assert checkpoint.load(tmp_path / "0", opt_state_like=state).opt_state == state
    assert checkpoint.load(tmp_path / "0").opt_state == {}


def test_bfloat16_parameters(tmp_path):
    cfg = CFG.replace(param_dtype="bfloat16")
    tree = all_bfloat16(params())
    checkpoint.save(tmp_path / "0", cfg, tree)
    assert_same(checkpoint.load(tmp_path / "0").params, tree)


def test_float64_parameters(tmp_path, x64):
    cfg = CFG.replace(param_dtype="float64")
    tree = params(cfg)
    assert tree["final_norm"]["scale"].dtype == jnp.float64
    checkpoint.save(tmp_path / "0", cfg, tree)
    assert_same(checkpoint.load(tmp_path / "0").params, tree)


DTYPES = ["bool", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32"]
LEAVES = st.tuples(
    st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1)
)
KEYS = st.text(
    st.characters(codec="utf-8", exclude_characters="./\\\0", exclude_categories=["Cs"]), min_size=1, max_size=5
)
TREES = st.recursive(LEAVES, lambda children: st.dictionaries(KEYS, children, min_size=1, max_size=3), max_leaves=6)


def make_leaf(shape, dtype, seed):
    """Random bits, so also NaNs with payloads and subnormal numbers; of a bool, only the two."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    bits = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, size, np.uint8)
    return bits.view(jnp.dtype(dtype)).reshape(shape)


@settings(max_examples=25)
@given(tree=st.dictionaries(KEYS.filter(lambda key: key[0] != "_"), TREES, min_size=1, max_size=3))
def test_random_trees(tmp_path_factory, tree):
    tree = jax.tree.map(lambda leaf: make_leaf(*leaf), tree, is_leaf=lambda node: isinstance(node, tuple))
    spec = jax.tree.map(lambda leaf: ParamSpec(leaf.shape, leaf.dtype), tree)
    path = tmp_path_factory.mktemp("random") / "0"
    checkpoint.save(path, CFG, tree, spec=spec)
    assert_same(checkpoint.load(path, expect=spec).params, tree)


MESHES = [MeshConfig(data=8), MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)]
# All axes divide by 8.
SHARDED_CFG = CFG.replace(num_heads=8, num_kv_heads=8)


@pytest.mark.parametrize("saved_on", MESHES, ids=str)
def test_meshes_may_differ(tmp_path, saved_on):
    spec = tele.spec(SHARDED_CFG)
    host = jax.tree.map(np.asarray, params(SHARDED_CFG))
    mesh = make_mesh(saved_on)
    tree = jax.device_put(host, param_shardings(spec, mesh))
    optimizer = optax.adam(1e-3)
    with jax.set_mesh(mesh):
        state = jax.jit(optimizer.init)(tree)
    state = state[0]._replace(mu=tree), state[1]  # a moment that is not zero
    checkpoint.save(tmp_path / "0", SHARDED_CFG, tree, opt_state=state)

    on_one = checkpoint.load(tmp_path / "0", opt_state_like=state, shardings=None)
    assert_same(on_one.params, host)
    for other in MESHES:
        mesh = make_mesh(other)
        loaded = checkpoint.load(tmp_path / "0", mesh, opt_state_like=jax.eval_shape(lambda s: s, state))
        assert_same(loaded.params, host)
        assert_same(loaded.opt_state[0].mu, host)
        wanted = flatten(param_shardings(spec, mesh))
        for name, leaf in flatten(loaded.params).items():
            assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name
        for name, leaf in flatten(loaded.opt_state[0].nu).items():
            assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name
        assert loaded.opt_state[0].count.sharding.is_fully_replicated
        assert len(loaded.opt_state[0].count.sharding.device_set) == 8


def test_little_host_memory_is_enough(tmp_path, monkeypatch):
    """One array at a time, where even one is above what may be in flight."""
    tree = params(SHARDED_CFG)
    checkpoint.save(tmp_path / "0", SHARDED_CFG, tree, opt_state={"mu": tree})
    monkeypatch.setattr(read, "_IN_FLIGHT_BYTES", 1)
    loaded = checkpoint.load(tmp_path / "0", make_mesh(MESHES[2]))
    assert_same(loaded.params, tree)
    assert_same(loaded.opt_state["mu"], tree)


def test_shardings_are_followed(tmp_path):
    tree = params(SHARDED_CFG)
    state = optax.adam(1e-3).init(tree)
    checkpoint.save(tmp_path / "0", SHARDED_CFG, tree, opt_state=state)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    along_last = jax.tree.map(lambda leaf: NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "x")), tree)
    whole = NamedSharding(mesh, P())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state)
    loaded = checkpoint.load(tmp_path / "0", shardings=along_last, opt_state_like=like)
    assert_same(loaded.params, tree)
    for leaf, sharding in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(along_last), strict=True):
        assert leaf.sharding == sharding
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(loaded.opt_state))
    generic = checkpoint.load(tmp_path / "0", shardings=along_last).opt_state
    assert generic["0"]["mu"]["lm_head"]["kernel"].sharding == along_last["lm_head"]["kernel"]


def test_plain_orbax_reads_it(tmp_path):
    import orbax.checkpoint as ocp

    tree = params()
    checkpoint.save(tmp_path / "0", CFG, tree, opt_state=optax.adam(1e-3).init(tree))
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "0" / "params"), tree)
        assert_same(checkpointer.restore(tmp_path / "0" / "opt_state")["0"]["nu"], jax.tree.map(jnp.zeros_like, tree))


TWO_PROCESSES = """
import sys, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
process, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tele_jax.checkpoint import host_leaves, layout
from tele_jax.model.spec import flat_spec
from tests.checkpoint.trees import CFG
cfg = CFG
host = jax.tree.map(lambda s: np.arange(s.size, dtype=np.float32).reshape(s.shape), tele.spec(cfg))
def place(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
def same(found):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(host), strict=True):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, y[shard.index])
for saved_on, loaded_on in [(dict(fsdp=2, tensor=2), dict(fsdp=4)), (dict(data=2, tensor=2), dict(data=4))]:
    mesh = make_mesh(MeshConfig(**saved_on))
    tree = jax.tree.map(place, host, param_shardings(tele.spec(cfg), mesh))
    where = f"{directory}/{saved_on}"
    with checkpoint.Manager(where, keep=1) as manager:
        for step in (1, 2):
            manager.save(step, cfg, tree, {"mu": tree, "count": 3}, data_state=b"abc")
        loaded = manager.load(mesh=make_mesh(MeshConfig(**loaded_on)))
        same(loaded.params); same(loaded.opt_state["mu"])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        described = host_leaves.describe_leaves(layout.named_leaves(abstract), flat_spec(cfg), "params")
        stored = checkpoint.open_lazy(where)
        assert described == {name: array.leaf for name, array in stored.items["params"].items()}
        assert ('fsdp' in saved_on) == any(leaf.file_grid != (1,) * len(leaf.chunks) for leaf in described.values())
        assert loaded.opt_state["count"] == 3 and loaded.data_state == b"abc" and loaded.step == 2
print("fine")
"""


def test_two_processes_write_one_checkpoint(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command, port = [sys.executable, "-c", TWO_PROCESSES], free_port()
    children = [
        subprocess.Popen(
            [*command, str(i), str(port), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outcomes = [child.communicate(timeout=120) for child in children]
    for out, err in outcomes:
        assert out.endswith("fine\n"), err  # Gloo talks on stdout
    expected = jax.tree.map(lambda s: np.arange(s.size, dtype=np.float32).reshape(s.shape), tele.spec(CFG))
    for directory in tmp_path.iterdir():
        assert_same(checkpoint.load(directory).params, expected)
        assert not list(checkpoint.verify(checkpoint.open_lazy(directory)))
        assert sorted(p.name for p in directory.iterdir()) == ["2"]
        opened = checkpoint.open_lazy(directory).items
        items = {item: {name: array.leaf for name, array in named.items()} for item, named in opened.items()}
        files = {str(file.relative_to(directory / "2")) for file in directory.rglob("*") if file.is_file()}
        assert set(packing.array_files(items)) == {file for file in files if file.count("/") > 1}
