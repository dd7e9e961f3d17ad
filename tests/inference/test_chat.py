"""A conversation: what the model is asked, what of its tokens becomes text and when, and where the tokenizer is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.data import dialogue
from tele_jax.data.templates import TEMPLATES
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.data.vocabulary_training import train_vocabulary
from tele_jax.inference import chat
from tele_jax.inference.chat import Chat, TextStream, find_tokenizer
from tele_jax.inference.generate import generate
from tests import reference

TEXTS = [
    "The cat sat on the mat. ",
    "def f(x):\n    return x + 1\n",
    "画蛇添足是什么意思？画蛇添足比喻做了多余的事。\n",
] * 20
SIZES = dict(num_layers=2, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=460, max_seq_len=64)


@functools.cache
def tokenizer_bytes(preset="telechat_12b"):
    return train_vocabulary(TEXTS, preset=preset, vocab_size=440, character_coverage=1.0).model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_bytes())
    return path


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return load_vocabulary(tokenizer)


@pytest.fixture(scope="module")
def tele_flm(tmp_path_factory):
    """A vocabulary with </s>, as the templates of text markers need."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_bytes("tele_flm"))
    return load_vocabulary(path)


@functools.cache
def model(**overrides):
    cfg = tele.ModelConfig(**SIZES | dict(dtype="float32") | overrides)
    params = reference.random_params(cfg, np.random.default_rng(1), 1.0)
    return cfg, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def scripted(monkeypatch, *replies):
    """Puts the tokens of `replies` in the place of a model's; returns the list of prompts that it will be given."""
    prompts, left = [], list(replies)

    def generate(cfg, params, rows, *, stop_ids, on_token, **options):
        prompts.append(rows[0])
        output = []
        for token in left.pop(0):
            if token in stop_ids:
                break
            output.append(token)
            on_token(0, token)
        return [output]

    monkeypatch.setattr(chat, "generate", generate)
    return prompts


def test_a_real_model_answers_after_the_rendered_history(vocabulary):
    cfg, params = model()
    talk = Chat(cfg, params, vocabulary, system="Be brief.", max_new_tokens=6)
    heard, drawn = [], {}
    for question in ("The cat?", "画蛇"):
        asked = [*talk.messages, {"role": "user", "content": question}]
        prompt = dialogue.fit_prompt(asked, vocabulary, 58, drawn=drawn).tokens
        stop_ids = [vocabulary.end_id, vocabulary.user_id, vocabulary.bot_id]
        (tokens,) = generate(cfg, params, [prompt], max_new_tokens=6, stop_ids=stop_ids)
        heard.clear()
        answer = talk.reply(question, on_text=heard.append)
        assert talk.last.prompt.tokens == prompt
        assert talk.last.tokens == tokens
        assert (
            answer
            == "".join(heard)
            == b"".join(vocabulary.piece_bytes[t] for t in tokens if t < 440).decode(errors="replace")
        )
        assert talk.messages == [*asked, {"role": "assistant", "content": answer}]
        assert (talk.last.text, talk.last.ended) == (answer, "length" if len(tokens) == 6 else "eos")
        drawn[len(asked)] = tokens


def test_replies_are_drawn_apart_and_again_the_same(vocabulary):
    cfg, params = model()

    def talk(seed):
        conversation = Chat(cfg, params, vocabulary, max_new_tokens=8, seed=seed, temperature=1.0)
        answers = []
        for _ in range(2):
            conversation.reset()
            answers.append(conversation.reply("The cat?"))
        return answers

    assert talk(3) == talk(3)
    assert len({*talk(3), *talk(5)}) == 4


@pytest.mark.parametrize("end", ["<_end>", "<_user>", "<_bot>"])
def test_an_answer_stops_at_a_marker(vocabulary, monkeypatch, end):
    cat = vocabulary.encode("The cat")
    scripted(monkeypatch, [*cat, vocabulary.id_of(end), *cat])
    assert Chat(*model(), vocabulary).reply("Who?") == "The cat"


def test_an_empty_answer_leaves_no_trace(vocabulary, monkeypatch):
    prompts = scripted(monkeypatch, [vocabulary.end_id], vocabulary.encode("Yes"))
    talk = Chat(*model(), vocabulary, system="S")
    assert talk.reply("A?") == ""
    assert talk.messages == [{"role": "system", "content": "S"}]
    assert talk.reply("B?") == "Yes"
    assert prompts[1] == [
        *[vocabulary.system_id, *vocabulary.encode("S")],
        *[vocabulary.user_id, *vocabulary.encode("B?"), vocabulary.bot_id],
    ]


