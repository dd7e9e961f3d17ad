"""`tele generate CKPT --prompt TEXT`: continues one prompt on the terminal as it is made, or several as a batch.

With --prompts FILE.jsonl it continues a file of prompts into a file of continuations, which a later run goes on with.
The flags and the loading of a model, and the flags of a mesh, serve other verbs too.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tele_jax import checkpoint
from tele_jax.axes import PyTree
from tele_jax.checkpoint import adapted
from tele_jax.cli import Outcome, Progress, flag, note, switch
from tele_jax.config import ModelConfig, check_seed, from_dict, to_dict
from tele_jax.data import dialogue, templates
from tele_jax.data.templates import document_start, marker_ids, release_of
from tele_jax.data.vocabulary import Vocabulary, load_vocabulary
from tele_jax.errors import UserError
from tele_jax.files import Json, Table
from tele_jax.growth.masks import require_unmasked
from tele_jax.inference.chat import check_vocabulary, find_tokenizer
from tele_jax.inference.generate import prepare
from tele_jax.inference.sampling import sampling
from tele_jax.inference.texts import continue_file, continue_texts, describe, read_prompts, require_ours
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh

MAX_NEW_TOKENS = 128
BATCH_SIZE = 8  # not published: ours


def arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    flag(what, "--prompt TEXT", "text to continue; several become a batch", action="append")
    lines = 'file of lines {"prompt": TEXT}, or {"messages": [...]} for dialogues; other fields are copied'
    flag(what, "--prompts FILE.jsonl", lines, Path)
    out = "file that gets a line per line of --prompts; where it has some of them, the work goes on after these"
    flag(parser, "--out FILE.jsonl", out, Path)
    flag(parser, "--batch-size N", f"prompts of --prompts that are continued together; default: {BATCH_SIZE}", int)
    flag(parser, "--stop TEXT", "text to end before; may be given several times", action="append", default=[])
    switch(parser, "--logprobs", "add the log-probability of every token to --out and --json")
    add_arguments(parser)
    flag(parser, "--max-new-tokens N", "most tokens to make; default: 128, or what the context leaves", int)


def run(args: argparse.Namespace) -> Outcome:
    """Prints the continuations, without the prompts, or writes --out; the figures are their counts and times."""
    args.stop = [utf8(text, "--stop") for text in args.stop]
    if args.prompts is not None:
        return _run_file(args)
    for name in ("out", "batch_size"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --prompts FILE.jsonl, not with --prompt")
    asked = [utf8(text, "--prompt") for text in args.prompt]
    model = load_model(args, dialogues=False)
    start = document_start(model.vocabulary, model.provenance)
    prompts = [_encode(model, {"prompt": text}) for text in asked]
    length = args.max_new_tokens or _default_length(model.cfg, max(map(len, prompts)))
    clock = Clock(len(prompts))

    def show(row: int, text: str) -> None:
        clock.tick()
        if len(prompts) == 1:
            emit(text)

    found = continue_texts(
        model.cfg, model.params, model.vocabulary, prompts, on_text=show, **_how(args, model, length)
    )
    if len(prompts) == 1:
        emit("\n")
    else:
        for row, (prompt, continuation) in enumerate(zip(asked, found, strict=True)):
            emit(f"--- {row + 1}: {' '.join(prompt.split())[:70]}\n{continuation.text}\n")
    speed = clock.figures() | {"new_tokens": sum(len(continuation.tokens) for continuation in found)}
    print_speed(speed)
    rows = [
        {"prompt": text, **describe(continuation, prompt, model.vocabulary, logprobs=args.logprobs)}
        for text, prompt, continuation in zip(asked, prompts, found, strict=True)
    ]
    return Outcome(speed | {"document_start": start, "sampling": model.options, "continuations": rows})


def _run_file(args: argparse.Namespace) -> Outcome:
    """Continues a file of prompts into --out; what is quick to find wrong is looked at first."""
    if args.out is None:
        raise UserError("--prompts needs --out FILE.jsonl, the file to write the continuations to")
    batch_size = BATCH_SIZE if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    records = read_prompts(args.prompts)
    require_ours(args.out)
    dialogues = "messages" in records[0]
    model = load_model(args, dialogues=dialogues)
    prompts, length = _fitting(args, model, records)
    how = _how(args, model, length, dialogues=dialogues)
    origin = {
        "checkpoint": _of_model(model.stored),
        "tokenizer": model.vocabulary.sha256[:16],
        "logprobs": args.logprobs,
    }
    origin |= {"prompts": _checksum([records, prompts]), **how}
    new_tokens, begin = 0, time.perf_counter()

    def answer(rows: list[int]) -> list[Table]:
        nonlocal new_tokens
        asked = [prompts[row] for row in rows]
        found = continue_texts(model.cfg, model.params, model.vocabulary, asked, numbers=rows, **how)
        new_tokens += sum(len(continuation.tokens) for continuation in found)
        pairs = zip(found, asked, strict=True)
        return [describe(one, prompt, model.vocabulary, logprobs=args.logprobs) for one, prompt in pairs]

    shown = Progress("generate", unit="prompts")
    lengths = [len(prompt) for prompt in prompts]
    before = continue_file(args.out, records, lengths, answer, origin=origin, batch_size=batch_size, progress=shown)
    seconds = time.perf_counter() - begin
    figures = {"out": str(args.out), "prompts": len(records), "prompts_before": before, "new_tokens": new_tokens}
    figures |= {"seconds": seconds, "tokens_per_second": new_tokens / seconds, "max_new_tokens": length}
    kept = f", {before:,} of them from before" if before else ""
    return Outcome(figures | {"sampling": model.options}, f"{len(records):,} continuations in {args.out}{kept}")


def _encode(model: "Model", record: Table) -> list[int]:
    """The ids of a prompt, after what stands before a document, or of a dialogue up to its next answer."""
    if "messages" in record:
        return dialogue.render_prompt(record["messages"], model.vocabulary, template=model.template)
    start = document_start(model.vocabulary, model.provenance)
    return ([] if start is None else [start]) + model.vocabulary.encode(record["prompt"])


def _fitting(args: argparse.Namespace, model: "Model", records: Sequence[Table]) -> tuple[list[list[int]], int]:
    """(ids of the prompts of a file, most new tokens of each); raises UserError with the line that does not fit."""
    prompts: list[list[int]] = []
    for number, record in enumerate(records, start=1):
        try:
            prompts.append(_encode(model, record))
        except UserError as error:
            raise UserError(f"{args.prompts}:{number}: {error}") from None
    line, longest = max(enumerate(map(len, prompts), start=1), key=lambda item: item[1])
    length = args.max_new_tokens or _default_length(model.cfg, longest)
    try:
        model.cfg.require_positions(longest + length)
    except UserError as error:
        fits = f"a prompt of {longest} tokens and {length} new ones (--max-new-tokens): {error}"
        raise UserError(f"{args.prompts}:{line}: {fits}") from None
    if args.max_new_tokens is None and length < MAX_NEW_TOKENS:
        note(f"{args.prompts}:{line}: its {longest} tokens leave room for {length} new ones, the most for every prompt")
    return prompts, length


def _how(args: argparse.Namespace, model: "Model", length: int, *, dialogues: bool = False) -> Table:
    """Keywords of continue_texts that decide what is drawn."""
    ends = ({model.vocabulary.eos_id} - {-1}) | set(model.stop_ids)
    if model.template is not None:  # a fine-tuned model may end with another one
        ends |= set(marker_ids(model.template, model.vocabulary).end)
        ends |= set(templates.stop_ids(model.template, model.vocabulary)) if dialogues else set()
    how = {"max_new_tokens": length, "stop_ids": sorted(ends), "stop": args.stop, "seed": args.seed}
    return how | {"continues": not dialogues, **model.options}


def _of_model(stored: checkpoint.Lazy) -> str:
    """A checksum of a model: of its config and the checksums of its parameters."""
    return _checksum([to_dict(stored.cfg), adapted.fingerprint(stored)])


def _checksum(value: Json) -> str:
    """The first 16 digits of the SHA-256 of a value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _default_length(cfg: ModelConfig, prompt: int) -> int:
    room = cfg.max_seq_len - prompt
    fits = room >= MAX_NEW_TOKENS or room < 1 or cfg.rope.ntk is not None  # below 1: the prompt alone is refused
    return MAX_NEW_TOKENS if fits else room


