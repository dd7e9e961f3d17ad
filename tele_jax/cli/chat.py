"""tele chat CKPT: a conversation on the terminal, or over a pipe; with --message one question and its answer."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tele_jax.cli import generate
from tele_jax.errors import UserError

HELP = "talk to a fine-tuned model"
COMMANDS = """\
/reset         forget the conversation, keep the system message
/system TEXT   begin a new conversation with this system message; without TEXT, with none
/save FILE     add the conversation to FILE, one line of JSON that `tele train` can read as dialogues
/help          this list
/quit          end; so does the end of the input
A line that begins with a space is never a command. Ctrl-C stops an answer; it is forgotten with its question."""


def arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_model_arguments(parser)
    parser.add_argument("--message", "--prompt", metavar="TEXT", help="answer this one question, then exit")
    parser.add_argument("--system", metavar="TEXT", help="a message to the model before the conversation")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="per answer; default 1024, or half the context")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Talks until the input ends; returns the conversation, and count and speed of every answer."""
    from tele_jax.chat import Chat

    for flag in ("message", "system"):
        if getattr(args, flag) is not None:
            setattr(args, flag, generate.utf8(getattr(args, flag), f"--{flag}"))
    cfg, params, vocabulary, template = generate.load_model(args)
    chat = Chat(
        cfg,
        params,
        vocabulary,
        template=template,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        **generate.sampling_options(args, template),
    )
    replies: list[dict[str, Any]] = []
    if args.message is not None:
        _answer(chat, args.message, replies)
    else:
        _converse(chat, replies)
    return {"replies": replies, "messages": chat.messages}


def _converse(chat: Any, replies: list[dict[str, Any]]) -> None:
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
            elif line.strip():
                _answer(chat, line.strip(), replies)
        except UserError as error:  # of this line; the conversation goes on
            print(f"tele: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)


def _answer(chat: Any, question: str, replies: list[dict[str, Any]]) -> None:
    clock = generate.Clock()

    def show(text: str) -> None:
        clock.tick()
        generate.emit(text)

    chat.reply(question, on_text=show)
    generate.emit("\n")
    figures = clock.figures() | {"prompt_tokens": len(chat.prompt_tokens), "new_tokens": len(chat.reply_tokens)}
    generate.report(figures)
    replies.append(figures)


def _command(chat: Any, name: str, rest: str) -> None:
    system = chat.messages[0]["content"] if chat.messages and chat.messages[0]["role"] == "system" else None
    if name == "/reset":
        chat.reset(system)
    elif name == "/system":
        chat.reset(rest or None)
    elif name == "/save":
        if not rest:
            raise UserError("/save needs the name of a file")
        if len(chat.messages) < 2:
            raise UserError("there is nothing to save yet")
        try:
            with Path(rest).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{rest}: {error.strerror}") from None
        except (RuntimeError, ValueError) as error:  # ~nobody/, a name with a zero byte
            raise UserError(f"{rest!r}: {error}") from None
    elif name == "/help":
        print(COMMANDS)
    else:
        raise UserError(f"{name}: no such command; /help lists them, and a space before it sends the line as it is")


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
                print(f"tele: the line: not UTF-8 at byte {error.start}", file=sys.stderr)
            else:
                yield line
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8") from None
