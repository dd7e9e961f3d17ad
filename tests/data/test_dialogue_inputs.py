"""Mistakes in files of dialogues and in their settings are one line each; long dialogues are counted."""

import json
import re

import numpy as np
import pytest

from tele_jax.data import domains
from tele_jax.data.cache import RowCache
from tele_jax.data.domains import OpenData
from tele_jax.errors import UserError
from tele_jax.settings import DEFAULT_DIALOGUES, CacheConfig, DataConfig, DialogueConfig, SourceConfig
from tests.data import caches
from tests.data.test_released_prompts import small_tokenizers

GOOD = {"instruction": "Say one.", "output": "one"}
BAD = {"instruction": "Say one.", "output": ""}


@pytest.fixture(scope="module")
def flm(tmp_path_factory):
    return small_tokenizers(tmp_path_factory.mktemp("tokenizers"))["telechat_52b"]


def page(tokenizer, path, how=DEFAULT_DIALOGUES, template=None, **fields):
    source = SourceConfig(files=(str(path),), format="dialogues", **fields)
    return DataConfig(tokenizer=str(tokenizer), sources={"chat": source}, dialogues=how, template=template)


def refused(config, message, seq_len=32):
    with pytest.raises(UserError, match=message) as caught:
        domains.check(config, kind="sft", seq_len=seq_len)
    assert "\n" not in str(caught.value)


def cached(config, out, seq_len=32):
    manifest = caches.make(CacheConfig(data=config, kind="sft", seq_len=seq_len), out)
    return manifest.domains["chat"].counts


def test_more_unusable_lines_than_the_limit_refuse_the_start_and_the_cache(model_file, tmp_path):
    path = caches.write_lines(tmp_path / "a.jsonl", [GOOD, BAD, GOOD, {"messages": 3}, GOOD])
    told = r"chat.*: 2 of 5 documents cannot be used; the first is .*a\.jsonl.*messages\[1\]\.content is empty"
    limit = r"; data\.dialogues\.max_rejected=0\.3 is the largest share that is taken"
    refused(page(model_file, path, DialogueConfig(max_rejected=0.3)), told + limit)
    with pytest.raises(UserError, match=told + limit):
        cached(page(model_file, path, DialogueConfig(max_rejected=0.3)), tmp_path / "refused")
    taken = page(model_file, path, DialogueConfig(max_rejected=0.4))
    documents = domains.check(taken, kind="sft", seq_len=32).train["chat"]
    assert [reject["line"] for reject in documents.rejected] == [2, 4] and len(documents) == 3
    counts = cached(taken, tmp_path / "rows")
    assert (counts.documents, counts.rejected) == (3, 2)
    kept = (tmp_path / "rows" / "chat" / "00000.rejected.jsonl").read_text("utf-8").splitlines()
    assert sorted(json.loads(line)["reason"] for line in kept) == [
        "messages is not a list",
        "messages[1].content is empty",
    ]


def long_talk(turns, words=3):
    return caches.talk(*(f"{i} " * words for i in range(2 * turns)))


@pytest.mark.parametrize(
    ("too_long", "counts", "said"),
    [
        ("split", {"split": 1, "shortened": 1}, ["1 .* were split at turns", "1 .* were cut to fit"]),
        ("cut", {"shortened": 2}, ["2 .* were cut to fit"]),
        ("drop", {"dropped": 2}, ["2 .* were left out"]),
    ],
)
def test_dialogues_longer_than_a_row_are_counted_and_cached_rows_are_the_live_ones(
    model_file, tmp_path, too_long, counts, said
):
    path = caches.write_lines(tmp_path / "a.jsonl", [long_talk(1), long_talk(5), long_talk(1, 60)])
    config = page(model_file, path, DialogueConfig(too_long=too_long))
    documents = OpenData(config, kind="sft", seq_len=48).train["chat"]
    names = ("split", "shortened", "dropped")
    assert {name: getattr(documents, name) for name in names if getattr(documents, name)} == counts
    for note, pattern in zip(documents.notes(), said, strict=True):
        assert note.startswith("sources.chat.files: ") and re.search(pattern, note)
    found = cached(config, tmp_path / "rows", seq_len=48)
    assert {name: getattr(found, name) for name in names if getattr(found, name)} == counts
    cache = RowCache(tmp_path / "rows")
    assert cache.manifest.dialogues == config.dialogues
    live = sorted(tuple(map(tuple, documents.example(i).tolist())) for i in range(len(documents)))
    columns = ("tokens", "targets", "loss_weights")
    rows = caches.segments(caches.whole_domain(cache, "chat"))
    assert sorted(tuple(tuple(segment[name].tolist()) for name in columns) for segment in rows) == live


