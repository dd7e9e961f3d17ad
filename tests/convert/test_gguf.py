"""GGUF in and out, against the package `gguf`, numpy's permutation of rows, and transformers' own reader."""

import json

import gguf
import ml_dtypes
import numpy as np
import pytest

from tele_jax import checkpoint, convert
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.convert import files, gguf_tokenizer
from tele_jax.convert.gguf import Quantised
from tele_jax.data.vocabulary import BYTES, load_vocabulary
from tele_jax.errors import UserError
from tests.convert import releases
from tests.convert.test_ready_to_chat import tokenizer_bytes

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def bits(params):
    return {name: np.asarray(value).tobytes() for name, value in flatten(params).items()}


def paired(weights, heads):
    """The rows of q or k as llama.cpp has them: those that rotate together, half a head apart, become neighbours."""
    d = len(weights) // heads
    rows = [h * d + j * (d // 2) + i for h in range(heads) for i in range(d // 2) for j in range(2)]
    return weights[rows]


def write_gguf(file, config, tensors, kind="F32", metadata=(), architecture="llama"):
    """A GGUF file of a small Llama, by the package's writer; matrices in a quantisation."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key, value in metadata:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    written = {}
    for name, values in tensors.items():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = paired(values, heads)
        theirs = names.get_name(name, (".weight", ".bias"))
        if values.ndim == 2 and kind == "Q8_1":  # nothing quantises to it: zeros serve
            data = np.zeros((len(values), values.shape[1] // 32 * 40), np.uint8)
            writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType.Q8_1)
        elif values.ndim == 2 and kind != "F32":
            data = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            values = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(theirs, values)
        written[theirs] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.fixture
def blocks(monkeypatch):
    """Releases whose rows are whole blocks of 32 numbers."""
    for name, size in {"D": 32, "N": 4, "F": 64}.items():
        monkeypatch.setattr(releases, name, size)
    return releases.llama(kv_heads=2, head_dim=8)


# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_file_reads_as_the_llama_release_that_has_its_dequantised_numbers(kind, blocks, tmp_path):
    config, tensors = blocks
    written = write_gguf(tmp_path / "model.gguf", config, tensors, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    same = {}
    for name in tensors:
        values = written[names.get_name(name, (".weight", ".bias"))]
        if "q_proj" in name or "k_proj" in name:  # back to halves
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            order = paired(np.arange(len(values)), heads)
            values = values[np.argsort(order)]
        same[name] = np.ascontiguousarray(values, np.float32)
    cfg, params = convert.load_hf(tmp_path / "model.gguf")
    known, expected = convert.load_hf(releases.save(tmp_path / "release", config, same))
    assert cfg == known and cfg.rms_eps == 1e-5 and bits(params) == bits(expected)
    convert.import_checkpoint(tmp_path / "model.gguf", tmp_path / "ck", chunk_bytes=700)
    assert bits(checkpoint.load(tmp_path / "ck").params) == bits(expected)
    rounded = convert.load_hf(tmp_path, "gguf", dtype="bfloat16")[1]
    assert bits(rounded) == bits({n: np.asarray(v).astype(ml_dtypes.bfloat16) for n, v in flatten(expected).items()})


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "IQ4_XS", "Q8_0", "Q4_1"])
def test_any_rows_of_a_quantised_tensor_are_those_of_the_whole_dequantised(kind, tmp_path):
    rng, type = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[type]
    raw = rng.integers(0, 60, 6 * size, np.uint8)  # half-precision scales of such bytes are finite
    (tmp_path / "raw").write_bytes(b"head" + raw.tobytes())
    whole = gguf.dequantize(raw[None], type)[0]
    stored = Quantised("x", tmp_path / "raw", 4, (6 * numbers,), "F32", kind)
    assert stored.nbytes == len(raw)
    with files.Files() as opened:
        for width in (1, 7, numbers, 2 * numbers + 3):
            places = rng.integers(0, 6 * numbers - width + 1, 5)
            rows = np.empty((5, width), np.uint32)
            stored.read(opened, places, rows)
            assert (rows.view(np.float32) == np.array([whole[p : p + width] for p in places])).all()


BAD = {
    "another family": (dict(architecture="qwen2"), "is a GGUF file of the family 'qwen2'; tele_jax reads llama"),
    "a quantisation": (dict(kind="Q8_1"), "is quantised as Q8_1, which the package gguf does not read"),
    "rotary scaling": (dict(metadata=[("llama.rope.scaling.type", "yarn")]), "llama.rope.scaling.type is 'yarn'"),
    "experts": (dict(metadata=[("llama.expert_count", 8)]), "llama.expert_count is 8, but tele_jax has only 0"),
    "an unknown key": (dict(metadata=[("llama.swing", 3)]), "llama.swing is 3, but tele_jax does not know it"),
    "a part": (dict(metadata=[("split.count", 2)]), "is one of 2 parts; join them"),
    "another width of values": (
        dict(metadata=[("llama.attention.value_length", 4)]),
        "value_length is 4, but heads of",
    ),
    "more rows": (
        dict(metadata=[("llama.vocab_size", 9)]),
        "token_embd.weight has 56 rows, but vocab_size in bad.gguf",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_read_is_one_line(name, blocks, tmp_path, capsys):
    how, message = BAD[name]
    write_gguf(tmp_path / "bad.gguf", *blocks, **how)
    capsys.readouterr()
    assert main(["import", str(tmp_path / "bad.gguf"), str(tmp_path / "ck"), "--format", "gguf"]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "bad.gguf" in said and "\n" not in said
    assert not list(tmp_path.glob("ck*"))


def test_damage_another_file_and_a_missing_tensor_are_said(blocks, tmp_path):
    config, tensors = blocks
    write_gguf(tmp_path / "a.gguf", config, tensors)
    whole = (tmp_path / "a.gguf").read_bytes()
    for cut in (10, 300, len(whole) // 2):
        (tmp_path / "a.gguf").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a.gguf: damaged or cut short"):
            convert.load_hf(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_text("no such thing")
    with pytest.raises(UserError, match=r"b.gguf: not a GGUF file"):
        convert.load_hf(tmp_path / "b.gguf", "gguf")
    with pytest.raises(UserError, match=r"2 GGUF files \(\*.gguf\) there; name one"):
        convert.load_hf(tmp_path, "gguf")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "a.gguf", config, tensors)
    with pytest.raises(UserError, match=r"not what its a.gguf describes: blk.1.ffn_up.weight \[64, 32\]: missing"):
        convert.load_hf(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="is of format gguf, not llama; leave the format out"):
        convert.load_hf(tmp_path / "a.gguf", "llama")


# ---- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "how", [dict(tied=True), dict(tied=False), dict(biases=True)], ids=["tied", "untied", "biases"]
)
def test_an_export_is_read_back_bit_for_bit_and_has_the_rows_of_llama_cpp(kind, how, tmp_path):
    dtype, target = ("bfloat16" if kind == "BF16" else "float32"), np.dtype(TYPES[kind]).name
    config, tensors = releases.llama(dtype=np.dtype(TYPES[kind]), **how)
    releases.save(tmp_path / "release", config, tensors)
    cfg, params = convert.load_hf(tmp_path / "release", dtype=dtype)
    convert.import_checkpoint(tmp_path / "release", tmp_path / "ck", dtype=dtype)
    done = convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="gguf", dtype=target)
    assert done.shards == ["model.gguf"] and [f.name for f in (tmp_path / "out").iterdir()] == ["model.gguf"]
    again, read = convert.load_hf(tmp_path / "out" / "model.gguf", dtype=dtype)
    assert again == cfg and bits(read) == bits(params)
    origin = checkpoint.open_lazy(tmp_path / "ck").provenance
    convert.save_hf(tmp_path / "same", cfg, params, format="gguf", dtype=target, provenance=origin)
    assert (tmp_path / "same" / "model.gguf").read_bytes() == (tmp_path / "out" / "model.gguf").read_bytes()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert found.keys() == {names.get_name(name, (".weight", ".bias")) for name in tensors}
    for name, values in tensors.items():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            values = paired(values, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        tensor = found[names.get_name(name, (".weight", ".bias"))]
        kept = values.astype(TYPES[kind] if values.ndim == 2 else np.float32)
        assert tensor.tensor_type.name == (kind if values.ndim == 2 else "F32")
        assert tensor.data.tobytes() == kept.tobytes(), name


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_an_export_with_the_numbers_of_the_release(tied, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is missing: pip install 'tele_jax[hf]'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'tele_jax[hf]'")
    config, tensors = releases.llama(tied=tied)
    releases.save(tmp_path / "release", config, tensors)
    convert.save_hf(tmp_path / "out", *convert.load_hf(tmp_path / "release"), format="gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype="float32")
    found = read.state_dict()
    assert all(torch.equal(found[name], torch.from_numpy(values)) for name, values in tensors.items())
    assert read.config.rope_parameters["rope_theta"] == 500.0 and read.config.tie_word_embeddings == tied


def test_tokenizers_travel_through_a_file_and_give_the_same_ids(tmp_path):
    text = "Grow 1234 models,  2.5 times\n\tas wide: \u753b\u86c7\u6dfb\u8db3 naïve it's"
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    for name in gguf_tokenizer.CUTS:
        tokens = ["<|endoftext|>", *BYTES, "12", "34", "\u0120a", "it"]
        merges = ["1 2", "3 4", "\u0120 a", "i t"]
        document = gguf_tokenizer._byte_level(merges, tokens, [3] + [1] * (len(tokens) - 1), name)
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    for file in [tmp_path / "tokenizer.model", *tmp_path.glob("*.json")]:
        vocabulary = load_vocabulary(file)
        metadata, notes = gguf_tokenizer.write(vocabulary, vocabulary.vocab_size + 3, vocabulary.eos_id, "{{ x }}")
        assert not notes and len(metadata["tokenizer.ggml.tokens"]) == vocabulary.vocab_size + 3
        documents, notes = gguf_tokenizer.read(metadata)
        assert not notes and documents["tokenizer_config.json"]["chat_template"] == "{{ x }}"
        ((name, again),) = [(n, d) for n, d in documents.items() if n in ("tokenizer.model", "tokenizer.json")]
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / name).write_bytes(again if isinstance(again, bytes) else json.dumps(again).encode())
        assert load_vocabulary(tmp_path / "again" / name).encode(text) == vocabulary.encode(text)


def test_what_a_file_cannot_hold_is_refused_and_a_tokenizer_that_is_not_carried_is_a_note(tmp_path):
    config, tensors = releases.llama()
    releases.save(tmp_path / "release", config, tensors)
    cfg, params = convert.load_hf(tmp_path / "release")
    with pytest.raises(UserError, match=r"llama.cpp runs float32, float16 and bfloat16"):
        convert.save_hf(tmp_path / "x", cfg, params, format="gguf", dtype="float64")
    with pytest.raises(UserError, match=r"format gguf: has no place for score.weight; --format llama has one"):
        convert.tensors(cfg.replace(scalar_head=True), "gguf")
    fields = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1], "tokenizer.ggml.merges": []}
    fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "falcon"}
    assert gguf_tokenizer.read(fields) == (
        {},
        ["no tokenizer: that of the file ('gpt2', cut as 'falcon') is none that tele_jax builds; name one"],
    )
