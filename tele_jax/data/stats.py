"""Figures of a cache, from its manifest and from the order of a run alone: no row is read."""

from pathlib import Path

import numpy as np

from tele_jax.data.cache import Counts, Manifest
from tele_jax.data.order import Order

SIMULATED_ROWS = 1_000_000


def order(manifest: Manifest, seed: int) -> Order:
    """The order of a run at the rates of the page that made the cache."""
    domains = manifest.domains
    return Order(
        tuple(domains),
        tuple(domain.counts.rows for domain in domains.values()),
        tuple(domain.source.rate for domain in domains.values()),
        seed,
    )


def shares(manifest: Manifest) -> dict[str, float]:
    """The share of the rows that each domain is asked for."""
    total = sum(domain.source.rate for domain in manifest.domains.values())
    return {name: domain.source.rate / total for name, domain in manifest.domains.items()}


def simulate(manifest: Manifest) -> dict[str, float]:
    """The share of the rows that each domain has in the first SIMULATED_ROWS of a run, whatever its seed."""
    counts = order(manifest, 0).counts(SIMULATED_ROWS)
    return {name: counts[name] / SIMULATED_ROWS for name in manifest.domains}


def epochs(manifest: Manifest, rows: int) -> dict[str, float]:
    """How often a run of so many rows goes through each domain."""
    return order(manifest, 0).epochs(rows)


def tokens_per_byte(counts: Counts) -> float:
    """Tokens that spell text, per UTF-8 byte of it, as published (arXiv 2404.16645)."""
    return counts.text_tokens / max(1, counts.text_bytes)  # a task may give ids that spell nothing


def length_quantile(counts: Counts, quantile: float) -> int:
    """The power of 2 below which, or less than its double, so large a share of the documents have their length."""
    below = np.cumsum(counts.lengths) >= quantile * sum(counts.lengths)
    return 1 << int(np.argmax(below))


def plot(manifest: Manifest, path: Path) -> None:
    """Lengths of documents, what a domain has of the rows and of the run, and tokens per byte, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    domains = manifest.domains
    names, counts = list(domains), [domain.counts for domain in domains.values()]
    height = max(3.2, 0.35 * len(names) + 1.6)
    figure, (lengths, share, density) = plt.subplots(1, 3, figsize=(15, height), layout="constrained")
    used = [bin for bin in range(len(counts[0].lengths)) if any(count.lengths[bin] for count in counts)]
    bins = np.arange(min(used), max(used) + 2)
    for name, count in zip(names, counts):
        values = np.array(count.lengths[bins[0] : bins[-1]]) / sum(count.lengths)
        lengths.stairs(100 * values, 2.0**bins, label=name, linewidth=1.5)
    lengths.axvline(manifest.seq_len, color="grey", linestyle="--", linewidth=1, label="a row")
    lengths.set_xscale("log", base=2)
    lengths.set_xlabel("tokens of a document")
    lengths.set_ylabel("documents, %")
    lengths.legend(fontsize="small")
    lengths.set_title("Lengths")
    places = np.arange(len(names))
    rows = sum(count.rows for count in counts)
    share.barh(places - 0.2, [100 * count.rows / rows for count in counts], 0.4, label="of the cache", color="silver")
    share.barh(places + 0.2, [100 * value for value in shares(manifest).values()], 0.4, label="of a run")
    share.set_xlabel("share of the rows, %")
    share.legend(fontsize="small")
    share.set_title("Domains")
    bars = density.barh(places, [tokens_per_byte(count) for count in counts], 0.6)
    density.bar_label(bars, fmt="%.3f", padding=3, fontsize="small")
    density.margins(x=0.15)
    density.set_xlabel("tokens per UTF-8 byte")
    density.set_title("Tokenizer")
    for axes in (share, density):
        axes.set_yticks(places, names)
        axes.invert_yaxis()
    for axes in (lengths, share, density):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
