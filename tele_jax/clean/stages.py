"""The stages that look at one document at a time, with a page's thresholds, as functions on a batch's documents."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tele_jax.clean import models, rules, screening, text
from tele_jax.clean.document import Document, Drop, Tally
from tele_jax.clean.settings import CleanConfig

# Per document: what becomes of it, and what was changed: {reason: detail}.
Outcome = tuple[Document | Drop, Mapping[str, str]]
Apply = Callable[[Sequence[Document]], list[Outcome]]


def _each(
    function: Callable[..., Document | Drop], *, load: Callable[[Any], Any] | None = None, change: str = ""
) -> Callable[[Any], Apply]:
    """Makes the maker of a stage from function(document, table of the page, what `load` read).

    load: reads the models or lists that the table names. change: what a new text counts as, where that is counted.
    """

    def make(table: object) -> Apply:
        loaded = () if load is None else (load(table),)

        def one(document: Document) -> Outcome:
            result = function(document, table, *loaded)
            changed = change and isinstance(result, Document) and result.text.strip() != document.text.strip()
            return result, {change: ""} if changed else {}

        return lambda documents: [one(document) for document in documents]

    return make


def _quality(table: Any) -> Apply:
    classifier = models.load_classifier(table.model)
    return lambda documents: [(result, {}) for result in models.quality(documents, table, classifier)]


def _masked(table: Any) -> Apply:
    def one(document: Document) -> Outcome:
        result, found = screening.privacy(document, table)
        return result, {f"masked {kind}": f"{count} times" for kind, count in found.items()}

    return lambda documents: [one(document) for document in documents]


_MAKERS: dict[str, Callable[[Any], Apply]] = {
    "extract": _each(text.extract, change="extracted"),
    "language": _each(text.language),
    "normalise": _each(text.normalise, change="normalised"),
    "rules": _each(rules.rules),
    "quality": _quality,
    "perplexity": _each(models.perplexity, load=models.load_all_ngrams),
    "overlap": _each(screening.overlap, load=screening.load_benchmarks),
    "privacy": _masked,
    "safety": _each(screening.safety, load=screening.load_words),
}
LOCAL = tuple(_MAKERS)


def build(name: str, config: CleanConfig) -> Apply:
    """The function of a stage in LOCAL; loads its models and word lists.

    Raises:
      UserError: a model or a list is missing or not what it should be.
    """
    return _MAKERS[name](getattr(config, name))


def account(stage: str, documents: Sequence[Document], outcomes: Sequence[Outcome]) -> tuple[list[Document], Tally]:
    """Returns the documents that stay, and the account of the stage for this batch."""
    kept, tally = [], Tally()
    for document, (result, changes) in zip(documents, outcomes, strict=True):
        tally.add((stage, document.source, "in", ""), document)
        if isinstance(result, Drop):
            tally.add((stage, document.source, "drop", result.reason), document, result.detail)
            continue
        kept.append(result)
        tally.add((stage, document.source, "out", ""), result)
        for reason, detail in changes.items():
            # Samples of masked text show the masks, never what was under them.
            tally.add((stage, document.source, "change", reason), document, detail, text=result.text)
    return kept, tally
