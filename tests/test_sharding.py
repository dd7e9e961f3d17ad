"""Sharding rules: every leaf covered, and each mistake named."""

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import tele_jax as tele
from tele_jax.axes import ParamSpec, flatten
from tele_jax.errors import UserError
from tele_jax.settings import MeshConfig
from tele_jax.sharding import RULES, make_mesh, param_shardings, partition_spec


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def test_kernels_are_cut_by_the_names_of_their_axes(mesh):
    spec = tele.spec(tele.get_model("tele_flm_52b"))
    specs = {name: s.spec for name, s in flatten(param_shardings(spec, mesh)).items()}
    assert specs["layers.attn.q"] == P(None, "fsdp", "tensor", None)
    assert specs["layers.attn.o"] == P(None, "tensor", None, "fsdp")
    assert specs["layers.mlp.down"] == P(None, "tensor", "fsdp")
    assert specs["embed.table"] == P("tensor", "fsdp")
    assert specs["layers.attn_norm.scale"] == P(None, "fsdp")


@pytest.mark.parametrize("name", ["tele_flm_52b", "tele_flm_102b", "tele_flm_1t", "telechat_7b", "telechat_12b"])
def test_every_leaf_of_the_published_models_is_cut_on_a_large_mesh(name):
    mesh = AbstractMesh((1, 64, 8), ("data", "fsdp", "tensor"))
    for leaf, spec in flatten(tele.spec(tele.get_model(name))).items():
        assert "fsdp" in partition_spec(leaf, spec, mesh), leaf


def leaf(*axes, shape=(8, 8)):
    return ParamSpec(shape, "float32", (), axes[:1], axes[1:])


def test_an_axis_without_a_rule_is_named(mesh):
    with pytest.raises(UserError, match=r"expert\.up: no sharding rule covers its axis 'expert'"):
        partition_spec("expert.up", leaf("expert", "mlp"), mesh)


def test_two_axes_on_one_mesh_axis_are_named(mesh):
    with pytest.raises(
        UserError, match=r"pair: two of its axes \('heads', 'mlp'\) are cut over the mesh axis 'tensor'"
    ):
        partition_spec("pair", leaf("heads", "mlp"), mesh)


def test_a_large_leaf_on_every_device_is_an_error(mesh):
    rules = dict.fromkeys(RULES)
    with pytest.raises(UserError, match="big: 67,125,248 bytes would lie whole on every device"):
        partition_spec("big", leaf("embed", "mlp", shape=(4096, 4097)), mesh, rules)
    assert partition_spec("small", leaf("embed", "mlp", shape=(64, 64)), mesh, rules) == P(None, None)


def test_abstract_shardings_need_no_memory():
    spec = tele.spec(tele.get_model("tele_flm_1t"))
    mesh = make_mesh(MeshConfig(fsdp=8))
    total = sum(
        int(jax.numpy.prod(jax.numpy.array(s.shard_shape(p.shape), dtype="float32")))
        for s, p in zip(jax.tree.leaves(param_shardings(spec, mesh)), jax.tree.leaves(spec), strict=True)
    )
    assert total == pytest.approx(tele.count_params(tele.get_model("tele_flm_1t")) / 8, rel=1e-5)
