"""Records of dialogues in the formats of the field, read as the messages of dialogue.py.

Each reader turns a record into one of the format `messages`, which is that of OpenAI's chat: {"messages": [{"role",
"content"}, ...]}, and beside it perhaps "system" and "tools". A content may be a list of parts of text, to be joined.

The released template for tools is not published. By a convention of ours, that of Hermes models, they are text: the
system message ends with the tools, one JSON object a line between <tools> and </tools>; an answer that calls tools ends
with <tool_call> {"name", "arguments"} </tool_call> for each; what they return is the next message of the user,
<tool_response> text </tool_response> for each. Ids of calls only connect the two, and are not written.

Fields that nothing here understands are refused by name, but for LABELS: none is ignored.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tele_jax.data.messages import Message, check, is_blank
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.settings import DEFAULT_DIALOGUES, DialogueConfig

# Fields of a record that say where it is from, and nothing about what is learned.
LABELS = frozenset({"id", "source", "url", "title", "language", "lang", "license", "category", "meta", "metadata"})
_UNDERSTOOD = LABELS | {"messages", "system", "tools", "parallel_tool_calls"}
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
_MARKERS = {"<_system>": "system", "<_user>": "user", "<_bot>": "assistant"}


def _sharegpt(record: Table) -> Table:
    def message(i: int, entry: Any) -> Any:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("from"), str):
            raise UserError(f'conversations[{i}] is not a table of the strings "from" and "value"')
        rest = {key: value for key, value in entry.items() if key not in ("from", "value")}
        role, content = entry["from"], entry.get("value")
        if role == "function_call" and isinstance(content, str):
            role, content = "gpt", _called(content)
        return {"role": _SHAREGPT.get(role, role), "content": content, **rest}

    said = _list(record.pop("conversations"), "conversations")
    return {"messages": [message(i, entry) for i, entry in enumerate(said)], **record}


def _alpaca(record: Table) -> Table:
    history = _list(record.pop("history", None) or [], "history")
    if not all(isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in history):
        raise UserError("history is not a list of pairs of a question and an answer")
    asked = [record.pop("instruction"), record.pop("input", None) or ""]
    if not all(isinstance(text, str) for text in asked):
        raise UserError('"instruction" and "input" are not strings')
    texts = [*(text for pair in history for text in pair), "\n".join(filter(None, asked)), record.pop("output", None)]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)], **record}


def _telechat(record: Table) -> Table:
    said, answer = record.pop("input"), record.pop("output", None)
    if not isinstance(said, str):
        raise UserError('"input" is not a string')
    # The released code puts <_user> before an input that does not begin with a marker.
    first, *rest = re.split(f"({'|'.join(_MARKERS)})", said)
    parts = [*(["<_user>", first] if first else []), *rest]
    messages = [{"role": _MARKERS[marker], "content": text} for marker, text in zip(parts[::2], parts[1::2])]
    return {"messages": [*messages, {"role": "assistant", "content": answer}], **record}


def _telechat2(record: Table) -> Table:
    return {"messages": record.pop("dialog"), **record}


# Each format, the keys by which it is known, and its reader, in the order in which they are looked for.
READERS: Mapping[str, tuple[tuple[str, ...], Callable[[Table], Table]]] = {
    "messages": (("messages",), dict),
    "sharegpt": (("conversations",), _sharegpt),
    "telechat2": (("dialog",), _telechat2),
    "alpaca": (("instruction", "output"), _alpaca),
    "telechat": (("input", "output"), _telechat),
}
DIALOGUES = frozenset({"dialogues", *READERS})  # formats whose records are dialogues


def from_record(
    record: object, format: str = "dialogues", how: DialogueConfig = DEFAULT_DIALOGUES, *, complete: bool = True
) -> list[Message]:
    r"""Returns the messages of a record, the system message among them, with the weights that `how` asks for.

    >>> from_record({"instruction": "Add.", "input": "1 + 1", "output": "2"})
    [{'role': 'user', 'content': 'Add.\n1 + 1'}, {'role': 'assistant', 'content': '2'}]

    Args:
      record: a JSON value.
      format: a key of READERS, or "dialogues" for the first of them whose keys the record has.
      how: `system` and `learned` of it count here.
      complete: whether the last message has to be an answer; otherwise a question, and nothing is learned.

    Raises:
      UserError: it is no record of a dialogue, or has a field that is not understood.
    """
    formats = [format] if format in READERS else list(READERS)
    found = [name for name in formats if isinstance(record, Mapping) and set(READERS[name][0]) <= set(record)]
    if not isinstance(record, Mapping) or not found:
        keys = ", or ".join(" and ".join(f'"{key}"' for key in READERS[name][0]) for name in formats)
        raise UserError(f"not a table with the key {keys}, as the format {format} asks for")
    if found[0] != "messages" and "messages" in record:
        raise UserError("the field 'messages' of the record is not understood; take it out, or the record")
    read = READERS[found[0]][1](dict(record))
    for field, value in read.items():
        if field not in _UNDERSTOOD and not is_blank(value):
            raise UserError(f"the field {field!r} of the record is not understood; take it out, or the record")
    messages = _messages(_list(read["messages"], "messages"))
    messages = _with_system(messages, read.get("system"), _tools(read.get("tools")), how.system)
    check(messages, complete=complete)
    if how.learned == "last" and complete:
        given = [
            message if message["role"] in ("system", "user") else {**_said(message), "weight": 0}
            for message in messages[:-1]
        ]
        messages = [*given, messages[-1]]
        check(messages)  # the last answer may say that it is not learned
    return messages


def _said(message: Message) -> Table:
    return {"role": message["role"], "content": message["content"]}


def _list(value: object, what: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{what} is not a list")
    return value


def _messages(said: Sequence[Any]) -> list[Message]:
    """Reads messages: joins parts, writes calls and what they return as text. What is left of them, `check` judges."""
    messages: list[Message] = []
    tool_before = False
    for i, entry in enumerate(said):
        if not isinstance(entry, Mapping):
            raise UserError(f'messages[{i}] is not a table of the strings "role" and "content"')
        message = {key: value for key, value in entry.items() if not is_blank(value)}
        message["content"] = _content(message.get("content"), f"messages[{i}].content")
        role = message.get("role")
        if role == "developer":
            message["role"] = "system"
        if role in ("assistant", "bot") and "tool_calls" in message:
            calls = _list(message.pop("tool_calls"), f"messages[{i}].tool_calls")
            written = [_call(call, f"messages[{i}].tool_calls[{j}]") for j, call in enumerate(calls)]
            message["content"] = "\n".join(filter(None, [message["content"], *written]))
        if role == "tool":
            message = _response(message, i)
            if tool_before:  # several calls are answered in one turn
                message["content"] = f"{messages.pop()['content']}\n{message['content']}"
        tool_before = role == "tool"
        messages.append(message)
    return messages


def _content(content: object, where: str) -> Any:
    """Returns a text, or the parts of a list joined; None becomes the empty text, which `check` refuses."""
    if not isinstance(content, list):
        return "" if content is None else content
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise UserError(f"{where}[{j}] is of the type {kind!r}; only parts of the type 'text' can be learned")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise UserError(f'{where}[{j}] is not {{"type": "text", "text": a string}}')
    return "".join(part["text"] for part in content)


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _call(call: object, where: str) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} is not a call of a function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: its arguments are not JSON") from None
    return _tagged("tool_call", _written({"name": function["name"], "arguments": arguments}))


def _called(content: str) -> str:
    """Returns the calls of a ShareGPT message: a JSON object or a list of them, or else the text itself."""
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError):
        return _tagged("tool_call", content)
    calls = calls if isinstance(calls, list) else [calls]
    return "\n".join(_call(call, f"function_call[{j}]") for j, call in enumerate(calls))


def _response(message: Mapping[str, Any], i: int) -> Table:
    name, content = message.get("name"), message["content"]
    if not isinstance(content, str):
        raise UserError(f"messages[{i}].content of a tool is not a string")
    rest = {key: value for key, value in message.items() if key not in ("name", "tool_call_id")}
    content = content if name is None else _written({"name": name, "content": content})
    return {**rest, "role": "user", "content": _tagged("tool_response", content)}


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>\n{text}\n</{tag}>"


def _tools(tools: object) -> str:
    """Returns the text of the tools of a record, a list or its JSON; "" where there are none."""
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UserError('"tools" is a string that is not JSON') from None
    if not tools:
        return ""
    described = _list(tools, "tools")
    for j, tool in enumerate(described):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"tools[{j}] is not the description of a function with a name")
    return _tagged("tools", "\n".join(map(_written, described)))


def _with_system(messages: list[Message], system: object, tools: str, default: str | None) -> list[Message]:
    """Puts the system message first: that of the record or of its messages, or else the default; then the tools."""
    if system is not None and not isinstance(system, str):
        raise UserError('"system" is not a string')
    first = messages[0] if messages and messages[0].get("role") == "system" else None
    if first is not None and system:
        raise UserError('there are two system messages: "system" and the first of the messages')
    if first is not None and not isinstance(first["content"], str):
        raise UserError("messages[0].content is not a string")
    said = "\n\n".join(filter(None, [first["content"] if first else system or default, tools]))
    if first is None:
        return [{"role": "system", "content": said}, *messages] if said else messages
    return [{**first, "content": said}, *messages[1:]]
