"""Exactly the intended tokens count: random dialogues in every format, option and template against a reference of text.

The reference knows no tokens: it lists the bytes of the answers and the names of the markers after them, with weights.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tele_jax.data import dialogue, packing
from tele_jax.data.dialogue_formats import READERS, from_record
from tele_jax.data.documents import Document
from tele_jax.data.domains import OpenData
from tele_jax.data.encode import encode
from tele_jax.data.templates import TEMPLATES
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.settings import DataConfig, DialogueConfig, SourceConfig
from tests.data import caches
from tests.data.test_released_prompts import small_tokenizers

TEXT = st.text("ab é中\n<_>1", min_size=1, max_size=8).filter(str.strip)
WEIGHT = st.sampled_from([None, None, 1, 1.0, 0, 0.42, 2.5])
TURNS = st.lists(st.tuples(TEXT, TEXT, WEIGHT), min_size=1, max_size=5)
SYSTEM = st.none() | TEXT
MARKS = {"telechat": False, "alpaca": False, "messages": True, "sharegpt": True, "telechat2": True}  # may have weights
HOW = st.builds(
    DialogueConfig,
    learned=st.sampled_from(["all", "last"]),
    next_user=st.booleans(),
    too_long=st.sampled_from(["split", "cut", "drop"]),
    system=SYSTEM,
)


@pytest.fixture(scope="module")
def tokenizers(model_file, tmp_path_factory):
    """The file of a small tokenizer for every template."""
    small = small_tokenizers(tmp_path_factory.mktemp("tokenizers"))
    made = {name: small[name] for name in ("telechat_7b", "telechat2", "telechat_52b", "chatml")}
    return made | {
        "telechat": model_file,
        "telechat_12b": small["telechat2"],
        "tele_flm_instruct": made["telechat_52b"],
    }


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def opened(request, tokenizers):
    file = tokenizers[request.param]
    return load_vocabulary(file).with_template(request.param), file, TEMPLATES[request.param]


def record_of(format, system, turns):
    """A record as somebody would write it, without code of ours."""
    marks = [{} if weight is None else {"weight": weight} for *_, weight in turns]
    own = {} if system is None else {"system": system}
    if format == "telechat":
        said = "".join(f"<_user>{question}<_bot>{answer}" for question, answer, _ in turns)
        return {"input": said.removesuffix(f"<_bot>{turns[-1][1]}"), "output": turns[-1][1]}
    if format == "alpaca":
        history = [[question, answer] for question, answer, _ in turns[:-1]]
        return {"instruction": turns[-1][0], "input": "", "output": turns[-1][1], "history": history, **own}
    role, content, user, bot = {
        "messages": ("role", "content", "user", "assistant"),
        "sharegpt": ("from", "value", "human", "gpt"),
        "telechat2": ("role", "content", "user", "bot"),
    }[format]
    said = [
        message
        for (question, answer, _), mark in zip(turns, marks)
        for message in ({role: user, content: question}, {role: bot, content: answer, **mark})
    ]
    if format == "messages" and system is not None:
        said, own = [{"role": "system", "content": system}, *said], {}
    return {{"messages": "messages", "sharegpt": "conversations", "telechat2": "dialog"}[format]: said, **own}


def weights_of(turns, how):
    given = [1 if weight is None else weight for *_, weight in turns]
    return [0] * (len(given) - 1) + given[-1:] if how.learned == "last" else given


def learned_text(turns, weights, vocabulary, template, next_user):
    """What is learned of a sample of these turns: (byte or name of a marker, weight) in order."""
    space = b" " if vocabulary.adds_dummy_prefix else b""
    learned = []
    for number, ((_, answer, _), weight) in enumerate(zip(turns, weights, strict=True), start=1):
        last = number == len(turns)
        ends = [template.end] if last or template.between.startswith(template.end) else []
        piece, _, text = template.user.rpartition(">")
        ends += [f"{piece}>", *text.encode()] if next_user and not last else []
        learned += [(symbol, weight) for symbol in [*(space + answer.encode()), *ends] if weight]
    return learned


def spelled(ids, weights, vocabulary):
    """What is learned of ids."""
    return [
        (symbol, weight)
        for i, weight in zip(ids, weights, strict=True)
        if weight
        for symbol in (vocabulary.piece_bytes[i] or [vocabulary.piece(i)])
    ]


def drawn(data, template, vocabulary):
    """(format, record, system message, turns, options) of a random dialogue that the template can write."""
    format = data.draw(st.sampled_from(sorted(READERS)))
    turns = data.draw(TURNS)
    if template.markers == "text":  # a piece that reaches from an answer into the text after it is not learned
        answers = [answer for _, answer, _ in turns]
        assume(
            all(
                vocabulary.encode(a + template.between)[: len(vocabulary.encode(a))] == vocabulary.encode(a)
                for a in answers
            )
        )
    if not MARKS[format]:
        turns = [(question, answer, None) for question, answer, _ in turns]
    how = data.draw(HOW)
    system = data.draw(SYSTEM) if format != "telechat" else None
    if template.system is None:
        system, how = None, DialogueConfig(learned=how.learned, next_user=how.next_user, too_long=how.too_long)
    if template.markers == "text":
        how = DialogueConfig(learned=how.learned, too_long=how.too_long, system=how.system)
    return format, record_of(format, system, turns), system or how.system, turns, how


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
def test_exactly_the_answers_count_in_every_format_option_and_template(opened, data):
    vocabulary, _, template = opened
    format, record, system, turns, how = drawn(data, template, vocabulary)
    weights = weights_of(turns, how)
    if not any(weights):
        with pytest.raises(UserError, match="none of the answers is to be learned"):
            from_record(record, format, how)
        return
    messages = from_record(record, format, how)
    first = [{"role": "system", "content": system}] if system else []
    assert [message["content"] for message in messages] == [
        *(message["content"] for message in first),
        *(text for question, answer, _ in turns for text in (question, answer)),
    ]
    (sample,) = dialogue.samples(messages, vocabulary, 10_000, next_user=how.next_user)
    assert not sample.is_cut and (sample.first, sample.end) == (0, len(turns))
    assert spelled(sample.tokens, sample.weights, vocabulary) == learned_text(
        turns, weights, vocabulary, template, how.next_user
    )


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
def test_a_long_dialogue_is_split_cut_or_dropped_and_every_answer_counts_once(opened, data):
    vocabulary, _, template = opened
    format, record, system, turns, how = drawn(data, template, vocabulary)
    weights = weights_of(turns, how)
    if not any(weights):
        return
    messages = from_record(record, format, how)
    whole = len(dialogue.render(messages, vocabulary)[0])
    limit = data.draw(st.integers(dialogue.shortest(vocabulary), whole + 2))

    def part(first, end):
        own = [{"role": "system", "content": system}] if system else []
        said = [{"role": "user", "content": text} for pair in turns[first:end] for text in pair[:2]]
        return [*own, *(m | {"role": ("user", "assistant")[i % 2]} for i, m in enumerate(said))]

    def length(first, end):
        return len(dialogue.render(part(first, end), vocabulary)[0])

    found = dialogue.samples(messages, vocabulary, limit, too_long=how.too_long, next_user=how.next_user)
    assert all(len(sample.tokens) == len(sample.weights) <= limit and any(sample.weights) for sample in found)
    if how.too_long == "drop":
        assert bool(found) == (whole <= limit)
    if how.too_long != "split" or whole <= limit:
        assert all((sample.first, sample.end) == (0, len(turns)) for sample in found)
    else:
        covered = [turn for sample in found for turn in range(sample.first, sample.end)]
        missing = set(range(len(turns))) - set(covered)
        assert covered == sorted(set(covered)), "no turn comes twice"
        # A sample is left out where it learns nothing: it holds no answer that counts, or lost it to the limit.
        assert all(not weights[turn] or length(turn, turn + 1) > limit for turn in missing)
        for sample in found:  # as many turns as fit
            assert sample.end == len(turns) or length(sample.first, sample.end + 1) > limit
    for sample in found:
        expected = learned_text(
            turns[sample.first : sample.end], weights[sample.first : sample.end], vocabulary, template, how.next_user
        )
        learned = spelled(sample.tokens, sample.weights, vocabulary)
        if not sample.is_cut:
            assert learned == expected and length(sample.first, sample.end) <= limit
        elif how.too_long == "split" or sample.end - sample.first == 1:
            assert sample.end - sample.first == 1 and length(sample.first, sample.end) > limit
            assert learned == expected[: len(learned)], "an answer loses nothing but its right end"
        else:  # whole turns of the end, or the last one cut
            tails = [
                learned_text(turns[k:], weights[k:], vocabulary, template, how.next_user) for k in range(len(turns))
            ]
            assert learned in tails or learned == tails[-1][: len(learned)]


@pytest.mark.parametrize("name", ["telechat", "telechat_52b"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_same_tokens_count_when_dialogues_are_read_from_files_and_packed(tokenizers, name, data):
    vocabulary = load_vocabulary(tokenizers[name]).with_template(name)
    how = data.draw(HOW.filter(lambda how: name == "telechat" or not how.next_user))
    format = data.draw(st.sampled_from(sorted(READERS)))
    dialogues = data.draw(st.lists(st.tuples(SYSTEM, TURNS), min_size=1, max_size=6))
    limit = data.draw(st.integers(dialogue.shortest(vocabulary) + 8, 90))
    records = []
    for system, turns in dialogues:
        turns = turns if MARKS[format] else [(question, answer, None) for question, answer, _ in turns]
        records.append(record_of(format, None if format == "telechat" else system, turns))
    expected = []
    for record in records:
        try:
            messages = from_record(record, format, how)
        except UserError:
            continue
        options = {"too_long": how.too_long, "next_user": how.next_user}
        expected += [(s.tokens, s.weights) for s in dialogue.samples(messages, vocabulary, limit + 1, **options)]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "a.json"
        is_array = data.draw(st.booleans())
        file.write_text(json.dumps(records) if is_array else "".join(json.dumps(r) + "\n" for r in records), "utf-8")
        source = SourceConfig(files=(str(file),), format=data.draw(st.sampled_from([format, "dialogues"])))
        config = DataConfig(tokenizer=str(tokenizers[name]), template=name, sources={"a": source}, dialogues=how)
        opened = OpenData(config, kind="sft", seq_len=limit, on_rejects=lambda domain: None)
        if not expected:
            with pytest.raises(UserError, match=r"not one d(ocument can be used|ialogue is left)"):
                _ = opened.train
            return
        documents = opened.train["a"]
        examples = [documents.example(i) for i in range(len(documents))]
        in_order = [example for example, _ in documents.in_order(lambda: 1 << 40)]
        live = caches.open_feed(config, kind="sft", seq_len=limit, batch_size=2, seed=1, on_rejects=lambda domain: None)
        batches = [next(live) for _ in range(len(examples) + 1)]
    for found in (examples, in_order):
        assert [seen(e[0], e[1], e[2]) for e in found] == [seen(t[:-1], t[1:], w[1:]) for t, w in expected]
    wanted = sorted(seen(*example) for example in examples)
    open_rows, full = packing.fit_rows(packing.empty_rows(3, limit, 3), examples, pad_id=3)
    rows = packing.to_batch(np.concatenate([full, open_rows]))
    assert sorted(map(of_segment, caches.segments(rows))) == wanted
    packed = [of_segment(segment) for batch in batches for segment in caches.segments(batch)]
    assert set(packed) <= set(wanted)
    assert all(batch["loss_weights"].dtype == np.float32 and batch["tokens"].dtype == np.int32 for batch in batches)


def seen(inputs, targets, weights):
    return tuple(map(int, inputs)), tuple(map(int, targets)), tuple(map(float, np.float32(weights)))


def of_segment(segment):
    assert (segment["positions"] == np.arange(len(segment["positions"]))).all()
    return seen(segment["tokens"], segment["targets"], segment["loss_weights"])


@given(data=st.data())
@settings(max_examples=20)
def test_in_pretraining_all_tokens_count_but_for_answers_with_a_weight_of_their_own(tokenizers, data):
    vocabulary, turns = load_vocabulary(tokenizers["telechat"]), data.draw(TURNS)
    if not any(weights_of(turns, DialogueConfig())):
        return
    messages = from_record(record_of("messages", None, turns))
    columns = encode([Document(messages)], vocabulary, "pretrain", 8).columns
    weights = []
    for question, answer, weight in turns:
        weights += [1] * (len(vocabulary.encode(question)) + 2)
        weights += [1 if weight is None else weight] * (len(vocabulary.encode(answer)) + 1)
    assert columns[2].tolist() == [*weights, 1]
    packed = packing.cut_rows(packing.empty_rows(1, 8, 3), columns, np.array([columns.shape[1]]), separator=2, pad_id=3)
    line = np.concatenate([*packed[1], *packed[0]], axis=1)
    assert line[2, : len(weights) + 1].tolist() == [*weights, 1]
