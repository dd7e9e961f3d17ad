"""Texts continued by a model: several at once, or a file of prompts, whose continuations a later run can go on with."""

import codecs
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tele_jax import files
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, require
from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table
from tele_jax.inference.chat import TextStream, why_ended
from tele_jax.inference.generate import generate_scored

WINDOW = 16  # batches of a file among which prompts are sorted by length; a kill loses the work on as many at most
ANSWER = ("text", "prompt_tokens", "new_tokens", "ended", "logprobs")  # fields that a line of the output has of its own


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The continuation of a prompt.

    Attributes:
      text: up to the first stop string, which is left out.
      tokens: all tokens that were drawn, those of the stop string included, without the stop id.
      logprobs: float32[len(tokens)], log-probabilities of the tokens in nats, of the model before temperature, penalty
        and the choice among the likeliest.
      ended: "stop" (a stop string has come), or as in chat.Reply.
    """

    text: str
    tokens: list[int]
    logprobs: np.ndarray
    ended: Literal["eos", "stop", "length", "context"]


def continue_texts(
    cfg: ModelConfig,
    params: Params,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    continues: bool = True,
    on_text: Callable[[int, str], None] | None = None,
    **options: Any,
) -> list[Continuation]:
    """Continues each prompt until a stop string, a stop id or max_new_tokens.

    Args:
      prompts: token ids, one list per row, as `generate` takes them.
      stop: texts before which a continuation ends. Of several, the first that is complete counts.
      continues: the texts continue those of the prompts; False where they begin anew, as a reply in a dialogue.
      on_text: called as on_text(row, text) after every token with the text that is certain now and was not before,
        which may be none; together these are Continuation.text.
      options: stop_ids, seed, numbers and how tokens are drawn, as in generate.generate_scored.
    """
    streams = [TextStream(vocabulary, continues=continues, stop=stop) for _ in prompts]
    texts = [""] * len(prompts)

    def show(row: int, text: str) -> None:
        texts[row] += text
        if on_text is not None:
            on_text(row, text)

    def on_token(row: int, token: int) -> bool:
        show(row, streams[row].add(token))
        return streams[row].stopped

    at_once = bool(stop) or on_text is not None  # otherwise all tokens are drawn in one program
    options |= {"max_new_tokens": max_new_tokens, "on_token": on_token if at_once else None}
    outputs = generate_scored(cfg, params, prompts, **options)
    for row, (tokens, _) in enumerate(outputs):
        for token in () if at_once else tokens:
            on_token(row, token)
        if rest := streams[row].end():
            show(row, rest)
    found = []
    for text, stream, prompt, (drawn, logprobs) in zip(texts, streams, prompts, outputs, strict=True):
        ended = "stop" if stream.stopped else why_ended(cfg, prompt, drawn, max_new_tokens)
        found.append(Continuation(text, drawn, logprobs, ended))
    return found


def describe(continuation: Continuation, prompt: Sequence[int], vocabulary: Vocabulary, *, logprobs: bool) -> Table:
    """The fields ANSWER as JSON has them. A byte of a token that is part of a character is written by its number."""
    found = {"text": continuation.text, "prompt_tokens": len(prompt), "new_tokens": len(continuation.tokens)}
    found |= {"ended": continuation.ended}
    if logprobs:
        found["logprobs"] = [
            {"token": i, "text": vocabulary.spelled(i).decode(errors="backslashreplace"), "logprob": float(logprob)}
            for i, logprob in zip(continuation.tokens, continuation.logprobs, strict=True)
        ]
    return found


# ---- files of prompts ----------------------------------------------------------------------------------------------


def read_prompts(path: files.PathLike) -> list[Table]:
    """The lines of a file of prompts: each a table with "prompt", a text, or each with "messages", and other fields.

    Raises:
      UserError: naming the line: it is no such table, or has a field that its continuation is written to.
    """
    data = files.read_bytes(path, "prompts ").removeprefix(codecs.BOM_UTF8)
    require(not data.startswith(b"\x1f\x8b"), f"prompts {path}: is compressed; unpack it first")
    lines = data.removesuffix(b"\n").split(b"\n")
    require(bool(data), f"prompts {path}: is empty")
    records: list[Table] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        record = files.parse_json(line, where, UserError) if line.strip() else None
        if not isinstance(record, dict):
            raise UserError(f'{where}: not a table such as {{"prompt": "Once upon"}}')
        kinds = [kind for kind in ("prompt", "messages") if kind in record]
        require(len(kinds) == 1, f'{where}: must have either "prompt" or "messages"')
        require(kinds[0] in (records or [record])[0], f'{where}: has "{kinds[0]}", and line 1 has not; take two files')
        if kinds == ["prompt"]:
            good = isinstance(record["prompt"], str) and bool(record["prompt"])
            require(good, f"{where}: prompt is {record['prompt']!r}, not a text")
        taken = sorted(record.keys() & set(ANSWER))
        require(
            not taken, f"{where}: the field {''.join(taken[:1])!r} is kept for the continuation; give it another name"
        )
        try:
            _line(record)
        except UnicodeEncodeError:
            raise UserError(f"{where}: a text has half a surrogate pair, which no file in UTF-8 can hold") from None
        records.append(record)
    return records


def made_by(out: Path) -> Path:
    """The file beside `out` that says what `out` is made from."""
    return out.with_name(f"{out.name}.made_by.json")


def require_ours(out: Path) -> None:
    """Raises UserError where `out` exists and was not made by `continue_file`, or there is no place for it."""
    require(out.parent.is_dir(), f"--out {out}: there is no directory {out.parent}")
    require(os.access(out.parent, os.W_OK), f"--out {out}: {out.parent} cannot be written to")
    if os.path.lexists(out):
        size = files.require_regular(out, "--out ")
        known = size == 0 or made_by(out).exists()
        require(known, f"--out {out}: exists, and no {made_by(out).name} says what made it; choose another file")


def continue_file(
    out: Path,
    records: Sequence[Table],
    lengths: Sequence[int],
    answer: Callable[[list[int]], list[Table]],
    *,
    origin: Table,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> int:
    """Writes a line of JSON to `out` for every record: its fields, and those of its answer.

    Lines stand in the order of the records. They are computed in batches of records of like length, the same batches
    whenever the work goes on after a kill, so that the file is the same to the bit.

    Args:
      lengths: of the prompts in tokens, one a record.
      answer: returns the answers to the records of these indices, a batch.
      origin: what the answers depend on, names and values of JSON; is kept in `made_by(out)`.
      progress: called with (answers so far, all).

    Returns:
      The number of lines that `out` had before.

    Raises:
      UserError: `out` was made from something else, is being written by another process, or cannot be written.
      DamageError: a line of `out` does not belong to its record; the disk is full.
    """
    count, window = len(records), WINDOW * batch_size
    require_ours(out)
    message = f"--out {out}: is being written by another process"
    with files.held_alone(out.with_name(f".{out.name}.lock"), message):
        done = before = _goes_on(out, records, origin)
        progress(done, count)
        for start in range(done // window * window, count, window):
            by_length = sorted(range(start, min(start + window, count)), key=lambda i: lengths[i])
            batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
            answers: dict[int, Table] = {}
            for batch in sorted(batches, key=min):
                if max(batch) >= before:
                    answers |= zip(batch, answer(batch), strict=True)
                ready = list(itertools.takewhile(answers.__contains__, range(done, count)))
                files.append(out, b"".join(_line({**records[i], **answers[i]}) for i in ready))
                done += len(ready)
                progress(max(done, start + len(answers)), count)
    return before


def _goes_on(out: Path, records: Sequence[Table], origin: Table) -> int:
    """Number of complete lines of `out`, which were made from `origin`; what follows them is cut off."""
    data = out.read_bytes() if out.exists() else b""
    if not data:
        files.write_json(made_by(out), origin)
        files.append(out, b"")
        return 0
    known = files.read_json(made_by(out))
    known = known if isinstance(known, dict) else {}
    origin = json.loads(json.dumps(origin))
    names = [name for name in {**known, **origin} if known.get(name) != origin.get(name)]
    other = ", ".join(f"{name} was {known.get(name)!r} and is {origin.get(name)!r}" for name in names)
    require(not names, f"--out {out}: was made from something else ({other}); choose another file")
    lines = data.split(b"\n")[:-1]
    for number, line in enumerate(lines):
        found = files.parse_json(line, f"{out}:{number + 1}")
        record = records[number] if number < len(records) else None
        if record is None or not isinstance(found, dict) or record != {name: found.get(name) for name in record}:
            raise DamageError(f"{out}:{number + 1}: is not the answer to the prompt of this line; the file was changed")
    size = sum(len(line) + 1 for line in lines)
    if size < len(data):
        os.truncate(out, size)
    return len(lines)


def _line(record: Table) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
