"""TeleChat's template, token by token, in a vocabulary where a character is a token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tele_jax.data import dialogue
from tele_jax.data.dialogue import check, render, render_prompt
from tele_jax.data.dialogue_formats import from_record
from tele_jax.errors import UserError

U, B, E, S = 1, 2, 3, 4


class Letters:
    """`a` is 97, and so on: the expected tokens below can be read."""

    user_id, bot_id, end_id, system_id = U, B, E, S

    def encode(self, text):
        return list(map(ord, text))


LETTERS = Letters()


def talk(*contents, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return first + [
        {"role": "user" if i % 2 == 0 else "assistant", "content": content} for i, content in enumerate(contents)
    ]


def spell(*parts):
    return [token for part in parts for token in (map(ord, part) if isinstance(part, str) else [part])]


def test_one_turn():
    tokens, weights = render(talk("ab", "cd"), LETTERS)
    assert tokens == spell(U, "ab", B, "cd", E)
    assert weights == [0, 0, 0, 0, 1, 1, 1]


def test_all_answers_of_all_turns_count_and_nothing_else():
    tokens, weights = render(talk("a", "bc", "d", "e", system="sy"), LETTERS)
    assert tokens == spell(S, "sy", U, "a", B, "bc", E, U, "d", B, "e", E)
    assert weights == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]


def test_a_prompt_ends_where_the_answer_begins():
    assert render_prompt(talk("a", "bc", "d", system="s"), LETTERS) == spell(S, "s", U, "a", B, "bc", E, U, "d", B)


def test_bot_is_another_name_for_assistant():
    assert render([talk("a")[0], {"role": "bot", "content": "b"}], LETTERS) == render(talk("a", "b"), LETTERS)


@pytest.mark.parametrize(
    ("max_tokens", "expected", "num_learned"),
    [
        (None, spell(S, "s", U, "ab", B, "c", E, U, "def", B, "gh", E), 5),
        (16, spell(S, "s", U, "ab", B, "c", E, U, "def", B, "gh", E), 5),
        (15, spell(S, "s", U, "def", B, "gh", E), 3),
        (10, spell(S, "s", U, "def", B, "gh", E), 3),
        (9, spell(S, "s", U, "ef", B, "gh", E), 3),
        (8, spell(S, "s", U, "f", B, "gh", E), 3),
        (7, spell(U, "ef", B, "gh", E), 3),  # no question left beside the system message: it goes
        (5, spell(U, B, "gh", E), 3),
        (4, spell(U, B, "gh"), 2),
    ],
)
def test_a_long_dialogue_loses_old_turns_then_the_left_of_the_question(max_tokens, expected, num_learned):
    tokens, weights = render(talk("ab", "c", "def", "gh", system="s"), LETTERS, max_tokens)
    assert tokens == expected
    assert sum(weights) == num_learned


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (11, spell(U, "ab", B, "c", E, U, "def", B)),
        (10, spell(U, "def", B)),
        (5, spell(U, "def", B)),
        (4, spell(U, "ef", B)),
    ],
)
def test_a_long_prompt_is_cut_the_same_way(max_tokens, expected):
    assert render_prompt(talk("ab", "c", "def"), LETTERS, max_tokens) == expected


CONTENT = st.text("xyz", min_size=1, max_size=12)
DIALOGUE = st.tuples(st.none() | CONTENT, st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)).map(
    lambda d: talk(*[part for turn in d[1] for part in turn], system=d[0])
)


@given(DIALOGUE, st.none() | st.integers(4, 60))
def test_what_chat_prompts_with_is_what_training_showed(messages, max_tokens):
    answer = LETTERS.encode(messages[-1]["content"])
    if max_tokens is not None and max_tokens - len(answer) - 1 < 4:
        return
    tokens, _ = render(messages, LETTERS, max_tokens)
    prompt = render_prompt(messages[:-1], LETTERS, None if max_tokens is None else max_tokens - len(answer) - 1)
    assert [*prompt, *answer, E] == tokens


@given(DIALOGUE, st.integers(4, 60))
def test_a_limit_is_kept_and_something_is_always_learned(messages, max_tokens):
    full, _ = render(messages, LETTERS)
    tokens, weights = render(messages, LETTERS, max_tokens)
    assert len(tokens) == len(weights) <= max_tokens
    assert (tokens == full) == (len(full) <= max_tokens)
    # A token counts if and only if the nearest marker at or before it, the token itself not counted, is <_bot>.
    learned, inside = [], False
    for token in tokens:
        learned.append(int(inside and token not in (U, B)))
        inside = token == B or (inside and token not in (U, E))
    assert weights == learned and sum(weights) > 0


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages is not a list"),
        ([], "the last message has to be an answer"),
        (talk("a"), "the last message has to be an answer"),
        (talk(system="s"), "the last message has to be an answer"),
        ([{"role": "user"}], r'messages\[0\] is not a table of the strings "role" and "content"'),
        (talk("a", ""), r"messages\[1\]\.content is empty"),
        ([{"role": "human", "content": "a"}], r"messages\[0\]\.role is 'human', not one of system, user, assistant"),
        (talk("a", "b")[::-1], r"messages\[0\]\.role is 'assistant', but it is the turn of user"),
        ([talk("a")[0]] * 2, r"messages\[1\]\.role is 'user', but it is the turn of assistant"),
        ([*talk("a", "b"), *talk(system="s")], r"messages\[2\]: the system message has to come first"),
    ],
)
def test_what_is_no_dialogue_is_refused(messages, message):
    with pytest.raises(UserError, match=message):
        check(messages)


def test_a_prompt_has_to_end_in_a_question_and_fit():
    with pytest.raises(UserError, match="the last message has to be a question"):
        render_prompt(talk("a", "b"), LETTERS)
    with pytest.raises(UserError, match="max_tokens=3: a dialogue needs at least 4"):
        render_prompt(talk("a"), LETTERS, 3)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss": 0}])
def test_an_answer_that_is_marked_is_given_and_not_learned(vocabulary, mark):
    def marked(*marks, **how):
        messages = []
        for i, each in enumerate(marks):
            messages.append({"role": "user", "content": f"question {i}"})
            messages.append({"role": "assistant", "content": f"answer {i}", **each})
        return dialogue.render(from_record({"messages": messages}), vocabulary, **how)

    end = [vocabulary.end_id]
    parts = [
        ([vocabulary.user_id, *vocabulary.encode("question 0"), vocabulary.bot_id], False),
        (vocabulary.encode("answer 0") + end, True),
        ([vocabulary.user_id, *vocabulary.encode("question 1"), vocabulary.bot_id], False),
        (vocabulary.encode("answer 1") + end, True),
    ]
    tokens = [i for part, _ in parts for i in part]
    for marks, learned in (((mark, {}), (0, 1)), (({"weight": 1}, mark), (1, 0))):
        expected = []
        for number, (part, is_answer) in enumerate(parts):
            expected += [learned[number // 2] if is_answer else 0] * len(part)
        assert marked(*marks) == (tokens, expected)
        # Of a document of pretraining all else is learned.
        expected = []
        for number, (part, is_answer) in enumerate(parts):
            expected += [learned[number // 2] if is_answer else 1] * len(part)
        assert marked(*marks, given=1) == (tokens, expected)


def test_a_record_may_carry_its_system_message_and_labels_and_be_of_telechat2():
    user, bot = {"role": "user", "content": "a"}, {"role": "bot", "content": "b"}
    system = {"role": "system", "content": "c"}
    assert from_record({"dialog": [user, bot], "system": "c", "id": 7}) == [system, user, bot]
    assert from_record({"messages": [user, bot | {"tool_calls": []}], "system": ""})[0] == user
    assert from_record({"messages": [system, user, bot], "system": None}) == [system, user, bot]


@pytest.mark.parametrize(
    ("fields", "answer", "reason"),
    [
        ({}, {"train": 0.5}, r"messages\[1\]\.train is 0.5; an answer is learned \(1\) or not \(0\)"),
        ({}, {"weight": "0"}, r"messages\[1\]\.weight is '0'; a weight is a finite number of at least 0"),
        ({}, {"weight": -0.5}, r"messages\[1\]\.weight is -0.5; a weight is a finite number of at least 0"),
        ({}, {"weight": float("nan")}, r"messages\[1\]\.weight is nan; a weight is a finite"),
        ({}, {"weight": 10**400}, r"a weight is a finite number of at least 0, in float32"),
        ({}, {"weight": 1e39}, r"messages\[1\]\.weight is 1e\+39; a weight is a finite"),
        ({}, {"weight": 0}, "none of the answers is to be learned"),
        ({}, {"weight": 0.5, "train": False}, "its marks .* contradict each other"),
        ({}, {"tool_calls": [{"id": 1}]}, r"messages\[1\]\.tool_calls\[0\] is not a call of a function with a name"),
        ({}, {"name": "x"}, r"messages\[1\]: the field 'name' is not understood"),
        ({"tools": [{}]}, {}, r"tools\[0\] is not the description of a function with a name"),
        ({"weight": 1}, {}, "the field 'weight' of the record is not understood"),
        ({"system": 3}, {}, '"system" is not a string'),
        ({"messages": [{"role": "system", "content": "d"}], "system": "c"}, {}, "there are two system messages"),
        ({"input": "<_user>a<_bot>", "output": "b"}, {}, "the field 'input' of the record is not understood"),
    ],
)
def test_what_a_record_says_and_nothing_here_obeys_is_a_reason_to_reject_it(fields, answer, reason):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **answer}]
    with pytest.raises(UserError, match=reason):
        from_record({"messages": messages} | fields)


def test_a_question_cannot_be_marked_to_be_learned():
    messages = [{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=r"messages\[0\]\.train is True, but only answers are learned"):
        dialogue.check(messages)
