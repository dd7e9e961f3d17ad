"""Which language a document is in: en, zh, code or other.

CLD2 (pycld2, its tables inside the package) tells languages, code is told first, by its look: language identifiers call
code English.
"""

import re

from tele_jax.clean import hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import LanguageConfig
from tele_jax.extras import need

MAX_CHARS = 20_000  # looked at, from the beginning and the middle: more changes nothing but the time
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")  # CLD2 refuses these
# Lines that prose hardly has: ends as statements and blocks do, begins with a keyword and has its syntax, a call, an
# assignment, a comment or a tag on a line of its own.
_CODE_LINE = re.compile(
    r"""
    .*[{}]\s*$
    | \s*[\])}]+[;,]?\s*$
    | \s*(?:def|class)\s+\w+\s*[(:].*
    | \s*(?:import\s+[\w.]+(?:\s+as\s+\w+)?|from\s+[\w.]+\s+import\s.*)\s*$
    | \s*(?:if|elif|else|for|while|try|except|finally|with|return|raise|yield|assert|del|elseif)\b.*(?::|[)\]\w"'])\s*$
    | \s*(?:public|private|protected|static|const|let|var|func|fn|function|package|using|namespace|struct|enum|typedef)
      \s+[\w<>*&:]+.*
    | \s*\#\s*(?:include|define|ifdef|ifndef|endif|pragma)\b.*
    | \s*[\w.\[\]"'*&>-]+\s*(?:=|\+=|-=|:=|=>)\s*\S.*
    | \s*[\w.]+\(.*\)?[,;]?\s*$
    | \s*(?://|/\*|\*/|\#\s|\#!|--\s|@\w+).*
    | \s*</?\w[^>]*>\s*$
    | (?:\ {4,}|\t+)\S.*[(\[,:=]\s*$
    """,
    re.X,
)
_STRONG_LINE = re.compile(
    r".*[{}]\s*$|\s*(?:def|class)\s+\w+\s*[(:]|\s*\#\s*include\b|.*\w\(.*\)|.*[\w\]]\s*(?:=|==)\s*\S"
)
# Of a line that ends in a semicolon. Items of a list in prose end so too, so that the rest of the line has to look like
# code: a call, an assignment, an operator or an index; a call in GNU style; or few words, the first of them a keyword.
_SYNTAX = re.compile(
    r"""\w\(|[\w\])"']\s*[-+*/|&%^:]?=|->|::|\[\w*\]|[&*$@]\w|\+\+|--\w|<<|>>|^\s*[\w.>-]+\ \(.*\)\s*;$|^\s*[)\]}]""",
    re.X,
)
_DECLARES = re.compile(
    r"""\s*(?:return|break|continue|goto|throw|delete|import|package|using|use|let|var|const|static|extern|typedef|struct
    |class|enum|namespace|template|friend|virtual|explicit|inline|constexpr|extends|sub|require|no|shift|undef|die
    |int|char|float|double|void|bool|unsigned|signed|long|short|public|private|protected|final|my|our|end|begin|commit
    |[a-z]\w*_t)\b""",
    re.X,
)
MIN_CODE_LINES = 0.4  # of the lines that are not blank (ours; measured in docs/clean.md)
MIN_STRONG_LINES = 0.1


def looks_like_code(text: str) -> bool:
    """Whether most lines are shaped like code; at least three of them."""
    lines = [line for line in text[:MAX_CHARS].split("\n") if line.strip()]
    if len(lines) < 3:
        return False
    lines = [line[:400] for line in lines]
    if sum(len(line) for line in lines) / len(lines) > 120:
        return False
    statements = [_is_statement(line) for line in lines]
    shaped = sum(found or bool(_CODE_LINE.match(line)) for found, line in zip(statements, lines))
    strong = sum(found or bool(_STRONG_LINE.match(line)) for found, line in zip(statements, lines))
    return shaped >= MIN_CODE_LINES * len(lines) and strong >= MIN_STRONG_LINES * len(lines)


def _is_statement(line: str) -> bool:
    line = line.rstrip()
    if not line.endswith(";"):
        return False
    continues = line.count(")") > line.count("(")  # a call that began on a line before
    return continues or bool(_SYNTAX.search(line)) or (bool(_DECLARES.match(line)) and len(line.split()) <= 6)


def identify(text: str) -> tuple[str, str, float]:
    """(en, zh, code or other; CLD2's code of the language, or "code"; share of the text in it).

    Traditional Chinese is zh. A text too short for CLD2 is judged by its share of Han characters and kana.
    """
    if looks_like_code(text):
        return "code", "code", 1.0
    part = text if len(text) <= MAX_CHARS else text[: MAX_CHARS // 2] + "\n" + text[len(text) // 2 :][: MAX_CHARS // 2]
    part = _UNFIT.sub(" ", part)
    _, _, found = need("pycld2").detect(part, isPlainText=True, bestEffort=True)
    code = found[0][1]
    kind = {"en": "en", "zh": "zh", "zh-Hant": "zh"}.get(code, "other")
    # The two Chinese scripts share characters; their shares belong together.
    share = sum(p for _, c, p, _ in found if c == code or (kind == "zh" and c in ("zh", "zh-Hant"))) / 100
    # CLD2 takes classical Chinese for Japanese, and Chinese with its reading in pinyin for Vietnamese or for a mixture,
    # counting bytes. Without kana or hangul, a text of whose words at least half are Han characters is Chinese.
    if code != "en" and not re.search("[\u3040-\u30ff\uac00-\ud7af]", part):
        han = sum("\u3400" <= c <= "\u9fff" for c in part)
        words = len(hashing.tokens(part))
        if han and han >= 0.5 * words:
            return "zh", "zh", max(han / words, share if kind == "zh" else 0.0)
    return kind, code, share


def language(document: Document, config: LanguageConfig) -> Document | Drop:
    """Sets the language, unless the source names it, and drops what is in none of those to keep."""
    if document.language is None:
        kind, code, share = identify(document.text)
        if share < config.min_share:
            return Drop("mixed languages", f"{share:.0%} {code}")
        if kind not in config.keep:
            return Drop(f"language {code}" if kind == "other" else f"language {kind}", f"{share:.0%}")
        return document.replace(language=kind)
    if document.language not in config.keep:
        return Drop(f"language {document.language}", "as the page says")
    return document
