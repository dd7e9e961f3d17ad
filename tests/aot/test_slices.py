"""Between slices nothing travels but the sums of gradients, once a microbatch."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.aot import hlo
from tele_jax.aot.counts import COLLECTIVES, count
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh
from tele_jax.train.optimizer import optimizer
from tele_jax.train.step import lower_step

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'tele_jax[tpu]', 684 MB)"
)
CFG = tele.ModelConfig(num_layers=3, embed_dim=256, num_heads=2, mlp_dim=512, vocab_size=1024, max_seq_len=512)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def program(mesh, microbatches, seq_len):
    tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-3), lambda step: jnp.float32(1))
    lowered = lower_step(CFG, tx, mesh, batch_size=8, seq_len=seq_len, microbatches=microbatches)
    return hlo.parse(lowered.compile().as_text())


def local_bytes(itemsize):
    """(of kernels and tables, of vectors in whole) on one device; gradients are exchanged in bfloat16 or float32."""
    kernels, vectors = 0, 0
    for spec in flatten(tele.spec(CFG)).values():
        if spec.role in ("scale", "bias"):
            vectors += spec.size
        else:
            kernels += spec.size // (MESH.fsdp * MESH.tensor)
    return itemsize * kernels, itemsize * vectors


@pytest.mark.parametrize("microbatches", [1, 2])
def test_over_data_only_sums_travel(microbatches):
    """As the partitioner writes it for 8 CPUs: data is the axis that runs over slices.

    With rows of 64 tokens and less, smaller than the weights, it permutes activations instead, also over data.
    """
    module = program(make_mesh(MESH, jax.devices()), microbatches, seq_len=512)
    half = MESH.fsdp * MESH.tensor
    kinds = {"within": set(), "across": set()}
    for computation in module.computations.values():
        for i in computation.instructions.values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                groups = hlo.device_groups(i)
                across = any(len({int(device) // half for device in group}) > 1 for group in groups)
                kinds["across" if across else "within"].add(kind)
    assert kinds["across"] == {"all-reduce"}
    assert {"all-gather", "all-to-all"} <= kinds["within"], "the parser sees what the model needs inside a slice"


@needs_libtpu
@pytest.mark.parametrize("microbatches", [1, 2])
def test_two_slices_exchange_gradients_and_nothing_else(microbatches):
    from tele_jax.aot import topology

    devices = topology.devices(topology.find_slice("v5e:2x2", 2))
    mesh = make_mesh(MESH, devices, num_slices=2)
    assert [len({d.slice_index for d in part.flat}) for part in mesh.devices] == [1, 1], "data alone crosses"
    crossing = [c for c in count(program(mesh, microbatches, seq_len=512)).collectives if c.slices > 1]
    assert {c.kind for c in crossing} == {"all-reduce"} and {c.slices for c in crossing} == {2}
    moved = sum(c.times * c.operand_bytes for c in crossing)
    least, (kernels, vectors) = local_bytes(2)[0], local_bytes(4)
    # Each gradient once a microbatch, in the dtype it was computed in; a tile of scalars, loss and weight, beside.
    assert microbatches * least <= moved <= microbatches * (kernels + vectors) + 4096


@needs_libtpu
def test_the_plan_of_two_slices_counts_what_crosses(tmp_path, capsys):
    argv = ["plan", "--model", "tele_flm_proxy", "--topology", "v5e:2x2", "--num-slices", "2", "--batch-size", "8"]
    argv += ["--seq-len", "512", "--cache", str(tmp_path), "--json", str(tmp_path / "j")]
    assert main([*argv, "--mesh", "fsdp=8"]) == 2
    assert "there are 2 slices, and only data may cross them" in capsys.readouterr().err
    main([*argv, "--mesh", "data=2,fsdp=4"])
    found = json.loads((tmp_path / "j").read_text())
    crossed = found["collectives"]["all-reduce over 2 slices"]["received_bytes"]
    params = tele.count_params(tele.get_model("tele_flm_proxy"))
    assert 2 * params / 4 <= crossed <= 4 * params / 4 * 1.01
    assert found["seconds"]["dcn"] == pytest.approx(crossed / 3.125e9)


def test_the_mesh_lies_on_as_many_slices_as_the_page_says():
    with pytest.raises(UserError, match=r"num_slices=2, but the devices lie on 1; change config\.num_slices"):
        make_mesh(MESH, jax.devices(), num_slices=2)


class Device:
    """A TPU of a slice, as far as a mesh looks at it."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index


def test_data_runs_over_slices_first():
    devices = [Device(number, number // 4) for number in range(8)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), devices, num_slices=2)
    assert np.vectorize(lambda d: d.slice_index)(mesh.devices)[:, 0, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="data=1: there are 2 slices, and only data may cross them"):
        make_mesh(MeshConfig(fsdp=8), devices)
