"""Nothing is overwritten, cast, padded or skipped: every difference is named before anything is read or written."""

import functools
import re
import resource
import shutil

import jax
import numpy as np
import optax
import pytest

import tele_jax as tele
from tele_jax import checkpoint, growth
from tele_jax.axes import ParamSpec, flatten, unflatten
from tele_jax.errors import DamageError, UserError
from tests.checkpoint.trees import CFG, all_bfloat16, assert_same, params


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("strict") / "5"
    checkpoint.save(path, CFG, params(), opt_state=optax.adam(1e-3).init(params()), step=5)
    return path


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text("mine")], ids=["directory", "file"])
def test_an_existing_destination_is_refused_and_left_alone(tmp_path, make):
    make(tmp_path / "0")
    with pytest.raises(UserError, match="exists already, and checkpoints are never overwritten"):
        checkpoint.save(tmp_path / "0", CFG, params())
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


@pytest.mark.parametrize("path", [None, 3, "", " ", b"a"])
def test_what_is_no_path_is_named(path, saved):
    ck = checkpoint.open_lazy(saved)
    plan = growth.widen_mlp(ck.cfg, ck.cfg.mlp_dim + 1)
    for call in (
        checkpoint.load,
        checkpoint.open_lazy,
        checkpoint.Manager,
        lambda path: checkpoint.save(path, ck.cfg, ck.params),
        lambda path: growth.stream(plan, path, "dst"),
    ):
        with pytest.raises(UserError, match=re.escape(f"expected the path of a checkpoint, got {path!r}")):
            call(path)
    with pytest.raises(UserError, match="names no new directory"):
        growth.stream(plan, saved, path)


def test_other_arguments_that_are_not_of_their_kind_are_named(saved, tmp_path):
    ck = checkpoint.open_lazy(saved)
    save = functools.partial(checkpoint.save, tmp_path / "new", ck.cfg)
    for call, named in (
        (lambda: checkpoint.verify(saved), "verify: expected what checkpoint.open_lazy"),
        (lambda: checkpoint.load(saved, items=("parms",)), "no 'parms' in a checkpoint; did you mean 'params'"),
        (lambda: checkpoint.load(saved, cfg="x"), "load: cfg: expected a ModelConfig"),
        (lambda: checkpoint.load(saved, mesh="x"), "load: mesh: expected a mesh"),
        (lambda: save(None), "nested dict, got NoneType"),
        (lambda: save(ck.params, step="x"), "step='x' must be a whole number"),
        (lambda: save(ck.params, step=-1), "step=-1 must not be negative"),
        (lambda: save(ck.params, provenance="x"), "provenance: expected a list of dicts"),
        (lambda: save(ck.params, data_state="x"), "data_state: expected bytes, got str"),
        (lambda: ck.items["parms"], "the checkpoint has no 'parms'; it has params"),
        (lambda: ck.items["params"]["layers.q"], "the checkpoint has no 'layers.q'; it has embed.table"),
    ):
        with pytest.raises(UserError, match=named):
            call()
    assert not (tmp_path / "new").exists()


def test_what_a_killed_save_left_is_no_obstacle_and_does_not_get_in(tmp_path):
    left = tmp_path / "0.orbax-checkpoint-tmp" / "params" / "old.leaf"
    left.mkdir(parents=True)
    (left / "zarr.json").write_text("{}")
    checkpoint.save(tmp_path / "0", CFG, params())
    assert_same(checkpoint.load(tmp_path / "0").params, params())
    assert [p.name for p in tmp_path.iterdir()] == ["0"]
    assert not (tmp_path / "0" / "params" / "old.leaf").exists()


