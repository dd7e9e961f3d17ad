"""Columns with the fate and the scores of every sample: some 100 bytes a sample.

The fate of a sample tells whether it was selected, and if not, why.
"""

import dataclasses

import numpy as np

from tele_jax.selection.chunks import Read
from tele_jax.selection.samples import Chunk

LEFT, SELECTED = 0, 1  # fates; others are places in Columns.reasons


class Columns:
    """Fates, places and scores of N samples, each column in the order of their numbers.

    Attributes:
      fate: int32[N]: LEFT, SELECTED, or the place of (stage, reason) in `reasons`.
      category: int32[N], place in `categories`, which is sorted once all chunks are added.
      copy_of: int64[N], number of the sample kept in the place of a copy; -1 for others.
      tokens, loss, alone: see scores.Scores; 0 and NaN without a score.
      cluster, distance: see choice.assign; -1 and NaN for samples that were dropped.
      place: float32[N, 2], in the picture of the report.
    """

    def __init__(self, count: int):
        self.turns, self.question, self.answer, self.category, self.fate, self.tokens = np.zeros((6, count), np.int32)
        self.copy_of, self.cluster = np.full(count, -1, np.int64), np.full(count, -1, np.int32)
        self.loss, self.alone, self.distance = np.full((3, count), np.nan, np.float32)
        self.place, self.centres = np.full((count, 2), np.nan, np.float32), np.zeros((0, 2))
        self.categories: list[str] = []
        self.reasons: list[tuple[str, str]] = [("", "left"), ("", "selected")]

    def __len__(self) -> int:
        return len(self.fate)

    @property
    def difficulty(self) -> np.ndarray:
        """Loss with the question, divided by the loss without; NaN without a score."""
        return self.loss / self.alone

    @property
    def perplexity(self) -> np.ndarray:
        """exp(loss); NaN without a score."""
        return np.exp(self.loss)

    def add(self, chunk: Chunk, read: Read) -> None:
        """Fills in what was found in a chunk."""
        rows = slice(chunk.first, chunk.first + chunk.count)
        for name in ("turns", "question", "answer"):
            getattr(self, name)[rows] = read.rows[name]
        for name in read.categories:
            if name not in self.categories:
                self.categories.append(name)
        self.category[rows] = [self.categories.index(name) for name in read.categories]
        for row, (stage, reason, _) in read.drops.items():
            self.fate[chunk.first + row] = self.code(stage, reason)

    def code(self, stage: str, reason: str) -> int:
        """The fate of a sample that a stage drops for a reason."""
        if (stage, reason) not in self.reasons:
            self.reasons.append((stage, reason))
        return self.reasons.index((stage, reason))

    def drop(self, rows: np.ndarray, stage: str, reason: str) -> None:
        """Drops samples, bool[N]."""
        if rows.any():
            self.fate[rows] = self.code(stage, reason)

    def count(self, stage: str, reason: str) -> int:
        """Returns how many samples a stage dropped for a reason."""
        return int((self.fate == self.reasons.index((stage, reason))).sum()) if (stage, reason) in self.reasons else 0

    def dropped_by(self, *stages: str) -> np.ndarray:
        """Tells which samples the stages dropped, bool[N]."""
        return np.isin(self.fate, [i for i, (name, _) in enumerate(self.reasons) if name in stages])

    def name(self, row: int) -> str:
        """The category of a sample."""
        return self.categories[self.category[row]]


@dataclasses.dataclass(frozen=True)
class Example:
    """A sample as the report shows it."""

    where: str
    category: str
    detail: str
    text: str
