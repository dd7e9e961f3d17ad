"""Features of texts without a model: counts of hashed character n-grams, weighted by TF-IDF, in the axes of an SVD."""

import dataclasses
import io
from collections.abc import Sequence

import numpy as np

from tele_jax.extras import need
from tele_jax.selection.choice import one_thread

COLUMNS = 1 << 16  # of hashed n-grams
NGRAMS = (1, 3)  # characters
CHARS = 4_000  # at the beginning of a text that are looked at


@dataclasses.dataclass(frozen=True, eq=False)
class Hashed:
    """Weights of n-grams and axes.

    Attributes:
      idf: float64[COLUMNS], inverse document frequencies, ln((1 + n) / (1 + df)) + 1.
      axes: float64[dims, COLUMNS].
    """

    idf: np.ndarray
    axes: np.ndarray

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the features, float32[len(texts), dims], each of length 1, or 0 for a text without characters."""
        with one_thread():
            found = np.asarray(_weighted(_counts(texts), self.idf) @ self.axes.T)
        length = np.sqrt((found**2).sum(1, keepdims=True))
        return (found / np.where(length > 0, length, 1)).astype(np.float32)

    def to_bytes(self) -> bytes:
        """The arrays as a file of numpy."""
        with io.BytesIO() as file:
            np.savez(file, idf=self.idf, axes=self.axes)
            return file.getvalue()

    @staticmethod
    def load(path) -> "Hashed":
        """Reads what `to_bytes` gave."""
        with np.load(path) as arrays:
            return Hashed(arrays["idf"], arrays["axes"])


def fit(texts: Sequence[str], dims: int, seed: int) -> Hashed:
    """Weights and axes of a sample of texts; seed: of the randomised SVD (Halko, Martinsson and Tropp 2011)."""
    decomposition = need("sklearn.decomposition")
    counts = _counts(texts)
    documents = np.bincount(counts.indices, minlength=COLUMNS)
    idf = np.log((1 + len(texts)) / (1 + documents)) + 1
    svd = decomposition.TruncatedSVD(min(dims, len(texts)), random_state=seed)
    with one_thread():
        svd.fit(_weighted(counts, idf))
    return Hashed(idf, svd.components_)


def _counts(texts: Sequence[str]):
    text = need("sklearn.feature_extraction.text")
    how = {"analyzer": "char", "ngram_range": NGRAMS, "n_features": COLUMNS, "norm": None, "alternate_sign": False}
    return text.HashingVectorizer(**how).transform([value[:CHARS] for value in texts])


def _weighted(counts, idf: np.ndarray):
    """(1 + ln count) * idf, rows of length 1."""
    weighted = counts.astype(np.float64)
    weighted.data = (1 + np.log(weighted.data)) * idf[weighted.indices]
    return need("sklearn.preprocessing").normalize(weighted)
