"""Duplicates: keys of a document under which its likely copies meet, verification of those that met, and components.

MinHash with banding: Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3. Two documents
of Jaccard similarity s meet with probability 1 - (1 - s^rows)^bands, and stay together if their signatures agree in at
least `threshold` of their places. Signatures are rensa's, cut to 8 bits when they travel (Li and König 2010, b-bit
minwise hashing: agreement by chance, 1/256, is subtracted).
SimHash: Charikar 2002, here 128 bits of the same shingles; equal in all but `simhash_bits` bits, found by the
pigeonhole principle in one of simhash_bits + 1 blocks (Manku, Jain and Das Sarma 2007).
"""

from collections.abc import Sequence

import numpy as np

from tele_jax.clean import hashing
from tele_jax.clean.document import Document
from tele_jax.clean.settings import DuplicatesConfig
from tele_jax.extras import need

# A document under one key; payload: what verification compares. batch: the key of the batch that holds it.
KEYED = np.dtype([("key", np.uint64), ("uid", np.int64), ("batch", np.int64)])
# a < b are one; kind: index in KINDS.
EDGE = np.dtype([("a", np.int64), ("b", np.int64), ("a_batch", np.int64), ("b_batch", np.int64), ("kind", np.uint8)])
DROPPED = np.dtype([("uid", np.int64), ("batch", np.int64), ("kept", np.int64), ("kind", np.uint8)])
KINDS = ("exact", "simhash", "minhash")


def shingles(text: str, n: int) -> np.ndarray:
    """The set of n-gram hashes of a text, sorted: uint64 [M]."""
    return np.unique(hashing.ngrams(hashing.tokens(text), n))


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
        return np.unpackbits(hub ^ others, axis=1).sum(axis=1) <= config.simhash_bits
    return agreement(hub, others) >= config.threshold


def first_of_key(table: np.ndarray) -> np.ndarray:
    """All but the lowest uid under every key: DROPPED [M], where `kept` is that lowest uid."""
    order = np.lexsort((table["uid"], table["key"]))
    table = table[order]
    first = np.concatenate(([True], table["key"][1:] != table["key"][:-1]))
    kept = table["uid"][np.maximum.accumulate(np.where(first, np.arange(len(table)), 0))]
    result = np.empty(int((~first).sum()), DROPPED)
    for name in ("uid", "batch"):
        result[name] = table[name][~first]
    result["kept"], result["kind"] = kept[~first], 0
    return result


def components(edges: np.ndarray) -> np.ndarray:
    """All but the first document of every connected component: DROPPED [M], sorted by uid.

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
