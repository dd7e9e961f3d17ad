"""The training step gives the same losses on any mesh and in any number of microbatches."""

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax.errors import UserError
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh, put_batch
from tele_jax.train.optimizer import optimizer
from tele_jax.train.step import flops_per_token, make_step, state_shardings

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, vocab_size=250,
    padded_vocab_size=256, dtype="float32", mup_base_width=16, output_biases=True,
)  # fmt: skip
ROWS, LENGTH, STEPS = 8, 33, 5


def batches():
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    return [
        {
            "tokens": rng.integers(0, 250, shape, np.int32),
            "targets": rng.integers(0, 250, shape, np.int32),
            "loss_weights": (rng.random(shape) < 0.8).astype(np.float32),
            "segment_ids": np.sort(rng.integers(0, 3, shape), axis=1).astype(np.int32),
            "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        }
        for _ in range(STEPS)
    ]


def losses(shape, microbatches, masks=None):
    data, fsdp, tensor = shape
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])
    tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-2, weight_decay=0.1), lambda step: 1.0)
    step = make_step(CFG, tx, mesh, batch_size=ROWS, microbatches=microbatches)
    shardings, opt_shardings = state_shardings(CFG, tx, mesh)
    params = jax.device_put(tele.init(CFG, jax.random.key(0)), shardings)
    opt_state = jax.device_put(tx.init(params), opt_shardings)
    result = []
    for batch in batches():
        params, opt_state, figures = step(params, opt_state, put_batch(batch, mesh, ROWS), masks)
        result.append(float(figures["loss"]))
    q = params["layers"]["attn"]["q"]
    assert q.addressable_shards[0].data.size * fsdp * tensor == q.size  # cut, not copied
    return result


@pytest.fixture(scope="module")
def one_device():
    return losses((1, 1, 1), 1)


@pytest.mark.parametrize(
    ("shape", "microbatches"),
    [((8, 1, 1), 1), ((1, 4, 2), 1), ((2, 2, 2), 2), ((1, 1, 1), 4)],
)
def test_losses_do_not_depend_on_the_mesh(one_device, shape, microbatches):
    if jax.device_count() < int(np.prod(shape)):
        pytest.fail("needs 8 simulated devices; tests/conftest.py asks for them")
    assert one_device[0] > 5 and one_device[-1] != one_device[0]
    np.testing.assert_allclose(losses(shape, microbatches), one_device, rtol=0, atol=1e-5)


def test_moving_masks_compile_once():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-2), lambda step: 1.0)
    step = make_step(CFG, tx, mesh, batch_size=ROWS)
    shardings, opt_shardings = state_shardings(CFG, tx, mesh)
    params = jax.device_put(tele.init(CFG, jax.random.key(0)), shardings)
    opt_state = jax.device_put(tx.init(params), opt_shardings)
    batch = put_batch(batches()[0], mesh, ROWS)
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **kw: compiles.append(name) if "backend_compile" in name else None
    )
    for c in (0.0, 0.25, 0.5, 0.75):
        masks = {"mlp": np.where(np.arange(48) < 30, 1, c).astype(np.float32)}
        params, opt_state, figures = step(params, opt_state, batch, masks)
        if c == 0.0:
            float(figures["loss"])
            compiles.clear()
    assert np.isfinite(float(figures["loss"]))
    assert not compiles


@pytest.mark.parametrize(
    ("mesh", "match"),
    [
        (dict(tensor=8), r"layers\.attn\.k: kv_heads=2 does not divide over mesh tensor=8"),
        (dict(fsdp=3), r"embed=32 does not divide over mesh fsdp=3"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh, match):
    config = MeshConfig(**mesh)
    tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-2), lambda step: 1.0)
    devices = jax.devices()[: config.fsdp * config.tensor]
    with pytest.raises(UserError, match=match):
        make_step(CFG, tx, make_mesh(config, devices), batch_size=ROWS)


def test_a_mesh_of_another_size_than_the_devices_is_refused():
    with pytest.raises(UserError, match=r"mesh data=1 x fsdp=3 x tensor=1 = 3 devices, but there are 8"):
        make_mesh(MeshConfig(fsdp=3))


def test_a_batch_that_does_not_divide_is_refused():
    tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-2), lambda step: 1.0)
    with pytest.raises(UserError, match=r"batch_size=6 .* data x fsdp = 8"):
        make_step(CFG, tx, make_mesh(MeshConfig(data=8)), batch_size=6)


def test_flops_of_the_52b_model_are_six_per_parameter_and_causal_attention():
    cfg = tele.get_model("tele_flm_52b")
    matmul = 64 * (4 * 8192**2 + 3 * 8192 * 21824) + 80384 * 8192
    assert flops_per_token(cfg, 4096) == 6 * matmul + 6 * 64 * 8192 * 4096
