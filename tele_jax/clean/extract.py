"""Pages of HTML to text, and text to one form of Unicode.

resiliparse extracts: of the libraries that find the main content it is the one fast enough for a crawl, and DataComp-LM
(arXiv 2406.11794, section 4.2) found models trained on its text as good as on trafilatura's, at an eighth of the time.
"""

import re
import unicodedata
from typing import Any

from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import ExtractConfig, NormaliseConfig
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