# ---- what `tele chat` and `tele plan` need as well -----------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that generate and chat share: the checkpoint, where it lies, dialogues and draws."""
    flag(parser, "ckpt CKPT", "step, stage or work directory; of several steps, the latest")
    flag(parser, "--tokenizer FILE", "default: tokenizer.model or tokenizer.json in or above the checkpoint")
    known = ", ".join(templates.TEMPLATES)
    form = f"format of dialogues: {known}; default: as the tokenizer and the checkpoint say"
    flag(parser, "--template NAME", form, choices=templates.TEMPLATES)
    mesh = "devices to spread the model over: tensor=4, or data=2,tensor=4, as config.mesh; default: one device"
    flag(parser, "--mesh AXIS=N,...", mesh)
    sample = (
        "draw as the model was released to sample; default: the likeliest token (of a released model after its "
        "repetition penalty), unless its generation_config.json has do_sample; a flag below replaces its value"
    )
    switch(parser, "--sample", sample)
    flag(parser, "--temperature T", "temperature; 0 takes the likeliest token; default: as released", float)
    flag(parser, "--top-k K", "number of likeliest tokens to draw among; default: as released, or all", int)
    flag(parser, "--top-p P", "sum of the likeliest to draw among; default: as released, or all", float)
    flag(parser, "--repetition-penalty R", "factor above 1 against repeats; default: as released, or 1", float)
    flag(parser, "--seed N", "seed of the draws; default: 0", int, default=0)


