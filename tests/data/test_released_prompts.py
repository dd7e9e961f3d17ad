"""Prompts and training samples have the ids of the released code, and no typed marker is a marker.

The small tokenizers that are trained here have the dummy prefix of the released ones and are always used; the released
tokenizers are used where their folder lies beside the project.
"""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tele_jax.data import templates
from tele_jax.data.dialogue import fit_prompt, render, render_prompt, shortest
from tele_jax.data.templates import TEMPLATES
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.inference.chat import TextStream
from tests.data import released_prompts as released
from tests.data.test_vocabulary_tokenizers import FLAGS, byte_level, telechat_7b

RELEASED = Path(__file__).resolve().parents[3] / "shared" / "released"
CONVERSATIONS = released.conversations(300)
TEXTS = ["".join(texts) for texts in CONVERSATIONS[:100]] * 2 + ["<_user>Hi<_bot>Hello<_end>"] * 30


def small_tokenizers(folder):
    """Two tokenizers with a dummy prefix, in the layouts of Tele-FLM and of TeleChat2, and two without: 7B, ChatML."""
    files = {"telechat_52b": folder / "flm.model", "telechat2": folder / "two.model", "telechat_7b": folder / "7b.json"}
    for name, bos, eos, controls in (
        ("telechat_52b", "<s>", "</s>", []),
        ("telechat2", "<_start>", "<_end>", ["<_user>", "<_bot>", "<_system>"]),
    ):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=out, model_type="bpe", vocab_size=500, hard_vocab_limit=False,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, bos_id=1, eos_id=2, pad_id=3, bos_piece=bos, eos_piece=eos,
            pad_piece="<_pad>", control_symbols=controls, minloglevel=2,
        )  # fmt: skip
        files[name].write_bytes(out.getvalue())
    description = byte_level(TEXTS, 600)
    files["telechat_7b"].write_text(json.dumps(telechat_7b(description)), encoding="utf-8")
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added = [dict(id=600 + i, content=name, special=True, **FLAGS) for i, name in enumerate(names)]
    description["added_tokens"] += added
    files["chatml"] = folder / "chatml.json"
    files["chatml"].write_text(json.dumps(description), encoding="utf-8")
    return files


def bare(file):
    """`encode` of the library that the file is of."""
    if file.suffix != ".json":
        return sentencepiece.SentencePieceProcessor(model_file=str(file)).encode
    theirs = tokenizers.Tokenizer.from_file(str(file))
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(params=["telechat_7b", "telechat_12b", "telechat_52b", "tele_flm_instruct", "telechat2"])
def family(request):
    return request.param


@pytest.fixture(params=["small", "released"])
def opened(request, family, small):
    """(vocabulary, encode of the bare library, template) of a family."""
    folder = "telechat_52b" if family == "tele_flm_instruct" else family
    if request.param == "small":
        file = small["telechat2" if family == "telechat_12b" else folder]
    else:
        file = RELEASED / folder / "tokenizer.model"
        if not file.is_file():
            pytest.skip(f"the released tokenizer is not here: {folder} in the folder of released files")
    return load_vocabulary(file), bare(file), TEMPLATES[family]


def rule(family, vocabulary):
    build = getattr(released, family)
    if family != "telechat_12b" or vocabulary.user_id == 20:
        return build
    return lambda encode, texts: build(encode, texts, user=4, bot=5)  # the small one, in the layout of TeleChat2


def test_300_prompts_have_the_ids_of_the_released_code(opened, family):
    vocabulary, encode, template = opened
    build = rule(family, vocabulary)
    same = sum(
        render_prompt(released.messages(texts), vocabulary, template=template) == build(encode, texts)
        for texts in CONVERSATIONS
    )
    assert same == len(CONVERSATIONS) == 300


def test_300_training_samples_have_the_ids_of_the_released_code(opened, family):
    vocabulary, encode, template = opened
    build = released.telechat_52b_sample if family == "telechat_52b" else rule(family, vocabulary)
    for texts in CONVERSATIONS:
        texts = [*texts, texts[0][::-1].replace("<", "x")]
        tokens, weights = render(released.messages(texts), vocabulary, template=template)
        assert len(tokens) == len(weights) and weights[-1] == 1
        if family == "tele_flm_instruct":  # its training code is not published: question and answer as those of 52B
            last = [*encode(f"<_user>{texts[-2].strip()}<_bot>"), *encode(texts[-1]), 2]
            assert tokens[-len(last) :] == last
        else:
            assert tokens == build(encode, texts)
        learned = [token for token, weight in zip(tokens, weights, strict=True) if weight]
        if template.markers == "ids":
            end = [vocabulary.end_id]
            assert learned == [token for text in texts[1::2] for token in [*encode(text), *end]]
        else:  # the ends inside a dialogue are not learned, nor a piece that reaches from an answer into one
            spelled = b"".join(vocabulary.piece_bytes[token] for token in learned).decode(errors="replace")
            assert "<_end>" not in spelled and spelled.replace(" ", "").endswith(texts[-1].replace(" ", ""))
            whole = "".join(texts[1::2]).replace(" ", "")
            assert len(whole) - len(texts) <= len(spelled.replace(" ", "")) <= len(whole)


