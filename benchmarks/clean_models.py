"""What thresholds of the stages `quality` and `perplexity` keep and drop, on real text and on text that was spoilt.

    python benchmarks/clean_models.py --work DIR

The n-gram models are trained on encyclopedic English and on Chinese idioms and statutes, nine documents in ten, the
classifier on the same against half of the spam; as configs/data/clean_web.py does. Judged are the tenth of the
documents that was held out, genuine text of kinds that no model has seen (plays, a dictionary, poems, manual pages),
and spoilt text: the held-out documents with their words in random order, with one character in ten replaced, and the
other half of the spam. Prints JSON: quantiles, and the share of every kind that a threshold drops. DIR as for clean.py.
"""

import argparse
import itertools
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import clean_corpus
import numpy as np

from tele_jax import corpora
from tele_jax.clean import models

PERPLEXITIES = (1000, 3000, 10_000, 20_000, 50_000)
PROBABILITIES = (0.01, 0.05, 0.2, 0.5)
MOST = 1_500  # documents of a kind that are judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    cache = parser.parse_args().work / "packages"
    clean_corpus.fetch(cache)
    rng = random.Random(0)
    usual = {"en": list(wikipedia(cache)), "zh": [text for text in clean_corpus.chinese(cache) if is_usual(text)]}
    other = {"en": list(rest_of_english(cache)), "zh": [t for t in clean_corpus.chinese(cache) if not is_usual(t)]}
    spam = [clean_corpus.spam(rng) for _ in range(2_000)]
    held_out = {name: texts[::10][:MOST] for name, texts in usual.items()}
    train = {name: [text for i, text in enumerate(texts) if i % 10] for name, texts in usual.items()}
    judged = {
        name: {
            "held out": held_out[name],
            "genuine, of another kind": rng.sample(other[name], min(MOST, len(other[name]))),
            "words in random order": [shuffled(text, rng) for text in held_out[name]],
            "one character in ten replaced": [noisy(text, rng) for text in held_out[name]],
            "spam": [text for text in spam[1::2] if text.isascii() == (name == "en")],
        }
        for name in usual
    }
    trained = models.train_classifier([*train["en"][:5_000], *train["zh"][:5_000]], spam[::2])
    result: dict = {"classifier": {"accuracy": round(trained.accuracy, 4)}}
    for name, kinds in judged.items():
        model = models.train_ngrams(train[name])
        result[name] = {
            "perplexity": {
                kind: figures([model.perplexity(t) for t in texts], PERPLEXITIES, above=True)
                for kind, texts in kinds.items()
            },
            "probability of being good": {
                kind: figures(trained.classifier.probabilities(texts), PROBABILITIES, above=False)
                for kind, texts in kinds.items()
            },
        }
    print(json.dumps(result, indent=1))


def figures(values, thresholds, *, above: bool) -> dict:
    """Quantiles, and the share beyond each threshold."""
    values = np.minimum(values, 1e9)  # a text without words has an infinite perplexity
    low, middle, high = (float(f"{np.quantile(values, q):.3g}") for q in (0.01, 0.5, 0.99))
    dropped = {str(t): round(float((values > t if above else values < t).mean()), 4) for t in thresholds}
    return {"documents": len(values), "1%": low, "50%": middle, "99%": high, "dropped": dropped}


def wikipedia(cache: Path):
    for document in corpora.wikipedia(corpora.download(corpora.WIKIPEDIA, cache)):
        if document.text and len(document.text) > 150:
            yield document.text


def rest_of_english(cache: Path):
    """All of clean_corpus.english but Wikipedia, which comes first there."""
    first = sum(bool(d.text) for d in corpora.wikipedia(corpora.download(corpora.WIKIPEDIA, cache)))
    yield from itertools.islice(clean_corpus.english(cache), first, None)


def is_usual(text: str) -> bool:
    """Idioms with their reading in pinyin, and statutes; not poems and manual pages."""
    return bool(re.search("[āáǎàēéěèīíǐìōóǒòūúǔù]）|第[一二三]条", text[:2_000]))


def shuffled(text: str, rng: random.Random) -> str:
    words = clean_corpus.TOKEN.findall(text)
    return " ".join(rng.sample(words, len(words)))


def noisy(text: str, rng: random.Random) -> str:
    return "".join(rng.choice(text) if rng.random() < 0.1 else c for c in text)


if __name__ == "__main__":
    main()
