"""The text of a document: taken from HTML, brought into one form of Unicode, and its language identified.

resiliparse extracts: of the libraries that find the main content it is the one fast enough for a crawl, and DataComp-LM
(arXiv 2406.11794, section 4.2) found models trained on its text as good as on trafilatura's, at an eighth of the time.
CLD2 (pycld2, its tables inside the package) tells languages. Code is told first, by its look, for language identifiers
call it English.
"""

import re
import unicodedata
from typing import Any

from tele_jax.clean import hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import ExtractConfig, LanguageConfig, NormaliseConfig
from tele_jax.extras import need


def extract(document: Document, config: ExtractConfig) -> Document | Drop:
    """The text of a page; documents that are no HTML pass."""
    if not document.html:
        return document
    parse = need("resiliparse.extract.html2text").extract_plain_text
    tree = need("resiliparse.parse.html").HTMLTree.parse(document.text)
    text = parse(tree, main_content=config.main_content, alt_texts=False).strip()
    if config.main_content and "<pre" in document.text.lower() and _keep_listings(tree, text):
        text = parse(tree, main_content=True, alt_texts=False).strip()
    if len(text) < config.min_chars:
        return Drop("no text in page", f"{len(text)} characters")
    return document.replace(text=text, html=False)


_NAVIGATION = frozenset(("nav", "header", "footer", "aside", "form"))
MAX_WRAPPER = 0.5  # of a page's text: an element with more is the page, and its marks are left alone (ours)


def _keep_listings(tree: Any, text: str) -> bool:
    """Unmarks, in the tree, what keeps preformatted text out of the main content; whether there was any.

    The search for the main content goes by the names of classes: what is called "section" or "sidebar" goes as a whole,
    with the listings in it. A listing is seldom navigation, so the elements around one lose the marks that they are
    judged by; not those that say by their tag that they are navigation.
    """
    kept = {line.strip() for line in text.split("\n")}
    size = len(tree.body.text) if tree.body is not None else 0
    found = False
    for listing in tree.document.query_selector_all("pre"):
        lines = [line.strip() for line in listing.text.split("\n")]
        if all(line in kept for line in lines if line):
            continue
        around, parent = [], listing.parent
        while parent is not None and parent.tag not in ("body", "html", ""):
            around.append(parent)
            parent = parent.parent
        if any(element.tag in _NAVIGATION for element in around):
            continue
        for element in around:
            if len(element.text) > MAX_WRAPPER * size:
                break
            for mark in ("class", "id"):
                if mark in (element.attrs or ()):
                    del element[mark]
                    found = True
    return found


# C0 and C1 controls without tab, line and form feed, deletion, byte order marks inside, noncharacters U+FFFE, U+FFFF.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\u00ad]")  # zero-width, bidi, soft hyphen
_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")  # all but U+3000, which indents Chinese paragraphs
_TRAILING = re.compile(r"[ \t]+$", re.M)
_BLANK_LINES = re.compile(r"\n{3,}")


def normalise(document: Document, config: NormaliseConfig) -> Document:
    """One form of the same text.

    Line ends become line feeds and control characters go; of prose also: Unicode NFC, invisible characters go, exotic
    spaces become plain, no spaces at line ends, at most one blank line. White space of code is syntax: none of it is
    touched, and neither are its characters' forms (a string literal may need them).
    """
    text = document.text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROLS.sub("", text)
    if document.language != "code":
        text = text.replace("\x0c", "\n")
        text = _INVISIBLE.sub("", _SPACES.sub(" ", text))
        text = _BLANK_LINES.sub("\n\n", _TRAILING.sub("", text)).strip("\n")
        if config.form != "none":
            text = unicodedata.normalize(config.form, text)
    return document if text == document.text else document.replace(text=text)


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
    """True for a text of at least three lines most of which are shaped like code."""
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
