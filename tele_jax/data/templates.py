"""Dialogue templates: what stands around questions and answers, as each family was released, and how it draws.

One table. A marker is a single id of the vocabulary, named in angle brackets as everywhere, or text that is spelled out
like any other. Which template a model has follows from its vocabulary where that has the markers; the models on the
vocabulary of Tele-FLM, which has none, are told apart by where they were imported from, or by name.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """The markers around the parts of a dialogue.

        start [system text] user question bot answer between user question bot answer end

    Attributes:
      name: in TEMPLATES.
      markers: whether start, user, bot, system and between are ids or text. `end` is always an id: what a reply ends
        with. Texts between ids are encoded apart from each other; where markers are text, they are encoded together
        with the question, and in a prompt together with all of the dialogue (encode_parts).
      start: what a dialogue begins with, once; "" for nothing.
      system: before a system message, which is the first message of a dialogue; "" for nothing; None: no place for one.
      user, bot, end: see above.
      between: after an answer that another question follows; "" for nothing. Learned if it is the same as end.
      strips: whether white space around a question is dropped.
      sampling: how it draws when asked to sample, keywords of generate.sampling.
      greedy: the same for when it is not asked: the released models take the likeliest token, after a repetition
        penalty.
    """

    name: str
    markers: Literal["ids", "text"] = "ids"
    start: str = ""
    system: str | None = "<_system>"
    user: str = "<_user>"
    bot: str = "<_bot>"
    end: str = "<_end>"
    between: str = "<_end>"
    strips: bool = False
    sampling: Mapping[str, Any]
    greedy: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _as_released(repetition_penalty: float) -> dict[str, Mapping[str, Any]]:
    """TeleChat's sampling, by generation_config.json of every size: only the penalty differs, and applies always."""
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
    )
}


@dataclasses.dataclass(frozen=True)
class Markers:
    """The markers of a template as ids of a vocabulary, as far as they are ids.

    Where they are text, only `end` has any. `system` is None where a system message has no place or no id.
    """

    start: list[int]
    system: list[int] | None
    user: list[int]
    bot: list[int]
    between: list[int]
    end: list[int]


@dataclasses.dataclass(frozen=True)
class Said:
    """Text that somebody wrote: markers in it are no markers."""

    text: str


def choose(vocabulary: Vocabulary, name: str | None = None, provenance: Iterable[Mapping[str, Any]] = ()) -> Template:
    """The template called `name`, or that of the checkpoint or the vocabulary.

    provenance: of the checkpoint; an import says its format there, and that of TeleChat-52B is a template as well.

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
    if (family := getattr(vocabulary, "family", None)) in TEMPLATES:
        return TEMPLATES[family]
    try:
        marker_ids(TEMPLATES["telechat"], vocabulary)
    except UserError as error:
        raise UserError(
            f"{error}, so nothing says how dialogues are written; the templates are {', '.join(TEMPLATES)}"
        ) from None
    return TEMPLATES["telechat"]


def marker_ids(template: Template, vocabulary: Vocabulary) -> Markers:
    """The template's markers as ids.

    Raises:
      UserError: the vocabulary has no such piece.
    """
    if template.markers == "text":
        system = None if template.system is None else []
        return Markers(start=[], system=system, user=[], bot=[], between=[], end=[vocabulary.id_of(template.end)])
    user, bot, end = [vocabulary.user_id], [vocabulary.bot_id], [vocabulary.end_id]
    start = [vocabulary.id_of(template.start)] if template.start else []
    try:
        system = None if template.system is None else [vocabulary.system_id]
    except UserError:  # said when a dialogue has one
        system = None
    return Markers(start=start, system=system, user=user, bot=bot, between=end, end=end)


def encode_parts(template: Template, vocabulary: Vocabulary, parts: Sequence[str | Said | list[int]]) -> list[int]:
    """The ids of a string that is made of the template's own text, of what somebody wrote, and of ids.

    The text is encoded as one string, as the released code does, so that its ids are those of the whole: pieces reach
    over the ends of the parts. Where markers are text, one that somebody typed is spelled with one of its letters in
    bytes: the same text in other ids than the marker's. Ids that are handed in stand where they are.

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
    """The place of the first letter that the marker itself does not have in bytes; mostly the first."""
    own = vocabulary.encode(marker)
    for place, letter in enumerate(marker):
        if not set(own).intersection(_in_bytes(vocabulary, letter)):
            return place
    raise UserError(f"tokenizer {vocabulary.path}: it has only bytes for {marker!r}, which text may not hold then")


def _in_bytes(vocabulary: Vocabulary, letter: str) -> list[int]:
    return [vocabulary.id_of(f"<0x{byte:02X}>") for byte in letter.encode()]


def stop_ids(template: Template, vocabulary: Vocabulary) -> list[int]:
    """What ends a reply. A model that goes on with the next question has finished its answer just as well."""
    markers = marker_ids(template, vocabulary)
    ends = {*markers.end, vocabulary.eos_id}
    if template.markers == "ids":
        ends |= {*markers.user, *markers.bot}
    return sorted(ends - {-1})
