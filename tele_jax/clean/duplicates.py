"""Copies of pages, of documents and of paragraphs: keys under which likely copies meet, verification, groups of copies.

MinHash with banding: Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3. Two documents
of Jaccard similarity s meet with probability 1 - (1 - s^rows)^bands, and stay together if their signatures agree in at
least `threshold` of their places. Signatures are rensa's, cut to 8 bits when they travel (Li and König 2010, b-bit
minwise hashing: agreement by chance, 1/256, is subtracted).
SimHash: Charikar 2002, here 128 bits of the same shingles; equal in all but `simhash_bits` bits, found by the
pigeonhole principle in one of simhash_bits + 1 blocks (Manku, Jain and Das Sarma 2007).
"""

import fnmatch
import hashlib
import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import numpy as np

from tele_jax.clean import hashing
from tele_jax.clean.document import OFFSET_BITS, Document, Drop
from tele_jax.clean.settings import DuplicatesConfig, ParagraphsConfig, UrlsConfig
from tele_jax.extras import need

# A document under one key; payload: what verification compares. batch: the key of the batch that holds it.
KEYED = np.dtype([("key", np.uint64), ("uid", np.int64), ("batch", np.int64)])
# a < b are one; kind: index in KINDS.
EDGE = np.dtype([("a", np.int64), ("b", np.int64), ("a_batch", np.int64), ("b_batch", np.int64), ("kind", np.uint8)])
DROPPED = np.dtype([("uid", np.int64), ("batch", np.int64), ("kept", np.int64), ("kind", np.uint8)])
KINDS = ("exact", "simhash", "minhash")


def signatures(sets: Sequence[np.ndarray], config: DuplicatesConfig) -> np.ndarray:
    """MinHash signatures, uint32 [len(sets), bands * rows]."""
    rensa = need("rensa")
    flat = np.concatenate(sets) if len(sets) else np.zeros(0, np.uint64)
    offsets = np.concatenate(([0], np.cumsum([len(s) for s in sets]))).astype(np.uint64)
    size = config.bands * config.rows
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, size, config.seed)
    return np.asarray(matrix.to_rows(), np.uint32).reshape(len(sets), size)