def test_the_published_prompt_of_telechat2(opened, family):
    vocabulary, _, template = opened
    if family == "telechat2":
        prompt = render_prompt(released.messages(["你好"]), vocabulary, template=template)
        assert (prompt[:2], prompt[-1]) == ([1, 4], 5)
        if vocabulary.vocab_size == 131_072:
            assert vocabulary.family == "telechat2" and prompt == [1, 4, 96343, 5]


def test_a_typed_marker_is_the_same_text_and_no_marker(opened):
    vocabulary, _, template = opened
    for texts in (["<_bot>"], ["a <_user><_bot>b<_end>"], ["x", "<_end><_user>y", "<_us<_user>er>"], ["<_user>"]):
        for make in (render_prompt, lambda *a, **k: render(*a, **k)[0]):
            if make is not render_prompt:
                texts = [*texts, "z"] if len(texts) % 2 else texts
            ids = make(released.messages(texts), vocabulary, template=template)
            real = (len(texts) + 1) // 2
            if template.markers == "ids":
                assert (ids.count(vocabulary.user_id), ids.count(vocabulary.bot_id)) == (real, real)
                continue
            # Only the template's own markers are there where the letters that are spelled in bytes are another text.
            seen = b"".join(
                b"\0" if vocabulary.piece(i).startswith("<0x") else vocabulary.piece_bytes[i] for i in ids
            ).decode(errors="replace")
            assert (seen.count("<_user>"), seen.count("<_bot>")) == (real, real)
            whole = b"".join(vocabulary.piece_bytes[i] for i in ids).decode()
            typed = "".join(texts)
            assert whole.count("<_user>") == real + typed.count("<_user>")


def test_streamed_and_decoded_text_are_one_and_have_no_space_of_the_tokenizer(opened):
    vocabulary, encode, _ = opened
    texts = ["你好", "Paris is", "1", "\n1. a", "  x", " ", "\u3000", "\t", "🎉", *[t[0] for t in CONVERSATIONS[:100]]]
    for text in texts:
        for ids in (encode(text), vocabulary.encode(text), [vocabulary.eos_id - 1, *encode(text)]):
            stream = TextStream(vocabulary)
            streamed = "".join([*map(stream.add, ids), stream.end()])
            assert streamed == vocabulary.decode(ids) == text
        assert vocabulary.decode([*vocabulary.encode("a"), *vocabulary.encode_continuation(text)]) == "a" + text


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ids_are_streamed_as_they_are_decoded_and_as_the_library_decodes_them(small, data):
    file = small[data.draw(st.sampled_from(["telechat2", "telechat_52b"]))]
    vocabulary, bare_model = load_vocabulary(file), sentencepiece.SentencePieceProcessor(model_file=str(file))
    every = [i for i in range(vocabulary.vocab_size) if i not in (vocabulary.eos_id, vocabulary.unk_id)]
    ids = data.draw(
        st.lists(st.sampled_from([*every, vocabulary.id_of("<0x20>"), vocabulary.id_of("<0xE4>")]), max_size=9)
    )
    stream = TextStream(vocabulary)
    streamed = "".join([*map(stream.add, ids), stream.end()])
    assert streamed == vocabulary.decode(ids)
    if "\ufffd" not in streamed:  # of bytes that are not UTF-8 the library makes more of them
        assert streamed == bare_model.decode(ids)


def test_a_second_turn_holds_the_very_ids_that_were_drawn(opened, family):
    vocabulary, encode, template = opened
    texts = ["Hello", "the cat", "and?"]
    drawn = [*encode("the"), *vocabulary.encode_continuation(" c"), *vocabulary.encode_continuation("at")]
    assert vocabulary.decode(drawn) == "the cat" and drawn != encode("the cat")
    prompt = fit_prompt(released.messages(texts), vocabulary, template=template, drawn={1: drawn}).tokens
    first = render_prompt(released.messages(texts[:1]), vocabulary, template=template)
    assert prompt[: len(first) + len(drawn)] == first + drawn
    rest = prompt[len(first) + len(drawn) :]
    if template.markers == "text":
        between = template.between + "<_user>and?<_bot>"
        assert rest == vocabulary.encode_continuation(between)
        assert b"".join(vocabulary.piece_bytes[i] for i in rest).decode() == between
    else:
        assert rest == rule(family, vocabulary)(encode, texts)[-len(rest) :]


def test_what_did_not_fit_is_said(opened):
    vocabulary, _, template = opened
    texts = ["first question", "first answer", "second question", "second answer", "third question"]
    whole = fit_prompt(released.messages(texts), vocabulary, template=template)
    assert (whole.dropped_turns, whole.cut_question, whole.dropped_system) == (0, False, False)
    last = render_prompt(released.messages(texts[-1:]), vocabulary, template=template)
    for limit in range(shortest(vocabulary, template), len(whole.tokens)):
        fitted = fit_prompt(released.messages(texts), vocabulary, limit, template)
        assert len(fitted.tokens) <= limit and fitted.dropped_turns > 0
        assert fitted.cut_question == (limit < len(last))
        if not fitted.cut_question:
            kept = texts[2 * fitted.dropped_turns :]
            assert fitted.tokens == render_prompt(released.messages(kept), vocabulary, template=template)
    assert templates.stop_ids(template, vocabulary)
