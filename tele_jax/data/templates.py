"""Dialogue templates: what stands around questions and answers, as each family was released, and how it draws.

One table. A marker is a single id of the vocabulary, named in angle brackets as everywhere, or text that is spelled out
like any other. Which template a model has follows from its vocabulary where that has the markers; the models on the
vocabulary of Tele-FLM, which has none, are told apart by where they were imported from, or by name.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tele_jax.data.vocabulary import Vocabulary
from tele_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """What stands around the parts of a dialogue.

        [system text] user question bot answer between user question bot answer end

    Attributes:
      name: in TEMPLATES.
      markers: whether user, bot, system and between are ids or text. `end` is always an id: what a reply ends with.
      system: before a system message, which is the first thing in a dialogue; "" for nothing; None: no place for one.
      user, bot, end: see above.
      between: after an answer that another question follows; "" for nothing. Learned if it is the same as end.
      strips: whether white space around a question is dropped.
      sampling: how it draws when asked to sample, keywords of generate.sampling.
    """

    name: str
    markers: Literal["ids", "text"] = "ids"
    system: str | None = "<_system>"
    user: str = "<_user>"
    bot: str = "<_bot>"
    end: str = "<_end>"
    between: str = "<_end>"
    strips: bool = False
    sampling: Mapping[str, Any]


def _sampling(repetition_penalty: float) -> Mapping[str, Any]:
    """TeleChat's, generation_config.json of every size: only the penalty differs."""
    return {"temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": repetition_penalty}


TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        # Ours: TeleChat's, for a vocabulary that has the markers at other ids, as `tele tokenizer train` makes it.
        Template(name="telechat", sampling=_sampling(1.03)),
        # FACTS section 5. No id for a system message is published.
        Template(name="telechat_7b", system=None, sampling=_sampling(1.03)),
        Template(name="telechat_12b", sampling=_sampling(1.01)),
        # Tele-AI/TeleChat-52B on GitHub: models/modeling_telechat.py (chat), models/generation_config.json,
        # vllm_inf/template_telechat.jinja (the system message), deepspeed-finetune (the last answer ends with </s>).
        Template(name="telechat_52b", markers="text", system="", end="</s>", sampling=_sampling(1.02)),
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
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Markers:
    """A template in the ids of a vocabulary; `system` is None where a system message has no place or no id."""

    system: list[int] | None
    user: list[int]
    bot: list[int]
    between: list[int]
    end: list[int]


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
    if template.markers == "ids":
        user, bot, end = [vocabulary.user_id], [vocabulary.bot_id], [vocabulary.end_id]
        try:
            system = None if template.system is None else [vocabulary.system_id]
        except UserError:  # said when a dialogue has one
            system = None
        return Markers(system=system, user=user, bot=bot, between=end, end=end)
    return Markers(
        system=None if template.system is None else vocabulary.encode(template.system),
        user=vocabulary.encode(template.user),
        bot=vocabulary.encode(template.bot),
        between=vocabulary.encode(template.between),
        end=[vocabulary.id_of(template.end)],
    )


def encode_content(template: Template, vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids of what somebody said, in which nothing is a marker.

    Where markers are text, one that somebody typed is spelled with one of its letters in bytes: the same text in other
    ids than the marker's.

    Raises:
      UserError: a marker in the text, and a vocabulary that has only bytes for all of its letters.
    """
    if template.markers == "ids":
        return vocabulary.encode(text)
    markers = [marker for marker in (template.user, template.bot, template.between) if marker]
    ids = []
    rest = text
    while found := [(rest.index(marker), marker) for marker in markers if marker in rest]:
        place, marker = min(found)
        place += _letter_apart(vocabulary, marker)
        ids += vocabulary.encode(rest[:place]) if place else []
        ids += _in_bytes(vocabulary, rest[place])
        rest = rest[place + 1 :]
    return ids + vocabulary.encode(rest) if rest else ids


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
