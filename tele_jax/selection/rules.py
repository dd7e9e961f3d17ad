"""Rules that a sample must not break, on each of its answers: named, and counted by name.

Lengths, repetition and languages are measured by the functions of the cleaning room. An answer is judged only where it
is learned: what a mark excludes is context.
"""

from collections.abc import Iterator

from tele_jax.clean import hashing, stages, text
from tele_jax.clean.document import Drop
from tele_jax.clean.settings import EN, ZH, RuleConfig
from tele_jax.data.messages import weight_of
from tele_jax.selection.samples import Sample
from tele_jax.selection.settings import RulesConfig

MIN_LANGUAGE_TOKENS = 8  # fewer do not tell a language, but by the script they are written in
MIN_LATIN_TOKENS = 3  # fewer may be a name, of which any language may speak
_CONFLICTS = {("en", "zh"), ("en", "other"), ("zh", "en"), ("zh", "other"), ("latin", "zh")}  # asked, answered
MIN_OTHER_TOKENS, MIN_OTHER_SHARE = 20, 0.9  # before an answer counts as in a language that is neither en nor zh
MIN_SENTENCE_TOKENS = 12  # an answer with fewer may be a name, a number or a list, without an end
_ENDS = tuple(".!?。！？…;；\"'”’」』》〉）)]】}>`*~～|_")
_OPEN_ENDS = tuple(",，、:：(（[【{《“「『=+&\\")  # what follows is missing
_DANGLING = (  # after which an English sentence goes on
    " the a an of to in on at by for with from and or but that which who whose is are was were be been has have had as "
    "if when because than into its their his her this these those not will would can could may "
)
_BETWEEN = ("。", "！", "？", ". ", "! ", "? ", ".\n")  # sentences
_PAIRS = ("()", "[]", "{}", "（）", "【】", "《》", "“”", "「」")
_REPETITION = {
    name: RuleConfig(max_top_ngram=table.max_top_ngram, max_duplicate_ngrams=table.max_duplicate_ngrams)
    for name, table in (("en", EN), ("zh", ZH))
}
MIN_REPETITION_TOKENS = 50  # Gopher's least length of a text: in fewer tokens a title that is repeated is a large share


def language(value: str, tokens: int) -> str:
    """Returns en, zh, code or other; of a text too short to tell "latin" by its script, or ""."""
    chars = hashing.characters(value)
    han, words = int(hashing.is_unspaced(chars).sum()), int(hashing.is_word(chars).sum())
    if tokens < MIN_LANGUAGE_TOKENS:
        latin = tokens >= MIN_LATIN_TOKENS and value.isascii() and any(map(str.isalpha, value))
        return "zh" if words >= 4 and han == words else "latin" if latin else ""
    if 2 * han > tokens:
        return "zh"
    kind, _, share = text.identify(value)
    if kind == "other" and (tokens < MIN_OTHER_TOKENS or share < MIN_OTHER_SHARE):
        return ""
    return kind


def violations(sample: Sample, config: RulesConfig) -> Iterator[Drop]:
    """Yields every rule that the sample breaks, with the figure."""
    messages = list(sample.messages or ())
    answers = [m for m in messages if m["role"] in ("assistant", "bot")]
    turns = [turn for turn, answer in zip(sample.turns(), answers, strict=True) if weight_of(answer)]
    question, answer = lengths(sample)
    for what, count in (("question", question), ("answer", answer)):
        low, high = (getattr(config, f"{end}_{what}_tokens") for end in ("min", "max"))
        if count < low:
            yield Drop(f"short {what}", f"{count} < {low} tokens")
        if count > high:
            yield Drop(f"long {what}", f"{count} > {high} tokens")
    for asked, answered in turns:
        yield from _of_answer(asked, answered, sample.category, config)


def lengths(sample: Sample) -> tuple[int, int]:
    """Returns the tokens of the system message and all questions, and of all answers."""
    turns = sample.turns()
    return tuple(sum(len(hashing.tokens(part)) for part in parts) for parts in zip(*turns, strict=True))  # pyright: ignore[reportReturnType]


def _of_answer(asked: str, answered: str, category: str, config: RulesConfig) -> Iterator[Drop]:
    hashes, tokens = hashing.tokens(asked), hashing.tokens(answered)
    found = language(answered, len(tokens))
    if config.same_language and category not in config.any_language:
        expected = language(asked, len(hashes))
        if (expected, found) in _CONFLICTS:
            yield Drop("another language", f"{expected} asked, {found} answered")
    if config.echo and len(hashes) == len(tokens) and (hashes == tokens).all() and len(tokens):
        yield Drop("echo", "the answer is its question")
    lower = answered.lower().lstrip()
    for phrase in config.refusals:
        if lower.startswith(phrase.lower()):
            yield Drop("refusal", phrase)
            break
    judged = config.truncated and category not in config.any_end
    if judged and (why := truncated(answered, len(tokens), found == "code")):
        yield Drop("truncated", why)
    if config.repetition and found in _REPETITION and len(tokens) >= MIN_REPETITION_TOKENS:
        for broken in stages.violations(answered, found, _REPETITION[found]):
            yield Drop("repetition", f"{broken.reason} {broken.detail}")
            break


def truncated(answer: str, tokens: int, is_code: bool) -> str:
    """Returns why an answer seems to end before its end, or "".

    >>> truncated("It was built in 1889, and", 6, False), truncated("Paris", 1, False)
    ('ends with "and"', '')

    A bracket or fence that was not closed; a mark or a word after which something has to follow; prose of
    MIN_SENTENCE_TOKENS or more, or of several sentences, whose last one has no end. Code has only the first two.
    """
    end = answer.rstrip()
    if end.count("```") % 2:
        return "a fence ``` is open"
    for opening, closing in _PAIRS:
        if _is_open(end, opening, closing):
            return f"{opening} is open"
    if end.endswith(_OPEN_ENDS):
        return f"ends with {end[-1:]!r}"
    if is_code or end.endswith(_ENDS):
        return ""
    last = end.split()[-1:]
    if last and f" {last[0]} " in _DANGLING and tokens > 2:
        return f'ends with "{last[0]}"'
    inside = tokens >= MIN_SENTENCE_TOKENS // 2 and any(mark in end[:-1] for mark in _BETWEEN)
    return "the last sentence has no end" if inside or tokens >= MIN_SENTENCE_TOKENS else ""


def _is_open(value: str, opening: str, closing: str) -> bool:
    """Tells whether a bracket is not closed. One that closes nothing, as in "a)", does not count."""
    if opening not in value:
        return False
    depth = 0
    for character in value:
        depth = depth + 1 if character == opening else max(depth - 1, 0) if character == closing else depth
    return depth > 0
