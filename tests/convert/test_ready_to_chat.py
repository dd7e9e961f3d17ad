"""A Llama export talks in transformers as it does here: the ids of a conversation, and when an answer ends."""

import json

import pytest

from tele_jax import checkpoint, convert
from tele_jax.cli.main import main
from tele_jax.convert.beside import make
from tele_jax.data.dialogue import render, render_prompt
from tele_jax.data.templates import TEMPLATES, stop_ids
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.inference.generate import generate
from tests.data import released_prompts as released
from tests.data.test_released_prompts import RELEASED, bare, small_tokenizers
from tests.inference.test_chat import model, tokenizer_bytes

CONVERSATIONS = released.conversations(40, seed=1)
PRETRAIN, SFT = {"stage": "p", "kind": "pretrain"}, {"stage": "s", "kind": "sft"}


def ids_of(tokenizer, messages, **options):
    found = tokenizer.apply_chat_template(messages, **options)
    return found if isinstance(found, list) else found["input_ids"]


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="torch is missing: pip install 'tele_jax[hf]'")
    return pytest.importorskip("transformers", reason="transformers is missing: pip install 'tele_jax[hf]'")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A checkpoint that was trained and fine-tuned here, with its tokenizer."""
    step = tmp_path_factory.mktemp("sft") / "10"
    checkpoint.save(step, *model(vocab_size=440), step=10, provenance=[PRETRAIN, SFT])
    (step / "tokenizer.model").write_bytes(tokenizer_bytes())
    return step


@pytest.mark.usefixtures("quick_compilation")
def test_transformers_gives_the_ids_and_the_answer_of_chat(transformers, step, tmp_path):
    import torch

    out = tmp_path / "out"
    assert main(["export", str(step), str(out), "--format", "llama"]) == 0
    vocabulary = load_vocabulary(step / "tokenizer.model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for texts in CONVERSATIONS:
        messages = released.messages(texts)
        assert ids_of(tokenizer, messages, add_generation_prompt=True) == render_prompt(messages, vocabulary)
        messages = released.messages([*texts, texts[0]])
        assert ids_of(tokenizer, messages) == render(messages, vocabulary)[0]
    system = [{"role": "system", "content": "Be brief."}, *released.messages(["The cat?"])]
    assert ids_of(tokenizer, system) == render_prompt(system, vocabulary)
    with pytest.raises(Exception, match="the system message has to come first"):
        ids_of(tokenizer, system[::-1])
    # A text begins with the separator of training, as in `tele generate`.
    assert tokenizer("The cat")["input_ids"] == [vocabulary.eos_id, *vocabulary.encode("The cat")]
    assert tokenizer.decode(vocabulary.encode(" x  画蛇\n1")) == " x  画蛇\n1"

    llama = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (tokenizer.eos_token_id, llama.config.bos_token_id) == (vocabulary.end_id, vocabulary.bos_id)
    assert set(llama.generation_config.eos_token_id) == {vocabulary.end_id, vocabulary.user_id, vocabulary.bot_id}
    prompt = render_prompt(system, vocabulary)
    ends = stop_ids(TEMPLATES["telechat_12b"], vocabulary)
    (expected,) = generate(*model(vocab_size=440), [prompt], max_new_tokens=8, stop_ids=ends, repetition_penalty=1.01)
    torch.set_num_threads(1)
    drawn = llama.generate(torch.tensor([prompt]), max_new_tokens=8)[0, len(prompt) :].tolist()
    assert [i for i in drawn if i not in ends] == expected


FAMILIES = ["telechat_7b", "telechat2", "telechat_52b", "tele_flm_instruct", "chatml", "released"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_ids_of_the_released_code_in_transformers(transformers, family, small, tmp_path):
    """With small tokenizers that have a dummy prefix or are byte-level, and with one that was released."""
    file = RELEASED / "telechat_52b" / "tokenizer.model"
    if family == "released":
        if not file.is_file():
            pytest.skip("the released tokenizer is not here: telechat_52b in the folder of released files")
        family = "telechat_52b"
    else:
        file = small["telechat_52b" if family == "tele_flm_instruct" else family]
    documents, _, notes = make(load_vocabulary(file), [SFT], 4096, family)
    assert notes == []
    for name, document in documents.items():
        (tmp_path / name).write_text(json.dumps(document), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encode = bare(file)
    if family == "chatml":
        system = [{"role": "system", "content": "Be brief."}, *released.messages(["The cat?"])]
        found = ids_of(tokenizer, system, add_generation_prompt=True)
        assert found == released.chatml(encode, ["The cat?"], "Be brief.")
    same = sum(
        ids_of(tokenizer, released.messages(texts), add_generation_prompt=True)
        == getattr(released, family)(encode, texts)
        for texts in CONVERSATIONS
    )
    assert same == len(CONVERSATIONS)


def test_a_model_of_plain_text_gets_no_chat_template_unless_one_is_named(tmp_path, capsys):
    step = tmp_path / "10"
    checkpoint.save(step, *model(vocab_size=440), step=10, provenance=[PRETRAIN])
    (step / "tokenizer.model").write_bytes(tokenizer_bytes())
    done = convert.export_checkpoint(step, tmp_path / "plain", format="llama")
    assert done.notes == ["no chat template: the model was last trained on plain text; --template NAME writes one"]
    config = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config and config["eos_token"] == "<_end>"
    convert.export_checkpoint(step, tmp_path / "named", format="llama", template="telechat_12b")
    assert "<_user>" in json.loads((tmp_path / "named" / "tokenizer_config.json").read_text())["chat_template"]
    assert main(["export", str(step), str(tmp_path / "x"), "--format", "tele_flm", "--template", "telechat"]) == 2
    assert "only an export as llama or gguf gets a chat template" in capsys.readouterr().err
    # Read again, the export says itself what stands before a text.
    convert.import_checkpoint(tmp_path / "plain", tmp_path / "again")
    (entry,) = checkpoint.open_lazy(tmp_path / "again").provenance
    assert entry["generation"]["document_start"] == load_vocabulary(step / "tokenizer.model").eos_id


def test_the_files_of_a_llama_release_come_back_as_they_were(tmp_path):
    from tests.convert import releases

    src = releases.save(tmp_path / "release", *releases.llama(vocab_size=releases.V))
    theirs = {"tokenizer_config.json": '{"chat_template": "x"}', "generation_config.json": '{"eos_token_id": [2, 5]}'}
    for name, text in theirs.items():
        (src / name).write_text(text)
    convert.import_checkpoint(src, tmp_path / "ck")
    convert.export_checkpoint(tmp_path / "ck", tmp_path / "out", format="llama")
    assert {name: (tmp_path / "out" / name).read_text() for name in theirs} == theirs


def test_without_a_tokenizer_the_export_says_so(tmp_path):
    step = tmp_path / "10"
    checkpoint.save(step, *model(vocab_size=440), step=10, provenance=[SFT])
    done = convert.export_checkpoint(step, tmp_path / "out", format="llama")
    assert done.notes == ["no tokenizer beside the checkpoint: the export has none, and no chat template"]
