"""What users see of the package: names, short representations, and errors that name the wrong argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import settings
from tele_jax.aot import jobs
from tele_jax.errors import UserError
from tele_jax.growth import receipt
from tele_jax.growth.leaf import LeafPlan
from tele_jax.growth.plan import Step
from tele_jax.inference.generate import prepare
from tele_jax.processes import Place
from tele_jax.train import workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tele.ModelConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, vocab_size=64, max_seq_len=32, dtype="float32"
)
LARGER = CFG.replace(num_layers=3, mlp_dim=30)


@pytest.fixture(scope="module")
def params():
    return tele.init(CFG, jax.random.key(0))


@pytest.mark.parametrize(
    "module", [tele, tele.growth, tele.surgery, tele.lora, tele.losses, tele.checkpoint, tele.convert, tele.plots]
)
def test_dir_shows_what_can_be_used_and_nothing_else(module):
    assert dir(module) == sorted(module.__all__)
    assert all(getattr(module, name) is not None for name in dir(module))


def test_head_dim_follows_from_embed_and_heads():
    assert CFG.head_dim == 8
    assert CFG.replace(num_heads=4).head_dim == 8, "a head keeps its size when a model is changed"
    assert tele.get_model("tele_flm_52b").head_dim == 128


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda p: tele.init("tele_flm_52b", jax.random.key(0)),
            r"init: cfg: expected a ModelConfig, got str; tele.get",
        ),
        (lambda p: tele.init(CFG, 0), r"init: key: expected jax.random.key\(seed\), got int"),
        (lambda p: tele.forward({"num_layers": 2}, p, [[1, 2]]), "forward: cfg: expected a ModelConfig, got dict"),
        (lambda p: tele.forward(CFG, None, [[1, 2]]), "forward: params: expected a nested dict, got NoneType"),
        (lambda p: tele.forward(CFG, p, [1, 2]), r"tokens: expected int32\[B, S\], got int64\[2\]"),
        (lambda p: tele.forward(CFG, p, [[1.0, 2.0]]), r"tokens: expected int32\[B, S\], got float64\[1, 2\]"),
        (lambda p: tele.forward(CFG, p, [[1, 2], [3]]), "tokens: rows of unequal length"),
        (lambda p: tele.forward(CFG, p, [[1, 64]]), "tokens: id 64 is not in the vocabulary of 64 tokens"),
        (lambda p: tele.forward(CFG, p, [[-1, 2]]), "tokens: id -1 is not in the vocabulary"),
        (lambda p: tele.forward(CFG, p, np.ones((1, 33), np.int32)), "seq_len=33 is above the model's max_seq_len=32"),
        (lambda p: tele.forward(LARGER, p, [[1, 2]]), "forward: params are not those of cfg"),
        (lambda p: tele.forward(CFG.replace(embed_norm=True), p, [[1, 2]]), "forward: params are not those of cfg"),
        (lambda p: tele.spec("tele_flm_52b"), "cfg: expected a ModelConfig, got str"),
        (lambda p: tele.count_params(3), "cfg: expected a ModelConfig, got int"),
        (lambda p: tele.generate("x", p, [[1]], max_new_tokens=1), "generate: cfg: expected a ModelConfig, got str"),
        (lambda p: tele.get_model(3), "get_model: expected the name of a model, got int"),
        (
            lambda p: CFG.replace(num_layer=3),
            "ModelConfig.num_layer: unknown key of ModelConfig; did you mean 'num_layers'",
        ),
        (lambda p: tele.growth.plan("a", CFG), "expected a ModelConfig, got str"),
        (lambda p: tele.growth.plan(CFG, {"embed_dim": 32}), "expected a ModelConfig, got dict"),
        (lambda p: tele.growth.apply(CFG, p), "expected a Plan"),
        (lambda p: tele.growth.apply(tele.growth.plan(CFG, LARGER), {"w": 1}), "the parameters do not fit"),
        (lambda p: tele.growth.compose(CFG, LARGER), "expected a Plan"),
        (lambda p: tele.ModelConfig(num_layrs=2), "ModelConfig.num_layrs: unknown key of ModelConfig; did you mean"),
        (lambda p: tele.ModelConfig(), "ModelConfig.num_layers: missing"),
        (lambda p: CFG.replace(dtype="float33"), "ModelConfig.dtype: 'float33' is not one of 'bfloat16'"),
        (lambda p: CFG.replace(dtype=jnp.float32), "ModelConfig.dtype: .* is not one of 'bfloat16'"),
        (lambda p: CFG.replace(dtype=np.dtype("float32")), "ModelConfig.dtype: .* is not one of 'bfloat16'"),
        (lambda p: CFG.replace(rope=None), "ModelConfig.rope: expected Rope or a table of its fields, got None"),
        (lambda p: CFG.replace(rope="x"), "ModelConfig.rope: expected Rope or a table of its fields, got 'x'"),
        (lambda p: CFG.replace(tie_embeddings=1), "ModelConfig.tie_embeddings: expected bool, got 1"),
        (lambda p: tele.Rope(1e4, theta=1e4), "Rope: give every field once, by its name"),
        (lambda p: settings.MeshConfig(data=2.0), "MeshConfig.data=2.0 must be a whole number"),
        (lambda p: settings.OptimizerConfig(lerning_rate=1.0), "OptimizerConfig.lerning_rate: .*did you mean"),
        (lambda p: tele.growth.AxisMap("mlp", 2, [0, 1], frsh=None), "AxisMap.frsh: .*did you mean 'fresh'"),
        (lambda p: tele.growth.MaskSchedule(tele.growth.plan(CFG, LARGER), rmp=1), "MaskSchedule.rmp: .*'ramp'"),
        (
            lambda p: tele.init(CFG, jax.random.split(jax.random.key(0), 3)),
            r"expected jax.random.key.*\[3\]",
        ),
        (lambda p: tele.init(CFG, np.zeros(3, np.uint32)), r"init: key: expected jax.random.key.*uint32\[3\]"),
        (lambda p: tele.init(CFG, np.zeros((2, 2), np.uint32)), r"init: key: expected jax.random.key.*uint32\[2, 2\]"),
        (lambda p: tele.forward(CFG, p, [[1, 2]], positions=[[0.5, 1]]), r"positions: expected int32\[B, S\]"),
        (lambda p: tele.forward(CFG, p, [[1, 2]], segment_ids=[[1, 2], [1]]), "segment_ids: rows of unequal length"),
        (lambda p: tele.forward(CFG, p, [[1, 2]], masks=3), "masks: expected a dict, got int"),
        (lambda p: tele.forward(CFG, p, [[1, 2]], masks={"mlp": "x"}), "masks: mlp: expected numbers"),
        (lambda p: tele.forward(CFG.replace(padded_vocab_size=80), {}, [[1, 2]]), "embed.table: missing"),
        (lambda p: jax.jit(tele.forward, static_argnums=0)(CFG, p, [[1, 2], [3]]), "tokens: rows of unequal length"),
        (lambda p: tele.generate(CFG, p, 3, max_new_tokens=1), "prompts is 3, not a list of lists"),
        (lambda p: tele.generate(LARGER, prepare(CFG, p), [[1]], max_new_tokens=1), "params: 2 layers, but cfg has 3"),
        (
            lambda p: tele.generate(CFG.replace(mlp_dim=30), prepare(CFG, p), [[1]], max_new_tokens=1),
            r"layers.mlp.up: float32\[2, 16, 24\], expected float32\[2, 16, 30\]",
        ),
        (lambda p: tele.checkpoint.save(None, CFG, p), "expected the path of a checkpoint, got None"),
        (lambda p: tele.checkpoint.save("never", CFG, p, step=1.5), "step=1.5 must be a whole number"),
        (lambda p: tele.checkpoint.save("never", CFG, p, provenance=["x"]), "provenance: expected a list of dicts"),
        (lambda p: tele.checkpoint.save("never", CFG, p, data_state="x"), "data_state: expected bytes, got str"),
        (lambda p: tele.checkpoint.load(3), "expected the path of a checkpoint, got 3"),
        (lambda p: tele.growth.Plan(stepz=()), "Plan.stepz: unknown key of Plan; did you mean 'steps'"),
        (lambda p: tele.growth.Plan(), "Plan.steps: missing"),
        (lambda p: Step(polcy="exact"), "Step.polcy: unknown key of Step; did you mean 'policy'"),
        (lambda p: LeafPlan(coeficient=2.0), "LeafPlan.coeficient: .*did you mean 'coefficient'"),
        (lambda p: tele.growth.Plan((), steps=()), "Plan: give every field once, by its name"),
        (lambda p: Place(None, 1, proces_id=0), "Place.proces_id: .*did you mean 'process_id'"),
        (lambda p: Place(None, "two"), "Place.num_processes='two' must be a whole number"),
        (lambda p: jobs.TrainJob(batch_sise=3), "TrainJob.batch_sise: .*did you mean 'batch_size'"),
        (lambda p: jobs.DecodeJob(cfg="x", slice=1, mesh=1, batch_size=1, seq_len=1), "DecodeJob.cfg: expected Model"),
        (lambda p: receipt.Request(scr="x"), "Request.scr: .*did you mean 'src'"),
        (lambda p: tele.checkpoint.load("W", mesh=3), "load: mesh: expected a mesh with the axes .*, got int"),
        (lambda p: tele.score("x", p, [[1]], [[2]]), "score: cfg: expected a ModelConfig, got str"),
        (lambda p: tele.score(LARGER, p, [[1]], [[2]]), "score: params are not those of cfg"),
        (lambda p: tele.score(CFG, prepare(CFG, p), [[1]], [[2]]), "score: params"),
        (lambda p: tele.score(CFG, p, "ab", ["c", "d"]), "score: prompts is 'ab', not a list of texts or of lists"),
        (lambda p: tele.score(CFG, p, [[1]], None), "score: continuations is None, not a list"),
        (lambda p: tele.score(CFG, p, ["a"], ["b"], vocabulary="t.model"), "vocabulary: expected what load_.*got str"),
        (lambda p: tele.run({}, None), "workdir: expected the path of the run's own directory, got None"),
        (lambda p: tele.run({}, 3), "workdir: expected the path of the run's own directory, got 3"),
        (lambda p: tele.run({}, "W", from_step="x"), "from_step='x' must be a whole number"),
        (lambda p: tele.run({"run": ["a"], "a": {"kind": "sft", 3: 4}}, "W"), "config.a.3: unknown key of SftStage"),
        (lambda p: tele.run({"run": ["a"], "a": {}, 3: 4}, "W"), "config.3: unknown key"),
    ],
)
def test_a_wrong_argument_is_named(call, named, params):
    with pytest.raises(UserError, match=named):
        call(params)


WRONG_TREES = ({}, {"layers": 3}, {"layers": {}}, {1: 2}, None, [1], {"x": 1.0})


@pytest.mark.parametrize("tree", WRONG_TREES, ids=repr)
def test_a_tree_that_is_not_that_of_the_config_is_named(tree, tmp_path):
    plan = tele.growth.plan(CFG, LARGER)
    for call in (
        lambda: tele.forward(CFG, tree, [[1, 2]]),
        lambda: tele.generate(CFG, tree, [[1]], max_new_tokens=1),
        lambda: tele.score(CFG, tree, [[1]], [[2]]),
        lambda: tele.growth.apply(plan, tree),
        lambda: tele.growth.lazy(plan, tree),
        lambda: tele.growth.shrink(plan, tree),
        lambda: tele.growth.verify(plan, tree, tree, [[1, 2, 3]]),
        lambda: tele.growth.layers.distances(CFG, tree, [[1, 2, 3]]),
        lambda: tele.checkpoint.save(tmp_path / "c", CFG, tree),
    ):
        with pytest.raises(UserError, match=r"param|embed.table: missing"):
            call()
    assert not list(tmp_path.iterdir())


def test_an_id_of_a_padding_row_is_not_in_the_vocabulary():
    padded = CFG.replace(padded_vocab_size=80)
    with pytest.raises(UserError, match="id 64 is not in the vocabulary of 64 tokens"):
        tele.forward(padded, tele.init(padded, jax.random.key(0)), [[1, 64]])


@pytest.mark.parametrize("key", [np.zeros(2, np.uint32), jax.random.PRNGKey(0)], ids=["numpy", "jax"])
def test_a_legacy_key_is_a_key(key, params):
    jax.tree.map(np.testing.assert_array_equal, tele.init(CFG, key), params)


def test_a_directory_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, not a directory"):
        workdir.require_own(tmp_path / "file" / "W", None)


def test_lists_are_taken_where_arrays_are(params):
    tokens = [[1, 2, 3], [4, 5, 6]]
    ours, theirs = (tele.forward(CFG, params, t) for t in (tokens, jnp.array(tokens, jnp.int32)))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    inside_jit = jax.jit(tele.forward, static_argnums=0)(CFG, params, tokens)
    np.testing.assert_allclose(np.asarray(inside_jit), np.asarray(ours), rtol=1e-5, atol=1e-6)


def test_representations_are_short_and_tables_are_long(params, tmp_path):
    plan = tele.growth.plan(CFG, LARGER)
    big = tele.growth.apply(plan, params)
    report = tele.growth.verify(plan, params, big, np.array([[1, 2, 3, 4]], np.int32))
    tele.checkpoint.save(tmp_path / "c", CFG, params, opt_state={"count": 1}, step=3)
    lazy, loaded = tele.checkpoint.open_lazy(tmp_path / "c"), tele.checkpoint.load(tmp_path / "c")
    for value in (plan, report, lazy, loaded):
        assert len(repr(value)) < 400 and repr(value).count("\n") < 4
    for value in (plan, report, lazy):
        assert "<table" in value._repr_html_() and len(str(value).splitlines()) >= 4
    assert "6,480 parameters" in repr(lazy) and "layers.attn.q" in str(lazy)
