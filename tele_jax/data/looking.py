"""A row as text for people: where segments begin, and what of them is learned."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tele_jax.data.vocabulary_base import Vocabulary

# Around the name of a piece that is no text, such as a marker. In text they are shown as escapes, so that a marker that
# somebody typed never looks like one.
OPENING, CLOSING = "\u27e6", "\u27e7"
BOLD, DIM, LEARNED, RESET = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A segment of a row.

    Attributes:
      begin, end: its positions in the row.
      learned: how many of its targets have a weight of 1.
      parts: (text, whether it is learned), in order: the first input, which is given, and then the targets.
    """

    begin: int
    end: int
    learned: int
    parts: tuple[tuple[str, bool], ...]

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        parts = [{"text": text, "learned": learned} for text, learned in self.parts]
        return {"begin": self.begin, "end": self.end, "learned": self.learned, "parts": parts}


def segments(row: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> list[Segment]:
    """The segments of one row of a batch: arrays [S], as packing.to_batch has them [B, S]."""
    found = []
    for number in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        places = np.flatnonzero(row["segment_ids"] == number)
        weights = [0, *row["loss_weights"][places].tolist()]
        ids = [int(row["tokens"][places[0]]), *row["targets"][places].tolist()]
        parts = [
            (spell([i for i, _ in group], vocabulary), learned)
            for learned, group in itertools.groupby(zip(ids, weights), key=lambda pair: pair[1] > 0)
        ]
        found.append(Segment(int(places[0]), int(places[-1]) + 1, int(sum(weights)), tuple(parts)))
    return found


def spell(ids: Sequence[int], vocabulary: Vocabulary) -> str:
    """The text of ids; pieces that stand for no text by their names in brackets.

    Cut characters become U+FFFD, and controls and those brackets escapes.
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
    """The row as lines. What is learned is green, or without color begins with "+ ", and what is given with "- "."""
    used = row[-1].end if row else 0
    learned = sum(segment.learned for segment in row)
    padding = f", {seq_len - used} of padding" if used < seq_len else ""
    head = f"=== {title}: {len(row)} segments, {used} tokens, {learned} learned{padding} ==="
    lines = [f"{BOLD}{head}{RESET}" if color else head]
    for number, segment in enumerate(row, start=1):
        border = f"--- segment {number}: positions {segment.begin} to {segment.end - 1}, {segment.learned} learned ---"
        lines.append(f"{BOLD}{border}{RESET}" if color else border)
        if color:
            lines.append("".join(f"{LEARNED if part else DIM}{text}{RESET}" for text, part in segment.parts))
        else:
            for text, part in segment.parts:
                lines += [("+ " if part else "- ") + line for line in text.split("\n")]
    return "\n".join(lines) + "\n"
