"""In, and out again: every number where the released layout says it belongs, every bit as it was."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import checkpoint, convert
from tele_jax.axes import flatten
from tele_jax.config import Ntk, Rope
from tele_jax.convert import configs, exporting, families, region
from tele_jax.convert.files import Files, create, split
from tele_jax.model.spec import flat_spec
from tests.convert import releases

CASES = {
    "llama": ("llama", {}, {}),
    "llama_tied": ("llama", {"tied": True}, {}),
    "llama_biases_wide_heads": ("llama", {"biases": True, "head_dim": 10}, {}),
    "tele_flm": ("tele_flm", {}, {}),
    "telechat_tied": ("telechat", {}, {}),
    "telechat_untied": ("telechat", {"tied": False, "prefix": "transformer."}, {}),
    "telechat_tied_with_prefix": ("telechat", {"prefix": "transformer."}, {}),
    "telechat_untied_without_prefix": ("telechat", {"tied": False}, {}),
    "telechat_grouped": ("telechat", {"kv_heads": 3}, {}),
    "telechat_52b": ("telechat_52b", {}, {}),
    "shards": ("tele_flm", {}, {"shards": 4}),
    "bfloat16": ("telechat", {"dtype": ml_dtypes.bfloat16}, {"shards": 2}),
    "bfloat16_52b": ("telechat_52b", {"dtype": ml_dtypes.bfloat16}, {}),
    "float64": ("llama", {"dtype": np.float64}, {}),
}


def release(name, directory):
    format, options, how = CASES[name]
    config, tensors = releases.MAKERS[format](seed=3, **options)
    return format, config, tensors, releases.save(directory / "release", config, tensors, **how)


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        ours = np.asarray(found[name])
        assert (ours.dtype, ours.shape) == (values.dtype, values.shape), name
        assert ours.tobytes() == np.ascontiguousarray(values).tobytes(), name


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
@pytest.mark.parametrize("name", CASES)
def test_import_puts_every_number_in_its_place_and_export_puts_it_back(name, tmp_path):
    format, config, tensors, src = release(name, tmp_path)
    done = convert.import_checkpoint(src, tmp_path / "ck", chunk_bytes=700, format=format)
    assert done.tiles > 20
    assert done.bytes_read == sum(t.nbytes for t in tensors.values() if t.shape and t.any())  # but constants
    lazy = checkpoint.open_lazy(tmp_path / "ck")
    read = {leaf: array.read() for leaf, array in lazy.items["params"].items()}
    assert_bits(read, releases.leaves(format, tensors))
    assert lazy.cfg.param_dtype == lazy.cfg.dtype == next(iter(tensors.values())).dtype.name
    assert not list(checkpoint.verify(lazy))

    out = convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format=format, shard_gb=1e-5)
    assert len(out.shards) > 3
    assert_bits(releases.read_weights(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("name", ["llama_tied", "telechat_untied", "telechat_52b", "bfloat16"])
def test_in_memory_it_is_the_same(name, tmp_path):
    format, _, tensors, src = release(name, tmp_path)
    cfg, params = convert.load_hf(src)
    assert_bits(flatten(params), releases.leaves(format, tensors))
    assert cfg == checkpoint.open_lazy(imported(src, tmp_path / "ck")).cfg
    convert.save_hf(tmp_path / "out", cfg, params, format=format)
    assert_bits(releases.read_weights(tmp_path / "out"), tensors)
    again, _ = convert.load_hf(tmp_path / "out")
    assert again.replace(init_std=cfg.init_std, matrix_init_std=cfg.matrix_init_std) == cfg


def imported(src, dst, **how):
    convert.import_checkpoint(src, dst, **how)
    return dst


def test_a_checkpoint_that_was_saved_whole_is_exported_the_same(tmp_path):
    """Its chunks are cut along other axes than those of an import."""
    format, _, tensors, src = release("telechat_untied", tmp_path)
    cfg, params = convert.load_hf(src)
    checkpoint.save(tmp_path / "saved", cfg, params)
    convert.export_checkpoint(tmp_path / "saved", tmp_path / "out", format=format)
    assert_bits(releases.read_weights(tmp_path / "out"), tensors)


def test_float16_becomes_float32_without_a_change_and_goes_back(tmp_path):
    config, tensors = releases.telechat(dtype=np.float16)
    src = releases.save(tmp_path / "release", config, tensors)
    imported(src, tmp_path / "ck", dtype="float32")
    wide = {name: values.astype(np.float32) for name, values in tensors.items()}
    assert_bits(flatten(checkpoint.load(tmp_path / "ck").params), releases.leaves("telechat", wide))
    convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="telechat", dtype="float16")
    assert_bits(releases.read_weights(tmp_path / "out"), tensors)


def test_a_dtype_that_is_asked_for_rounds_to_nearest(tmp_path):
    config, tensors = releases.llama(dtype=np.float32)
    src = releases.save(tmp_path / "release", config, tensors)
    imported(src, tmp_path / "ck", dtype="bfloat16")
    rounded = {name: values.astype(ml_dtypes.bfloat16) for name, values in tensors.items()}
    assert_bits(flatten(checkpoint.load(tmp_path / "ck").params), releases.leaves("llama", rounded))


def test_buffers_that_are_not_as_usual_come_back_as_they_were(tmp_path):
    config, tensors = releases.telechat_52b()
    tensors["transformer.h.1.attn.masked_bias"] = np.array(-123.0, np.float32)
    src = releases.save(tmp_path / "release", config, tensors)
    imported(src, tmp_path / "ck")
    convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="telechat_52b")
    assert_bits(releases.read_weights(tmp_path / "out"), tensors)


def test_files_that_travel(tmp_path):
    config, tensors = releases.telechat()
    src = releases.save(tmp_path / "release", config, tensors)
    kept = {
        "tokenizer.json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 54}]}),
        "tokenizer_config.json": '{"chat_template": "x"}',
        "generation_config.json": "{}",
        "tokenization_telechat.py": "raise SystemExit",
    }
    programs = {"modeling_telechat.py": "raise SystemExit", "configuration_telechat.py": ""}
    for name, text in {**kept, **programs, "README.md": "not this one", "optimizer.bin": "nor this"}.items():
        (src / name).write_text(text)
    done = convert.import_checkpoint(src, tmp_path / "ck")
    assert done.release.notes == [
        "vocabulary: 55 tokens (that many ids are in tokenizer.json); rows 55 to 55 are padding"
    ]
    cfg = checkpoint.open_lazy(tmp_path / "ck").cfg
    assert (cfg.vocab_size, cfg.padded_vocab_size) == (55, 56)
    convert.export_checkpoint(tmp_path / "ck", tmp_path / "same", format="telechat")
    convert.export_checkpoint(tmp_path / "ck", tmp_path / "other", format="llama", max_seq_len=32)
    for directory, expected in (("same", {**kept, **programs}), ("other", kept)):
        names = {f.name for f in (tmp_path / directory).iterdir()} - {"config.json", "model.safetensors"}
        assert names == expected.keys()
        assert all((tmp_path / directory / name).read_text() == text for name, text in expected.items())


def test_the_provenance_says_where_it_came_from_and_stays(tmp_path):
    format, config, _, src = release("tele_flm", tmp_path)
    imported(src, tmp_path / "ck")
    (entry,) = checkpoint.open_lazy(tmp_path / "ck").provenance
    generation = {"eos_token_ids": [2], "do_sample": False, "sampling": {}, "document_start": None}
    said = {"stage": "ck", "kind": "import", "format": format, "source": "release", "config": config}
    assert entry == said | {"generation": generation}


def test_what_grew_keeps_the_other_keys_of_its_release(tmp_path):
    _, config, _, src = release("tele_flm", tmp_path)
    imported(src, tmp_path / "ck")
    cfg = checkpoint.open_lazy(tmp_path / "ck").cfg
    plan = tele.growth.plan(cfg, cfg.replace(embed_dim=48, num_heads=12, mlp_dim=50, num_layers=4), policy="exact")
    tele.growth.stream(plan, tmp_path / "ck", tmp_path / "grown")
    convert.export_checkpoint(tmp_path / "grown", tmp_path / "out", format="tele_flm")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["auto_map"] == config["auto_map"]
    assert (written["hidden_size"], written["num_hidden_layers"], written["intermediate_size"]) == (48, 4, 50)
    again, params = convert.load_hf(tmp_path / "out")
    tokens = np.arange(20, dtype=np.int32)[None]
    loaded = checkpoint.load(tmp_path / "ck")
    expected = np.asarray(tele.forward(cfg, loaded.params, tokens))
    assert np.abs(np.asarray(tele.forward(again, params, tokens)) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("format", "stated", "change", "key", "found"),
    [
        ("telechat", {"num_key_value_heads": 2}, {"num_kv_heads": 6}, "num_key_value_heads", None),
        ("telechat", {}, {"rope": Rope(ntk=Ntk(original_length=4096, trained_length=32))}, "base_seqlen", None),
        ("tele_flm", {"mup_base_width": 8}, {"mup_base_width": 12}, "mup_base_width", None),
        (
            "tele_flm",
            {"rope_theta": None, "rope_scaling": {"rope_theta": 700.0}},
            {"rope": Rope(theta=900.0)},
            "rope_scaling",
            None,
        ),
        ("telechat_52b", {}, {"mup_base_width": None}, "mup_base_width", None),
        ("llama", {"rope_theta": None, "rope_parameters": {"rope_theta": 9.0}}, {"num_layers": 4}, "auto_map", "kept"),
    ],
)
def test_no_key_of_the_release_outlives_what_it_said(format, stated, change, key, found):
    """Where the model changed since, what the writer leaves out must not be left from before."""
    config = releases.MAKERS[format]()[0] | stated | {"auto_map": "kept"}
    cfg = configs.read(configs.Keys(config, "config.json"), format).replace(**change)
    release = {"kind": "import", "format": format, "config": config}
    document = exporting.outline(cfg, format, dtype="float32", provenance=[release]).document
    assert document.get(key) == found and document["auto_map"] == "kept"
    again = configs.read(configs.Keys(document, "config.json"), format)
    described = {"num_layers", "num_kv_heads", "embed_dim", "mlp_dim", "rope", "logit_mult", "tie_embeddings"}
    assert {name: getattr(again, name) for name in described} == {name: getattr(cfg, name) for name in described}


SIZES = dict(num_layers=1, embed_dim=2, num_heads=1, head_dim=2, mlp_dim=1, vocab_size=1)
SPEC = flat_spec(tele.ModelConfig(**SIZES, output_biases=True, scalar_head=True))


@settings(max_examples=100)
@given(data=st.data())
def test_any_rectangle_of_any_leaf_goes_out_and_comes_back(data, tmp_path_factory):
    """Whatever the sizes, against numpy's own indexing of the whole leaf."""
    draw = data.draw
    sizes = {axis: draw(st.integers(1, 6)) for axis in ("embed", "heads", "head_dim", "mlp", "vocab")}
    sizes |= {"layers": 1, "score": 1}
    sizes["kv_heads"] = sizes["heads"]
    dtype = np.dtype(draw(st.sampled_from([ml_dtypes.bfloat16, np.float32])))
    specs = {
        name: dataclasses.replace(spec, shape=tuple(sizes[axis] for axis in spec.axes), dtype=dtype)
        for name, spec in SPEC.items()
    }
    table = draw(st.sampled_from([families.TELE_FLM, families.TELECHAT, families.TELECHAT_52B]))
    row = draw(st.sampled_from([row for row in table if row.leaves]))
    tensor = families._tensor(row, 0, specs, sizes, dtype, "")
    part = draw(st.sampled_from(tensor.parts))
    spec = specs[part.leaf]
    axes, shape = spec.axes[len(spec.stack) :], spec.shape[len(spec.stack) :]
    start = [draw(st.integers(0, n - 1)) for n in shape]
    stop = [draw(st.integers(s + 1, n)) for s, n in zip(start, shape, strict=True)]
    directory = tmp_path_factory.mktemp("rectangle")
    stored = create(directory, split([tensor], 10**9))[tensor.name]
    values = np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)
    piece = tuple(slice(s, e) for s, e in zip(start, stop, strict=True))
    small = {"_ROW_BYTES": 8, "_SEGMENT_BYTES": 8, "_BLOCK_BYTES": 16}  # many blocks
    with pytest.MonkeyPatch.context() as patch, Files(os.O_RDWR) as files:
        for name, value in small.items() if draw(st.booleans()) else ():
            patch.setattr(region, name, value)
        region.write(files, stored, part, axes, [0] * len(axes), values)
        read = np.empty([e - s for s, e in zip(start, stop, strict=True)], spec.dtype)
        region.read(files, stored, part, axes, start, read)
        assert read.tobytes() == np.ascontiguousarray(values[piece]).tobytes()
        region.write(files, stored, part, axes, start, np.ascontiguousarray(-values[piece]))
        whole = np.empty(shape, spec.dtype)
        region.read(files, stored, part, axes, [0] * len(axes), whole)
    values[piece] *= -1
    assert whole.tobytes() == values.tobytes()


def test_jax_arrays_on_a_mesh_are_saved_as_well(tmp_path):
    from tele_jax.settings import MeshConfig
    from tele_jax.sharding import make_mesh, param_shardings

    format, _, tensors, src = release("llama", tmp_path)
    cfg, params = convert.load_hf(src)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    placed = jax.tree.map(jax.device_put, params, param_shardings(tele.spec(cfg), mesh))
    convert.save_hf(tmp_path / "out", cfg, placed, format=format)
    assert_bits(releases.read_weights(tmp_path / "out"), tensors)
