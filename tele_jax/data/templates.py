"""Dialogue templates: the markers around questions and answers, as each family was released, and its sampling.

A marker is ids of the vocabulary, named in angle brackets, with text between them, or text that is encoded like any
other. The template of a model follows from its vocabulary where that has the markers. The models on the vocabulary of
Tele-FLM, which has none, are told apart by the release that they were imported from, or by name.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypedDict

from tele_jax.config import as_written, written_table
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.files import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """The markers around the parts of a dialogue.

        start [system text after_system] user question bot answer between user question bot answer end

    Attributes:
      name: key in TEMPLATES.
      markers: whether start, user, bot, system and between are ids or text. `end`, which ends a reply, is always an id,
        and what begins a marker of ids is an id.
        Texts between ids are encoded apart from each other; markers that are text are encoded together with the
        question, and in a prompt together with all of the dialogue (encode_parts).
      start: marker at the beginning of a dialogue; "" for nothing.
      system: marker before a system message, which comes first; "" for nothing; None: a system message is refused.
      user, bot, end: see above.
      after_system: marker after a system message.
      between: marker after an answer that another question follows; "" for nothing. If it begins with end, that is
        learned.
      strips: whether white space around a question is dropped.
      sampling: keywords of inference.sampling.sampling where a sample is asked for.
      greedy: the same keywords otherwise: the released models take the likeliest token, after a repetition penalty.
    """

    name: str
    markers: Literal["ids", "text"] = "ids"
    start: str = ""
    system: str | None = "<_system>"
    after_system: str = ""
    user: str = "<_user>"
    bot: str = "<_bot>"
    end: str = "<_end>"
    between: str = "<_end>"
    strips: bool = False
    sampling: Mapping[str, float]
    greedy: Mapping[str, float] = dataclasses.field(default_factory=dict)


class _Decoding(TypedDict):
    sampling: Mapping[str, float]
    greedy: Mapping[str, float]


def _as_released(repetition_penalty: float) -> _Decoding:
    """Returns TeleChat's sampling by generation_config.json, which is the same for every size but for the penalty."""
    penalty = {"repetition_penalty": repetition_penalty}
    return {"sampling": {"temperature": 0.3, "top_k": 5, "top_p": 0.85, **penalty}, "greedy": penalty}


TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        # Ours: TeleChat's, for a vocabulary that has the markers at other ids, as `tele tokenizer train` makes it.
        Template(name="telechat", sampling=_as_released(1.03)["sampling"]),
        # The released code of each size. No id for a system message is published.
        Template(name="telechat_7b", system=None, **_as_released(1.03)),
        Template(name="telechat_12b", **_as_released(1.01)),
        # Tele-AI/TeleChat2 on GitHub: deepspeed-telechat/utils/data/data_utils.py, and its code for MindSpore.
        # That a system message follows <_start> is ours: the released chat has no place for one.
        Template(name="telechat2", start="<_start>", **_as_released(1.03)),
        # Tele-AI/TeleChat-52B on GitHub: models/modeling_telechat.py (chat), models/generation_config.json,
        # vllm_inf/template_telechat.jinja (the system message, stripped), deepspeed-finetune (the last answer ends with
        # </s>).
        Template(name="telechat_52b", markers="text", system="", end="</s>", **_as_released(1.02)),
        # vllm-project/vllm, examples/template_teleflm.jinja, without the white space of its layout. It drops a system
        # message; here it is refused. The model card of CofeAI/FLM-2-52B-Instruct-2407 has the penalty, and draws
        # greedily.
        Template(
            name="tele_flm_instruct",
            markers="text",
            system=None,
            end="</s>",
            between="",
            strips=True,
            sampling={"repetition_penalty": 1.03},
            greedy={"repetition_penalty": 1.03},
        ),
        # ChatML, the form of many released models. Sampling: the model card of SmolLM2-Instruct, whose template adds a
        # system message where there is none; here it has to be given.
        Template(
            name="chatml",
            system="<|im_start|>system\n",
            after_system="<|im_end|>\n",
            user="<|im_start|>user\n",
            bot="<|im_end|>\n<|im_start|>assistant\n",
            between="<|im_end|>\n",
            end="<|im_end|>",
            sampling={"temperature": 0.2, "top_p": 0.9},
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Markers:
    """The markers of a template as ids of a vocabulary; only `end` has any where markers are text.

    `system` is None where a system message has no place or no id.
    """

    start: list[int]
    system: list[int] | None
    after_system: list[int]
    user: list[int]
    bot: list[int]
    between: list[int]
    end: list[int]


@dataclasses.dataclass(frozen=True)
class Said:
    """Text that a person or the model wrote: markers in it are plain text."""

    text: str


def choose(vocabulary: Vocabulary, name: str | None = None, provenance: Iterable[Table] = ()) -> Template:
    """Returns the template called `name`, or the one that the checkpoint or the vocabulary implies.

    Args:
      vocabulary: vocabulary of the model.
      name: key in TEMPLATES; None: the template of the vocabulary.
      provenance: provenance of the checkpoint; an import of TeleChat-52B implies its template.

    Raises:
      UserError: no such template; nothing says which it is.
    """
    name = name or getattr(vocabulary, "template", None)
    if name is not None:
        if name not in TEMPLATES:
            raise UserError(f"template {name!r} is not one of {', '.join(TEMPLATES)}")
        return TEMPLATES[name]
    formats = [entry.get("format") for entry in provenance if isinstance(entry, Mapping)]
    if "telechat_52b" in formats:
        return TEMPLATES["telechat_52b"]
    if released := TEMPLATES.get(getattr(vocabulary, "family", None) or ""):
        return released
    missing = None
    for implied in (TEMPLATES["telechat"], TEMPLATES["chatml"]):
        try:
            marker_ids(implied, vocabulary)
            return implied
        except UserError as error:
            missing = missing or error
    raise UserError(
        f"{missing}, so nothing says how dialogues are written; the templates are {', '.join(TEMPLATES)}"
    ) from None


def marker_ids(template: Template, vocabulary: Vocabulary) -> Markers:
    """Returns the markers of a template as ids.

    Raises:
      UserError: the vocabulary has no such piece.
    """
    if template.markers == "text":
        system, end = None if template.system is None else [], [vocabulary.id_of(template.end)]
        return Markers(start=[], system=system, after_system=[], user=[], bot=[], between=[], end=end)
    parts = (template.after_system, template.user, template.bot, template.between, template.end)
    after_system, user, bot, between, end = (_ids_of(part, vocabulary) for part in parts)
    start = _ids_of(template.start, vocabulary)
    try:
        system = None if template.system is None else _ids_of(template.system, vocabulary)
    except UserError:  # raised where a dialogue has a system message
        system = None
    return Markers(start=start, system=system, after_system=after_system, user=user, bot=bot, between=between, end=end)


_PIECE = re.compile(r"(<[^<>]+>)")
_KNOWN = {"<_user>": "user_id", "<_bot>": "bot_id", "<_end>": "end_id", "<_system>": "system_id"}  # to a Vocabulary


def _ids_of(marker: str, vocabulary: Vocabulary) -> list[int]:
    """Returns the ids of a marker: those of the pieces in angle brackets, and of the text between them."""
    ids: list[int] = []
    for part in filter(None, _PIECE.split(marker)):
        if part in _KNOWN:
            ids.append(getattr(vocabulary, _KNOWN[part]))
        else:
            ids += [vocabulary.id_of(part)] if part.startswith("<") else vocabulary.encode(part)
    return ids


def encode_parts(template: Template, vocabulary: Vocabulary, parts: Sequence[str | Said | list[int]]) -> list[int]:
    """Encodes a string that is made of the template's own text, of text that was written (Said), and of ids.

    The text is encoded as one string, as in the released code, so that pieces reach over the ends of the parts. Where
    markers are text, one that was typed is spelled with one of its letters in bytes: the same text, but not the ids of
    the marker. Ids stand where they are.

    Raises:
      UserError: a marker in the text that somebody wrote, and a vocabulary that has only bytes for all of its letters.
    """
    markers = [marker for marker in (template.user, template.bot, template.between) if marker]
    ids: list[int] = []
    run = ""  # text that is not encoded yet

    def encode_run() -> None:
        nonlocal run
        ids.extend(vocabulary.encode_continuation(run) if ids else vocabulary.encode(run))
        run = ""

    for part in parts:
        if isinstance(part, str):
            run += part
            continue
        if isinstance(part, list):
            encode_run()
            ids += part
            continue
        rest = part.text
        while template.markers == "text" and (found := [(rest.index(m), m) for m in markers if m in rest]):
            place, marker = min(found)
            place += _letter_apart(vocabulary, marker)
            run += rest[:place]
            if not run and not ids and vocabulary.adds_dummy_prefix:  # the space that every string begins with
                ids += vocabulary.encode_continuation(" ")
            encode_run()
            ids += _in_bytes(vocabulary, rest[place])
            rest = rest[place + 1 :]
        run += rest
    encode_run()
    return ids


def _letter_apart(vocabulary: Vocabulary, marker: str) -> int:
    """Returns the place of the first letter that the marker itself does not spell in bytes; mostly 0."""
    own = vocabulary.encode(marker)
    for place, letter in enumerate(marker):
        if not set(own).intersection(_in_bytes(vocabulary, letter)):
            return place
    raise UserError(f"tokenizer {vocabulary.path}: it has only bytes for {marker!r}, which text may not hold then")


def _in_bytes(vocabulary: Vocabulary, letter: str) -> list[int]:
    return [vocabulary.id_of(f"<0x{byte:02X}>") for byte in letter.encode()]


def stop_ids(template: Template, vocabulary: Vocabulary) -> list[int]:
    """Returns the ids that end a reply; a model that goes on with the next question has finished its answer, too."""
    markers = marker_ids(template, vocabulary)
    ends = {*markers.end, vocabulary.eos_id}
    if template.markers == "ids":
        ends |= {markers.user[0], markers.bot[0]}
    return sorted(ends - {-1})


def separator(vocabulary: Vocabulary) -> int:
    """Returns the id that ends every document in training, and so conditions the first token of the next one."""
    return vocabulary.eos_id


@dataclasses.dataclass(frozen=True)
class _Sampling:
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None


@dataclasses.dataclass(frozen=True)
class _Generation:
    """The field "generation" that an import writes into the provenance, see convert/release.py."""

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    sampling: _Sampling = _Sampling()
    document_start: int | None = None


def release_of(provenance: Sequence[Table]) -> Table | None:
    """Returns the provenance entry of the import that a model comes from, "generation" complete; None without one.

    Raises:
      DamageError: a field of the entry is not what an import writes.
    """
    for number, entry in reversed(list(enumerate(provenance))):
        if entry.get("kind") == "import":
            where, fields = f"provenance[{number}]", {"config": Table, "constants": dict[str, float]}
            written_table(entry, where, {"format": str, "prefix": str, **fields})
            generation = as_written(_Generation, entry.get("generation", {}), f"{where}.generation")
            sampling = {k: v for k, v in dataclasses.asdict(generation.sampling).items() if v is not None}
            return {**entry, "generation": dataclasses.asdict(generation) | {"sampling": sampling}}
    return None


def greedy_options(template: Template | None, released: Table | None) -> Table:
    """Keywords of sampling.sampling for the likeliest tokens: the repetition penalty of a release, or of a template.

    released: "generation" of `release_of`; where it says nothing about sampling, the template does.
    """
    if released and released["sampling"]:
        return {name: value for name, value in released["sampling"].items() if name == "repetition_penalty"}
    return {} if template is None else dict(template.greedy)


def document_start(vocabulary: Vocabulary, provenance: Sequence[Table]) -> int | None:
    """Returns the id that conditions the first token of a document in a model; None where nothing does.

    That is the separator for a model that was pretrained here, and else the token that the code of its release puts
    before a text, as the import noted. Fine-tuning on dialogues, which begin with their first marker, and growth do not
    change it.

    Args:
      vocabulary: vocabulary of the model.
      provenance: provenance of the checkpoint.

    Raises:
      DamageError: the entry of an import is not what was written.
    """
    kind = next((e["kind"] for e in reversed(provenance) if e.get("kind") in ("pretrain", "import")), None)
    if kind == "pretrain":
        return separator(vocabulary)
    release = release_of(provenance)
    return None if release is None else release["generation"]["document_start"]
