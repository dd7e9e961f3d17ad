"""Training and reading vocabularies: published ids, exact round trips, refusals."""

import os
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tele_jax import extras
from tele_jax.data import vocabulary_training
from tele_jax.data.vocabulary import SentencePieceVocabulary, load_vocabulary
from tele_jax.errors import UserError
from tele_jax.extras import need

# From the released tokenizers, not from our code.
PUBLISHED = {
    "tele_flm": {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "0": 4, "9": 13, "_": 24, "<0x00>": 125, "<0xFF>": 380},
    "telechat_12b": {
        "<unk>": 0,
        "<_start>": 1,
        "<_end>": 2,
        "<_pad>": 3,
        "<_user>": 20,
        "<_bot>": 21,
        "<_system>": 22,
        "<0x00>": 123,
        "<0xFF>": 378,
    },
}
# Everything that is valid UTF-8, and often what a tokenizer stumbles over.
ANY_TEXT = st.lists(
    st.text()
    | st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "\0", "\u2581", "\u2585", "\ufeff", "\ufffd", "<_bot>", "</s>"])
    | st.sampled_from(["👍", "0", "_", "天地", "e\u0301", "<0x41>", "<unk>", "    def f(x):\n"])
).map("".join)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_special_pieces_are_at_their_published_ids(preset, texts, tmp_path):
    trained = vocabulary_training.train_vocabulary(texts, preset=preset, vocab_size=700)
    vocabulary = vocabulary_training.write_vocabulary(trained, tmp_path / "t.model", preset=preset)
    assert vocabulary.vocab_size == 700
    assert {piece: vocabulary.id_of(piece) for piece in PUBLISHED[preset]} == PUBLISHED[preset]
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (0, 1, 2, 3)


def test_dialogue_markers_of_tele_flm_take_reserved_ids(vocabulary):
    ids = [vocabulary.user_id, vocabulary.bot_id, vocabulary.end_id, vocabulary.system_id]
    assert ids == [25, 26, 27, 28]


def test_training_is_deterministic(texts, model_file):
    again = vocabulary_training.train_vocabulary(texts, preset="tele_flm", vocab_size=1000)
    assert again.model == model_file.read_bytes()


@given(ANY_TEXT)
@example("  two  spaces  ")
@example("\u2581a\u2581\u2581 b\u2581")
@settings(max_examples=300)
def test_round_trip_is_exact(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert b"".join(vocabulary.piece_bytes[i] for i in ids) == text.encode()


@given(st.lists(ANY_TEXT, max_size=4))
@settings(max_examples=50)
def test_texts_encoded_apart_join_exactly(vocabulary, parts):
    assert vocabulary.decode([i for part in parts for i in vocabulary.encode(part)]) == "".join(parts)


def test_tensorflow_gives_the_same_ids(vocabulary, texts):
    tf = extras.need("tensorflow")
    for text in [*texts, "", "\u2581", "a\u2581\u2581b ", "  <_bot>\n\t天地"]:
        ids = vocabulary.encode(text)
        assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
        if "\u2581" not in text:
            assert vocabulary.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == text


def test_it_counts_as_a_seqio_vocabulary(vocabulary):
    seqio = extras.need("seqio")
    import tele_jax.data.tasks  # noqa: F401

    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)


def test_decode_ends_at_the_end_of_the_sequence(vocabulary):
    ids = vocabulary.encode("before")
    assert vocabulary.decode([*ids, vocabulary.eos_id, *ids]) == "before"


def test_markers_in_text_are_text_even_where_the_file_would_match_them(vocabulary, model_file, tmp_path):
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    model = model_pb2.ModelProto.FromString(model_file.read_bytes())
    model.pieces[26].type = model_pb2.ModelProto.SentencePiece.USER_DEFINED
    (tmp_path / "visible.model").write_bytes(model.SerializeToString())
    for each in (vocabulary, load_vocabulary(tmp_path / "visible.model")):
        assert each.bot_id == 26
        assert 26 not in each.encode("say <_bot> and you are the bot")
        assert each.decode(each.encode("<_bot>")) == "<_bot>"


