"""`tele generate CKPT --prompt TEXT`: continues one prompt on the terminal as it is made, or several as a batch."""

import argparse
from typing import Any

from tele_jax.cli import models
from tele_jax.cli.verb import Outcome, flag
from tele_jax.config import ModelConfig
from tele_jax.data.templates import document_start, marker_ids
from tele_jax.inference.chat import TextStream, why_ended
from tele_jax.inference.generate import generate

MAX_NEW_TOKENS = 128


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--prompt TEXT", "text to continue; several become a batch", action="append", required=True)
    models.add_arguments(parser)
    flag(parser, "--max-new-tokens N", "most tokens to make; default: 128, or what the context leaves", int)


def run(args: argparse.Namespace) -> Outcome:
    """Prints the continuations, without the prompts; the figures are their counts and times."""
    asked = [models.utf8(text, "--prompt") for text in args.prompt]
    model = models.load_model(args, dialogues=False)
    cfg, vocabulary, template = model.cfg, model.vocabulary, model.template
    start = document_start(vocabulary, model.provenance)
    before = [] if start is None else [start]
    prompts = [before + vocabulary.encode(text) for text in asked]
    ends = ({vocabulary.eos_id} - {-1}) | set(model.stop_ids)
    if template is not None:  # a fine-tuned model may end with another one
        ends |= set(marker_ids(template, vocabulary).end)
    length = args.max_new_tokens or _default_length(cfg, max(map(len, prompts)))
    streams = [TextStream(vocabulary, continues=True) for _ in prompts]
    texts, clock = ["" for _ in prompts], models.Clock(len(prompts))

    def show(row: int, text: str) -> None:
        texts[row] += text
        if len(prompts) == 1:
            models.emit(text)

    def on_token(row: int, token: int) -> None:
        clock.tick()
        show(row, streams[row].add(token))

    how: dict[str, Any] = {"max_new_tokens": length, "stop_ids": sorted(ends), "seed": args.seed, "on_token": on_token}
    outputs = generate(cfg, model.params, prompts, **how, **model.options)
    for row, stream in enumerate(streams):
        show(row, stream.end())
    if len(prompts) == 1:
        models.emit("\n")
    else:
        for row, (prompt, text) in enumerate(zip(asked, texts, strict=True)):
            models.emit(f"--- {row + 1}: {' '.join(prompt.split())[:70]}\n{text}\n")
    speed = clock.figures()
    models.print_speed(speed)
    rows = [
        {"prompt": prompt, "text": text, "prompt_tokens": len(ids), "new_tokens": len(output)}
        | {"ended": why_ended(cfg, ids, output, length)}
        for prompt, text, ids, output in zip(asked, texts, prompts, outputs, strict=True)
    ]
    return Outcome(speed | {"document_start": start, "sampling": model.options, "continuations": rows})


def _default_length(cfg: ModelConfig, prompt: int) -> int:
    room = cfg.max_seq_len - prompt
    fits = room >= MAX_NEW_TOKENS or room < 1 or cfg.rope.ntk is not None  # below 1: the prompt alone is refused
    return MAX_NEW_TOKENS if fits else room