def parse_mesh(text: str) -> MeshConfig:
    """The MeshConfig that `text` describes, e.g. "fsdp=2,tensor=4"; raises UserError for anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not (size.isascii() and size.isdecimal()):
            raise UserError(f"--mesh {text}: expected AXIS=SIZE,... with data, fsdp and tensor: fsdp=64,tensor=2")
        if axis.strip() in sizes:
            raise UserError(f"--mesh {text}: gives {axis.strip()} twice")
        sizes[axis.strip()] = int(size)
    return from_dict(MeshConfig, sizes, "--mesh")


def open_mesh(text: str | None) -> jax.sharding.Mesh | None:
    """The mesh over the first devices, as many as it takes; None for None.

    Raises:
      UserError: not understood, or more devices than there are.
    """
    if text is None:
        return None
    config = parse_mesh(text)
    count = math.prod(dataclasses.asdict(config).values())
    if count > len(jax.devices()):
        raise UserError(f"--mesh {text}: takes {count} devices, but there are {len(jax.devices())}")
    return make_mesh(config, jax.devices()[:count])


def sampling_options(args: argparse.Namespace, template: Any, released: Table | None = None) -> Table:
    """Keywords for sampling.sampling: as the model was released, or with --sample as it draws then, and the flags.

    released: of the checkpoint's import, what generation_config.json says (convert/release.py); None where the
      model does not come from a release that says something: then the template's family does.
    """
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if released is not None and (args.sample or released["do_sample"]):
        default = released["sampling"]
    elif released is None and template is not None and args.sample:
        default = template.sampling
    else:
        default = templates.greedy_options(template, released)
    return dict(default) | given


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model and how it generates.

    Attributes:
      template: how dialogues are written; None where `tele generate` needs none and nothing says which it is.
      params: prepared (generate.prepare); with --mesh they lie on the mesh.
      options: keywords for sampling.sampling.
      stop_ids: what ends a text, by the files of its release.
      provenance: of the checkpoint.
      stored: the checkpoint.
    """

    cfg: ModelConfig
    params: PyTree
    vocabulary: Vocabulary
    template: templates.Template | None
    options: Table
    stop_ids: list[int]
    provenance: Sequence[Table]
    stored: checkpoint.Lazy


def load_model(args: argparse.Namespace, *, dialogues: bool) -> Model:
    """The model of a command line; what is quick to find wrong is looked at first.

    dialogues: a template is needed.
    """
    check_seed(args.seed)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    mesh = open_mesh(args.mesh)
    vocabulary = load_vocabulary(find_tokenizer(args.ckpt, args.tokenizer))
    lazy = checkpoint.open_lazy(args.ckpt)
    check_vocabulary(lazy.cfg, vocabulary)
    release = release_of(lazy.provenance)
    released = None if release is None else release["generation"]
    drawing = released if released and released["sampling"] else None
    try:
        template = templates.choose(vocabulary, args.template, lazy.provenance)
    except UserError as error:
        if dialogues or (args.sample and drawing is None):
            raise UserError(f"{error}: name it with --template") from None
        template = None
    options = sampling_options(args, template, drawing)
    sampling(**options)
    require_unmasked(lazy.provenance, args.ckpt)
    # Nothing here holds what is loaded, so that it does not lie beside what is made of it.
    params = prepare(lazy.cfg, checkpoint.load(lazy.path, mesh, items=("params",)).params)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?", and goes on
    stop_ids = [i for i in released["eos_token_ids"] if 0 <= i < lazy.cfg.vocab_size] if released else []
    return Model(lazy.cfg, params, vocabulary, template, options, stop_ids, lazy.provenance, lazy)


def utf8(text: str, where: str) -> str:
    """The text of an argument; raises UserError where it is empty or not UTF-8, whatever the locale took it for."""
    if not text:
        raise UserError(f"{where} is empty")
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None


def emit(text: str) -> None:
    """Prints at once, without a line end."""
    if text:
        print(text, end="", flush=True)


class Clock:
    """Times of the tokens of one call of generate."""

    def __init__(self, rows: int = 1):
        self._rows = rows
        self._begin = time.perf_counter()
        self._times: list[float] = []

    def tick(self) -> None:
        """Counts a token."""
        self._times.append(time.perf_counter())

    def figures(self) -> Table:
        """Count and speed. Before the first token lies the prompt, and on a first call the compilation."""
        times, later = self._times, len(self._times) - self._rows
        return {
            "new_tokens": len(times),
            "seconds_to_first_token": times[0] - self._begin if times else None,
            "tokens_per_second": later / (times[-1] - times[0]) if later > 0 else None,
        }


def print_speed(figures: Table) -> None:
    """Prints a line about the speed on standard error, if that is a terminal."""
    if sys.stderr.isatty() and figures["tokens_per_second"]:
        print(f"{figures['new_tokens']} tokens, {figures['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
