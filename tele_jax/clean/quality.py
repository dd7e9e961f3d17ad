"""A linear classifier over hashed words: is a document like the good samples or like the bad ones?

Logistic regression by scikit-learn over hashed unigrams and bigrams of tokens (hashing.tokens, so that Chinese needs no
word segmenter). fastText, which [T] used, is such a model with a learned embedding in between; its packages have had no
release since 2024 and no wheels for all of Python 3.11 to 3.13.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tele_jax.clean import hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import QualityConfig
from tele_jax.clean.writing import open_model, replace_file
from tele_jax.errors import UserError
from tele_jax.extras import need

FORMAT = "tele_jax quality classifier 1"
BITS = 18  # 262,144 features
MAX_TOKENS = 2_000  # of a document, from its beginning


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """weights float32 [2^BITS], bias: the logit of being good is a mean over features plus the bias."""

    weights: np.ndarray
    bias: float

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Of being good: float64 [N]."""
        matrix = features(texts)
        return 1 / (1 + np.exp(-(matrix @ self.weights.astype(np.float64) + self.bias)))

    def save(self, path: Path) -> None:
        """Writes the file, all of it or nothing."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, format=FORMAT, weights=self.weights, bias=np.float64(self.bias))
        replace_file(path, buffer.getvalue())


def load(path: str) -> Classifier:
    """Raises UserError where the file is missing or is no classifier."""
    arrays = open_model(path, FORMAT, "tele data clean-train quality")
    return Classifier(arrays["weights"], float(arrays["bias"]))


def features(texts: Sequence[str]):
    """Hashed unigrams and bigrams, square roots of their counts, rows of length 1: scipy CSR float64 [N, 2^BITS]."""
    sparse = need("scipy.sparse")
    columns, values, ends = [], [], [0]
    for text in texts:
        tokens = hashing.tokens(text[: 20 * MAX_TOKENS])[:MAX_TOKENS]
        grams = np.concatenate([tokens, hashing.ngrams(tokens, 2)])
        index, counts = np.unique((grams >> np.uint64(64 - BITS)).astype(np.int64), return_counts=True)
        row = np.sqrt(counts)
        columns.append(index)
        values.append(row / max(np.linalg.norm(row), 1e-12))
        ends.append(ends[-1] + len(index))
    shape = (len(texts), 1 << BITS)
    return sparse.csr_matrix((np.concatenate(values), np.concatenate(columns), np.array(ends)), shape=shape)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A classifier and its figures on samples that it was not trained on (one in ten)."""

    classifier: Classifier
    train_documents: int
    held_out_documents: int
    accuracy: float
    precision: float  # of what is called good
    recall: float


def train(good: Sequence[str], bad: Sequence[str], *, seed: int = 0) -> Trained:
    """Fits a classifier; both classes weigh the same.

    Raises:
      UserError: fewer than 20 samples of a class.
    """
    linear = need("sklearn.linear_model")
    for name, texts in (("good", good), ("bad", bad)):
        if len(texts) < 20:
            raise UserError(f"{len(texts)} {name} samples; give at least 20")
    matrix = features([*good, *bad])
    labels = np.concatenate([np.ones(len(good), int), np.zeros(len(bad), int)])
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    # C is ours; rows of length 1 in so many columns want little regularisation, and the result hardly depends on it.
    model = linear.LogisticRegression(C=30.0, class_weight="balanced", solver="liblinear", random_state=seed)
    model.fit(matrix[rest], labels[rest])
    classifier = Classifier(model.coef_[0].astype(np.float32), float(model.intercept_[0]))
    called = classifier.probabilities([([*good, *bad])[i] for i in held_out]) >= 0.5
    truth = labels[held_out] == 1
    hits = int((called & truth).sum())
    return Trained(
        classifier,
        len(rest),
        len(held_out),
        float((called == truth).mean()),
        hits / max(int(called.sum()), 1),
        hits / max(int(truth.sum()), 1),
    )


def quality(documents: Sequence[Document], config: QualityConfig, classifier: Classifier) -> list[Document | Drop]:
    """Documents below the threshold go; languages that are not named pass."""
    judged = [i for i, d in enumerate(documents) if d.language in config.languages]
    result: list[Document | Drop] = list(documents)
    if judged:
        for i, p in zip(judged, classifier.probabilities([documents[i].text for i in judged])):
            if p < config.threshold:
                result[i] = Drop("low quality", f"probability {p:.3f}")
    return result
