"""tele generate CKPT --prompt TEXT: continues one prompt on the terminal as it is made, or several as a batch."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tele_jax.errors import UserError

HELP = "continue a prompt"
MAX_NEW_TOKENS = 128


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="given several times: continued as a batch"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default 128, or what the context leaves beside the prompt"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the continuations, without the prompts, and returns them with their counts and times."""
    from tele_jax.data.examples import document_start
    from tele_jax.data.templates import marker_ids
    from tele_jax.inference.chat import TextStream, why_ended
    from tele_jax.inference.generate import generate

    asked = [utf8(text, "--prompt") for text in args.prompt]
    model = load_model(args)
    cfg, vocabulary, template = model.cfg, model.vocabulary, model.template
    start = document_start(vocabulary, model.provenance)
    before = [] if start is None else [start]
    prompts = [before + vocabulary.encode(text) for text in asked]
    ends = ({vocabulary.eos_id} - {-1}) | set(model.stop_ids)
    if template is not None:  # a fine-tuned model may end with another one
        ends |= set(marker_ids(template, vocabulary).end)
    length = args.max_new_tokens or _default_length(cfg, max(map(len, prompts)))
    streams = [TextStream(vocabulary, continues=True) for _ in prompts]
    texts = ["" for _ in prompts]
    clock = Clock(len(prompts))

    def show(row: int, text: str) -> None:
        texts[row] += text
        if len(prompts) == 1:
            emit(text)

    def on_token(row: int, token: int) -> None:
        clock.tick()
        show(row, streams[row].add(token))

    outputs = generate(
        cfg,
        model.params,
        prompts,
        max_new_tokens=length,
        stop_ids=sorted(ends),
        seed=args.seed,
        on_token=on_token,
        **model.options,
    )
    for row, stream in enumerate(streams):
        show(row, stream.end())
    if len(prompts) == 1:
        emit("\n")
    else:
        for row, (prompt, text) in enumerate(zip(asked, texts, strict=True)):
            emit(f"--- {row + 1}: {' '.join(prompt.split())[:70]}\n{text}\n")
    speed = clock.figures()
    report(speed)
    rows = zip(asked, texts, prompts, outputs, strict=True)
    return speed | {
        "document_start": start,
        "sampling": model.options,
        "continuations": [
            {
                "prompt": prompt,
                "text": text,
                "prompt_tokens": len(ids),
                "new_tokens": len(output),
                "ended": why_ended(cfg, ids, output, length),
            }
            for prompt, text, ids, output in rows
        ],
    }


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What generate and chat share: the checkpoint, where it is put, how dialogues are written and tokens drawn."""
    from tele_jax.cli import meshes
    from tele_jax.data.templates import TEMPLATES

    parser.add_argument("ckpt", metavar="CKPT", help="a step, stage or work directory; of several steps, the latest")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="default: tokenizer.model or tokenizer.json in or above the checkpoint"
    )
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        metavar="NAME",
        help=f"how dialogues are written: {', '.join(TEMPLATES)}; default: as the tokenizer and the checkpoint say",
    )
    meshes.add_argument(parser)
    parser.add_argument(
        "--sample",
        action="store_true",
        help="draw as the model was released when asked to sample, TeleChat-7B with temperature 0.3, top-k 5, top-p "
        "0.85 and repetition penalty 1.03; without it the likeliest token is taken, of a released model after its "
        "repetition penalty, unless its generation_config.json has do_sample; a flag below replaces its value",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the likeliest token; default as released"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw among the K likeliest; default as released, or all"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest that sum to P; default as released, or all"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: avoid repeats; default as released, or 1"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws; default 0")


def sampling_options(
    args: argparse.Namespace, template: Any, released: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Keywords for generate.sampling: as the model was released, or with --sample as it draws then, and the flags.

    released: of the checkpoint's import, what generation_config.json says (convert/conventions.py); None where the
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
    """A model as `tele generate` and `tele chat` use it.

    Attributes:
      template: how dialogues are written; None where `tele generate` needs none and nothing says which it is.
      params: prepared (generate.prepare); with --mesh they lie on the mesh.
      options: keywords for generate.sampling.
      stop_ids: what ends a text, by the files of its release.
      provenance: of the checkpoint.
    """

    cfg: Any
    params: Any
    vocabulary: Any
    template: Any
    options: dict[str, Any]
    stop_ids: list[int]
    provenance: Sequence[Mapping[str, Any]]


def load_model(args: argparse.Namespace) -> Model:
    """The model of a command line; what is quick to find wrong is looked at first."""
    from tele_jax import checkpoint
    from tele_jax.cli import meshes
    from tele_jax.config import check_seed
    from tele_jax.data import templates
    from tele_jax.data.examples import release_of
    from tele_jax.data.vocabulary import load_vocabulary
    from tele_jax.growth.masks import require_unmasked
    from tele_jax.inference.chat import check_vocabulary, find_tokenizer
    from tele_jax.inference.generate import prepare, sampling

    check_seed(args.seed)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    mesh = meshes.open_mesh(args.mesh)
    vocabulary = load_vocabulary(find_tokenizer(args.ckpt, args.tokenizer))
    lazy = checkpoint.open_lazy(args.ckpt)
    check_vocabulary(lazy.cfg, vocabulary)
    release = release_of(lazy.provenance)
    released = None if release is None else release["generation"]
    drawing = released if released and released["sampling"] else None
    try:
        template = templates.choose(vocabulary, args.template, lazy.provenance)
    except UserError as error:
        if args.verb == "chat" or (args.sample and drawing is None):
            raise UserError(f"{error}: name it with --template") from None
        template = None
    options = sampling_options(args, template, drawing)
    sampling(**options)
    require_unmasked(lazy.provenance, args.ckpt)
    # Nothing here holds what is loaded, so that it does not lie beside what is made of it.
    params = prepare(lazy.cfg, checkpoint.load(args.ckpt, mesh, items=("params",)).params)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?", and goes on
    stop_ids = [i for i in released["eos_token_ids"] if 0 <= i < lazy.cfg.vocab_size] if released else []
    return Model(lazy.cfg, params, vocabulary, template, options, stop_ids, lazy.provenance)


def utf8(text: str, where: str) -> str:
    """The text of an argument; UserError where it is empty or not UTF-8, whatever the locale took it for."""
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

    def figures(self) -> dict[str, Any]:
        """Count and speed. Before the first token lies the prompt, and on a first call the compilation."""
        times, later = self._times, len(self._times) - self._rows
        return {
            "new_tokens": len(times),
            "seconds_to_first_token": times[0] - self._begin if times else None,
            "tokens_per_second": later / (times[-1] - times[0]) if later > 0 else None,
        }


def report(figures: dict[str, Any]) -> None:
    """One line about the speed on standard error, if that is a terminal."""
    if sys.stderr.isatty() and figures["tokens_per_second"]:
        print(f"{figures['new_tokens']} tokens, {figures['tokens_per_second']:.1f} tokens/s", file=sys.stderr)


def _default_length(cfg: Any, prompt: int) -> int:
    room = cfg.max_seq_len - prompt
    fits = room >= MAX_NEW_TOKENS or room < 1 or cfg.rope.ntk is not None  # below 1: the prompt alone is refused
    return MAX_NEW_TOKENS if fits else room
