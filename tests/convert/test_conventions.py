"""An import notes the way in which a release generates, and generation follows it unless told otherwise."""

import argparse
import json
import re

import pytest

from tele_jax import checkpoint, convert
from tele_jax.cli.generate import sampling_options
from tele_jax.cli.main import main
from tele_jax.config import ModelConfig
from tele_jax.convert import configs, release
from tele_jax.convert.exporting import outline
from tele_jax.data.templates import TEMPLATES, document_start
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import DamageError, UserError
from tele_jax.inference.generate import generate
from tests.convert import releases
from tests.inference.test_chat import model, tokenizer_bytes

TELECHAT = {"do_sample": False, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.5}


def read(path, files, **config):
    for name, table in files.items():
        (path / name).write_text(json.dumps(table))
    return release.read_conventions(path, configs.Keys(config, "config.json"))


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({}, {}, ([], False, {})),
        ({}, {"eos_token_id": 2}, ([2], False, {})),
        ({"generation_config.json": {"eos_token_id": [128001, 128009]}}, {"eos_token_id": 2},
         ([128001, 128009], False, {})),
        ({"generation_config.json": TELECHAT | {"eos_token_id": 160133}}, {},
         ([160133], False, {"temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.5})),
        # Where a model samples and the file does not say, transformers draws among the 50 likeliest at 1.0.
        ({"generation_config.json": {"do_sample": True, "top_p": 0.9}}, {},
         ([], True, {"top_p": 0.9, "top_k": 50, "temperature": 1.0})),
        ({"generation_config.json": {"do_sample": True, "top_k": 0, "temperature": 0.6}}, {},
         ([], True, {"temperature": 0.6})),
    ],
)  # fmt: skip
def test_what_ends_a_text_and_how_tokens_are_drawn(files, config, expected, tmp_path):
    found, notes = read(tmp_path, files, **config)
    assert (found["eos_token_ids"], found["do_sample"], found["sampling"]) == expected
    assert notes == []


def template(first):
    special = {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}
    single = [{first: {"id": "<s>" if first == "SpecialToken" else "A", "type_id": 0}}]
    return {"post_processor": {"type": "TemplateProcessing", "single": single, "special_tokens": special}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}}, None),
        ({"tokenizer_config.json": {"add_bos_token": True}}, 1),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, 1),
        ({"tokenizer_config.json": {"tokenizer_class": "TelechatTokenizer"}}, None),
        ({"tokenizer.json": template("SpecialToken")}, 7),
        ({"tokenizer.json": template("Sequence")}, None),
        ({"tokenizer.json": {"post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel"}, template("SpecialToken")["post_processor"]]}}}, 7),
        ({"tokenizer.json": template("SpecialToken"), "tokenizer_config.json": {"add_bos_token": False}}, None),
    ],
)  # fmt: skip
def test_what_stands_before_a_text(files, expected, tmp_path):
    found, _ = read(tmp_path, files, bos_token_id=1)
    assert found["document_start"] == expected


def test_what_is_not_followed_is_said_and_nonsense_is_refused(tmp_path):
    _, notes = read(tmp_path, {"generation_config.json": {"num_beams": 4, "min_p": 0.0, "bad_words_ids": []}})
    assert notes == ["generation_config.json: num_beams is 4, which is not followed"]
    with pytest.raises(UserError, match=r"generation_config.json: top_p=2.0 must be in \(0, 1\]"):
        read(tmp_path, {"generation_config.json": {"top_p": 2.0}})
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is 'x', expected an id or a list"):
        read(tmp_path, {"generation_config.json": {"eos_token_id": "x"}})


