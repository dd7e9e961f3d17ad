"""Trained models that judge a document: a classifier of its quality, and n-gram models of usual text.

The classifier is a logistic regression by scikit-learn over hashed unigrams and bigrams of tokens (hashing.tokens, so
that Chinese needs no word segmenter). fastText, which [T] used, is such a model with a learned embedding in between;
its packages have had no release since 2024 and no wheels for all of Python 3.11 to 3.13.
The n-gram models are interpolated modified Kneser-Ney over hashed tokens (Chen and Goodman 1998, TR-10-98, section 3).
They are our own code, about a page of numpy: kenlm's package only reads models and has no wheels (its estimator is a
C++ program to be built with Boost), and nltk.lm counts in Python's dicts. N-grams are 64-bit hashes in sorted arrays;
among 10^9 of them two collide with a chance of 3%, which touches one n-gram.
"""

import dataclasses
import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tele_jax.clean import hashing
from tele_jax.clean.document import Document, Drop
from tele_jax.clean.output import replace_file
from tele_jax.clean.settings import PerplexityConfig, QualityConfig
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.files import Table

CLASSIFIER_FORMAT = "tele_jax quality classifier 1"
BITS = 18  # 262,144 features
CLASSIFIER_TOKENS = 2_000  # of a document, from its beginning


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """weights float32 [2^BITS], bias: the logit of being good is a mean over features plus the bias."""

    weights: np.ndarray
    bias: float

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """The probabilities that the texts are good: float64 [N]."""
        matrix = features(texts)
        return 1 / (1 + np.exp(-(matrix @ self.weights.astype(np.float64) + self.bias)))

    def save(self, path: Path) -> None:
        """Writes the file, all of it or nothing."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, format=CLASSIFIER_FORMAT, weights=self.weights, bias=np.float64(self.bias))
        replace_file(path, buffer.getvalue())


def _open_model(path: str, format: str, made_by: str) -> Table:
    """The arrays of a file that `save` of a classifier or an n-gram model wrote; numbers only, nothing is unpickled.

    Raises:
      UserError: the file is missing or is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["format"]) == format:
                return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {made_by} makes it") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    raise UserError(f"{path}: not a {format!r} file; {made_by} makes it")


def load_classifier(path: str) -> Classifier:
    """Reads a classifier; UserError where the file is missing or is something else."""
    arrays = _open_model(path, CLASSIFIER_FORMAT, "tele data clean-train quality")
    return Classifier(arrays["weights"], float(arrays["bias"]))


def features(texts: Sequence[str]):
    """Hashed unigrams and bigrams, square roots of their counts, rows of length 1: scipy CSR float64 [N, 2^BITS]."""
    sparse = need("scipy.sparse")
    columns, values, ends = [], [], [0]
    for text in texts:
        tokens = hashing.tokens(text[: 20 * CLASSIFIER_TOKENS])[:CLASSIFIER_TOKENS]
        grams = np.concatenate([tokens, hashing.ngrams(tokens, 2)])
        index, counts = np.unique((grams >> np.uint64(64 - BITS)).astype(np.int64), return_counts=True)
        row = np.sqrt(counts)
        columns.append(index)
        values.append(row / max(np.linalg.norm(row), 1e-12))
        ends.append(ends[-1] + len(index))
    shape = (len(texts), 1 << BITS)
    return sparse.csr_matrix((np.concatenate(values), np.concatenate(columns), np.array(ends)), shape=shape)


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """A classifier and its figures on samples that it was not trained on (one in ten)."""

    classifier: Classifier
    train_documents: int
    held_out_documents: int
    accuracy: float
    precision: float  # of what is called good
    recall: float


