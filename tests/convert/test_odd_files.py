"""Whatever lies at the path of a file of a release, the import says in one line what it is.

Layouts that transformers loads are loaded.
"""

import json
import os

import numpy as np
import pytest

from tele_jax import convert
from tele_jax.convert import configs, release
from tele_jax.convert.release import open_release
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tests.convert import releases

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n"


def as_directory(file):
    file.mkdir()


def as_pipe(file):
    os.mkfifo(file)


def as_loop(file):
    file.symlink_to(file.name)


def as_dangling(file):
    file.symlink_to("nowhere")


def holding(content):
    def write(file):
        file.write_bytes(content)

    return write


PLACES = {
    "directory": (as_directory, "is a directory, not a file"),
    "pipe": (as_pipe, "is a named pipe, not a file"),
    "loop": (as_loop, "Too many levels of symbolic links"),
    "dangling": (as_dangling, "No such file or directory|missing"),
    "pointer": (holding(POINTER), "is a Git-LFS pointer, .* git lfs pull"),
}
TEXTS = {
    "latin-1": (holding(b'{"a": "caf\xe9"}'), "not UTF-8 at byte 10"),
    "deep": (holding(b'{"a":' + b"[" * 100_000), "not JSON that can be read: too deep"),
    "list": (holding(b"[1]"), "not a table"),
    "empty": (holding(b""), "not JSON"),
    "digits": (holding(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
}
JSON_FILES = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
              "generation_config.json", "added_tokens.json")  # fmt: skip
CASES = [(file, kind) for file in (*JSON_FILES, "model.safetensors", "tokenizer.model") for kind in PLACES]
CASES += [(file, kind) for file in JSON_FILES for kind in TEXTS]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=str)
def test_what_is_no_such_file_is_named(name, kind, tmp_path):
    src = releases.save(tmp_path / "release", *releases.llama())
    (src / name).unlink(missing_ok=True)
    if "index" in name:
        (src / "model.safetensors").unlink()
    make, message = (PLACES | TEXTS)[kind]
    make(src / name)
    with pytest.raises(UserError, match=rf"release/{name}: .*({message})"):
        open_release(src)


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "dangling", "pointer"])
def test_a_tokenizer_that_is_no_file_is_named(kind, tmp_path):
    make, message = PLACES[kind]
    make(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=rf"tokenizer .*tokenizer.model: .*({message})"):
        load_vocabulary(tmp_path / "tokenizer.model")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path):
    src = releases.save(tmp_path / "release", *releases.llama())
    for name in ("config.json", "model.safetensors"):
        (src / name).chmod(0)
        with pytest.raises(UserError, match=rf"{name}: Permission denied"):
            open_release(src)
        (src / name).chmod(0o644)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    config, tensors = releases.llama()
    src = releases.save(tmp_path / "release", config, tensors)
    (src / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    assert convert.load_hf(src)[0].num_layers == releases.L


@pytest.mark.parametrize("stray", ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"])
def test_files_beside_model_safetensors_are_left_alone_and_named(stray, tmp_path):
    config, tensors = releases.llama()
    src = releases.save(tmp_path / "release", config, tensors)
    other = {name: values + 1 for name, values in tensors.items()} if "adapter" not in stray else {"a": np.zeros(2)}
    releases.write_safetensors(src / stray, other)
    release = open_release(src)
    assert release.notes == [f"left alone: {stray}, which model.safetensors or its index does not need"]
    _, params = convert.load_hf(src)
    assert (np.asarray(params["embed"]["table"]) == tensors["model.embed_tokens.weight"]).all()


def test_model_safetensors_goes_before_an_index_as_in_transformers(tmp_path):
    config, tensors = releases.llama()
    src = releases.save(tmp_path / "release", config, {name: values + 1 for name, values in tensors.items()}, shards=2)
    releases.write_safetensors(src / "model.safetensors", tensors)
    _, params = convert.load_hf(src)
    assert (np.asarray(params["embed"]["table"]) == tensors["model.embed_tokens.weight"]).all()


def with_buffers(src, buffers):
    """Appends tensors of any dtype to the one file of a release: {name: (dtype of the format, array)}."""
    tensors = releases.read_safetensors(src / "model.safetensors")
    entries = [(name, releases.NAMES[values.dtype], values) for name, values in tensors.items()]
    header, end = {}, 0
    for name, dtype, values in [*entries, *((name, *buffer) for name, buffer in buffers.items())]:
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(values).tobytes() for values in [e[2] for e in entries])
    body += b"".join(np.ascontiguousarray(values).tobytes() for _, values in buffers.values())
    (src / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_buffers_that_carry_nothing_are_passed_over(tmp_path):
    """What `save_pretrained` of the released 52B code and old copies of Llama write."""
    mask = ("BOOL", np.tril(np.ones((1, 1, 8, 8), bool)))
    src = releases.save(tmp_path / "release", *releases.telechat_52b())
    with_buffers(src, {
        **{f"transformer.h.{i}.attn.bias": mask for i in range(releases.L)},
        "transformer.wpe.inv_freq": ("F32", np.ones(2, np.float32)),
    })  # fmt: skip
    assert convert.load_hf(src)[0].num_layers == releases.L
    src = releases.save(tmp_path / "llama", *releases.llama())
    with_buffers(src, {
        "model.embed_tokens.position_ids": ("I64", np.arange(4)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", np.ones(2, np.float32)),
    })  # fmt: skip
    assert convert.load_hf(src)[0].num_layers == releases.L


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("transformer.h.0.attn.bias", "F32", r"transformer.h.0.attn.bias \[4\]: unknown"),
        ("transformer.h.0.attn.quantized", "I64", "quantized is of dtype I64; known are F64"),
        ("position_ids", "F32", r"position_ids \[4\]: unknown"),
        ("bias", "BOOL", "bias is of dtype BOOL; known are"),
    ],
)
def test_other_buffers_are_refused(name, dtype, message, tmp_path):
    src = releases.save(tmp_path / "release", *releases.telechat_52b())
    with_buffers(src, {name: (dtype, np.zeros(4, {"F32": "f4", "I64": "i8", "BOOL": bool}[dtype]))})
    with pytest.raises(UserError, match=message):
        open_release(src)


VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    1.5,
    1e400,
    float("nan"),
    "x",
    "24",
    "",
    [],
    [1],
    {},
    {"a": 1},
    10**40,
    -(2**70),
]