def test_an_interrupted_answer_leaves_no_trace(vocabulary, monkeypatch):
    scripted(monkeypatch, vocabulary.encode("The cat"))
    talk = Chat(*model(), vocabulary)

    def listener(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.reply("Who?", on_text=listener)
    assert talk.messages == []


def test_a_long_history_loses_its_oldest_turns_and_then_the_left_of_the_question(vocabulary, monkeypatch):
    answers = [vocabulary.encode(f"{i} cat") for i in range(6)]
    prompts = scripted(monkeypatch, *answers)
    talk = Chat(*model(), vocabulary, system="S", max_new_tokens=34)  # 30 tokens for the prompt
    for i in range(5):
        talk.reply(f"{i}?")
    assert [len(prompt) <= 30 for prompt in prompts] == [True] * 5
    system, turn = [vocabulary.system_id, *vocabulary.encode("S")], 3 + len(answers[0]) + len(vocabulary.encode("4?"))
    whole = (30 - len(system) - len(vocabulary.encode("4?")) - 2) // turn
    assert 0 < whole < 4
    expected = list(system)
    for i in range(4 - whole, 4):
        question = [vocabulary.user_id, *vocabulary.encode(f"{i}?"), vocabulary.bot_id]
        expected += [*question, *answers[i], vocabulary.end_id]
    assert prompts[4] == [*expected, vocabulary.user_id, *vocabulary.encode("4?"), vocabulary.bot_id]
    assert len(talk.messages) == 11  # nothing is lost from what was said
    long = "0123456789" * 4
    talk.reply(long)
    kept = vocabulary.encode(long)[-(30 - len(system) - 2) :]
    assert prompts[5] == [*system, vocabulary.user_id, *kept, vocabulary.bot_id]


def test_in_a_template_of_text_markers_a_reply_ends_with_the_end_of_sequence(tele_flm, monkeypatch):
    cat = tele_flm.encode("The cat")
    template = TEMPLATES["telechat_52b"]
    prompts = scripted(monkeypatch, [*cat, tele_flm.user_id, tele_flm.eos_id, *cat], [*cat, tele_flm.eos_id])
    talk = Chat(*model(), tele_flm, template=template, max_new_tokens=6)
    assert [talk.reply("A?"), talk.reply("<_bot>B?")] == ["The cat", "The cat"]
    drawn = {1: [*cat, tele_flm.user_id]}  # the very ids, also of what has no text
    assert prompts[1] == dialogue.fit_prompt(talk.messages[:-1], tele_flm, 58, template, drawn).tokens


def test_a_system_message_that_has_no_place_forgets_nothing(tele_flm, monkeypatch):
    scripted(monkeypatch, tele_flm.encode("Yes"))
    talk = Chat(*model(), tele_flm, template=TEMPLATES["tele_flm_instruct"], max_new_tokens=6)
    talk.reply("A?")
    with pytest.raises(tele.UserError, match="tele_flm_instruct has no place for a system message"):
        talk.reset("S")
    assert len(talk.messages) == 2
    with pytest.raises(tele.UserError, match="no place for a system message"):
        Chat(*model(), tele_flm, template=TEMPLATES["tele_flm_instruct"], max_new_tokens=6, system="S")


def test_reset_forgets_and_sets_the_system_message(vocabulary, monkeypatch):
    scripted(monkeypatch, vocabulary.encode("Yes"))
    talk = Chat(*model(), vocabulary)
    talk.reply("A?")
    talk.reset("S")
    assert talk.messages == [{"role": "system", "content": "S"}]
    talk.reset()
    assert talk.messages == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1), "temperature=-1"),
        (dict(seed=2**32), "seed=4294967296"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(max_new_tokens=62), "max_new_tokens=62 leaves 2 of the model's max_seq_len=64"),
        (dict(max_new_tokens=100), "leaves 0 of"),
    ],
    ids=str,
)
def test_options_out_of_range(vocabulary, options, message):
    with pytest.raises(tele.UserError, match=message):
        Chat(*model(), vocabulary, **options)


def test_a_vocabulary_larger_than_the_models(vocabulary):
    with pytest.raises(tele.UserError, match=r"440 ids, but the model's vocab_size is 400; .*--tokenizer"):
        Chat(*model(vocab_size=400), vocabulary)


def test_a_question_that_is_no_text(vocabulary):
    talk = Chat(*model(), vocabulary)
    with pytest.raises(tele.UserError, match=r"messages\[0\].content: character 1 is half a surrogate pair"):
        talk.reply("a\ud800")
    with pytest.raises(tele.UserError, match="is half a surrogate pair"):
        talk.reset("\ud800")
    assert talk.messages == []


def test_an_empty_question(vocabulary):
    with pytest.raises(tele.UserError, match="the question is empty"):
        Chat(*model(), vocabulary).reply("")


def test_a_character_of_several_tokens_comes_out_whole(vocabulary):
    stream = TextStream(vocabulary)
    tokens = vocabulary.encode("a龘🎉b")  # neither is a piece: bytes
    assert [len(vocabulary.piece_bytes[token]) for token in tokens] == [1] * 9
    assert [stream.add(token) for token in tokens] == ["a", "", "", "龘", "", "", "", "🎉", "b"]
    assert stream.end() == ""


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("画蛇添足 龘🎉é\ufffdcat"))
def test_streamed_text_is_never_broken(text):
    vocabulary = _vocabulary()
    stream = TextStream(vocabulary)
    so_far = ""
    for token in vocabulary.encode(text):
        so_far += stream.add(token)
        assert text.startswith(so_far)
    assert so_far == text
    assert stream.end() == ""