def train_classifier(good: Sequence[str], bad: Sequence[str], *, seed: int = 0) -> TrainedClassifier:
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
    return TrainedClassifier(
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


NGRAMS_FORMAT = "tele_jax n-gram model 1"
ORDER = 5
BEGIN = hashing.mix(np.array([1], np.uint64))[0]  # pads the beginning of a text


@dataclasses.dataclass(frozen=True, eq=False)
class NgramModel:
    """Per order n = 1..N: sorted hashes of n-grams with their discounted probabilities, of contexts with their weights.

    Attributes:
      grams: uint64 [M_n] for every order, sorted.
      gram_probs: float32 [M_n]: (count - discount) / total of the context.
      contexts: uint64 [K_n] for every order n > 1, sorted hashes of the n-1 tokens before.
      context_weights: float32 [K_n]: what the lower order gets.
      uniform: probability of a token never seen, times the weight of order 1.
    """

    grams: tuple[np.ndarray, ...]
    gram_probs: tuple[np.ndarray, ...]
    contexts: tuple[np.ndarray, ...]
    context_weights: tuple[np.ndarray, ...]
    uniform: float

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Natural logarithms of the probabilities of the tokens, each after those before it: float64 [N]."""
        order = len(self.grams)
        padded = np.concatenate([np.full(order - 1, BEGIN), tokens])
        prob = np.full(len(tokens), self.uniform)
        for n in range(1, order + 1):
            tail = padded[order - n :]
            if n > 1:
                prob *= _look_up(
                    self.contexts[n - 2], self.context_weights[n - 2], hashing.ngrams(tail[:-1], n - 1), 1.0
                )
            prob += _look_up(self.grams[n - 1], self.gram_probs[n - 1], hashing.ngrams(tail, n), 0.0)
        return np.log(prob)

    def perplexity(self, text: str) -> float:
        """Per token; infinity for a text without tokens."""
        tokens = hashing.tokens(text)
        return float(np.exp(-self.log_probs(tokens).mean())) if len(tokens) else float("inf")

    def save(self, path: Path) -> None:
        """Writes the file, all of it or nothing."""
        arrays = {"format": NGRAMS_FORMAT, "order": len(self.grams), "uniform": self.uniform}
        for name in ("grams", "gram_probs", "contexts", "context_weights"):
            arrays |= {f"{name}_{n}": array for n, array in enumerate(getattr(self, name))}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        replace_file(path, buffer.getvalue())


def load_ngrams(path: str) -> NgramModel:
    """Reads an n-gram model; UserError where the file is missing or is something else."""
    arrays = _open_model(path, NGRAMS_FORMAT, "tele data clean-train ngrams")
    order = int(arrays["order"])

    def column(name: str, count: int) -> tuple[np.ndarray, ...]:
        return tuple(arrays[f"{name}_{n}"] for n in range(count))

    return NgramModel(
        column("grams", order),
        column("gram_probs", order),
        column("contexts", order - 1),
        column("context_weights", order - 1),
        float(arrays["uniform"]),
    )


def load_all_ngrams(config: PerplexityConfig) -> dict[str, NgramModel]:
    """The models by language. Raises UserError as `load_ngrams`."""
    return {language: load_ngrams(path) for language, path in config.models.items()}


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    if not len(keys):
        return np.full(len(wanted), default)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at].astype(np.float64), default)


def train_ngrams(texts: Iterable[str], *, order: int = ORDER) -> NgramModel:
    """Estimates a model.

    Args:
      texts: each begins anew, after `order - 1` marks of beginning.
      order: the longest n-gram.

    Raises:
      UserError: there are fewer than 100 tokens.
    """
    sequences = [hashing.tokens(text) for text in texts]
    if sum(map(len, sequences)) < 100:
        raise UserError(f"{sum(map(len, sequences))} tokens of text; an n-gram model needs at least 100")
    padded = [np.concatenate([np.full(order - 1, BEGIN), s]) for s in sequences if len(s)]
    grams, probs, contexts, weights = [], [], [], []
    unigram_weight, vocabulary = 1.0, 1
    for n in range(1, order + 1):
        gram, context, count = _counts(padded, order, n)
        discount = _discounts(count)[np.minimum(count, 3)]
        names, inverse = np.unique(context, return_inverse=True)
        total = np.bincount(inverse, count)
        probs.append(((count - discount) / total[inverse]).astype(np.float32))
        grams.append(gram)
        left = np.bincount(inverse, discount) / total
        if n == 1:
            unigram_weight, vocabulary = float(left[0]), len(gram)
        else:
            contexts.append(names)
            weights.append(left.astype(np.float32))
    # One more for the token that was never seen: all unseen tokens share it.
    uniform = unigram_weight / (vocabulary + 1)
    return NgramModel(tuple(grams), tuple(probs), tuple(contexts), tuple(weights), uniform)


def _counts(padded: Sequence[np.ndarray], order: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n-grams sorted uint64 [M], the hash of each one's context [M], its count int64 [M]).

    The highest order counts occurrences; lower ones count the different tokens that come before (continuation counts),
    which is what makes it Kneser-Ney. N-grams that begin with a mark are preceded by nothing but marks: those at the
    beginning of a text count one for every text (the marks before are no different tokens).
    """
    whole, inner = [], []
    for sequence in padded:
        tail = sequence[order - n :]
        whole.append(hashing.ngrams(tail, n))
        inner.append(hashing.ngrams(tail[:-1], n - 1) if n > 1 else np.zeros(len(tail), np.uint64))
    gram = np.concatenate(whole)
    if n == order:
        names, first, count = np.unique(gram, return_index=True, return_counts=True)
        return names, np.concatenate(inner)[first], count.astype(np.int64)
    longer = np.concatenate([hashing.ngrams(sequence[order - n - 1 :], n + 1) for sequence in padded])
    _, one = np.unique(longer, return_index=True)  # one occurrence of every different (token before, n-gram)
    names, first, count = np.unique(gram[one], return_index=True, return_counts=True)
    return names, np.concatenate(inner)[one][first], count.astype(np.int64)


def _discounts(count: np.ndarray) -> np.ndarray:
    """D(0) = 0, D(1), D(2), D(3 and more); Chen and Goodman's estimates, kept in [0, count]."""
    n1, n2, n3, n4 = (max(int((count == i).sum()), 1) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    raw = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.array([min(max(d, 0.0 if i == 0 else 0.05), i - 0.05 if i else 0.0) for i, d in enumerate(raw)])


def perplexity(document: Document, config: PerplexityConfig, models: dict[str, NgramModel]) -> Document | Drop:
    """Documents whose perplexity is out of bounds go; languages without a model pass."""
    language = document.language or ""
    model = models.get(language)
    if model is None:
        return document
    value = model.perplexity(document.text)
    high, low = config.max_perplexity[language], config.min_perplexity.get(language, 0.0)
    if value > high:
        return Drop("high perplexity", f"{value:.1f} > {high:g}")
    if value < low:
        return Drop("low perplexity", f"{value:.1f} < {low:g}")
    return document
