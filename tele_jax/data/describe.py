"""Descriptions for people: figures and a picture of a cache, from its manifest alone, and a row as text."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tele_jax.data.cache import Counts, Manifest
from tele_jax.data.order import Order
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.files import Table

SIMULATED_ROWS = 1_000_000
# Brackets around the name of a piece that is no text, such as a marker. In text they are shown as escapes, so that a
# typed marker never looks like one.
OPENING, CLOSING = "\u27e6", "\u27e7"
BAR = "\u2502"  # after a token, where tokens are shown
BOLD, DIM, LEARNED, RESET = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[0m"


def run_order(manifest: Manifest, seed: int) -> Order:
    """Returns the order of a run at the rates of the page that made the cache."""
    domains = manifest.domains
    return Order(
        tuple(domains),
        tuple(domain.counts.rows for domain in domains.values()),
        tuple(domain.source.rate for domain in domains.values()),
        seed,
    )


def shares(manifest: Manifest) -> dict[str, float]:
    """Returns the share of the rows that each domain is asked for."""
    total = sum(domain.source.rate for domain in manifest.domains.values())
    return {name: domain.source.rate / total for name, domain in manifest.domains.items()}


def simulate(manifest: Manifest) -> dict[str, float]:
    """Returns the share of the rows that each domain has in the first SIMULATED_ROWS of a run with any seed."""
    counts = run_order(manifest, 0).counts(SIMULATED_ROWS)
    return {name: counts[name] / SIMULATED_ROWS for name in manifest.domains}


def epochs(manifest: Manifest, rows: int) -> dict[str, float]:
    """Returns how often a run of `rows` rows goes through each domain."""
    return run_order(manifest, 0).epochs(rows)


def tokens_per_byte(counts: Counts) -> float:
    """Returns the tokens that spell text, per UTF-8 byte of text, as published (arXiv 2404.16645)."""
    return counts.text_tokens / max(1, counts.text_bytes)  # a task may give ids that spell nothing


def length_quantile(counts: Counts, quantile: float) -> int:
    """Returns the power of 2 below whose double lies the length of such a share of the documents."""
    below = np.cumsum(counts.lengths) >= quantile * sum(counts.lengths)
    return 1 << int(np.argmax(below))


def plot(manifest: Manifest, path: Path) -> None:
    """Draws lengths of documents, shares of domains in the rows and in a run, and tokens per byte, as a PNG."""
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


@dataclasses.dataclass(frozen=True)
class Segment:
    """A segment of a row.

    Attributes:
      begin, end: its positions in the row.
      learned: how many of its targets have a weight above 0.
      parts: (text, weight), in order: the first input, which is given, and then the targets.
      note: where it is from, and whether it is all of a dialogue; "" where that is not known.
    """

    begin: int
    end: int
    learned: int
    parts: tuple[tuple[str, float], ...]
    note: str = ""

    def to_json(self) -> Table:
        """Returns the segment for --json."""
        parts = [{"text": text, "learned": weight > 0, "weight": weight} for text, weight in self.parts]
        return {"begin": self.begin, "end": self.end, "learned": self.learned, "note": self.note, "parts": parts}


def segments(
    row: Mapping[str, np.ndarray], vocabulary: Vocabulary, notes: Sequence[str] = (), *, tokens: bool = False
) -> list[Segment]:
    """Returns the segments of one row of a batch: arrays [S], as packing.to_batch has them [B, S].

    notes: of every segment. tokens: puts a BAR between tokens.
    """
    found = []
    for number in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        places = np.flatnonzero(row["segment_ids"] == number)
        weights = [0.0, *(float(f"{weight:.6g}") for weight in row["loss_weights"][places])]
        ids = [int(row["tokens"][places[0]]), *row["targets"][places].tolist()]
        parts = [
            (_text([i for i, _ in group], vocabulary, tokens=tokens), weight)
            for weight, group in itertools.groupby(zip(ids, weights), key=lambda pair: pair[1])
        ]
        learned, note = sum(weight > 0 for weight in weights), notes[number - 1] if notes else ""
        found.append(Segment(int(places[0]), int(places[-1]) + 1, learned, tuple(parts), note))
    return found


def _text(ids: Sequence[int], vocabulary: Vocabulary, *, tokens: bool) -> str:
    return "".join(f"{spell([i], vocabulary)}{BAR}" for i in ids) if tokens else spell(ids, vocabulary)


def spell(ids: Sequence[int], vocabulary: Vocabulary) -> str:
    """Returns the text of ids; pieces that stand for no text appear by their names in brackets.

    Cut characters become U+FFFD; control characters and the brackets become escapes.
    """
    parts = []
    for is_text, group in itertools.groupby(
        ids, key=lambda i: i < vocabulary.vocab_size and vocabulary.piece_bytes[i] != b""
    ):
        if is_text:
            text = b"".join(vocabulary.piece_bytes[i] for i in group).decode(errors="replace")
            parts += [_shown(c) for c in text]
        else:
            names = (vocabulary.piece(i) if i < vocabulary.vocab_size else str(i) for i in group)
            parts += [f"{OPENING}{name}{CLOSING}" for name in names]
    return "".join(parts)


def _shown(character: str) -> str:
    plain = character in "\n\t" or (character.isprintable() and character not in (OPENING, CLOSING))
    return character if plain else character.encode("unicode_escape").decode()


def render(title: str, row: Sequence[Segment], seq_len: int, *, color: bool) -> str:
    """Writes a row as lines. Learned text is green, or begins with "+ " without color; given text begins with "- ".

    A weight other than 1 stands after the plus.
    """
    used = row[-1].end if row else 0
    learned = sum(segment.learned for segment in row)
    padding = f", {seq_len - used} of padding" if used < seq_len else ""
    head = f"=== {title}: {len(row)} segments, {used} tokens, {learned} learned{padding} ==="
    lines = [f"{BOLD}{head}{RESET}" if color else head]
    for number, segment in enumerate(row, start=1):
        border = f"--- segment {number}: positions {segment.begin} to {segment.end - 1}, {segment.learned} learned"
        border += f"; {segment.note} ---" if segment.note else " ---"
        lines.append(f"{BOLD}{border}{RESET}" if color else border)
        if color:
            colored = (f"{LEARNED if part else DIM}{_times(part)}{text}{RESET}" for text, part in segment.parts)
            lines.append("".join(colored))
        else:
            for text, part in segment.parts:
                lines += [("+" if part else "-") + _times(part) + f" {line}" for line in text.split("\n")]
    return "\n".join(lines) + "\n"


def _times(weight: float) -> str:
    return "" if weight in (0, 1) else f"{weight:g}"
