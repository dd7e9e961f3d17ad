"""The stages that look at one document at a time, with a page's thresholds, as functions on a batch's documents."""

from collections.abc import Callable, Mapping, Sequence

from tele_jax.clean import extract, language, ngrams, overlap, privacy, quality, rules, safety
from tele_jax.clean.document import Document, Drop, Tally
from tele_jax.clean.settings import CleanConfig

# Per document: what becomes of it, and what was changed: {reason: detail}.
Outcome = tuple[Document | Drop, Mapping[str, str]]
Apply = Callable[[Sequence[Document]], list[Outcome]]
LOCAL = ("extract", "language", "normalise", "rules", "quality", "perplexity", "overlap", "privacy", "safety")


def build(name: str, config: CleanConfig) -> Apply:
    """The function of a local stage; loads its models and word lists.

    Raises:
      UserError: a model or a list is missing or not what it should be.
    """
    table = getattr(config, name)
    if name == "extract":
        return _each(lambda d: extract.extract(d, table), "extracted")
    if name == "language":
        return _each(lambda d: language.language(d, table))
    if name == "normalise":
        return _each(lambda d: extract.normalise(d, table), "normalised")
    if name == "rules":
        return _each(lambda d: rules.rules(d, table))
    if name == "quality":
        classifier = quality.load(table.model)
        return lambda documents: [(o, {}) for o in quality.quality(documents, table, classifier)]
    if name == "perplexity":
        models = {tongue: ngrams.load(path) for tongue, path in table.models.items()}
        return _each(lambda d: ngrams.perplexity(d, table, models))
    if name == "overlap":
        benchmarks = overlap.load(table)
        return _each(lambda d: overlap.overlap(d, table, benchmarks))
    if name == "privacy":
        return lambda documents: [_masked(d, table) for d in documents]
    if name == "safety":
        words = safety.load(table)
        return _each(lambda d: safety.safety(d, table, words))
    raise ValueError(name)


def _each(function: Callable[[Document], Document | Drop], change: str | None = None) -> Apply:
    """A function of one document as one of a batch; a new text counts as a change of the name given."""

    def apply(documents: Sequence[Document]) -> list[Outcome]:
        outcomes = []
        for document in documents:
            result = function(document)
            changed = change and isinstance(result, Document) and result.text.strip() != document.text.strip()
            outcomes.append((result, {change: ""} if changed else {}))
        return outcomes

    return apply


def _masked(document: Document, config) -> Outcome:
    result, found = privacy.privacy(document, config)
    return result, {f"masked {kind}": f"{count} times" for kind, count in found.items()}


def account(stage: str, documents: Sequence[Document], outcomes: Sequence[Outcome]) -> tuple[list[Document], Tally]:
    """(the documents that stay, the account of the stage for this batch)."""
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