def agreement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard similarities estimated from signatures of 8 bits, uint8 [..., size]."""
    same = (a == b).mean(axis=-1)
    return (same - 1 / 256) / (1 - 1 / 256)


def simhash(grams: np.ndarray) -> np.ndarray:
    """128-bit SimHash of hashed features: uint64 [2]."""
    words = np.stack([grams, hashing.mix(grams + np.uint64(1))], axis=1)
    bits = np.unpackbits(words.view(np.uint8).reshape(len(grams), 16), axis=1)
    return np.packbits(2 * bits.sum(axis=0, dtype=np.int64) > len(grams)).view(np.uint64)


def keys(
    documents: Sequence[Document], batch: int, config: DuplicatesConfig
) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """For every method and block or band: (KEYED [N], uint8 payloads [N, ...]) of a batch's documents.

    Exact copies are equal up to case and white space, and in code to the letter: an operator, a sign or a decimal point
    makes another text. Copies that differ in more are near copies.
    """
    result = {}
    sequences = [hashing.tokens(d.text) for d in documents]
    uids = np.array([d.uid for d in documents], np.int64)

    def entry(rows: np.ndarray, values: np.ndarray, payload: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = np.empty(len(rows), KEYED)
        table["key"], table["uid"], table["batch"] = values, uids[rows], batch
        return table, payload

    if "exact" in config.methods:
        bodies = [d.text if d.language == "code" else " ".join(d.text.lower().split()) for d in documents]
        values = np.concatenate([hashing.fingerprints(hashing.tokens_of_characters(body)) for body in bodies])
        result["exact", 0] = entry(np.arange(len(uids)), values, np.zeros((len(uids), 0), np.uint8))
    sets = [np.unique(hashing.ngrams(s, config.ngram)) for s in sequences]
    rows = np.array([i for i, s in enumerate(sets) if len(s) >= config.min_shingles], np.int64)
    if not len(rows):
        return result
    if "simhash" in config.methods:
        prints = np.stack([simhash(hashing.ngrams(sequences[i], config.ngram)) for i in rows])
        payload = prints.view(np.uint8).reshape(len(rows), 16)
        blocks = config.simhash_bits + 1
        edges = np.linspace(0, 16, blocks + 1).astype(int)
        for block in range(blocks):
            part = np.zeros((len(rows), 16), np.uint8)
            part[:, : edges[block + 1] - edges[block]] = payload[:, edges[block] : edges[block + 1]]
            halves = part.view(np.uint64)
            result["simhash", block] = entry(rows, hashing.mix(halves[:, 0] ^ hashing.mix(halves[:, 1])), payload)
    if "minhash" in config.methods:
        matrix = signatures([sets[i] for i in rows], config)
        payload = matrix.astype(np.uint8)  # the low 8 bits
        bands = matrix.reshape(len(rows), config.bands, config.rows).astype(np.uint64)
        for band in range(config.bands):
            result["minhash", band] = entry(rows, hashing.ngrams(bands[:, band].T, config.rows)[0], payload)
    return result


def pairs(method: str, table: np.ndarray, payload: np.ndarray, config: DuplicatesConfig) -> np.ndarray:
    """Verified pairs among documents under one band or block: EDGE [M], in no particular order.

    Those under one key are compared with the first of their kind, in the order of their uid, and with every one that
    was not like an earlier one: a star for every group of copies rather than all pairs of it.
    """
    order = np.lexsort((table["uid"], table["key"]))
    table, payload = table[order], payload[order]
    starts = np.flatnonzero(np.concatenate(([True], table["key"][1:] != table["key"][:-1])))
    found = []
    for start, end in zip(starts, np.append(starts[1:], len(table))):
        remaining = np.arange(start, end)
        while len(remaining) > 1:
            hub, others = remaining[0], remaining[1:]
            alike = _alike(method, payload[hub], payload[others], config)
            for other in others[alike]:
                found.append((hub, other))
            remaining = others[~alike]
    result = np.empty(len(found), EDGE)
    if found:
        a, b = np.array(found).T
        result["a"], result["a_batch"] = table["uid"][a], table["batch"][a]
        result["b"], result["b_batch"] = table["uid"][b], table["batch"][b]
        result["kind"] = KINDS.index(method)
    return result


def _alike(method: str, hub: np.ndarray, others: np.ndarray, config: DuplicatesConfig) -> np.ndarray:
    if method == "exact":
        return np.ones(len(others), bool)
    if method == "simhash":
        return np.unpackbits((hub ^ others).view(np.uint8), axis=1).sum(axis=1) <= config.simhash_bits
    return agreement(hub, others) >= config.threshold


def components(edges: np.ndarray) -> np.ndarray:
    """Drops all but the first document of every connected component: DROPPED [M], sorted by uid.

    `kind` is the strongest reason (the first of KINDS) among the pairs of a document.
    """
    scipy = need("scipy.sparse")
    csgraph = need("scipy.sparse.csgraph")
    if not len(edges):
        return np.zeros(0, DROPPED)
    uids, where = np.unique(np.concatenate([edges["a"], edges["b"]]), return_index=True)
    batches = np.concatenate([edges["a_batch"], edges["b_batch"]])[where]
    a, b = np.searchsorted(uids, edges["a"]), np.searchsorted(uids, edges["b"])
    graph = scipy.coo_matrix((np.ones(len(edges), np.int8), (a, b)), shape=(len(uids), len(uids)))
    _, label = csgraph.connected_components(graph, directed=False)
    # uids are sorted, so the first of a label is the lowest.
    _, first = np.unique(label, return_index=True)
    kept = uids[first[label]]
    kind = np.full(len(uids), len(KINDS), np.uint8)
    np.minimum.at(kind, a, edges["kind"])
    np.minimum.at(kind, b, edges["kind"])
    rows = kept != uids
    result = np.empty(int(rows.sum()), DROPPED)
    result["uid"], result["batch"], result["kept"], result["kind"] = uids[rows], batches[rows], kept[rows], kind[rows]
    return result


def reference(uid: int) -> str:
    """Names a document in a detail; the report (output.py) puts its path there."""
    return f"{{{uid >> OFFSET_BITS}@{uid & ((1 << OFFSET_BITS) - 1)}}}"


def drop_copy(document: Document, rows: np.ndarray, config: DuplicatesConfig) -> Drop:
    """Drops a copy as a whole; rows: DROPPED."""
    kind = KINDS[int(rows["kind"][0])]
    reason = "exact duplicate" if kind == "exact" else f"near duplicate ({kind})"
    return Drop(reason, f"of {reference(int(rows['kept'][0]))}")


# ---- equal addresses and paragraphs ------------------------------------------------------------------------------


def repeated(table: np.ndarray) -> np.ndarray:
    """Returns all rows but the first under every key, by uid and index, with the uid of that first row as `kept`."""
    order = np.lexsort([table[name] for name in ("index", "uid", "key") if name in (table.dtype.names or ())])
    table = table[order]
    again = table["key"][1:] == table["key"][:-1]
    result = np.empty(int(again.sum()), [*table.dtype.descr, ("kept", np.int64)])
    for name in table.dtype.names or ():
        result[name] = table[name][1:][again]
    first = np.flatnonzero(np.concatenate(([True], ~again)))
    result["kept"] = table["uid"][first][np.cumsum(~again)[again]]
    return result


def string_key(text: str) -> int:
    """64-bit hash of a string."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def canonical_url(url: str, config: UrlsConfig) -> str:
    """The URL without scheme, `www.`, default port, fragment, trailing slash and parameters that name no other page.

    >>> canonical_url("HTTP://www.Example.org:80/a/?b=2&utm_source=x&a=1#top", UrlsConfig())
    'example.org/a?a=1&b=2'
    """
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" if parts.port and parts.port not in (80, 443) else ""
        host = (parts.hostname or "").removeprefix("www.") + port
    except ValueError:
        return url.strip()
    if not host:
        return url.strip()
    query = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in config.ignore_query)
    ]
    path = unquote(parts.path).rstrip("/")
    return host + path + (f"?{urlencode(sorted(query))}" if query else "")


