"""JSON files of the `tokenizers` library: the library's own segmentation, exact round trips, TeleChat-7B's ids."""

import json

import pytest
import tokenizers
from hypothesis import example, given, settings

from tele_jax import extras
from tele_jax.data import cache
from tele_jax.data.domains import open_vocabulary
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import DamageError, UserError
from tele_jax.settings import DataConfig, SourceConfig
from tests.data import caches
from tests.data.test_vocabulary import ANY_TEXT

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)


def byte_level(texts, vocab_size=700):
    """A tokenizer as the library trains it, as a dict."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def telechat_7b(description, names=("<_user>", "<_bot>", "<_start>", "<_end>")):
    """The same with pieces that nothing leads to up to id 160,129, and the published special ids after them."""
    vocab = dict(description["model"]["vocab"])
    vocab |= {f"unused{i}": i for i in range(len(vocab), 160_130)}
    added = [dict(id=160_130 + i, content=name, special=True, **FLAGS) for i, name in enumerate(names)]
    model = description["model"] | {"vocab": vocab}
    return description | {"model": model, "added_tokens": [*description["added_tokens"], *added]}


@pytest.fixture(scope="module")
def description(texts):
    return byte_level(texts)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    def write(description):
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        path.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def vocabulary(description, write):
    return load_vocabulary(write(description))


@pytest.fixture(scope="module")
def seven(description, write):
    return load_vocabulary(write(telechat_7b(description)))


@given(ANY_TEXT)
@example("\u2581a \u2581 </s><pad>")
@settings(max_examples=300)
def test_round_trip_is_exact(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert b"".join(vocabulary.piece_bytes[i] for i in ids) == text.encode()


def test_the_ids_are_those_of_the_library(vocabulary, description, texts):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(description))
    for text in [*texts[:3], "天地玄黄  \n\tx = 1", ""]:
        assert vocabulary.encode(text) == theirs.encode(text).ids
        assert vocabulary.decode(theirs.encode(text).ids) == theirs.decode(theirs.encode(text).ids) == text


def test_the_special_ids_of_telechat_7b(seven):
    # From the released tokenizer, not from our code.
    assert (seven.user_id, seven.bot_id, seven.bos_id, seven.end_id) == (160130, 160131, 160132, 160133)
    assert (seven.pad_id, seven.eos_id, seven.vocab_size, seven.family) == (3, 160133, 160134, "telechat_7b")
    with pytest.raises(UserError, match="it has no piece '<_system>'"):
        _ = seven.system_id


def test_markers_that_the_file_calls_otherwise_have_their_published_numbers(description, write):
    names = ("<|extra_0|>", "<|extra_1|>", "<_start>", "<_end>")
    other = load_vocabulary(write(telechat_7b(description, names)))
    assert (other.user_id, other.bot_id) == (160130, 160131)
    assert other.piece_bytes[160130] == b"" and 160130 not in other.encode("<|extra_0|>")


def test_another_vocabulary_is_not_taken_for_telechats(vocabulary):
    assert vocabulary.family is None
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (0, 1, 2, 3)
    with pytest.raises(UserError, match="it has no piece '<_user>'"):
        _ = vocabulary.user_id


@pytest.mark.parametrize("special", [True, False])
def test_markers_in_text_are_text(description, write, special):
    """Whatever the file says about them, and where the model could take a whole word as it is, too."""
    changed = telechat_7b(description)
    for token in changed["added_tokens"]:
        token["special"] = special or not token["content"].startswith("<_")
    changed["model"] = changed["model"] | {"ignore_merges": True}
    changed["pre_tokenizer"] = changed["pre_tokenizer"] | {"use_regex": False}
    each = load_vocabulary(write(changed))
    for text in ("<_bot>", "<pad>", "say <_bot> and <_end></s> you <unk>", "<_user>", "</s>"):
        ids = each.encode(text)
        assert not {0, 1, 2, 3, 160130, 160131, 160132, 160133} & set(ids)
        assert each.decode(ids) == text


def test_decoding_ends_at_the_end_and_leaves_out_what_is_no_text(seven):
    ids = seven.encode("before")
    assert seven.decode([seven.user_id, *ids, seven.eos_id, *ids]) == "before"
    assert seven.decode([*ids, 10**6]) == "before"
    assert seven.decode([seven.find(letter) for letter in "äº"]) == "\ufffd"  # two bytes of the three of a character


def test_nothing_is_added_cut_or_padded_whatever_the_file_asks_for(description, write):
    changed = description | {
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 900}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
            "pad_token": "<pad>",
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    }  # fmt: skip
    text = "def f(x): return x + 1"
    assert load_vocabulary(write(changed)).encode(text) == load_vocabulary(write(description)).encode(text)


def test_tensorflow_gives_the_same_ids(vocabulary):
    tf = extras.need("tensorflow")
    texts = ["def f(x):\n    return 1", "", "天地 \u2581</s>"]
    data = tf.data.Dataset.from_tensor_slices(texts).map(vocabulary.encode_tf)
    for text, ids in zip(texts, data.as_numpy_iterator(), strict=True):
        assert ids.tolist() == vocabulary.encode(text)
        assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == text
    letters = vocabulary.encode("\0\1\2")  # no pieces of more than one
    rows = tf.constant([letters, [letters[1], vocabulary.eos_id, letters[0]]], tf.int32)
    assert vocabulary.decode_tf(rows).numpy().tolist() == [b"\0\1\2", b"\1"]


def test_it_counts_as_a_seqio_vocabulary_and_not_as_a_sentencepiece_one(vocabulary):
    seqio = extras.need("seqio")
    import tele_jax.data.tasks  # noqa: F401

    assert isinstance(vocabulary, seqio.Vocabulary)
    assert not isinstance(vocabulary, seqio.SentencePieceVocabulary)


def changed(description, **fields):
    return description | fields


DROPS_VOWELS = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Removed", "invert": False}


def before(part):
    """A pre-tokenizer that does something before the bytes."""
    whole = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return {"type": "Sequence", "pretokenizers": [part, whole]}


def test_an_added_token_takes_no_white_space_away(description, write):
    token = dict(id=700, content="<kitten>", special=False, **FLAGS | dict(lstrip=True, rstrip=True))
    vocabulary = load_vocabulary(write(changed(description, added_tokens=[*description["added_tokens"], token])))
    ids = vocabulary.encode("a  <kitten>\n b")
    assert 700 in ids and vocabulary.decode(ids) == "a  <kitten>\n b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: changed(d, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "only BPE is read"),
        (lambda d: changed(d, pre_tokenizer={"type": "Whitespace"}), "not a byte-level BPE; if a SentencePiece model"),
        (lambda d: changed(d, normalizer={"type": "NFC"}), "its normalizer changes text"),
        (lambda d: changed(d, pre_tokenizer=before({"type": "Whitespace"})), "its pre-tokenizer drops text"),
        (lambda d: changed(d, pre_tokenizer=before(DROPS_VOWELS)), "its pre-tokenizer drops text"),
        (
            lambda d: changed(d, model=d["model"] | {"end_of_word_suffix": "</w>"}),
            "its end_of_word_suffix is in no text",
        ),
        (
            lambda d: changed(d, model=d["model"] | {"continuing_subword_prefix": "##"}),
            "its continuing_subword_prefix is",
        ),
        (lambda d: changed(d, model=None), "not a JSON file of the tokenizers library"),
        (lambda d: {}, "not a JSON file of the tokenizers library"),
        (
            lambda d: changed(
                d, added_tokens=[*d["added_tokens"], dict(id=9000, content="<x>", special=True, **FLAGS)]
            ),
            "gives the added token '<x>' the id 9000, but read in order it gets 700",
        ),
        (
            lambda d: changed(d, model=d["model"] | {"vocab": {"a": 0, "b": 1}, "merges": []}, added_tokens=[]),
            "no piece for 207 bytes, the first 0x09",
        ),
    ],
)
def test_what_would_lose_text_is_refused(description, write, change, message):
    path = write(change(description))
    with pytest.raises(UserError, match=f"tokenizer {path}: .*{message}"):
        load_vocabulary(path)


def test_json_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a JSON file of the tokenizers library"):
        load_vocabulary(tmp_path / "tokenizer.json")


def test_a_cache_carries_it_under_the_name_of_its_kind(description, write, tmp_path):
    path = caches.write_lines(tmp_path / "a.jsonl", [{"text": "def f(x): return x"}])
    caches.make(caches.config(write(description), {"a": (path, "jsonl", 1)}), tmp_path / "rows")
    opened = cache.RowCache(tmp_path / "rows")
    assert opened.tokenizer() == tmp_path / "rows/tokenizer.json" and not (tmp_path / "rows/tokenizer.model").exists()
    # As a cache was written before: what a file is, its content says.
    (tmp_path / "rows/tokenizer.json").rename(tmp_path / "rows/tokenizer.model")
    assert load_vocabulary(opened.tokenizer()) == load_vocabulary(write(description))
    (tmp_path / "rows/tokenizer.model").write_text("{}")
    with pytest.raises(DamageError, match=r"tokenizer\.model: damaged, not the tokenizer that made this cache"):
        opened.tokenizer()
    (tmp_path / "rows/tokenizer.model").unlink()
    with pytest.raises(DamageError, match="rows: its copy of the tokenizer is missing"):
        opened.tokenizer()


def test_a_tokenizer_may_lack_rare_bytes_and_refuses_the_texts_that_have_them(description, write):
    """SmolLM2's has no piece for six control characters, nor for what begins characters of the planes 4 to 11."""
    lacking = {name: i for name, i in description["model"]["vocab"].items() if name not in ("\u0104", "\u00f1")}
    path = write(changed(description, model=description["model"] | {"vocab": lacking}))
    vocabulary = load_vocabulary(path)
    assert not vocabulary.spells_bytes
    assert (
        vocabulary.decode(vocabulary.encode("as before: \u753b\u86c7 \U0001f40d"))
        == "as before: \u753b\u86c7 \U0001f40d"
    )
    with pytest.raises(UserError, match="no piece for the byte 0x04, at 3 of the text"):
        vocabulary.encode("a\u00a0\u0004b")
    with pytest.raises(UserError, match="no piece for the byte 0xF1, at 0 of the text"):
        vocabulary.encode_batch(["\U00040000"])

    # Dialogues are trained on with it; pretraining wants a tokenizer of any text.
    markers = [
        dict(id=698 + i, content=f"<|im_{end}|>", special=True, **FLAGS) for i, end in enumerate(("start", "end"))
    ]
    added = [*description["added_tokens"], *markers]
    path = write(changed(description, model=description["model"] | {"vocab": lacking}, added_tokens=added))
    data = DataConfig(tokenizer=str(path), sources={"a": SourceConfig(files=("a.jsonl",), format="dialogues")})
    assert open_vocabulary(data, "sft") == load_vocabulary(path)
    with pytest.raises(UserError, match="it needs pieces for the 256 bytes and for the end of a sequence"):
        open_vocabulary(data, "pretrain")
