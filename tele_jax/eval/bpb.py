"""Bits per byte: how well a model predicts text, comparable between tokenizers.

A document is cut into windows of tokens. The first window scores all of its tokens, the first of them after
`EvalModel.prefix`. Each further window scores the next `stride` tokens, the last one those that are left, after as many
tokens before them as the window has room for. Every token is scored once. With a stride of a whole window these are
the rolling windows of lm-evaluation-harness.

    bits per byte = sum of -log2 p(token) over the documents of a domain / UTF-8 bytes of their texts
"""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tele_jax import tables
from tele_jax.config import require, to_dict
from tele_jax.errors import DamageError, UserError
from tele_jax.eval import tables as published
from tele_jax.eval.model import Leader
from tele_jax.eval.text import BpbConfig, Domain, key_of, read_texts
from tele_jax.files import Table, parse_json, read_bytes, read_table, write_file

GROUP = 4096  # windows that are handed to the scorer at once; bounds memory
FIRST_BUCKET = 2048  # tokens; later buckets of positions begin at twice, four times, ... as many
LEVEL = (2.5, 97.5)  # percentiles of the resampled figures: an interval of 95%


class Scored(NamedTuple):
    """The score of a document: tokens and nats, all of them and by bucket of positions."""

    tokens: int
    nats: float
    buckets: list[tuple[int, float]]


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first token read, first scored, end of the scored ones) of each window of a document.

    A first token read of -1 is the prefix. A window reads at most `window` tokens, the last one scored not among them.

    >>> list(windows(7, 4, 2))
    [(-1, 0, 4), (1, 4, 6), (2, 6, 7)]
    """
    begin, end = 0, min(window, num_tokens)
    while begin < num_tokens:
        yield max(end - window - 1, -1), begin, end
        begin, end = end, min(end + stride, num_tokens)


def bucket_edges(window: int) -> list[int]:
    """The positions at which buckets begin: 0, 2048, 4096, 8192, ... below the window, and the window.

    The last bucket is of the tokens that only further windows score.
    """
    doubled = FIRST_BUCKET * 2 ** np.arange(40)
    return [0, *(int(edge) for edge in doubled if edge < window), window]


class Journal:
    """Scores by the digest of the text, kept in a file as they are made, so that a killed evaluation goes on.

    The first line of the file says what the scores depend on; a last line that a kill cut short is dropped.
    """

    def __init__(self, directory: Path | None, header: Table):
        """Reads the scores of an earlier run. directory: of the file; None: scores are in memory alone.

        Raises:
          DamageError: a line of the file is not what was written.
        """
        self.scores: dict[str, Scored] = {}
        self._file = None
        if directory is None:
            return
        first = json.dumps(header, sort_keys=True)
        path = directory / f"scores-{hashlib.sha256(first.encode()).hexdigest()[:16]}.jsonl"
        whole, _, cut = read_bytes(path).rpartition(b"\n") if path.exists() else (b"", b"", b"")
        for number, line in enumerate(whole.split(b"\n")[1:], start=2):
            where = f"{path}, line {number}"
            try:
                key, tokens, nats, buckets = parse_json(line, where)
                if not isinstance(key, str) or len(buckets) != len(header["buckets"]):
                    raise ValueError
                self.scores[key] = Scored(int(tokens), float(nats), [(int(n), float(x)) for n, x in buckets])
            except (TypeError, ValueError):
                raise DamageError(f"{where}: damaged, no score of a document; remove the file to score anew") from None
        if cut or not whole:
            write_file(path, (whole or first.encode()) + b"\n")
        self._file = path.open("a", encoding="utf-8")

    def add(self, key: str, scored: Scored) -> None:
        """Keeps a score."""
        self.scores[key] = scored
        if self._file is not None:
            self._file.write(json.dumps([key, *scored]) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def score_texts(
    leader: Leader,
    texts: Iterable[str],
    journal: Journal,
    *,
    window: int,
    stride: int,
    eos: bool = False,
    progress: Callable[[int], object] = int,
) -> None:
    """Scores the documents that the journal does not have, in groups of about GROUP tokens.

    progress: is called with the bytes of text that are scored.
    """
    model, edges, room = leader.model, bucket_edges(window), GROUP
    waiting: dict[str, np.ndarray] = {}  # log-probabilities of the tokens of documents whose windows are not all scored
    left: dict[str, int] = {}  # windows of those that are not scored
    sizes: dict[str, int] = {}  # bytes of those, in all places where the text occurs
    done = 0
    requests: list[tuple[list[int], list[int]]] = []
    owners: list[tuple[str, int]] = []  # of each request: its document, and the position of its first scored token

    def flush() -> None:
        nonlocal done
        for request, logprobs, _ in leader.score(requests):
            key, begin = owners[request]
            waiting[key][begin : begin + len(logprobs)] = logprobs
            left[key] -= 1
            if left[key] == 0:
                journal.add(key, _summed(waiting.pop(key), edges))
                done += sizes.pop(key)
                progress(done)
        requests.clear()
        owners.clear()

    for text in texts:
        data = text.encode()
        key = key_of(data)
        if not text or key in journal.scores:
            done += len(data)
            continue
        sizes[key] = sizes.get(key, 0) + len(data)
        if key in waiting:
            continue
        ids = model.vocabulary.encode(text) + [model.vocabulary.eos_id] * eos
        places = list(windows(len(ids), window, stride))
        waiting[key], left[key] = np.zeros(len(ids)), len(places)
        for first, begin, end in places:
            before = [model.prefix] if first < 0 else ids[first:begin]
            requests.append((before, ids[begin:end]))
            owners.append((key, begin))
            room -= len(before) + end - begin
            if room <= 0:
                flush()
                room = GROUP
    flush()
    progress(done)


def _summed(logprobs: np.ndarray, edges: list[int]) -> Scored:
    parts = [-logprobs[a:b] for a, b in zip(edges, [*edges[1:], len(logprobs)], strict=True)]
    return Scored(len(logprobs), -float(logprobs.sum()), [(len(part), float(part.sum())) for part in parts])


# --------------------------------------------------------------------------------------------------------- the figures


def evaluate(
    leader: Leader,
    config: BpbConfig,
    domains: Sequence[Domain],
    *,
    fingerprint: str = "",
    directory: Path | None = None,
    progress: Callable[[int], object] = int,
) -> Table:
    """Scores all domains with a model and returns its figures, as JSON.

    Args:
      domains: of `survey`.
      fingerprint: names the parameters of the model, so that scores in `directory` are taken up for these alone.
      directory: where scores are kept as they are made; None: in memory.
      progress: is called with the bytes of text that are scored.

    Raises:
      UserError: as BpbConfig.sizes; text that has changed since the survey.
      FailedError: log-probabilities that are not finite numbers.
    """
    model = leader.model
    window, stride = config.sizes(model.cfg, model.vocabulary)
    how: Table = {"window": window, "stride": stride, "eos": config.eos}
    about = {"prefix": model.prefix, "tokenizer": model.vocabulary.sha256, "dtype": model.cfg.dtype, **how}
    edges = bucket_edges(window)
    header = {"parameters": fingerprint, "model": to_dict(model.cfg), "buckets": edges, **about}
    with contextlib.closing(Journal(directory, header)) as journal:
        texts = itertools.chain.from_iterable(read_texts(domain.files) for domain in domains)
        score_texts(leader, texts, journal, **how, progress=progress)
    figures, samples = {}, {}
    for domain in domains:
        nothing = Scored(0, 0.0, [(0, 0.0)] * len(edges))
        scores = [journal.scores.get(key) if size else nothing for key, size in domain.documents]
        found = [score for score in scores if score is not None]
        require(len(found) == len(scores), f"text.{domain.name}: has changed since the evaluation began; start it anew")
        samples[domain.name] = bootstrap([score.nats for score in found], domain, config)
        figures[domain.name] = _figures(domain, found, edges, samples[domain.name])
    return {**about, "parameters": fingerprint, "domains": figures, "averages": _averages(figures, samples)}


def bootstrap(nats: Sequence[float], domain: Domain, config: BpbConfig) -> np.ndarray:
    """Bits per byte of the domain with its documents drawn anew, with replacement: float64[resamples].

    A figure is the ratio of the sums over the documents drawn. Documents without text are not drawn. The draws follow
    from the seed and the name of the domain, so that every model is given the same.
    """
    pairs = np.array([(loss, size) for loss, (_, size) in zip(nats, domain.documents, strict=True) if size])
    rng = np.random.default_rng([config.seed, *domain.name.encode()])
    sums = np.array([pairs[rng.integers(len(pairs), size=len(pairs))].sum(axis=0) for _ in range(config.resamples)])
    return sums[:, 0] / sums[:, 1] / math.log(2)


def _interval(samples: np.ndarray) -> list[float]:
    return np.percentile(samples, LEVEL).tolist()


def _figures(domain: Domain, scores: Sequence[Scored], edges: Sequence[int], samples: np.ndarray) -> Table:
    tokens, nats = sum(score.tokens for score in scores), math.fsum(score.nats for score in scores)
    positions = []
    for begin, end, parts in zip(
        edges, [*edges[1:], None], zip(*(s.buckets for s in scores), strict=True), strict=True
    ):
        count, loss = sum(n for n, _ in parts), math.fsum(x for _, x in parts)
        if count:
            perplexity = math.exp(loss / count) if loss / count < 700 else None  # which float64 does not hold
            found = {"tokens": count, "loss": loss / count, "perplexity": perplexity}
            positions.append({"from": begin, "to": end, **found, "cut": _cut(scores, edges, end)})
    return {
        "documents": len(scores),
        "bytes": domain.num_bytes,
        "tokens": tokens,
        "tokens_per_byte": tokens / domain.num_bytes,
        "loss": nats / tokens,
        "bits_per_byte": nats / domain.num_bytes / math.log(2),
        "interval": _interval(samples) if sum(size > 0 for _, size in domain.documents) > 1 else None,
        "positions": positions,
    }


def _cut(scores: Sequence[Scored], edges: Sequence[int], end: int | None) -> Table | None:
    """The documents of at least `end` tokens and the loss of their first `end` ones; None where there is none."""
    long = [score for score in scores if end is not None and score.tokens >= end]
    if end is None or not long:
        return None
    losses = (x for score in long for _, x in score.buckets[: edges.index(end)])
    return {"documents": len(long), "loss": math.fsum(losses) / (len(long) * end)}


def _averages(figures: Mapping[str, Table], samples: Mapping[str, np.ndarray]) -> Table:
    """The averages over domains that the Tele-FLM report prints, or the domains that are missing for them."""
    averages: Table = {}
    for table in (published.ENGLISH_BPB, published.CHINESE_BPB):
        found = published.find_domains(table.family, figures)
        missing = [part for part in table.parts if part not in found]
        for name, weights in table.averages.items() if found else ():
            label = f"{table.family} {name}"
            if missing:
                averages[label] = {"missing": missing}
                continue
            losses, bits = ({c: figures[d][key] for c, d in found.items()} for key in ("loss", "bits_per_byte"))
            drawn = sum(w * samples[found[part]] for w, part in zip(weights, table.parts)) / sum(weights)
            averages[label] = {"loss": table.average(name, losses), "bits_per_byte": table.average(name, bits)}
            known = all(figures[domain]["interval"] for domain in found.values())
            averages[label]["interval"] = _interval(np.asarray(drawn)) if known else None
    return averages


# ---------------------------------------------------------------------------------------------------------- for people


def results_of(config: BpbConfig, domains: Sequence[Domain], models: Mapping[str, Table]) -> Table:
    """The content of results.json. models: figures of `evaluate`, by the name of the checkpoint."""
    text = {d.name: {"files": list(d.files), "documents": len(d.documents), "bytes": d.num_bytes} for d in domains}
    for domain in domains:
        text[domain.name]["empty"] = sum(size == 0 for _, size in domain.documents)
        text[domain.name]["xz"] = domain.xz
    how = {"resamples": config.resamples, "seed": config.seed}
    return {"kind": "bits_per_byte", **how, "text": text, "models": dict(models)}


def require_same(file: Path, results: Table) -> None:
    """Raises UserError where a file holds results of text, settings or a model that `results` would not hold.

    results: of `results_of`; its figures of models need no more than the settings of `evaluate`.
    """
    if not file.exists():
        return
    before = read_table(file)
    models = before.get("models") if before.get("kind") == results["kind"] else None
    if not isinstance(models, dict) or not all(isinstance(figures, dict) for figures in models.values()):
        raise UserError(f"{file}: holds results of something else; choose another --out")
    other = next((name for name in results if name != "models" and before.get(name) != results[name]), None)
    for path, figures in models.items():
        about = results["models"].get(path)
        if about is None:
            raise UserError(f"{file}: holds results of {path}; name it as well, or choose another --out")
        other = other or next((name for name, value in about.items() if figures.get(name) != value), None)
    require(other is None, f"{file}: was made with another {other}; choose another --out")


def text_of(results: Table, *, by_position: bool = False) -> str:
    """The tables of results for people: bits per byte of all models side by side, then figures of each model."""
    models = results["models"]
    rows = []
    for name, text in results["text"].items():
        figures = (_with_interval(model["domains"][name]) for model in models.values())
        rows.append((name, f"{text['documents']:,}", f"{text['bytes']:,}", f"{text['xz']:.3f}", *figures))
    notes = []
    for label in next(iter(models.values()))["averages"]:
        figures = [model["averages"][label] for model in models.values()]
        if "missing" in figures[0]:
            notes.append(f"no average {label!r} without the domains {', '.join(figures[0]['missing'])}")
        else:
            rows.append((label, "", "", "", *map(_with_interval, figures)))
    parts = ["bits per byte, with the 95% interval over documents"]
    parts[0] += "\n" + tables.text(rows, ("domain", "documents", "bytes", "xz", *models))
    details = [
        (path, name, f"{f['tokens']:,}", f"{f['tokens_per_byte']:.4f}", f"{f['loss']:.4f}", m["window"], m["stride"])
        for path, m in models.items()
        for name, f in m["domains"].items()
    ]
    header = ("model", "domain", "tokens", "tokens/byte", "nats/token", "window", "stride")
    parts.append(tables.text(details, header, align="llrrrrr"))
    if by_position:
        places = []
        for path, model in models.items():
            for name, f in model["domains"].items():
                for at in f["positions"]:
                    end = "" if at["to"] is None else f"{at['to']:,}"
                    figures = (f"{at['tokens']:,}", f"{at['loss']:.4f}", f"{at['perplexity'] or math.inf:.3f}")
                    places.append((path, name, f"{at['from']:,}", end, *figures))
        header = ("model", "domain", "from", "to token", "tokens", "nats/token", "perplexity")
        parts.append(tables.text(places, header, align="llrrrrr"))
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _with_interval(figures: Table) -> str:
    if figures["interval"] is None:
        return f"{figures['bits_per_byte']:.4f}"
    low, high = figures["interval"]
    return f"{figures['bits_per_byte']:.4f} [{low:.3f}, {high:.3f}]"
