"""Chunks in files: each in one, files of one process each, and few enough on the meshes of the published models."""

import itertools
import math
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.axes import ParamSpec, flatten
from tele_jax.checkpoint import host_leaves, layout, packing
from tele_jax.model.spec import abstract_params, flat_spec
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests.checkpoint.trees import CFG, params


@st.composite
def cases(draw):
    """(shape, part): the part of one process divides the shape."""
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    return shape, tuple(size // draw(st.sampled_from([d for d in (1, 2, 3, 4) if size % d == 0])) for size in shape)


@given(case=cases(), limits=st.tuples(st.integers(32, 500), st.integers(32, 5000)))
def test_every_chunk_is_in_one_file_and_no_file_in_two_parts(case, limits):
    shape, part = case
    chunks = layout.chunk_shape(shape, 4, stacked=1, shard=part, limit=limits[0])
    files = packing.file_shape(shape, chunks, 4, limit=limits[1], part=part)
    leaf = layout.Leaf(ParamSpec(shape, np.dtype(np.float32)), chunks, files=files)
    if files is not None:
        assert math.prod(files) * 4 <= max(limits[1], 4 * math.prod(chunks))
        for size, piece, whole in zip(files, part, shape, strict=True):
            assert piece == whole or piece % size == 0
    seen = []
    for file in itertools.product(*map(range, leaf.file_grid)):
        inside = packing.chunks_of(leaf, file)
        assert inside and {packing.file_of(leaf, chunk) for chunk in inside} == {file}
        entries = np.full((math.prod(leaf.per_file), 2), -1)
        if files is not None:
            entries = packing.parse_index(leaf, packing.make_index(leaf, file)).astype(np.int64)
            assert packing.parse_index(leaf, packing.make_index(leaf, file)[:-1] + b"\0\0") is None
        starts = [entries[packing.entry_of(leaf, chunk)][0] for chunk in inside]
        assert files is None or sorted(starts) == [i * packing.pitch(leaf) for i in range(len(inside))]
        seen += inside
    assert sorted(seen) == list(itertools.product(*map(range, leaf.grid)))


@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3), st.data())
def test_parts_have_one_owner_each(counts, data):
    owners = np.array(data.draw(st.lists(st.integers(0, 1), min_size=math.prod(counts), max_size=math.prod(counts))))
    owners = owners.reshape(counts)
    part = packing.single_owner_part(owners)
    for at in np.ndindex(*(n // p for n, p in zip(counts, part, strict=True))):
        inside = owners[tuple(slice(i * p, (i + 1) * p) for i, p in zip(at, part, strict=True))]
        assert inside.shape == part and len(set(inside.flat)) == 1


def test_small_files_for_what_is_written_chunk_by_chunk():
    """An eighth of the largest chunk where there are few; about 20,000 files in all for the largest model."""
    small = {"w": layout.Leaf(ParamSpec((24, 1024, 256), np.dtype(np.float32)), (1, 1024, 256))}
    assert packing.packed(small, layout.CHUNK_BYTES)["w"].files == (12, 1024, 256)
    specs = flat_spec(tele.get_model("tele_flm_1t"))
    chunks = {name: layout.chunk_shape(spec.shape, 4, stacked=len(spec.stack)) for name, spec in specs.items()}
    large = {(i, name): layout.Leaf(spec, chunks[name]) for i in range(3) for name, spec in specs.items()}
    files = sum(math.prod(leaf.file_grid) for leaf in packing.packed(large, layout.CHUNK_BYTES).values())
    assert files < 30_000


def saved_state(tree):
    return {"mu": tree, "nu": tree, "count": 3}


def described(cfg, tree):
    items = {"params": layout.named_leaves(tree), "opt_state": layout.named_leaves(saved_state(tree))}
    return {item: host_leaves.describe_leaves(leaves, flat_spec(cfg), item) for item, leaves in items.items()}


def test_the_count_is_that_of_the_files_there(tmp_path):
    """On 8 devices: counted for arrays that are not there, and listed on disk after a save."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = param_shardings(tele.spec(CFG), mesh)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    abstract = jax.tree.map(place, abstract_params(CFG), shardings)
    tree = jax.tree.map(jax.device_put, params(), shardings)
    checkpoint.save(tmp_path / "0", CFG, tree, opt_state=saved_state(tree))
    expected = sorted(packing.array_files(described(CFG, abstract)))
    files = [str(file.relative_to(tmp_path / "0")) for file in (tmp_path / "0").rglob("*") if file.is_file()]
    assert sorted(file for file in files if file.count("/") > 1) == expected
    assert len(files) - len(expected) <= 10  # documents of Orbax, and ours
    assert len(expected) < 100


def fake_sharding(mesh, per_host, spec):
    """A sharding over devices that are not there, {axis: size} of them, each `per_host` of one host."""
    sizes, names = list(mesh.values()), list(mesh)
    devices = [types.SimpleNamespace(process_index=i // per_host) for i in range(math.prod(sizes))]

    def cut(shape):
        return [mesh[spec[axis]] if axis < len(spec) and spec[axis] else 1 for axis in range(len(shape))]

    def indices(shape):
        found = {}
        for number, at in enumerate(np.ndindex(*sizes)):
            where = dict(zip(names, at, strict=True))
            index = []
            for axis, (size, count) in enumerate(zip(shape, cut(shape), strict=True)):
                i = where[spec[axis]] if axis < len(spec) and spec[axis] else 0
                index.append(slice(i * (size // count), (i + 1) * (size // count)))
            found[number] = tuple(index)
        return types.SimpleNamespace(items=lambda: [(devices[n], index) for n, index in found.items()])

    return types.SimpleNamespace(
        is_fully_addressable=False,
        shard_shape=lambda shape: tuple(n // c for n, c in zip(shape, cut(shape), strict=True)),
        devices_indices_map=indices,
    )


PUBLISHED = [
    ("tele_flm_52b", {"data": 1, "fsdp": 512, "tensor": 2}),
    ("tele_flm_102b", {"data": 1, "fsdp": 256, "tensor": 4}),
    ("tele_flm_1t", {"data": 1, "fsdp": 256, "tensor": 8}),
]


@pytest.mark.parametrize(("model", "mesh"), PUBLISHED, ids=lambda value: str(value))
def test_a_bucket_can_take_the_published_models(model, mesh):
    """On hosts of 4 devices, parameters and both moments."""
    cfg = tele.get_model(model)
    abstract = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))
    specs = {name: s.spec for name, s in flatten(param_shardings(tele.spec(cfg), abstract)).items()}
    tree = {
        name: types.SimpleNamespace(shape=leaf.shape, dtype=leaf.dtype, sharding=fake_sharding(mesh, 4, specs[name]))
        for name, leaf in flatten(abstract_params(cfg)).items()
    }
    leaves = host_leaves.describe_leaves(tree, flat_spec(cfg), "params")
    count = sum(1 for item in ("params", "mu", "nu") for _ in packing.array_files({item: leaves}))
    print(f"{model}: {count:,} files")
    assert count <= 50_000
    assert all(leaf.chunks[0] == 1 for leaf in leaves.values() if leaf.spec.stack)  # one layer is read alone
    assert max(math.prod(leaf.files or leaf.chunks) * leaf.spec.dtype.itemsize for leaf in leaves.values()) <= 2**30