def url_keys(documents: Sequence[Document], batch: int, config: UrlsConfig) -> np.ndarray:
    """KEYED [N] for the documents that have a URL."""
    return np.array([(string_key(canonical_url(d.url, config)), d.uid, batch) for d in documents if d.url], KEYED)


def drop_page(document: Document, rows: np.ndarray, config: UrlsConfig) -> Drop:
    """Drops a page as a whole; rows: as `repeated` gives them."""
    return Drop("repeated URL", f"{document.url}, as {reference(int(rows['kept'][0]))}")


# One paragraph under its hash; index: its place among those of the document.
PARAGRAPH = np.dtype([("key", np.uint64), ("uid", np.int64), ("batch", np.int64), ("index", np.int32)])
_BLANK = re.compile(r"(\n\s*\n)")


def split_paragraphs(text: str) -> list[str]:
    """Paragraphs and what stands between them, alternating; joined they are the text.

    Blank lines separate paragraphs; in a text without any, line ends do.
    """
    parts = _BLANK.split(text)
    return parts if len(parts) > 1 else re.split(r"(\n)", text)


def paragraph_keys(documents: Sequence[Document], batch: int, config: ParagraphsConfig) -> np.ndarray:
    """PARAGRAPH [N] for all long paragraphs of prose."""
    rows = [
        (string_key(part.strip()), document.uid, batch, index)
        for document in documents
        if document.language != "code"
        for index, part in enumerate(split_paragraphs(document.text)[::2])
        if len(part.strip()) >= config.min_chars
    ]
    return np.array(rows, PARAGRAPH)


def without_paragraphs(document: Document, rows: np.ndarray, config: ParagraphsConfig) -> Document | Drop:
    """The document less the paragraphs whose `index` is in rows; Drop where too little of the document is left."""
    parts = [*split_paragraphs(document.text), ""]
    kept = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2) if i // 2 not in rows["index"]]
    text = "".join(kept).strip("\n")
    share = len(text) / max(len(document.text), 1)
    if not text.strip() or share < config.min_kept:
        return Drop("repeated paragraphs", f"{share:.0%} left")
    return document.replace(text=text)
