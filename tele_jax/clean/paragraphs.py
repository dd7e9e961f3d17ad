"""Paragraphs that an earlier document, or the same one earlier, had already: found by hash, taken out."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import ParagraphsConfig

# One paragraph under its hash; index: which of the document's.
PARAGRAPH = np.dtype([("key", np.uint64), ("uid", np.int64), ("batch", np.int64), ("index", np.int32)])
_BLANK = re.compile(r"(\n\s*\n)")


def split(text: str) -> list[str]:
    """Paragraphs and what stands between them, alternating; joined they are the text.

    Blank lines separate paragraphs; in a text without any, line ends do.
    """
    parts = _BLANK.split(text)
    return parts if len(parts) > 1 else re.split(r"(\n)", text)


def key(text: str) -> int:
    """64-bit hash of a string."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def paragraph_keys(documents: Sequence[Document], batch: int, config: ParagraphsConfig) -> np.ndarray:
    """PARAGRAPH [N] for all long paragraphs of prose."""
    rows = [
        (key(part.strip()), document.uid, batch, index)
        for document in documents
        if document.language != "code"
        for index, part in enumerate(split(document.text)[::2])
        if len(part.strip()) >= config.min_chars
    ]
    return np.array(rows, PARAGRAPH)


def repeated(table: np.ndarray) -> np.ndarray:
    """All but the first paragraph under every key."""
    table = table[np.lexsort((table["index"], table["uid"], table["key"]))]
    return table[1:][table["key"][1:] == table["key"][:-1]]


def without(document: Document, indexes: Sequence[int], config: ParagraphsConfig) -> Document | Drop:
    """The document less these paragraphs; Drop where too little of it is left."""
    parts = split(document.text)
    gone = set(indexes)
    kept = []
    for index in range(0, len(parts), 2):
        if index // 2 not in gone:
            kept += [parts[index], parts[index + 1] if index + 1 < len(parts) else ""]
    text = "".join(kept).strip("\n")
    share = len(text) / max(len(document.text), 1)
    if not text.strip() or share < config.min_kept:
        return Drop("repeated paragraphs", f"{share:.0%} left")
    return document.replace(text=text)
