"""Pairs, rankings and prompts: how records are read, which tokens a row has, and what becomes of bad records."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from tele_jax.data import dialogue, preferences, record_rows, records, sources
from tele_jax.data.record_rows import RecordBatches
from tele_jax.data.templates import TEMPLATES
from tele_jax.errors import UserError
from tele_jax.settings import DEFAULT_DIALOGUES, DataConfig, DialogueConfig, OptimizerConfig, SourceConfig, TrainStage
from tele_jax.stages.dpo import DpoStage
from tests.data.caches import write_lines

QUESTION = {"role": "user", "content": "Which is larger, 3 or 5?"}


def answer(text):
    return {"role": "assistant", "content": text}


def pair(number, chosen="five", rejected="three is", **fields):
    return {"prompt": f"question {number}", "chosen": chosen, "rejected": rejected, **fields}


def stage(
    model_file, domains, *, format="pairs", held_out=(), batch_size=4, seq_len=64, dialogues=DEFAULT_DIALOGUES, **how
):
    """A training stage that reads {domain: path}."""
    made = {
        name: SourceConfig(files=(str(path),), format=format, validation_files=tuple(map(str, held_out)))
        for name, path in domains.items()
    }
    data = DataConfig(tokenizer=str(model_file), sources=made, dialogues=dialogues)
    how = {"steps": 1, **how}
    return TrainStage(
        kind="dpo",
        data=data,
        optimizer=OptimizerConfig(learning_rate=1.0),
        batch_size=batch_size,
        seq_len=seq_len,
        **how,
    )


def answer_of(batch, pair, side):
    """The arrays of one answer with its prompt, cut out of its row by its segment id."""
    own = batch["segment_ids"] == 1 + 2 * pair + side
    return {name: array[own] for name, array in batch.items() if array.shape == own.shape}


def opened(made, kind="pairs", **how):
    return RecordBatches(made, kind, sources.Indexes(), **how)


def batches_of(made, count, kind="pairs", **how):
    feed = opened(made, kind, **how).feed()
    try:
        return list(itertools.islice(feed, count))
    finally:
        feed.close()


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": QUESTION["content"], "chosen": "5", "rejected": "3"},
        {"prompt": [QUESTION], "chosen": [answer("5")], "rejected": answer("3")},
        {"chosen": [QUESTION, answer("5")], "rejected": [QUESTION, answer("3")]},
        {"prompt": QUESTION["content"], "chosen": [QUESTION, answer("5")], "rejected": "3", "id": 7},
    ],
)
def test_the_forms_of_a_pair_are_one_pair(record):
    found = preferences.read_record(record, "pairs", DEFAULT_DIALOGUES)
    assert list(found.prompt) == [QUESTION]
    assert (found.answers, found.pairs, found.margin) == (("5", "3"), [(0, 1)], 0.0)


def test_a_common_beginning_of_two_texts_is_no_prompt():
    """Dialogues are compared message by message: "The answer is 5" and "The answer is 53" share letters, not a prompt.

    Planted fault 7: with the longest common prefix of the two texts as the prompt, neither of these is refused.
    """
    other = {**QUESTION, "content": QUESTION["content"] + " Say it."}
    with pytest.raises(UserError, match=r"^chosen and rejected have no common prompt: they differ in messages\[0\]"):
        preferences.read_record(
            {"chosen": [QUESTION, answer("5")], "rejected": [other, answer("53")]}, "pairs", DEFAULT_DIALOGUES
        )
    longer = [QUESTION, answer("3"), QUESTION, answer("5")]
    with pytest.raises(UserError, match=r"no common prompt: they differ in messages\[1\]"):
        preferences.read_record({"chosen": longer, "rejected": [QUESTION, answer("3")]}, "pairs", DEFAULT_DIALOGUES)


def test_a_row_is_the_prompt_and_the_answer_with_its_end(model_file, vocabulary, tmp_path):
    """Tokens from the pieces of the template; answers alone are learned, and the end is found by the length."""
    records = [
        pair(0, "yes", "yes no", margin=0.5),
        {"prompt": [{"role": "system", "content": "Be brief."}, QUESTION], "chosen": "5", "rejected": "It is 3."},
    ]
    path = write_lines(tmp_path / "pairs.jsonl", records)
    own = opened(stage(model_file, {"a": path}))
    found = own.store.read(["a", "a"], [0, 1])
    v, encode = vocabulary, vocabulary.encode
    prompts = [
        [v.user_id, *encode("question 0"), v.bot_id],
        [v.system_id, *encode("Be brief."), v.user_id, *encode(QUESTION["content"]), v.bot_id],
    ]
    answers = [["yes", "yes no"], ["5", "It is 3."]]
    assert found["margin"].tolist() == [0.5, 0] and found["pair_weights"].tolist() == [1, 1]
    for row, side in itertools.product((0, 1), (0, 1)):
        want = [*prompts[row], *encode(answers[row][side]), v.end_id]
        n, first = len(want), len(prompts[row])
        of = answer_of(found, row, side)
        assert of["tokens"].tolist() == want
        learned = np.flatnonzero(of["loss_weights"])
        assert learned.tolist() == list(range(first - 1, n - 1))
        assert of["targets"][learned].tolist() == want[first:]
        assert of["positions"].tolist() == list(range(n))
        assert found["answer_lengths"][row, side] == n - first
        end = np.unravel_index(found["ends"][row, side], found["tokens"].shape)
        assert found["segment_ids"][end] == 1 + 2 * row + side and found["positions"][end] == n - 1
    empty = found["segment_ids"] == 0
    assert not found["loss_weights"][empty].any() and not found["positions"][empty].any()
    alone = own.store.read(["a"], [1])
    assert len(alone["tokens"]) == 1, "both answers in a row"
    for side in (0, 1):
        assert (answer_of(alone, 0, side)["tokens"] == answer_of(found, 1, side)["tokens"]).all()
    assert (own.sample(3, 5) == found["tokens"][:, :5]).all(), "a growth is verified on these"
    made = stage(model_file, {"a": path})
    apart = opened(DpoStage(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)}, rows=8)).store
    shown = [(what, row["tokens"].tolist(), note) for what, row, note in apart.shown("a", 1)]
    assert shown == [(what, row["tokens"].tolist(), note) for what, row, note in own.store.shown("a", 1)]
    assert [len(tokens) for _, tokens, _ in shown] == [
        len(prompts[1]) + n for n in (len(encode("5")), len(encode("It is 3.")))
    ]


def by_common_prefix(prompt, answers, vocabulary):
    """Fault 7: the prompt is what the ids of the two whole dialogues have in common."""
    (own, ids) = dialogue.render_answers(prompt, answers, vocabulary)
    whole = [own + each for each in ids]
    n = next(i for i, both in enumerate(zip(*whole, strict=False)) if len({*both}) > 1)
    return whole[0][:n], [each[n:] for each in whole]


@pytest.mark.parametrize("render", [dialogue.render_answers, by_common_prefix])
def test_answers_that_begin_alike_are_learned_from_their_first_token(
    model_file, vocabulary, tmp_path, monkeypatch, render
):
    path = write_lines(tmp_path / "pairs.jsonl", [pair(0, "five it is", "five it was")])
    monkeypatch.setattr(records, "dialogue", SimpleNamespace(render_answers=render))
    found = opened(stage(model_file, {"a": path})).store.read(["a"], [0])
    learned = [answer_of(found, 0, side)["loss_weights"].sum() for side in (0, 1)]
    wanted = [len(vocabulary.encode(text)) + 1 for text in ("five it is", "five it was")]
    assert (learned == wanted) is (render is dialogue.render_answers)


@pytest.mark.parametrize("template", ["telechat", "telechat_52b"])
def test_prompts_are_those_that_the_model_answers(vocabulary, template):
    """A prompt has the ids of chat, and in a dialogue of one turn, prompt and answer those of fine-tuning."""
    form = dataclasses.replace(TEMPLATES[template], end="<_end>", name=template)
    dialogue_ = [QUESTION, answer("Five."), {"role": "user", "content": "And 4?"}]
    prompt, (first, second) = dialogue.render_answers(dialogue_, ["Four.", "a <_end> b"], vocabulary, form)
    assert prompt == dialogue.render_prompt(dialogue_, vocabulary, template=form)
    assert first[-1] == second[-1] == vocabulary.end_id and vocabulary.end_id not in second[:-1]
    prompt, (reply,) = dialogue.render_answers([QUESTION], ["Five."], vocabulary, form)
    assert prompt + reply == dialogue.render([QUESTION, answer("Five.")], vocabulary, template=form)[0]


def test_a_ranking_is_all_its_pairs_and_weighs_one(model_file, vocabulary, tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"prompt": "q", "answers": ["a", "b", "c", "d"]}, pair(1)])
    store = opened(stage(model_file, {"a": path})).store
    assert store.rows == {"a": 7} and store.num_answers == 6
    found = store.read(["a"] * 7, list(range(7)))
    ends = {side: [answer_of(found, pair, side)["tokens"][-2] for pair in range(6)] for side in (0, 1)}
    ids = {text: vocabulary.encode(text)[-1] for text in "abcd"}
    want = [(ids[better], ids[worse]) for better, worse in itertools.combinations("abcd", 2)]
    assert list(zip(ends[0], ends[1])) == want
    np.testing.assert_allclose(found["pair_weights"], [1 / 6] * 6 + [1])
    assert found["sequences"][:, 0].tolist() == [0, 0, 0, 1, 1, 2, 4]
    again = store.read_answers(found["sequences"])
    assert (again["tokens"] == found["tokens"]).all()


def test_every_pair_once_an_epoch_and_resuming_to_the_row(model_file, tmp_path):
    one = write_lines(tmp_path / "one.jsonl", [pair(i) for i in range(6)])
    two = write_lines(tmp_path / "two.jsonl", [pair(i + 6) for i in range(6)])
    made = stage(model_file, {"one": one, "two": two}, batch_size=4, seed=3)
    own = opened(made)
    feed = own.feed()
    first = [next(feed) for _ in range(3)]
    assert sorted(np.concatenate([batch["sequences"][:, 0] for batch in first]).tolist()) == list(range(0, 24, 2))
    state, positions = feed.state(), feed.positions()
    after = [next(feed) for _ in range(2)]
    feed.close()
    again = opened(made).feed()
    again.restore(state)
    for want, got in zip(after, again):
        assert all((want[name] == got[name]).all() for name in want)
    again.close()
    assert {name: at.next for name, at in positions.items()} == {"one": 6, "two": 6}
    rows = own.feed(rows=np.arange(2))  # a process of two: all rows, for the width is that of the longest
    assert len(next(rows)["tokens"]) == 4
    rows.close()
    moved = write_lines(tmp_path / "elsewhere" / "b.jsonl", [pair(i) for i in range(6)])
    assert opened(stage(model_file, {"b": moved})).store.checksum("b") == own.store.checksum("one")
    with pytest.raises(UserError, match=r"saved for another feed: sources.one.checksum"):
        path = write_lines(tmp_path / "one2.jsonl", [pair(i, "six") for i in range(6)])
        opened(stage(model_file, {"one": path, "two": two}, seed=3)).feed().restore(state)


def test_epochs_count_the_pairs(model_file, tmp_path):
    path = write_lines(tmp_path / "one.jsonl", [pair(i) for i in range(6)])
    made = stage(model_file, {"one": path}, batch_size=4, steps=None, epochs=2)
    assert opened(made).count_steps() == 3


BAD = [
    ("not JSON: Expecting", "{"),
    ("have no common prompt", {"chosen": [QUESTION, answer("5")], "rejected": [{**QUESTION, "content": "?"}, answer("3")]}),  # noqa: E501
    ("chosen: messages[1].content is empty", pair(1, "")),
    ("two answers are the same tokens", pair(1, "five", "five")),
    ("'margin' is nan", '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}'),
    ("'margin' is '1'", pair(1, margin="1")),
    ("'margin' is 1e+39, not a finite number, in float32", pair(1, margin=1e39)),
    ("'margin' is 1000", pair(1, margin=10**400)),
    ("tokens with the prompt, more than a row of 64", pair(1, "many words " * 40)),
    ("'score' of the record is not understood", pair(1, score=1)),
    ('not a table with the keys "chosen" and "rejected"', {"prompt": "q"}),
    ('"answers" is not a list of at least two', {"prompt": "q", "answers": ["a"]}),
    ("which has neither", {"prompt": "q", "answers": ["a", "b"], "margin": 1}),
    ("the record has no \"prompt\"", {"chosen": "a", "rejected": "b"}),
    ("half a surrogate pair", '{"prompt": "q", "chosen": "\\ud83d", "rejected": "b"}'),
    ("weight is of fine-tuning", pair(1, {"role": "assistant", "content": "a", "weight": 2})),
    ("not a table", "3"),
]  # fmt: skip


def test_bad_records_are_rejected_with_their_line(model_file, tmp_path):
    """Each is named by file and line, and the good ones are used."""
    lines = [json.dumps(pair(0)), *(b if isinstance(b, str) else json.dumps(b) for _, b in BAD)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    (found,) = opened(stage(model_file, {"a": path})).corpora.values()
    assert len(found) == 1 and found.num_rejected == len(BAD)
    for i, ((reason, _), entry) in enumerate(zip(BAD, found.rejected, strict=True)):
        assert reason.replace("'margin'", '"margin"') in entry["reason"], entry
        assert (entry["file"], entry["line"]) == (str(path), i + 2)
    assert "17 of 18 documents cannot be used; the first is" in found.account()
    with pytest.raises(UserError, match=r"max_rejected=0.5 is the largest share"):
        opened(stage(model_file, {"a": path}, dialogues=DialogueConfig(max_rejected=0.5)))
    only = tmp_path / "only.jsonl"
    only.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match=r"sources.a.files: not one document can be used; the first is .*, line 1: "):
        opened(stage(model_file, {"a": only}))


def test_what_no_stage_of_pairs_can_read(model_file, tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [pair(0)])
    with pytest.raises(
        UserError, match=r"sources.a.format: the stage reads pairs, so it has to be 'pairs', not 'messages'"
    ):
        opened(stage(model_file, {"a": path}, format="messages"))
    made = stage(model_file, {"a": path})
    with pytest.raises(UserError, match=r"data.cache: pairs are read from files"):
        opened(dataclasses.replace(made, data=dataclasses.replace(made.data, cache="cache")))
    with pytest.raises(UserError, match=r"data.dialogues.too_long: is of fine-tuning"):
        opened(stage(model_file, {"a": path}, dialogues=DialogueConfig(too_long="cut")))
    with pytest.raises(UserError, match="is trained on as well"):
        opened(stage(model_file, {"a": path}, held_out=[path]))
    from tele_jax.data.batches import Batches

    for kind in ("sft", "pretrain"):
        with pytest.raises(UserError, match="reward, dpo, ppo and grpo read pairs"):
            Batches(made, kind, sources.Indexes())


def test_held_out_pairs_are_filled_up_without_weight(model_file, tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [pair(0)])
    held = write_lines(tmp_path / "held.jsonl", [pair(0), *(pair(i) for i in range(1, 6))])
    own = opened(stage(model_file, {"a": path}, held_out=[held]))
    (found,) = own.held_out.values()
    weights = np.concatenate([batch["pair_weights"] for batch in found.batches])
    assert weights.tolist() == [1] * 6 + [0] * 2
    assert found.num_tokens == sum(
        answer_of(batch, pair, side)["loss_weights"].sum()
        for batch in found.batches
        for pair, side in itertools.product(np.flatnonzero(batch["pair_weights"]), (0, 1))
    )
    assert own.shared() == ["sources.a.files: 1 documents are held out as well"]


def test_prompts_keep_their_record_by_number(model_file, vocabulary, tmp_path):
    one = [{"prompt": f"What is {i}?", "answer": str(i), "level": i} for i in range(3)]
    two = [{"prompt": [QUESTION, answer("5"), {"role": "user", "content": "Why?"}], "seed": 4}]
    files = {"one": write_lines(tmp_path / "1.jsonl", one), "two": write_lines(tmp_path / "2.jsonl", two)}
    own = opened(stage(model_file, files, format="prompts"), "prompts", room=10)
    batch = own.store.read(["two", "one"], [0, 2])
    assert [own.store.fields(i) for i in batch["record"].tolist()] == [two[0], one[2]]
    want = dialogue.render_prompt(two[0]["prompt"], vocabulary)
    assert batch["tokens"][0, : batch["lengths"][0]].tolist() == want
    longer = write_lines(tmp_path / "3.jsonl", [*one, {"prompt": "many words " * 40}])
    (found,) = opened(stage(model_file, {"a": longer}, format="prompts"), "prompts", room=10).corpora.values()
    assert "tokens, and 54 leave room for an answer" in found.rejected[0]["reason"]
    asked = write_lines(tmp_path / "4.jsonl", [{"prompt": [QUESTION, answer("5")]}])
    with pytest.raises(UserError, match="line 1: the last message has to be a question"):
        opened(stage(model_file, {"a": asked}, format="prompts"), "prompts")


def test_prompts_of_a_seqio_task(model_file, vocabulary):
    seqio, tf = pytest.importorskip("seqio"), pytest.importorskip("tensorflow")
    from tele_jax.data import tasks

    texts = [f"What is {i} and 1?" for i in range(4)]
    ids = [vocabulary.encode(text) for text in texts]
    source = {"inputs": tf.ragged.constant(ids, dtype=tf.int32), "answer": tf.constant([str(i + 1) for i in range(4)])}

    def read(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices(source).map(
            lambda x: {**x, "inputs": tf.ensure_shape(x["inputs"], [None])}
        )

    feature = seqio.Feature(tasks.SentencePieceVocabulary(str(model_file)), add_eos=False, dtype=tf.int32)
    seqio.TaskRegistry.add(
        "prompts_of_a_test", source=seqio.FunctionDataSource(read, ["train"]), output_features={"inputs": feature}
    )
    made = stage(model_file, {"a": "unused"}, format="prompts")
    data = dataclasses.replace(made.data, sources={"a": SourceConfig(task="prompts_of_a_test")})
    own = opened(dataclasses.replace(made, data=data), "prompts")
    batch = own.store.read(["a"], [2])
    assert batch["tokens"][0, : batch["lengths"][0]].tolist() == ids[2]
    assert own.store.fields(2) == {"answer": "3"}


def test_batches_are_little_wider_than_their_longest_row_in_few_widths():
    rng = np.random.default_rng(0)
    for lengths, limit in (
        (rng.lognormal(4, 0.6, 5000).clip(5, 512), 512),
        (np.full(9, 7), 64),
        (np.arange(1, 4), 3),
        (rng.lognormal(6, 0.6, 5000).clip(5, 2000), 2048),
    ):
        lengths = lengths.astype(np.int64)
        for size in (1, 8, 256):
            seen, longest = (rng.choice(lengths, (count, size)).max(axis=1) for count in (500, 1000))
            widths = record_rows._widths(seen, limit, limit)
            assert len(widths) <= 16 and (np.diff(widths) > 0).all() and widths[-1] == limit and widths[0] > 0
            made = widths[np.searchsorted(widths, longest)]
            assert (made >= longest).all()
            assert limit < 1024 or (widths % 128 == 0).all(), "TPU kernels of attention"
            eighths = -(-longest // (limit // 8)) * (limit // 8) if limit > 8 else longest
            assert limit > 1024 or (made - longest).mean() <= 0.5 * (eighths - longest).mean()


def test_answers_are_packed_whole_into_rows_of_like_lengths():
    """No two share a place, microbatches keep to their own rows, no row has more than its share of longest answers."""
    rng = np.random.default_rng(0)
    for pairs, count, parts in ((8, 8, 1), (8, 4, 2), (8, 16, 4), (64, 16, 1), (3, 2, 1), (1, 1, 1)):
        for lengths in (rng.integers(1, 100, (pairs, 2)), rng.lognormal(4, 1, (pairs, 2)).astype(int) + 1):
            rows, begins, width = record_rows.places(lengths, count, parts)
            filled = np.zeros((count, width), int)
            for pair, side in np.ndindex(pairs, 2):
                row, begin = rows[pair, side], begins[pair, side]
                filled[row, begin : begin + lengths[pair, side]] += 1
                assert row % parts == pair % parts
            assert filled.max() == 1 and filled.sum() == lengths.sum()
            assert (np.diff(filled, axis=1) <= 0).all(), "padding is at the end"
            assert width <= -(-2 * pairs // count) * lengths.max()
            # The longest row was the shortest before its last answer: it ends at most that answer above the mean.
            assert width <= filled.sum() / count * parts + lengths.max()


def test_few_positions_are_padding(model_file, tmp_path):
    words = np.random.default_rng(0).lognormal(1.5, 0.8, (256, 2)).astype(int) + 1
    records = [pair(i, "yes " * a, "no " * b) for i, (a, b) in enumerate(words.clip(max=60).tolist())]
    path = write_lines(tmp_path / "pairs.jsonl", records)
    shares, widths = {}, {}
    for rows in (64, 32, 8):
        made = DpoStage(**vars(stage(model_file, {"a": path}, batch_size=32, seq_len=256)) | {"rows": rows})
        found = batches_of(made, 20)
        assert all(len(batch["tokens"]) == rows and len(batch["ends"]) == 32 for batch in found)
        shares[rows] = np.mean([(batch["segment_ids"] > 0).mean() for batch in found])
        widths[rows] = len({batch["tokens"].shape for batch in found})
    assert shares[64] < 0.5 < 0.65 < shares[32] and shares[8] > 0.9, shares
    assert max(widths.values()) <= 9, widths
