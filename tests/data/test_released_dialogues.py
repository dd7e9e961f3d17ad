"""TeleChat's released fine-tuning samples are read whole, with the ids of an independent script.

The samples and the tokenizers are used where their folder lies beside the project.
"""

import json
import re

import numpy as np
import pytest
import sentencepiece

from tele_jax.data.domains import OpenData
from tele_jax.settings import DataConfig, DialogueConfig, SourceConfig
from tests.data.test_released_prompts import RELEASED

EXAMPLES, TOKENIZER = RELEASED / "telechat_examples", RELEASED / "telechat_12b" / "tokenizer.model"
FILES = ("single_turn_example.jsonl", "multi_turn_example.jsonl")
USER, BOT, END = 20, 21, 2


@pytest.fixture(scope="module")
def released():
    if not EXAMPLES.is_dir() or not TOKENIZER.is_file():
        pytest.skip(f"the released samples or the tokenizer of TeleChat-12B are not here: {RELEASED}")
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))


def by_the_rules(line, encode, next_user=False):
    """Ids and weights of a line: a text between two markers is encoded apart; an answer and its end are learned."""
    record = json.loads(line)
    parts = [*re.split("(<_user>|<_bot>)", record["input"])[1:], "<_bot>", record["output"]]
    ids, weights = [], []
    for marker, text in zip(parts[::2], parts[1::2], strict=True):
        asked, text_ids = marker == "<_user>", encode(text)
        ids += [USER, *text_ids] if asked else [BOT, *text_ids, END]
        weights += [next_user and bool(weights), *[0] * len(text_ids)] if asked else [0, *[1] * (len(text_ids) + 1)]
    return ids, weights


def test_the_2000_released_samples_are_read_whole_with_the_ids_of_the_rules(released):
    sources = {name: SourceConfig(files=(str(EXAMPLES / name),), format="telechat") for name in FILES}
    seen = []
    for next_user in (False, True):
        how = DialogueConfig(next_user=next_user, max_rejected=0.0)
        config = DataConfig(tokenizer=str(TOKENIZER), template="telechat_12b", sources=sources, dialogues=how)
        opened = OpenData(config, kind="sft", seq_len=8192)
        assert [
            (len(opened.train[name]), opened.train[name].num_rejected, opened.train[name].notes()) for name in FILES
        ] == [
            (1000, 0, []),
            (1000, 0, []),
        ]
        for name in FILES:
            lines = (EXAMPLES / name).read_text("utf-8").splitlines()
            for i in range(50):
                ids, weights = by_the_rules(lines[i], released.encode, next_user)
                inputs, targets, loss_weights = opened.train[name].example(i).tolist()
                assert (inputs, targets, loss_weights) == (ids[:-1], ids[1:], weights[1:]), (name, i)
                seen.append(sum(weights))
    assert len(seen) == 200 and seen[:100] != seen[100:]


def test_of_long_released_samples_every_answer_is_learned_once(released):
    config = DataConfig(
        tokenizer=str(TOKENIZER),
        template="telechat_12b",
        sources={"a": SourceConfig(files=(str(EXAMPLES / FILES[1]),), format="dialogues")},
    )
    whole, split = (OpenData(config, kind="sft", seq_len=length).train["a"] for length in (8192, 1024))
    assert split.split > 10 and split.shortened == 0 and split.dropped == 0 and len(split) > 1000
    assert split.notes() == [f"sources.a.files: {split.split} dialogues were longer than a row and were split at turns"]

    def answers(documents):
        found = []
        for i in range(len(documents)):
            _, targets, weights = documents.example(i)
            found.append(targets[weights > 0])
        return np.concatenate(found)

    assert (answers(whole) == answers(split)).all()