@given(st.lists(st.integers(0, 500) | st.integers(123, 378), max_size=30))
def test_streamed_text_of_any_tokens_is_the_text_of_their_bytes(tokens):
    vocabulary = _vocabulary()
    stream = TextStream(vocabulary)
    streamed = "".join([*map(stream.add, tokens), stream.end()])
    spelled = b"".join(vocabulary.piece_bytes[token] for token in tokens if token < vocabulary.vocab_size)
    assert streamed == spelled.decode("utf-8", errors="replace")


@functools.cache
def _vocabulary():
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(tokenizer_bytes())
        file.flush()
        return load_vocabulary(file.name)


def work_directory(path, cfg=None, params=None):
    """W/sft/checkpoints/10 with a tokenizer in W, as `tele train` leaves it."""
    if cfg is None:
        cfg, params = model()
    checkpoint.save(path / "sft" / "checkpoints" / "10", cfg, params, step=10)
    (path / "config.json").write_text('{"run": ["sft"]}')
    (path / "tokenizer.model").write_bytes(tokenizer_bytes())
    return path


def test_the_tokenizer_is_found_from_every_directory_of_a_run(tmp_path):
    work = work_directory(tmp_path / "W")
    for part in ("", "sft", "sft/checkpoints", "sft/checkpoints/10"):
        assert find_tokenizer(work / part) == str(work / "tokenizer.model")
    nearer = work / "sft" / "checkpoints" / "10" / "tokenizer.model"
    nearer.write_bytes(b"")
    assert find_tokenizer(work) == str(nearer)
    assert find_tokenizer(work, "other.model") == "other.model"


def test_a_json_tokenizer_is_found_and_a_model_beside_it_goes_first(tmp_path):
    work = work_directory(tmp_path / "W")
    (work / "sft" / "tokenizer.json").write_text("{}")
    assert find_tokenizer(work) == str(work / "sft" / "tokenizer.json")
    (work / "sft" / "tokenizer.model").write_bytes(b"")
    assert find_tokenizer(work) == str(work / "sft" / "tokenizer.model")


def test_the_tokenizer_is_not_looked_for_above_the_work_directory(tmp_path):
    work = work_directory(tmp_path / "W")
    (work / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(tele.UserError, match=r"no tokenizer.model or tokenizer.json in or above it, up to .*W; name"):
        find_tokenizer(work)
    with pytest.raises(tele.UserError, match="nowhere: no such directory"):
        find_tokenizer(tmp_path / "nowhere")


def test_why_a_reply_ended_and_what_was_left_out(vocabulary, monkeypatch):
    cat = vocabulary.encode("The cat")
    ended = [*cat, vocabulary.end_id]
    scripted(monkeypatch, ended, [cat[0]] * 34, [vocabulary.end_id], ended)
    talk = Chat(*model(), vocabulary, system="S", max_new_tokens=34)
    assert talk.last is None
    talk.reply("A?")
    assert (talk.last.ended, talk.last.remembered, talk.last.prompt.dropped_turns) == ("eos", True, 0)
    talk.reply("B?")
    assert talk.last.ended == "length"
    talk.reply("C?")
    assert (talk.last.ended, talk.last.text, talk.last.remembered) == ("eos", "", False)
    assert talk.last.prompt.dropped_turns == 2  # the second answer alone is longer than 30 tokens
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["A?", "B?"]
    talk.reply("0123456789" * 4)
    assert talk.last.prompt.cut_question and not talk.last.prompt.dropped_system


def test_a_reply_that_fills_the_context_says_so(vocabulary, monkeypatch):
    cat = vocabulary.encode("The cat")
    scripted(monkeypatch, [cat[0]] * 34)
    talk = Chat(*model(), vocabulary, max_new_tokens=34)
    talk.reply("0123456789" * 4)
    assert len(talk.last.prompt.tokens) == 30 and talk.last.ended == "context"


def test_an_answer_that_a_caller_changed_is_encoded_again(vocabulary, monkeypatch):
    letters = [vocabulary.id_of(piece) for piece in "cat"]
    assert letters != vocabulary.encode("cat") and vocabulary.decode(letters) == "cat"
    prompts = scripted(monkeypatch, letters, letters, letters)
    talk = Chat(*model(), vocabulary)
    talk.reply("A?")
    talk.reply("B?")
    assert "".join(map(chr, prompts[1])).count("".join(map(chr, letters))) == 1
    talk.messages[1]["content"] = "No"
    talk.reply("C?")
    assert prompts[2] == [
        *[vocabulary.user_id, *vocabulary.encode("A?"), vocabulary.bot_id, *vocabulary.encode("No"), vocabulary.end_id],
        *[vocabulary.user_id, *vocabulary.encode("B?"), vocabulary.bot_id, *letters, vocabulary.end_id],
        *[vocabulary.user_id, *vocabulary.encode("C?"), vocabulary.bot_id],
    ]
