"""Options of the compiler: where a step takes them from, and what becomes of one that the compiler does not know."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import tele_jax as tele
from tele_jax.aot.jobs import TrainJob
from tele_jax.aot.topology import find_slice
from tele_jax.errors import UserError
from tele_jax.published import GENERATIONS
from tele_jax.settings import MeshConfig, OptimizerConfig
from tele_jax.sharding import make_mesh
from tele_jax.stages import run_config
from tele_jax.train import step as steps
from tele_jax.train import workdir
from tele_jax.train.compiler_options import SETS, options_of, refused
from tele_jax.train.optimizer import optimizer

CFG = tele.ModelConfig(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=32, max_seq_len=8)
ROWS = 2
PAGE = {
    "run": ("first",),
    "first": {
        "kind": "pretrain",
        "model": {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24, "vocab_size": 32, "max_seq_len": 8},
        "data": {"tokenizer": "t.model", "sources": {"en": {"files": ("t.txt",)}}},
        "optimizer": {"learning_rate": 1e-3},
        **{"steps": 1, "batch_size": ROWS, "seq_len": 8},
    },
}


def page(**more):
    return run_config(ConfigDict(PAGE | more))


def one_device():
    tx = optimizer(CFG, OptimizerConfig(learning_rate=1e-3), lambda step: jnp.float32(1.0))
    return CFG, tx, make_mesh(MeshConfig(), jax.devices()[:1])


def test_every_generation_has_options_and_the_compiler_s_own():
    assert set(SETS) == set(GENERATIONS)
    for generation in GENERATIONS.values():
        sets = SETS[generation.name]
        assert sets["none"] == {}
        for kind in generation.device_kinds:
            assert options_of(kind) == next(iter(sets.values()))
            assert options_of(kind, "none") == {}
    assert options_of("TPU v6 lite", "offload")["xla_tpu_enable_sparse_core_collective_offload_all_gather"] is True
    assert options_of("cpu") == options_of("NVIDIA H100 80GB HBM3") == {}
    with pytest.raises(UserError, match="compiler options 'ofload': did you mean 'offload'"):
        options_of("TPU v5p", "ofload")


def test_a_step_that_runs_and_one_that_is_planned_are_compiled_with_the_options_given():
    unknown = {"xla_tpu_nothing": True}
    refusal = r"^compiler_options\.xla_tpu_nothing: this compiler does not take it \(cpu"
    cfg, tx, mesh = one_device()
    params = tele.init(cfg, jax.random.key(0))
    batch = {name: np.ones((ROWS, 8), np.int32) for name in ("tokens", "targets")}
    batch["loss_weights"] = np.ones((ROWS, 8), np.float32)
    step = steps.make_step(cfg, tx, mesh, batch_size=ROWS, compiler_options=unknown)
    with pytest.raises(UserError, match=refusal):
        step(params, tx.init(params), batch)
    lowered = steps.lower_step(cfg, tx, mesh, batch_size=ROWS, seq_len=8, compiler_options=unknown)
    with pytest.raises(UserError, match=refusal), refused():
        lowered.compile()


def test_a_mesh_of_tpus_takes_the_options_of_its_generation(monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "options_of", lambda kind: asked.append(kind) or {})
    steps.make_step(*one_device(), batch_size=ROWS)
    assert asked == [jax.devices()[0].device_kind]
    steps.make_step(*one_device(), batch_size=ROWS, compiler_options={})
    assert len(asked) == 1


def test_a_page_names_options_and_a_run_may_go_on_with_others():
    options = {"xla_tpu_scoped_vmem_limit_kib": 65536, "xla_enable_async_all_gather": True, "xla_x": "ENABLED"}
    config = page(compiler_options=options)
    assert config.compiler_options == options and page().compiler_options is None
    assert page(compiler_options={}).compiler_options == {}
    stored = workdir.as_json(config)
    assert stored["compiler_options"] == options
    assert run_config(stored) == config
    assert set(workdir.differences(workdir.as_json(page()), stored)) == {"compiler_options"}
    with pytest.raises(UserError, match=r"config\.compiler_options: expected a table, got 'fast'"):
        page(compiler_options="fast")
    with pytest.raises(UserError, match=r"config\.compiler_options\.xla_x: expected str"):
        page(compiler_options={"xla_x": [1]})


def test_a_plan_is_made_with_the_options_that_training_takes():
    sizes = dict(batch_size=8, seq_len=8, mesh=MeshConfig(fsdp=8), slice=find_slice("v6e:2x4"))
    job = TrainJob(cfg=CFG, **sizes)
    assert job.compiled_with == options_of("TPU v6 lite") == job.option_sets["none"] == {}
    offload = dataclasses.replace(job, compiler_options=dict(options_of("TPU v6 lite", "offload")))
    assert offload.settings["compiled_with"] == offload.compiled_with == job.option_sets["offload"] != {}


@pytest.mark.parametrize("value", ["abc", 2**70])
def test_a_value_that_the_compiler_cannot_read_is_named(value):
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    told = r"^compiler_options\.xla_cpu_prefer_vector_width: .*; correct the value$"
    with pytest.raises(UserError, match=told), refused():
        lowered.compile(compiler_options={"xla_cpu_prefer_vector_width": value})


def test_an_error_that_is_about_no_option_is_left_as_it_is():
    with pytest.raises(jax.errors.JaxRuntimeError, match="cannot convert"), refused():
        raise jax.errors.JaxRuntimeError("INTERNAL: ValueError: cannot convert in xla_client thing")