@pytest.mark.parametrize("format", releases.MAKERS)
def test_every_key_with_every_kind_of_value_is_read_or_refused(format):
    config, _ = releases.MAKERS[format]()
    read = 0
    for key in [*config, "rope_scaling", "rope_parameters", "layer_types", "head_dim", "unheard_of"]:
        for value in VALUES:
            keys = configs.Keys(config | {key: value}, "config.json")
            try:
                configs.read(keys, configs.detect(keys))
                read += 1
            except UserError as error:
                assert str(error).startswith("config.json: ")
    assert read > 50


def test_every_generation_key_with_every_kind_of_value_is_read_or_refused(tmp_path):
    stated = {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
    stated |= {"eos_token_id": 2, "bos_token_id": 1, "add_bos_token": True, "post_processor": {}, "num_beams": 1}
    empty = configs.Keys({}, "config.json")
    for key in stated:
        for value in [*VALUES, {"processors": 3}, {"processors": [{"type": "TemplateProcessing", "single": []}]}]:
            for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
                (tmp_path / name).write_text(json.dumps(stated | {key: value}))
            try:
                release.read_conventions(tmp_path, empty)
            except UserError as error:
                assert ".json: " in str(error)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_json_tokenizer_that_is_none_is_named(kind, tmp_path):
    TEXTS[kind][0](tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer .*tokenizer.json: not a "):
        load_vocabulary(tmp_path / "tokenizer.json")
