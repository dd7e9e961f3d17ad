"""What is wrong with a release is said in one line that names the file and the tensor, and nothing is left behind."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint, convert
from tele_jax.errors import DamageError, UserError
from tests.convert import releases

EMBEDDING = "model.embed_tokens.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def release(tmp_path):
    """change(config, tensors) edits a Llama in memory; returns its directory."""

    def make(change=lambda config, tensors: None, shards=1):
        config, tensors = releases.llama()
        change(config, tensors)
        return releases.save(tmp_path / "release", config, tensors, shards)

    return make


def refused(src, tmp_path, kind, match, **how):
    """By the import and in memory; returns the message, which is one line."""
    with pytest.raises(kind, match=match) as error:
        convert.import_checkpoint(src, tmp_path / "dst", chunk_bytes=700, **how)
    with pytest.raises(kind, match=match):
        convert.load_hf(src, **how)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["release"], [])
    return str(error.value)


# ---- files -------------------------------------------------------------------------------------------------------


def test_no_directory(tmp_path):
    refused(tmp_path / "release", tmp_path, UserError, r"release: no such directory; expected a released checkpoint")


def test_a_file_in_the_place_of_a_directory(release, tmp_path):
    file = release() / "model.safetensors"
    refused(file, tmp_path, UserError, r"model.safetensors: is a file; name the directory that holds it")


def test_a_missing_shard_names_the_file_and_a_tensor_that_it_holds(release, tmp_path):
    src = release(shards=3)
    (src / "part-1.safetensors").unlink()
    refused(src, tmp_path, UserError, r"part-1.safetensors: missing; .*index.json has \d+ tensors in it, such as model")


def test_an_index_of_another_name_serves_where_there_is_one_only(release, tmp_path):
    src = release(shards=3)
    (src / "model.safetensors.index.json").rename(src / "weights.safetensors.index.json")
    convert.load_hf(src)
    (src / "part-1.safetensors").unlink()
    refused(
        src, tmp_path, UserError, r"part-1.safetensors: missing; weights.safetensors.index.json has \d+ tensors in it"
    )


def test_a_shard_without_a_tensor_that_the_index_promises(release, tmp_path):
    src = release(shards=3)
    held = releases.read_safetensors(src / "part-0.safetensors")
    gone = held.pop(sorted(held)[0]) is not None
    releases.write_safetensors(src / "part-0.safetensors", held)
    assert gone
    refused(src, tmp_path, UserError, r"part-0.safetensors: has no lm_head.weight, though .*index.json says so")


def test_a_shard_with_a_tensor_that_the_index_does_not_know(release, tmp_path):
    src = release(shards=3)
    held = releases.read_safetensors(src / "part-0.safetensors") | {"other": np.zeros(3, np.float32)}
    releases.write_safetensors(src / "part-0.safetensors", held)
    refused(src, tmp_path, UserError, r"part-0.safetensors: has other, which .*index.json does not place there")


def test_an_index_that_leads_elsewhere(release, tmp_path):
    src = release(shards=2)
    index = src / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("part-1", "../part-1"))
    refused(src, tmp_path, UserError, r"index.json: .* is placed in '../part-1.safetensors', which is no file beside")
    for place in ("3", "null", '""', "[]"):
        index.write_text('{"weight_map": {"a": ' + place + "}}")
        refused(src, tmp_path, UserError, r"index.json: damaged, a is placed in .*, which is no name of a file")
    index.write_text("{}")
    refused(src, tmp_path, UserError, r"index.json: damaged, not an index of safetensors")


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.001])
def test_a_truncated_file(kept, release, tmp_path):
    src = release()
    file = src / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    message = refused(src, tmp_path, UserError, r"model.safetensors: (cut short|damaged or cut short)")
    if kept > 0.1:
        assert "model.layers." in message or "lm_head" in message or "model.norm" in message


def test_a_file_that_shrinks_while_it_is_read(release, tmp_path):
    src = release()
    file = src / "model.safetensors"

    def cut_short(done, total):
        with file.open("r+b") as stream:
            stream.truncate(20_000)

    with pytest.raises(UserError, match=r"model.safetensors: cut short at byte"):
        convert.import_checkpoint(src, tmp_path / "dst", chunk_bytes=700, progress=cut_short, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def header_of(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "cannot hold the header that it announces"),
        (struct.pack("<Q", 2**40) + b"{}", "cannot hold the header that it announces"),
        (header_of(b"{not json"), "its header is not that of a safetensors file"),
        (header_of(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}') + b"1234", "a: 4 bytes for F32"),
        (
            header_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + b"12345",
            "1 bytes behind the last",
        ),
        (
            header_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}') + b"12345678",
            "a: damaged: its numb",
        ),
        (header_of(b'{"a": {"shape": [1], "data_offsets": [0, 4]}}') + b"1234", "'dtype'"),
        (header_of(b'{"a": {}, "a": {}}'), "a name occurs twice"),
        (header_of(b"[" * 100_000), "maximum recursion depth"),
    ],
)
def test_a_damaged_header(content, match, release, tmp_path):
    src = release()
    (src / "model.safetensors").write_bytes(content)
    refused(src, tmp_path, UserError, rf"model.safetensors.*{match}")


def test_pickle_files_are_refused_with_advice(release, tmp_path):
    src = release()
    (src / "model.safetensors").rename(src / "pytorch_model-00001-of-00002.bin")
    refused(
        src,
        tmp_path,
        UserError,
        r"pytorch_model-00001-of-00002.bin: a PyTorch pickle file, .*convert it to safetensors",
    )
    (src / "pytorch_model-00001-of-00002.bin").unlink()
    refused(src, tmp_path, UserError, r"release: no \*.safetensors file")


def test_integers_and_quantized_weights_are_refused(release, tmp_path):
    src = release()
    entry = {"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}
    (src / "model.safetensors").write_bytes(header_of(json.dumps(entry).encode()) + b"1234")
    refused(src, tmp_path, UserError, r"model.safetensors: a is of dtype I8; known are F64, F32, F16, BF16")


# ---- tensors -----------------------------------------------------------------------------------------------------


def test_a_wrong_shape(release, tmp_path):
    src = release(lambda config, tensors: tensors.update({Q: np.zeros((24, 23), np.float32)}))
    refused(src, tmp_path, UserError, rf"model.safetensors: {Q}: has shape \[24, 23\], expected \[24, 24\]")


def test_a_missing_tensor_and_an_unknown_one(release, tmp_path):
    def change(config, tensors):
        tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(Q)

    message = refused(release(change), tmp_path, UserError, rf"{Q} \[24, 24\]: missing")
    assert "model.safetensors: model.layers.1.self_attn.query.weight [24, 24]: unknown" in message


def test_a_config_with_fewer_layers_than_the_weights(release, tmp_path):
    src = release(lambda config, tensors: config.update(num_hidden_layers=2))
    refused(src, tmp_path, UserError, r"model.layers.2.input_\S+ \[24\]: unknown; .*v_proj.weight \[8, 24\]: unknown")


def test_another_vocabulary(release, tmp_path):
    src = release(lambda config, tensors: config.update(vocab_size=60))
    refused(
        src, tmp_path, UserError, rf"model.safetensors: {EMBEDDING} has 56 rows, but vocab_size in config.json is 60"
    )


def test_the_tokenizer_of_another_model(release, tmp_path):
    src = release()
    (src / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 56}}}))
    refused(src, tmp_path, UserError, r"tokenizer.json: has 57 ids, but the embedding only 56 rows")
    (src / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 54}}}))
    refused(src, tmp_path, UserError, r"vocab_size 54: \S+tokenizer.json has 55 ids", vocab_size=54)
    (src / "tokenizer.json").write_text("{}")
    refused(src, tmp_path, UserError, r"tokenizer.json: not a tokenizer file")
    (src / "tokenizer.json").unlink()
    (src / "tokenizer.model").write_bytes(b"\x0a\x02ab" * 57)  # 57 pieces
    refused(src, tmp_path, UserError, r"tokenizer.model: has 57 ids, but the embedding only 56 rows")
    (src / "tokenizer.model").write_bytes(b"not a model")
    refused(src, tmp_path, UserError, r"tokenizer.model: not a tokenizer file")


@pytest.mark.parametrize("size", [0, 57])
def test_a_vocab_size_that_the_embedding_does_not_have(size, release, tmp_path):
    refused(release(), tmp_path, UserError, rf"vocab_size {size}: the embedding has 56 rows", vocab_size=size)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [EMBEDDING, Q, "model.norm.weight"])
def test_numbers_that_are_not_finite(name, dtype, value, tmp_path):
    config, tensors = releases.llama(dtype=dtype)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = value
    src = releases.save(tmp_path / "release", config, tensors, shards=2)
    refused(src, tmp_path, UserError, rf"part-\d.safetensors: {name}: has numbers that are not finite")


def test_numbers_that_are_too_large_for_the_dtype_asked_for(release, tmp_path):
    def change(config, tensors):
        tensors[Q] = tensors[Q].copy()
        tensors[Q][3, 4] = 3.4e38

    refused(
        release(change), tmp_path, UserError, rf"{Q}, as bfloat16: has numbers that are not finite", dtype="bfloat16"
    )


def test_several_dtypes_need_a_choice(release, tmp_path):
    def change(config, tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)

    src = release(change)
    refused(
        src, tmp_path, UserError, r"of several dtypes: BF16 \(model.norm.weight\), F32 \(.*\); choose one with --dtype"
    )
    cfg, _ = convert.load_hf(src, dtype="float32")
    assert cfg.param_dtype == "float32"


def test_float16_needs_a_choice(tmp_path):
    config, tensors = releases.llama(dtype=np.float16)
    src = releases.save(tmp_path / "release", config, tensors)
    refused(src, tmp_path, UserError, r"the weights are float16, .*choose --dtype float32, which changes no number")
    refused(src, tmp_path, UserError, r"dtype 'int8': not one of", dtype="int8")


def test_a_bias_where_ours_has_none(tmp_path):
    config, tensors = releases.llama(biases=True)
    name = "model.layers.0.self_attn.k_proj.bias"
    tensors[name] = tensors[name] + np.float32(1e-3)
    src = releases.save(tmp_path / "release", config, tensors)
    refused(src, tmp_path, UserError, rf"model.safetensors: {name} is not zero; tele_jax has no bias there")


def test_a_head_beside_a_tied_embedding_must_be_its_copy(tmp_path):
    config, tensors = releases.llama(tied=True)
    tensors["lm_head.weight"] = tensors[EMBEDDING].copy()
    cfg, params = convert.load_hf(releases.save(tmp_path / "copy", config, tensors))
    assert cfg.tie_embeddings and "lm_head" not in params
    tensors["lm_head.weight"][-1, -1] += 1
    src = releases.save(tmp_path / "other", config, tensors)
    with pytest.raises(UserError, match=rf"lm_head.weight is not {EMBEDDING}, though by config.json the two are tied"):
        convert.load_hf(src)


def test_frequencies_that_old_copies_carry_are_passed_over(release):
    src = release(lambda c, t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}))
    cfg, _ = convert.load_hf(src)
    assert cfg.num_layers == releases.L


# ---- config.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, match",
    [
        ({"model_type": "mixtral"}, "unknown architecture 'mixtral'; known are TeleFLM, telechat and llama"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "24"}, "hidden_size is '24', expected int"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", but tele_jax has only "silu"'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rotary scaling 'llama3' of Llama is none that"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary scaling 'yarn'"),
        ({"attention_bias": True}, "attention_bias is True and mlp_bias is False; tele_jax has both or none"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"sliding_window": 128}, "sliding_window is 128, but tele_jax has only null"),
        ({"num_key_value_heads": 4}, "num_heads=6 does not divide into num_kv_heads=4"),
        ({"rms_norm_eps": -1}, "rms_eps=-1.0 must be above 0"),
        ({"rms_norm_eps": float("inf")}, "rms_eps=inf must be a finite number"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x', expected float"),
    ],
)
def test_a_config_that_tele_jax_cannot_be(change, match, release, tmp_path):
    refused(release(lambda config, tensors: config.update(change)), tmp_path, UserError, rf"config.json: .*{match}")


@pytest.mark.parametrize(
    "maker, change, match",
    [
        (releases.telechat, {"embed_layernorm": True}, "embed_layernorm is true, but tele_jax has only false"),
        (releases.telechat, {"logn": True}, "logn is true"),
        (releases.telechat, {"n_head": 7}, "embed_dim=24 does not divide into num_heads=7"),
        (releases.telechat_52b, {"relative_encoding": "alibi"}, 'relative_encoding is "alibi"'),
        (releases.telechat_52b, {"mup_base_width": 7}, r"mup_base_width is 7, but 24 .* / 2 .* is 12"),
        (releases.tele_flm, {"hidden_size": 0}, "the hidden size is 0, must be above 0"),
        (releases.tele_flm, {"mup_scale_factor": 0}, "mup_scale_factor is 0.0, must be above 0"),
    ],
)
def test_a_config_of_the_other_families(maker, change, match, tmp_path):
    config, tensors = maker()
    src = releases.save(tmp_path / "release", config | change, tensors)
    refused(src, tmp_path, UserError, rf"config.json: .*{match}")


def test_no_config(release, tmp_path):
    src = release()
    (src / "config.json").write_text("[]")
    refused(src, tmp_path, UserError, "config.json: not a table")
    (src / "config.json").write_text("[" * 100_000)
    refused(src, tmp_path, UserError, "config.json: not JSON")
    (src / "config.json").write_text("{")
    refused(src, tmp_path, UserError, "config.json: not JSON")
    (src / "config.json").unlink()
    refused(src, tmp_path, UserError, "config.json: missing; a released checkpoint is a directory with config.json")


def test_another_format_than_asked_for(release, tmp_path):
    refused(release(), tmp_path, UserError, "config.json: is of format llama, not telechat; leave", format="telechat")


def test_an_unknown_format_and_tables_of_another_family(release, tmp_path):
    src = release()
    refused(src, tmp_path, UserError, "'onnx': not one of tele_flm, telechat, telechat_52b, llama, gguf", format="onnx")
    refused(src, tmp_path, UserError, "rope tables in float16: only the code of telechat", rope_tables="float16")


# ---- destinations ------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(release, tmp_path):
    src = release()
    convert.import_checkpoint(src, tmp_path / "ck")
    before = {file: file.read_bytes() for file in (tmp_path / "ck").rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="ck: exists already, and checkpoints are never overwritten"):
        convert.import_checkpoint(src, tmp_path / "ck")
    with pytest.raises(UserError, match="release: exists already, and is not overwritten"):
        convert.export_checkpoint(tmp_path / "ck", src, format="llama")
    assert before == {file: file.read_bytes() for file in (tmp_path / "ck").rglob("*") if file.is_file()}


def test_destinations_that_cannot_be_made(release, tmp_path):
    src = release()
    convert.import_checkpoint(src, tmp_path / "ck")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for dst, match in (("file/ck", "file is a file, not a directory"), ("link", "exists already")):
        with pytest.raises(UserError, match=match):
            convert.import_checkpoint(src, tmp_path / dst)
        with pytest.raises(UserError, match=match):
            convert.export_checkpoint(tmp_path / "ck", tmp_path / dst, format="llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "file", "link", "release"]


@pytest.mark.parametrize("size", [float("nan"), float("inf")])
def test_sizes_that_are_no_numbers(size, release, tmp_path):
    src = release()
    convert.import_checkpoint(src, tmp_path / "ck")
    for how in ({"memory_gb": size}, {"shard_gb": size}):
        with pytest.raises(UserError, match=rf"_gb={size}"):
            convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="llama", **how)
    with pytest.raises(UserError, match=rf"memory_gb={size} is not a number of gigabytes"):
        convert.import_checkpoint(src, tmp_path / "other", memory_gb=size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "release"]


def test_addresses_and_too_little_memory(release, tmp_path):
    src = release()
    with pytest.raises(UserError, match="gs://bucket/x: an import needs a file system"):
        convert.import_checkpoint(src, "gs://bucket/x")
    with pytest.raises(UserError, match=r"memory_gb=0.01 is too little for \S+: a chunk of it.* need memory_gb=0\.\d+"):
        convert.import_checkpoint(src, tmp_path / "ck", memory_gb=0.01)


def test_an_export_of_numbers_that_are_not_finite_leaves_nothing(release, tmp_path):
    cfg, params = convert.load_hf(release())
    bad = np.array(params["layers"]["mlp"]["up"])
    bad[2, 3, 4] = np.nan
    params["layers"]["mlp"]["up"] = bad
    with pytest.raises(DamageError, match=r"layers.mlp.up of layer 2: has numbers that are not finite"):
        convert.save_hf(tmp_path / "out", cfg, params, format="llama")
    bad[2, 3, 4] = 1e6
    with pytest.raises(UserError, match=r"layers.mlp.up of layer 2, as float16: has numbers that are not finite"):
        convert.save_hf(tmp_path / "out", cfg, params, format="llama", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_an_export_from_behind_growth_masks_is_refused(release, tmp_path):
    cfg, params = convert.load_hf(release())
    checkpoint.save(tmp_path / "ck", cfg, params, provenance=[{"stage": "wider", "mask": 0.5}])
    with pytest.raises(UserError, match=r"grown behind masks that stand at 0.50"):
        convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="llama")
    assert not (tmp_path / "out").exists()


def test_an_export_of_a_damaged_chunk_names_it_and_leaves_nothing(release, tmp_path):
    convert.import_checkpoint(release(), tmp_path / "ck")
    chunk = tmp_path / "ck" / "params" / "layers.mlp.up" / "c" / "0" / "0" / "0"  # all layers
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(DamageError, match=r"params/layers.mlp.up: damaged: .*c/0/0/0: its checksum"):
        convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "release"]


def test_float64_in_memory_needs_64_bits(tmp_path):
    config, tensors = releases.llama(dtype=np.float64)
    src = releases.save(tmp_path / "release", config, tensors)
    with pytest.raises(UserError, match=r"float64 needs jax.config.update"):
        convert.load_hf(src)
    assert tele.checkpoint  # an import does not: test_roundtrip.py
