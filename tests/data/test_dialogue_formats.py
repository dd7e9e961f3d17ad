"""Records of every format become the messages that somebody would write for them by hand, or are refused in a line."""

import json

import pytest

from tele_jax.data import documents, sources
from tele_jax.data.dialogue_formats import READERS, from_record
from tele_jax.errors import UserError
from tele_jax.settings import DialogueConfig

SYSTEM, Q1, A1, Q2, A2 = (
    {"role": role, "content": content}
    for role, content in (("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
WITH_TOOLS = [
    {"role": "system", "content": f"s\n\n<tools>\n{json.dumps(TOOL)}\n</tools>"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": f"a1\n{CALL}\n{CALL}"},
    {"role": "user", "content": "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"},
    {"role": "assistant", "content": "a2"},
]
OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("format", "record", "messages"),
    [
        ("messages", {"messages": [SYSTEM, Q1, A1, Q2, A2], "id": 3}, [SYSTEM, Q1, A1, Q2, A2]),
        ("messages", {"messages": [SYSTEM | {"role": "developer"}, Q1, A1], "tools": []}, [SYSTEM, Q1, A1]),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "1"}]},
                    A1,
                ]
            },
            [Q1, A1],
        ),
        ("messages", {"messages": [Q1, A1 | {"weight": 0.42, "refusal": None}]}, [Q1, A1 | {"weight": 0.42}]),
        (
            "messages",
            {
                "messages": [
                    SYSTEM,
                    Q1,
                    A1 | {"tool_calls": [OPENAI_CALL, OPENAI_CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "2"},
                    {"role": "tool", "tool_call_id": "2", "content": "3"},
                    A2,
                ],
                "tools": [TOOL],
                "parallel_tool_calls": True,
            },
            WITH_TOOLS,
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}], "system": "s"},
            [SYSTEM, Q1, A1],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q1"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "a2"},
                ],
                "tools": json.dumps([TOOL]),
            },
            [
                WITH_TOOLS[0],
                Q1,
                {"role": "assistant", "content": CALL},
                {"role": "user", "content": "<tool_response>\n2\n</tool_response>"},
                A2,
            ],
        ),
        ("alpaca", {"instruction": "q", "input": "1", "output": "a1"}, [Q1 | {"content": "q\n1"}, A1]),
        (
            "alpaca",
            {"instruction": "q2", "input": "", "output": "a2", "system": "s", "history": [["q1", "a1"]]},
            [SYSTEM, Q1, A1, Q2, A2],
        ),
        ("telechat", {"input": "<_user>q1<_bot>a1<_user>q2", "output": "a2"}, [Q1, A1, Q2, A2]),
        ("telechat", {"input": "q1", "output": "a1"}, [Q1, A1]),
        ("telechat2", {"system": "s", "dialog": [Q1, A1 | {"role": "bot"}]}, [SYSTEM, Q1, A1 | {"role": "bot"}]),
    ],
)
def test_a_record_becomes_messages_by_its_keys_or_by_the_name_of_its_format(format, record, messages):
    assert from_record(record) == from_record(record, format) == messages
    for other in READERS.keys() - {format}:
        asked = f"not a table with the key .* as the format {other} asks for|field 'instruction' .* is not understood"
        with pytest.raises(UserError, match=asked):
            from_record(record, other)


