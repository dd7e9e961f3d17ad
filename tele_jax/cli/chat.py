"""`tele chat CKPT`: a conversation on the terminal, or over a pipe; with --message one question and its answer."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tele_jax.cli import Outcome, flag, generate, note
from tele_jax.errors import UserError
from tele_jax.files import Table, require_regular
from tele_jax.inference.chat import Chat, Reply

COMMANDS = """\
/reset         forget the conversation, keep the system message
/system TEXT   begin a new conversation with this system message; without TEXT, with none
/save FILE     add the conversation to FILE, one line of JSON that `tele train` can read as dialogues
/help          this list
/quit          end; so does the end of the input
A line that begins with a space is never a command. Ctrl-C stops an answer; it is forgotten with its question."""


def arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_arguments(parser)
    flag(parser, "--message, --prompt TEXT", "one question to answer before the exit")
    flag(parser, "--system TEXT", "message to the model before the conversation; default: none")
    flag(parser, "--max-new-tokens N", "most tokens of an answer; default: 1024, or half the context", int)


def run(args: argparse.Namespace) -> Outcome:
    """Talks until the input ends; the figures are the conversation, and count and speed of every answer."""
    message, system = (
        None if text is None else generate.utf8(text, flag)
        for flag, text in (("--message", args.message), ("--system", args.system))
    )
    model = generate.load_model(args, dialogues=True)
    how: dict[str, Any] = {"template": model.template, "stop_ids": model.stop_ids, **model.options}
    how |= {"system": system, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    chat = Chat(model.cfg, model.params, model.vocabulary, **how)
    stage = _last_on_plain_text(model.provenance)
    if stage is not None:
        note(
            f"{args.ckpt} was last trained on plain text (stage {stage}), not on dialogues: expect it to continue "
            "text rather than to answer"
        )
    replies: list[Table] = []
    if message is not None:
        _answer(chat, message, replies, set())
    else:
        _converse(chat, replies)
    figures = {"replies": replies, "messages": chat.messages, "template": chat.template.name}
    return Outcome(figures | {"sampling": model.options, "trained_on_dialogues": stage is None})


def _last_on_plain_text(provenance: Sequence[Table]) -> str | None:
    """The stage of pretraining that no fine-tuning and no import came after; None where there is none."""
    kinds = ("import", "pretrain", "sft")
    last = next((entry for entry in reversed(provenance) if entry.get("kind") in kinds), {})
    return last.get("stage", "pretrain") if last.get("kind") == "pretrain" else None


def _converse(chat: Chat, replies: list[Table]) -> None:
    printed: set[str] = set()
    if sys.stdin.isatty():
        print("/help lists the commands.", file=sys.stderr)
    for line in _lines():
        try:
            line = generate.utf8(line, "the line") if line else line
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                if name == "/quit":
                    return
                _command(chat, name, rest.strip())
                if name in ("/reset", "/system"):
                    printed.clear()
            elif line.strip():
                _answer(chat, line.strip(), replies, printed)
        except UserError as error:  # of this line; the conversation goes on
            note(error)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)


def _answer(chat: Chat, question: str, replies: list[Table], printed: set[str]) -> None:
    """Prints the answer as it comes, and notes on it on standard error; notes that were `printed` before are not."""
    clock = generate.Clock()

    def show(text: str) -> None:
        clock.tick()
        generate.emit(text)

    chat.reply(question, on_text=show)
    generate.emit("\n")
    reply = chat.last
    assert reply is not None
    figures = {"prompt_tokens": len(reply.prompt.tokens), "new_tokens": len(reply.tokens), "ended": reply.ended}
    figures |= {name: getattr(reply.prompt, name) for name in ("dropped_turns", "cut_question", "dropped_system")}
    replies.append(clock.figures() | figures | {"remembered": reply.remembered})
    generate.print_speed(replies[-1])
    for line in _notes(chat, reply):
        if line not in printed:
            printed.add(line)
            note(line)


def _notes(chat: Chat, reply: Reply) -> list[str]:
    """Lines on what happened to the last reply and does not show in its text."""
    room = f"beside an answer of {chat.max_new_tokens:,} tokens in the model's context of {chat.max_seq_len:,}"
    happened = {
        f"the conversation does not fit {room}: its oldest turns are left out from here on": reply.prompt.dropped_turns,
        f"the question does not fit {room}: its beginning is left out": reply.prompt.cut_question,
        f"the system message does not fit {room}: it is left out": reply.prompt.dropped_system,
        "the answer is empty: it and its question are left out of the conversation": not reply.remembered,
        f"the answer was cut after {chat.max_new_tokens:,} tokens (--max-new-tokens)": reply.ended == "length",
        f"the answer was cut: it fills the model's context of {chat.max_seq_len:,} tokens": reply.ended == "context",
    }
    return [line for line, did in happened.items() if did]


def _command(chat: Chat, name: str, rest: str) -> None:
    system = chat.messages[0]["content"] if chat.messages and chat.messages[0]["role"] == "system" else None
    if name == "/reset":
        chat.reset(system)
    elif name == "/system":
        chat.reset(rest or None)
    elif name == "/save":
        _save(chat, rest)
    elif name == "/help":
        print(COMMANDS)
    else:
        raise UserError(f"{name}: no such command; /help lists them, and a space before it sends the line as it is")


def _save(chat: Chat, name: str) -> None:
    if not name:
        raise UserError("/save needs the name of a file")
    if len(chat.messages) < 2:
        raise UserError("there is nothing to save yet")
    try:
        target = Path(name).expanduser()
        if target.exists():
            require_regular(target)
        with target.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:  # ~nobody/, a name with a zero byte
        raise UserError(f"{name!r}: {error}") from None


def _lines() -> Iterator[str]:
    """The lines of standard input; on a terminal with a prompt and editing."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its editing and history
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # aimed at an answer that ended just before, or at what is typed
                print("\n(Ctrl-D or /quit ends)", file=sys.stderr)
            except UnicodeDecodeError as error:
                note(f"the line: not UTF-8 at byte {error.start}")
            else:
                yield line
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8") from None