def test_rare_characters_give_way_in_a_small_vocabulary(texts):
    rare = "".join(chr(0x4E00 + i) for i in range(500))
    small = vocabulary_training.train_vocabulary([*texts, rare], preset="tele_flm", vocab_size=700)
    assert small.character_coverage < 1
    large = vocabulary_training.train_vocabulary([*texts, rare], preset="tele_flm", vocab_size=2000)
    assert large.character_coverage == 1


def test_a_long_text_without_spaces_trains(texts):
    long = "".join(chr(0x4E00 + i % 40 + i % 7) for i in range(200_000))
    assert vocabulary_training.train_vocabulary([long], preset="tele_flm", vocab_size=500).model


def test_an_unknown_character_does_not_cost_the_text_around_it():
    with_it = vocabulary_training.train_vocabulary(["some words here\u2585 " * 99], preset="tele_flm", vocab_size=400)
    without = vocabulary_training.train_vocabulary(["some words here " * 99], preset="tele_flm", vocab_size=400)
    assert with_it.model == without.model


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["text"], {"vocab_size": 380}, "381 special pieces and bytes; give at least 383"),
        (["text"], {"vocab_size": 5000}, "vocab_size=5000: Vocabulary size too high"),
        ([], {"vocab_size": 500}, "no text"),
        ([""], {"vocab_size": 500}, "no text"),
        (["text"], {"vocab_size": 500, "character_coverage": 0.5}, "character coverage 0.5: .* 0.98 to 1"),
        (["text"], {"vocab_size": 500, "preset": "gpt"}, "'gpt' is not one of tele_flm, telechat_12b"),
    ],
)
def test_impossible_requests_are_refused(texts, options, message):
    with pytest.raises(UserError, match=message):
        vocabulary_training.train_vocabulary(texts, **{"preset": "tele_flm", **options})


def test_another_file_is_never_overwritten_unasked(texts, model_file, tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(b"precious")
    trained = vocabulary_training.Trained(model_file.read_bytes(), 1, 1, 1.0)
    with pytest.raises(UserError, match=r"t\.model: is there already and differs.*--force"):
        vocabulary_training.write_vocabulary(trained, path, preset="tele_flm")
    assert path.read_bytes() == b"precious"
    vocabulary_training.write_vocabulary(trained, path, preset="tele_flm", force=True)
    vocabulary_training.write_vocabulary(trained, path, preset="tele_flm")  # the same file again is no conflict
    assert path.read_bytes() == trained.model
    assert os.listdir(tmp_path) == ["t.model"]


def test_a_file_that_is_no_vocabulary_is_named(vocabulary, tmp_path):
    (tmp_path / "t.model").write_bytes(b"\xff" * 40)
    (tmp_path / "empty.model").touch()
    for name in ("t", "empty"):
        with pytest.raises(UserError, match=rf"{name}\.model: not a SentencePiece model"):
            load_vocabulary(tmp_path / f"{name}.model")
    with pytest.raises(UserError, match=r"absent\.model: No such file.*tele tokenizer train"):
        load_vocabulary(tmp_path / "absent.model")
    with pytest.raises(UserError, match="it has no piece '<_nobody>'"):
        vocabulary.id_of("<_nobody>")


def test_a_missing_package_names_the_extra(monkeypatch, model_file):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"sentencepiece.*pip install '?tele_jax\[data\]"):
        SentencePieceVocabulary(model_file)
    for module, extra in (("pycld2", "clean"), ("apache_beam", "clean"), ("seqio", "data")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"{module}.* not installed: pip install tele_jax\[{extra}\]"):
            need(module)


def test_a_dialogue_needs_no_tensorflow(model_file):
    code = (
        "import sys, tele_jax.data, tele_jax.data.feed, tele_jax.corpora\n"
        "from tele_jax.data import dialogue, vocabulary\n"
        f"v = vocabulary.load_vocabulary({str(model_file)!r})\n"
        "print(dialogue.render_prompt([{'role': 'user', 'content': 'Hi'}], v)[0])\n"
        "assert not {'tensorflow', 'seqio'} & set(sys.modules), 'TensorFlow was loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "25\n"), done.stderr