def test_only_the_last_answer_is_learned_and_a_system_message_is_added_where_asked():
    last = DialogueConfig(learned="last", system="s")
    assert from_record({"messages": [Q1, A1 | {"train": True}, Q2, A2]}, "messages", last) == [
        *(SYSTEM, Q1, A1 | {"weight": 0}, Q2, A2)
    ]
    own = {"role": "system", "content": "own"}
    assert from_record({"messages": [own, Q1, A1]}, "messages", last)[0] == own
    with pytest.raises(UserError, match="none of the answers is to be learned"):
        from_record({"messages": [Q1, A1, Q2, A2 | {"weight": 0}]}, "messages", last)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (7, 'not a table with the key "messages", or "conversations", or "dialog"'),
        ({"text": "a"}, 'or "instruction" and "output", or "input" and "output", as the format dialogues asks for'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A1]},
            r"messages\[0\]\.content\[0\] is of the type 'image_url'; only parts of the type 'text' can be learned",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, A1]}, r'content\[0\] is not {"type": "text"'),
        ({"messages": [Q1, A1], "images": ["a.png"]}, "the field 'images' of the record is not understood"),
        ({"messages": [Q1, A1 | {"function_call": {}}]}, r"messages\[1\]: the field 'function_call' is not understood"),
        ({"messages": [Q1, {"role": "assistant", "content": None}]}, r"messages\[1\]\.content is empty"),
        (
            {"messages": [Q1, {"role": "tool", "content": "2"}, A1]},
            r"messages\[1\]\.role is 'user', but it is the turn",
        ),
        ({"messages": [Q1, A1], "tools": "add"}, '"tools" is a string that is not JSON'),
        ({"messages": [Q1, A1 | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "its arguments are not JSON"),
        ({"messages": {"role": "user"}}, "messages is not a list"),
        ({"conversations": [{"value": "q1"}]}, r'conversations\[0\] is not a table of the strings "from" and "value"'),
        ({"conversations": [{"from": "robot", "value": "q"}]}, r"messages\[0\]\.role is 'robot', not one of"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, r"messages\[0\]\.role is 'assistant', but it is the turn"),
        ({"instruction": "q", "output": ""}, r"messages\[1\]\.content is empty"),
        ({"instruction": "q", "output": 3}, r"messages\[1\] is not a table of the strings"),
        ({"instruction": 1, "output": "a"}, '"instruction" and "input" are not strings'),
        ({"instruction": "q", "output": "a", "history": ["q", "a"]}, "history is not a list of pairs"),
        ({"instruction": "q", "output": "a", "chosen": "b"}, "the field 'chosen' of the record is not understood"),
        ({"input": ["q"], "output": "a"}, '"input" is not a string'),
        (
            {"input": "<_user>q<_bot>a", "output": "b"},
            r"messages\[2\]\.role is 'assistant', but it is the turn of user",
        ),
        (
            {"input": "<_user>q<_user>q", "output": "b"},
            r"messages\[1\]\.role is 'user', but it is the turn of assistant",
        ),
        ({"dialog": [Q1, A1], "weight": 2}, "the field 'weight' of the record is not understood"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(record, reason):
    with pytest.raises(UserError, match=reason) as caught:
        from_record(record)
    assert "\n" not in str(caught.value)


RECORDS = [{"instruction": f'q{i} ] }} , "', "output": f"a\\{i}"} for i in range(5)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_that_is_one_array_holds_the_documents_of_its_lines(tmp_path, indent, mark):
    (tmp_path / "a.json").write_text(f"{mark} {json.dumps(RECORDS, indent=indent, ensure_ascii=False)} \n", "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), "utf-8")
    array, lines = (sources.index("x", "x", [str(tmp_path / name)], "dialogues") for name in ("a.json", "b.jsonl"))
    expected = [from_record(record) for record in RECORDS]
    for i in (3, 0, 4, 1, 2):  # at random
        assert array.document(i).content == lines.document(i).content == expected[i]
    assert array.num_rejected == 0 and len(array) == 5


@pytest.mark.parametrize(
    ("text", "used", "reasons"),
    [
        (
            '[{"input": "q", "output": "a"}, 7, {"input": "q", "output": ""}]',
            1,
            ["element 2: not a tab", "element 3: messa"],
        ),
        ('[{"input": "q", "output": "a"}, {"input": "q", "outp', 1, ["element 2: not JSON"]),
        ('[{"input": "q", "output": "a"}] {"input": "q", "output": "a"}', 1, ["element 2: not JSON"]),
        ('[{"input": "q", "output": "a"},, {"input": "q", "output": "a"}]', 2, ["element 2: not JSON"]),
        ('[{"input": "q", "output": "a"}, {"input": "q]", "output": "a"}', 1, ["element 2: not JSON"]),
        ('[{"input": "q", "output": "a"},', 1, ["element 2: not JSON"]),
    ],
)
def test_what_is_wrong_in_an_array_is_named_by_its_element(tmp_path, text, used, reasons):
    (tmp_path / "a.json").write_text(text, "utf-8")
    corpus = sources.index("x", "x", [str(tmp_path / "a.json")], "telechat")
    places = [documents.place(reject) for reject in corpus.rejected]
    assert (len(corpus), corpus.num_rejected) == (used, len(reasons))
    assert all(f"a.json, {reason}" in place for place, reason in zip(places, reasons, strict=True)), places