def test_saving_what_the_config_does_not_describe_names_every_leaf(tmp_path):
    tree = flatten(params())
    del tree["final_norm.scale"]
    tree["layers.mlp.up"] = tree["layers.mlp.up"][:, :, :20]
    tree["lm_head.kernel"] = tree["lm_head.kernel"].astype("float16")
    tree["extra.bias"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as caught:
        checkpoint.save(tmp_path / "0", CFG, unflatten(tree))
    assert str(caught.value).split(";\n  ") == [
        "params: not what the config describes: extra.bias: given float32[3], not expected",
        "final_norm.scale: missing, expected float32[16]",
        "layers.mlp.up: given float32[3,16,20], expected float32[3,16,24]",
        "lm_head.kernel: given float16[16,40], expected float32[16,40]",
    ]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"opt_state": {"a.b": np.zeros(1)}}, "a.b: the key 'a.b' cannot be stored"),
        ({"opt_state": {"a": {"": np.zeros(1)}}}, "cannot be stored: it has an empty key"),
        ({"opt_state": {"name": "adam"}}, "opt_state: name: str cannot be stored"),
        ({"opt_state": {"key": jax.random.key(0)}}, "opt_state: key: a typed PRNG key"),
        ({"provenance": [{"when": object()}]}, "provenance: every entry must be a dict of JSON values"),
        ({"provenance": [{"loss": float("nan")}]}, "provenance: every entry must be a dict of JSON values"),
    ],
    ids=["dotted key", "empty key", "string", "PRNG key", "object", "nan"],
)
def test_what_cannot_be_stored_is_named_and_nothing_written(tmp_path, what, message):
    with pytest.raises(UserError, match=message):
        checkpoint.save(tmp_path / "0", CFG, params(), **what)
    assert not any(tmp_path.iterdir())


def test_another_model_is_refused_with_fields_and_leaves(saved):
    expected = CFG.replace(mlp_dim=32, rope=tele.Rope(1e4), output_biases=True)
    with pytest.raises(UserError) as caught:
        checkpoint.load(saved, cfg=expected)
    assert str(caught.value).split(";\n  ") == [
        f"{saved}: not a checkpoint of the model that is expected: config.mlp_dim: stored 24, expected 32",
        "config.rope: stored {'theta': 500000.0, 'ntk': None, 'tables': 'float32'}, "
        "expected {'theta': 10000.0, 'ntk': None, 'tables': 'float32'}",
        "config.output_biases: stored False, expected True",
        "layers.attn.o_bias: missing, expected float32[3,16]",
        "layers.mlp.down: stored float32[3,24,16], expected float32[3,32,16]",
        "layers.mlp.down_bias: missing, expected float32[3,16]",
        "layers.mlp.gate: stored float32[3,16,24], expected float32[3,16,32]",
        "layers.mlp.up: stored float32[3,16,24], expected float32[3,16,32]",
    ]


def test_a_config_may_differ_in_how_the_model_is_computed(saved):
    expected = CFG.replace(dtype="float32", remat="none", attention="reference")
    loaded = checkpoint.load(saved, cfg=expected)
    assert loaded.cfg == expected
    assert_same(loaded.params, params())


def test_another_dtype_is_refused_not_cast(saved):
    with pytest.raises(UserError, match=r"lm_head.kernel: stored float32\[16,40\], expected bfloat16\[16,40\]"):
        checkpoint.load(saved, cfg=CFG.replace(param_dtype="bfloat16"))


def test_expect_takes_the_place_of_the_config(tmp_path):
    tree = {"a": {"b": np.ones((2, 3), np.float32)}}
    spec = {"a": {"b": ParamSpec((2, 3), np.dtype("float32"))}}
    checkpoint.save(tmp_path / "0", CFG, tree, spec=spec)
    assert_same(checkpoint.load(tmp_path / "0", expect=spec).params, tree)
    with pytest.raises(UserError, match=r"a.b: stored float32\[2,3\], not expected"):
        checkpoint.load(tmp_path / "0")
    with pytest.raises(UserError, match=r"a.b: stored float32\[2,3\], expected float32\[2,4\]"):
        checkpoint.load(tmp_path / "0", expect={"a": {"b": ParamSpec((2, 4), np.dtype("float32"))}})


