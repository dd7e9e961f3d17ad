"""Rules on samples: what they find, and what they leave alone."""

import pytest

from tele_jax.selection import rules
from tele_jax.selection.samples import Sample
from tele_jax.selection.settings import RulesConfig
from tests.selection import pools

LONG = "The harbour was built in 1902 by the crew of a ship that had been lost, and opened in the next year."


def sample(*turns, category="x", **marks):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    messages[-1] |= marks
    return Sample(0, category, messages)


def reasons(*turns, category="x", marks=None, **config):
    return [
        drop.reason
        for drop in rules.violations(sample(*turns, category=category, **(marks or {})), RulesConfig(**config))
    ]


@pytest.mark.parametrize(
    "turns, expected",
    [
        (("When was it built?", LONG), []),
        (("Capital of France?", "Paris"), []),
        (("6 times 7?", "42"), []),
        (("“画蛇添足”是什么意思？", "比喻做了多余的事，反而不恰当。"), []),
        (("把这句话翻译一下", "好"), []),
        (("Name three colours.", "1) red\n2) green\n3) blue"), []),
        (("Write f.", "def f(x):\n    y = x + 1\n    return y"), []),
        (("写一个函数f，返回x加一", "def f(x):\n    y = x + 1\n    return y"), []),
        (("When was it built?", LONG[:60]), ["truncated"]),
        (("When was it built?", "It was built (in 1902"), ["truncated"]),
        (("Write f.", "```\ndef f(x):\n    return x"), ["truncated"]),
        (("Write f.", "def f(x):\n    y = g(x,\n    z = 3\n    return"), ["truncated"]),
        (("“画蛇添足”是什么意思？", "比喻做了多余的事，"), ["truncated"]),
        (("“画蛇添足”是什么意思？", "出自《战国策·齐策二"), ["truncated"]),
        (("When was it built?", "港口是在一九零二年由一艘沉船的船员修建的。"), ["another language"]),
        (("这个港口是什么时候修建起来的呢？", LONG), ["another language"]),
        (("When was it built?", "When was it built?"), ["echo"]),
        (("When was it built?", "I'm sorry, but I do not know."), ["refusal"]),
        (("港口是何时建的？", "作为一个人工智能，我不知道。"), ["refusal"]),
        (("Tell me of it.", "It is old and it is grey. " * 20), ["repetition"]),
        (("Hi", LONG, "And then?", LONG[:60]), ["truncated"]),
        (("Hi", LONG[:60], "And then?", LONG), ["truncated"]),
    ],
)
def test_each_rule(turns, expected):
    assert reasons(*turns) == expected


def test_rules_can_be_turned_off_and_categories_exempted():
    cut, foreign = (
        ("When was it built?", LONG[:60]),
        ("When was it built?", "港口是在一九零二年由一艘沉船的船员修建的。"),
    )
    assert reasons(*cut, truncated=False) == reasons(*cut, any_end=("x",)) == []
    assert reasons(*foreign, same_language=False) == reasons(*foreign, any_language=("x",)) == []
    assert reasons(*cut, any_end=("y",)) == ["truncated"]
    assert reasons("Hi", LONG, min_question_tokens=2) == ["short question"]
    assert reasons("Hi", LONG, max_answer_tokens=20, min_answer_tokens=20) == ["long answer"]
    assert reasons("Hi", LONG, "So?", "Yes.", max_answer_tokens=23) == []
    assert reasons("Hi", LONG, "So?", "Yes.", max_answer_tokens=22) == ["long answer"] and len(LONG.split()) == 22
    assert reasons("When was it built?", "I'm sorry, but no.", refusals=()) == []


def test_an_answer_that_is_not_learned_is_not_judged():
    assert reasons("When was it built?", LONG[:60], marks={"weight": 0}) == []


def test_planted_defects_are_caught_and_clean_samples_are_not():
    records, defects = pools.planted(600)
    found = {}
    for i, record in enumerate(records):
        made = Sample(i, record["category"], record["messages"])
        found[i] = next((drop.reason for drop in rules.violations(made, RulesConfig())), "")
    names = {"truncated": "truncated", "language": "another language"}
    for kind, reason in names.items():
        rows = [i for i, name in defects.items() if name == kind]
        assert len(rows) > 20 and sum(found[i] == reason for i in rows) >= 0.95 * len(rows)
    clean = [i for i in found if i not in defects]
    assert sum(found[i] != "" for i in clean) <= 0.01 * len(clean)