def test_a_state_of_split_dialogues_is_not_one_of_cut_dialogues(model_file, tmp_path):
    path = caches.write_lines(tmp_path / "a.jsonl", [long_talk(1), long_talk(5)])
    split, cut = (
        caches.open_feed(
            page(model_file, path, DialogueConfig(too_long=how)), kind="sft", seq_len=48, batch_size=2, seed=0
        )
        for how in ("split", "cut")
    )
    next(split)
    state = split.state()
    with pytest.raises(UserError, match=r"saved for another feed: sources\.chat\.format"):
        cut.restore(state)
    split.restore(state)
    assert np.isfinite(next(split)["loss_weights"]).all()


def test_a_row_that_is_too_short_for_any_dialogue_is_named(model_file, tmp_path):
    path = caches.write_lines(tmp_path / "a.jsonl", [long_talk(5)])
    refused(page(model_file, path), "seq_len=2: a row of dialogues needs at least 3 tokens", seq_len=2)
    dropped = page(model_file, path, DialogueConfig(too_long="drop"))
    message = r"not one dialogue is left, all are longer than a row of seq_len=48 tokens; give longer rows"
    refused(dropped, rf"sources\.chat\.files: {message}", seq_len=48)
    with pytest.raises(UserError, match=message):
        cached(dropped, tmp_path / "rows", seq_len=48)


def test_settings_that_the_template_or_the_tokenizer_cannot_follow_are_named(model_file, flm, tmp_path):
    path = caches.write_lines(tmp_path / "a.jsonl", [GOOD])
    own = caches.write_lines(tmp_path / "s.jsonl", [GOOD, GOOD | {"system": "Be brief."}])
    next_user = "next_user learns the id of <_user>, which is text in the template telechat_52b; leave next_user out"
    refused(page(flm, path, DialogueConfig(next_user=True), template="telechat_52b"), next_user)
    place = "the template tele_flm_instruct has no place for a system message"
    refused(page(flm, own, template="tele_flm_instruct"), rf"s\.jsonl: dialogue at byte \d+: {place}")
    refused(page(flm, path, DialogueConfig(system="Hi."), template="tele_flm_instruct"), rf"byte 0: {place}")
    refused(page(flm, path, template="telechat_12b"), r"tokenizer .*flm\.model")
    refused(page(model_file, path, template="telechat9"), "template 'telechat9' is not one of telechat,")
    with pytest.raises(UserError, match=r"max_rejected=2\.0 must be in"):
        DialogueConfig(max_rejected=2.0)
    with pytest.raises(UserError, match=r"too_long: .*'keep'"):
        DialogueConfig(too_long="keep")


def test_weights_are_for_live_rows_and_a_cache_says_how_it_was_made(model_file, tmp_path):
    weighted = caches.talk("a", "b")
    weighted["messages"][1]["weight"] = 0.42
    path = caches.write_lines(tmp_path / "w.jsonl", [weighted, caches.talk("c", "d")])
    batch = next(caches.open_feed(page(model_file, path), kind="sft", seq_len=16, batch_size=4, seed=0))
    assert set(np.unique(batch["loss_weights"]).tolist()) == {0.0, np.float32(0.42), 1.0}
    with pytest.raises(UserError, match=r"sources\.chat: a cache cannot keep weights of answers other than 0 and 1"):
        cached(page(model_file, path), tmp_path / "rows")
    plain = caches.write_lines(tmp_path / "p.jsonl", [GOOD])
    cached(page(model_file, plain, DialogueConfig(learned="last")), tmp_path / "last")
    for how, message in (
        (DialogueConfig(learned="last"), None),
        (DialogueConfig(system="s"), "made with another data.dia"),
    ):
        config = DataConfig(tokenizer=str(model_file), cache=str(tmp_path / "last"), dialogues=how)
        if message is None:
            assert domains.check(config, kind="sft", seq_len=32).data.dialogues == how
        else:
            refused(config, message)


def test_held_out_answers_count_whole_whatever_their_weight(model_file, vocabulary, tmp_path):
    weighted = caches.talk("a b", "c d")
    weighted["messages"][1]["weight"] = 0.42
    path = caches.write_lines(tmp_path / "train.jsonl", [GOOD])
    held = caches.write_lines(tmp_path / "held.jsonl", [weighted])
    config = page(model_file, path, DialogueConfig(next_user=True), validation_files=(held,))
    text = caches.held_out(config, kind="sft", seq_len=16, batch_size=1)["chat"]
    assert (text.num_bytes, text.num_tokens) == (3, len(vocabulary.encode("c d")))


def test_samples_that_learn_nothing_are_left_out_and_their_dialogue_counts_as_split(model_file, tmp_path):
    path = caches.write_lines(tmp_path / "a.jsonl", [long_talk(5)])
    config = page(model_file, path, DialogueConfig(learned="last"))
    documents = OpenData(config, kind="sft", seq_len=48).train["chat"]
    assert (len(documents), documents.split, documents.shortened, documents.dropped) == (1, 1, 0, 0)
    last = OpenData(page(model_file, path), kind="sft", seq_len=48).train["chat"]
    assert (documents.example(0)[:2] == last.example(len(last) - 1)[:2]).all(), "the last sample of all"
    assert cached(config, tmp_path / "rows", seq_len=48).split == 1