@pytest.mark.usefixtures("quick_compilation")
def test_an_imported_model_generates_as_released(tmp_path, capsys):
    """Greedy with the penalty, until any of the eos ids, after the token that its tokenizer puts first."""
    config, tensors = releases.llama(vocab_size=440)
    random = releases.Random(3, tensors["model.norm.weight"].dtype)
    tensors |= {
        "model.embed_tokens.weight": random.matrix(440, releases.D, 1),
        "lm_head.weight": random.matrix(440, releases.D, releases.D),
    }
    src = releases.save(tmp_path / "release", config, tensors)
    (src / "tokenizer.model").write_bytes(tokenizer_bytes())
    (src / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    vocabulary = load_vocabulary(src / "tokenizer.model")
    cfg, params = convert.load_hf(src)
    prompt = [1, *vocabulary.encode("The cat")]
    (drawn,) = generate(cfg, params, [prompt], max_new_tokens=12, repetition_penalty=1.5, stop_ids=[2])
    end = next(i for i in drawn[2:] if i not in drawn[:2])
    stated = TELECHAT | {"bos_token_id": 1, "eos_token_id": [2, end]}
    (src / "generation_config.json").write_text(json.dumps(stated))
    assert main(["import", str(src), str(tmp_path / "ck")]) == 0
    assert "generates as released: the likeliest token, repetition penalty 1.5\n" in capsys.readouterr().out
    figures = tmp_path / "figures.json"
    words = ["generate", tmp_path / "ck", "--prompt", "The cat", "--max-new-tokens", "12", "--json", figures]
    assert main(list(map(str, words))) == 0
    found = json.loads(figures.read_text())
    assert found["sampling"] == {"repetition_penalty": 1.5} and found["document_start"] == 1
    (continuation,) = found["continuations"]
    assert continuation["new_tokens"] == drawn.index(end) and continuation["ended"] == "eos"
    assert continuation["text"] == vocabulary.decode([*vocabulary.encode("x"), *drawn[: drawn.index(end)]])[1:]


def test_flags_replace_what_was_released(tmp_path):
    released, _ = read(tmp_path, {"generation_config.json": TELECHAT})
    sampled, _ = read(tmp_path, {"generation_config.json": TELECHAT | {"do_sample": True}})
    everything = {key: value for key, value in TELECHAT.items() if key != "do_sample"}

    def options(released, **flags):
        given = dict.fromkeys(("temperature", "top_k", "top_p", "repetition_penalty")) | {"sample": False} | flags
        return sampling_options(argparse.Namespace(**given), TEMPLATES["telechat_7b"], released)

    assert options(released) == {"repetition_penalty": 1.5}
    assert options(released, sample=True) == options(sampled) == everything
    assert options(sampled, temperature=0.0) == everything | {"temperature": 0.0}
    assert options(released, top_k=3, repetition_penalty=1.0) == {"repetition_penalty": 1.0, "top_k": 3}
    assert options(None) == {"repetition_penalty": 1.03}  # the template's family, where the release says nothing


def test_the_rule_for_the_first_token_goes_by_the_last_stage_that_saw_documents(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    vocabulary = load_vocabulary(tmp_path / "tokenizer.model")
    imported = {"kind": "import", "generation": {"document_start": 1}}
    older = {"kind": "import"}  # by a version that did not note it
    pretrain, sft, grow = {"kind": "pretrain"}, {"kind": "sft"}, {"kind": "grow"}
    for provenance, expected in (
        ([], None),
        ([older], None),
        ([imported], 1),
        ([imported, grow, sft], 1),
        ([imported, pretrain, grow, sft], vocabulary.eos_id),
        ([pretrain, sft], vocabulary.eos_id),
        ([sft], None),
    ):
        assert document_start(vocabulary, provenance) == expected


CFG = ModelConfig(num_layers=1, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=6, vocab_size=10)
BAD_FIELDS = [
    (("format",), (None, 3, ["llama"])),
    (("config",), (None, "x", [1])),
    (("constants",), (3, {"a": "b"}, [1])),
    (("prefix",), (1, {})),
    (("generation",), (None, 3, [1], "x")),
    (("generation", "eos_token_ids"), (None, 2, ["a"], [True], [1.5])),
    (("generation", "do_sample"), (1, "yes", None)),
    (("generation", "document_start"), ("x", True, [1])),
    (("generation", "sampling"), (5, None, {"beams": 1}, {"temperature": "hot"}, {"top_k": True})),
    (("generation", "unknown"), (1,)),
]


@pytest.mark.parametrize(("path", "values"), BAD_FIELDS, ids=lambda value: ".".join(map(str, value)))
def test_a_damaged_entry_of_an_import_is_named_by_whoever_reads_it(path, values, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    vocabulary = load_vocabulary(tmp_path / "tokenizer.model")
    for value in values:
        generation = {"eos_token_ids": [2], "do_sample": False, "sampling": {"top_k": 3}, "document_start": None}
        entry = {"stage": "a", "kind": "import", "format": "llama", "config": {}, "generation": generation}
        (entry if len(path) == 1 else generation)[path[-1]] = value
        where = re.escape("provenance[1]") + ".*" + path[-1]
        with pytest.raises(DamageError, match=where):
            document_start(vocabulary, [{"kind": "import"}, entry])
        with pytest.raises(DamageError, match=where):
            outline(CFG, "llama", provenance=[{"kind": "import"}, entry])


def test_commands_name_a_damaged_entry_of_an_import(tmp_path, capsys):
    entry = {"kind": "import", "format": "llama", "config": {}, "generation": {"sampling": {"beams": 4}}}
    checkpoint.save(tmp_path / "ck", *model(vocab_size=440), provenance=[entry])
    (tmp_path / "ck/tokenizer.model").write_bytes(tokenizer_bytes())
    for command in (["generate", "--prompt=a"], ["chat", "--message=a"], ["export", "--format=llama", "--list"]):
        assert main([command[0], str(tmp_path / "ck"), *command[1:]]) == 1
        assert "provenance[0].generation.sampling.beams" in capsys.readouterr().err