def test_another_optimizer_is_refused_with_its_leaves(saved):
    with pytest.raises(UserError) as caught:
        checkpoint.load(saved, opt_state_like=optax.sgd(1e-3, momentum=0.9).init(params()))
    lines = str(caught.value).split(";\n  ")
    assert lines[0] == f"{saved}: opt_state: not what is expected: 0.count: stored int32[], not expected"
    assert "0.mu.final_norm.scale: stored float32[16], not expected" in lines
    assert "0.trace.final_norm.scale: missing, expected float32[16]" in lines
    assert len(lines) == 3 * len(flatten(params())) + 1


def test_a_moment_of_another_dtype_is_refused(saved):
    like = optax.adam(1e-3).init(all_bfloat16(params()))
    with pytest.raises(UserError, match=r"0.mu.lm_head.kernel: stored float32\[16,40\], expected bfloat16\[16,40\]"):
        checkpoint.load(saved, opt_state_like=like)


def test_an_optimizer_state_that_was_not_saved_is_said(tmp_path):
    checkpoint.save(tmp_path / "0", CFG, params())
    with pytest.raises(UserError, match="holds no optimizer state"):
        checkpoint.load(tmp_path / "0", opt_state_like=optax.adam(1e-3).init(params()))


def test_shardings_of_another_tree_are_refused(saved):
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: sharding, params())
    del shardings["lm_head"]
    with pytest.raises(UserError, match=r"shardings: .* differ in lm_head.kernel"):
        checkpoint.load(saved, shardings=shardings)


def test_float64_is_not_cut_to_float32(tmp_path):
    spec = {"w": ParamSpec((3,), np.dtype("float64"))}
    checkpoint.save(tmp_path / "0", CFG, {"w": np.arange(3.0)}, spec=spec)
    with pytest.raises(UserError, match="params/w is float64, which JAX would cut to 32 bits; set JAX_ENABLE_X64=1"):
        checkpoint.load(tmp_path / "0", expect=spec)
    assert_same(checkpoint.open_lazy(tmp_path / "0").params["w"].read(), np.arange(3.0))


# ---- places and names that lead elsewhere, and disks that are full ------------------------------------------------


@pytest.mark.parametrize("place", ["run\\1/5", "a/b\\..\\c", "zero\0byte"])
def test_a_path_that_tensorstore_would_read_otherwise_is_refused_before_anything_is_written(tmp_path, place):
    with pytest.raises(UserError, match="cannot have a backslash or a zero byte"):
        checkpoint.save(f"{tmp_path}/{place}", CFG, params())
    with pytest.raises(UserError, match="cannot have a backslash or a zero byte"):
        checkpoint.open_lazy(f"{tmp_path}/{place}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["0007", "٧", "7_0", "+7"])
def test_only_what_a_manager_would_call_a_step_is_one(tmp_path, name):
    checkpoint.save(tmp_path / "checkpoints" / "5", CFG, params(), step=5)
    shutil.copytree(tmp_path / "checkpoints" / "5", tmp_path / "checkpoints" / name)
    assert checkpoint.open_lazy(tmp_path).path.name == "5"
    assert checkpoint.open_lazy(tmp_path / "checkpoints" / name).step == 5  # by its own name it can be had


@pytest.mark.parametrize("key", ["/outside", "../outside", "a\\b", "a/b", "zero\0byte", "_hidden", "n" * 300])
def test_a_leaf_cannot_be_called_what_leads_out_of_its_checkpoint(tmp_path, key):
    state = {"a": {key: np.zeros(2)}} if key != "_hidden" else {key: np.zeros(2)}
    with pytest.raises(UserError, match="cannot be stored"):
        checkpoint.save(tmp_path / "x", CFG, params(), opt_state=state)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_are_one_line_of_damage(tmp_path):
    """By a limit on the size of files, which fails like a full disk."""
    tree = params()

    def through_a_manager():
        with checkpoint.Manager(tmp_path / "m") as manager:
            manager.save(1, CFG, tree)

    def as_one():
        checkpoint.save(tmp_path / "x", CFG, tree)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for work in (as_one, through_a_manager):
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            with pytest.raises(DamageError, match="could not be written") as caught:
                work()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists() and checkpoint.locate.list_steps(tmp_path / "m") == []
