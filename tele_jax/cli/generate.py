"""`tele generate CKPT --prompt TEXT`: continues one prompt on the terminal as it is made, or several as a batch.

The flags and the loading of a model, and the flags of a mesh, serve other verbs too.
"""

import argparse
import dataclasses
import io
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from tele_jax import checkpoint
from tele_jax.axes import PyTree
from tele_jax.cli import Outcome, flag, switch
from tele_jax.config import ModelConfig, check_seed, from_dict
from tele_jax.data import templates
from tele_jax.data.templates import document_start, marker_ids, release_of
from tele_jax.data.vocabulary import Vocabulary, load_vocabulary
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.growth.masks import require_unmasked
from tele_jax.inference.chat import TextStream, check_vocabulary, find_tokenizer, why_ended
from tele_jax.inference.generate import generate, prepare
from tele_jax.inference.sampling import sampling
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh

MAX_NEW_TOKENS = 128


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--prompt TEXT", "text to continue; several become a batch", action="append", required=True)
    add_arguments(parser)
    flag(parser, "--max-new-tokens N", "most tokens to make; default: 128, or what the context leaves", int)


def run(args: argparse.Namespace) -> Outcome:
    """Prints the continuations, without the prompts; the figures are their counts and times."""
    asked = [utf8(text, "--prompt") for text in args.prompt]
    model = load_model(args, dialogues=False)
    cfg, vocabulary, template = model.cfg, model.vocabulary, model.template
    start = document_start(vocabulary, model.provenance)
    before = [] if start is None else [start]
    prompts = [before + vocabulary.encode(text) for text in asked]
    ends = ({vocabulary.eos_id} - {-1}) | set(model.stop_ids)
    if template is not None:  # a fine-tuned model may end with another one
        ends |= set(marker_ids(template, vocabulary).end)
    length = args.max_new_tokens or _default_length(cfg, max(map(len, prompts)))
    streams = [TextStream(vocabulary, continues=True) for _ in prompts]
    texts, clock = ["" for _ in prompts], Clock(len(prompts))

    def show(row: int, text: str) -> None:
        texts[row] += text
        if len(prompts) == 1:
            emit(text)

    def on_token(row: int, token: int) -> None:
        clock.tick()
        show(row, streams[row].add(token))

    how: dict[str, Any] = {"max_new_tokens": length, "stop_ids": sorted(ends), "seed": args.seed, "on_token": on_token}
    outputs = generate(cfg, model.params, prompts, **how, **model.options)
    for row, stream in enumerate(streams):
        show(row, stream.end())
    if len(prompts) == 1:
        emit("\n")
    else:
        for row, (prompt, text) in enumerate(zip(asked, texts, strict=True)):
            emit(f"--- {row + 1}: {' '.join(prompt.split())[:70]}\n{text}\n")
    speed = clock.figures()
    print_speed(speed)
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
    if released is not None:
        sampled, penalty = released["sampling"], released["sampling"].get("repetition_penalty")
        greedy = {} if penalty is None else {"repetition_penalty": penalty}
        default = sampled if args.sample or released["do_sample"] else greedy
    elif template is not None:
        default = template.sampling if args.sample else template.greedy
    else:
        default = {}
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
    """

    cfg: ModelConfig
    params: PyTree
    vocabulary: Vocabulary
    template: templates.Template | None
    options: Table
    stop_ids: list[int]
    provenance: Sequence[Table]


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
    params = prepare(lazy.cfg, checkpoint.load(args.ckpt, mesh, items=("params",)).params)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?", and goes on
    stop_ids = [i for i in released["eos_token_ids"] if 0 <= i < lazy.cfg.vocab_size] if released else []
    return Model(lazy.cfg, params, vocabulary, template, options, stop_ids, lazy.provenance)


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
