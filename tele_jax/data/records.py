"""The records of a domain of pairs or of prompts, each checked and encoded once, when the domain is opened.

A record that cannot be used is rejected with its file and line, as a dialogue is. A prompt is encoded once, apart from
the answers to it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from tele_jax.data import dialogue, sources
from tele_jax.data import documents as texts
from tele_jax.data.preferences import Preference, RecordKind, read_record
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.settings import DialogueConfig


class Ragged:
    """Lists of ids of any length, one after the other in one array.

    Attributes:
      ids: int32 [N].
      starts: int64 [n + 1], where each list begins; the last is N.
    """

    def __init__(self, lists: Sequence[Sequence[int] | np.ndarray]):
        self.starts = np.concatenate([[0], np.cumsum([len(each) for each in lists], dtype=np.int64)])
        self.ids = np.concatenate([np.zeros(0, np.int32), *(np.asarray(each, np.int32) for each in lists)])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.starts[i + 1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The tokens that a record may have: with its prompt and the longest answer; of its prompt alone."""

    sequence: int
    prompt: int


class Records:
    """The records of one domain that can be used, encoded; a documents.Documents as far as messages go.

    Attributes:
      where, format, rejected, num_rejected: as documents.Documents has them.
      prompts: ids of the prompt of every record.
      answers: ids of all answers, each with what ends it; record by record.
      of_answer: int64, the record of every answer.
      rows: int64 [n, 2], the answers that are chosen and rejected, of every pair; of prompts alone (record, record).
      margins, weights: float32 [n] of every pair; a ranking of K answers has K (K - 1) / 2, which together weigh 1.
      fields: of prompts, the record itself.
      sizes: int64, bytes of every record.
    """

    def __init__(self, where: str, kind: RecordKind, vocabulary: Vocabulary, limits: Limits):
        """Reads nothing yet: `read` and `read_task` do, and `close` ends it."""
        self._kind: RecordKind = kind
        self.where, self.format = where, kind
        self._vocabulary, self._limits, self._rejects = vocabulary, limits, texts.Rejects()
        self._prompts: list[Sequence[int] | np.ndarray] = []
        self._answers: list[list[int]] = []
        self._of_answer: list[int] = []
        self._rows: list[tuple[int, int]] = []
        self._margins: list[float] = []
        self._weights: list[float] = []
        self._sizes: list[int] = []
        self._digests: list[int] = []
        self.fields: list[Table] = []

    def read(self, patterns: Sequence[str], how: DialogueConfig) -> None:
        """Reads all files of the domain. UserError for a file that cannot be read."""
        read = self._reader(how)
        for path in sources.expand_domain(patterns, self.where):
            with texts.open_text(path) as file:
                for offset, data, at in texts.records(file, self._kind, lambda block: None):
                    made = texts.read_document(path, offset, data, read, self._rejects.add, at)
                    if made is not None:
                        self._keep(*made, size=len(data), digest=texts.digest(data, self._kind))

    def _reader(self, how: DialogueConfig) -> Callable[[str], tuple[Preference, Sequence[int], list[list[int]]]]:
        def read(text: str) -> tuple[Preference, Sequence[int], list[list[int]]]:
            found = read_record(texts.parse_record(text), self._kind, how)
            prompt, answers = dialogue.render_answers(found.prompt, found.answers, self._vocabulary)
            self._check(prompt, answers)
            return found, prompt, answers

        return read

    def read_task(self, task: str, split: str) -> None:
        """Reads the examples of a seqio Task: the ids of `inputs` are a prompt, the other features its fields."""
        from tele_jax.data import task_documents

        for number, fields in enumerate(task_documents.prompts(task, split, self._vocabulary)):
            prompt = fields.pop("inputs")
            try:
                self._check(prompt, [])
            except UserError as error:
                sample = self._vocabulary.decode(prompt[:50].tolist())
                of = {"task": task, "split": split, "shard": 0, "example": number}
                self._rejects.add({**of, "reason": str(error), "sample": sample})
                continue
            size = len(b"".join(self._vocabulary.piece_bytes[i] for i in prompt.tolist()))
            self._keep(Preference([], fields=fields), prompt, [], size=size, digest=None)

    def _check(self, prompt: Sequence[int] | np.ndarray, answers: Sequence[Sequence[int]]) -> None:
        if not len(prompt):
            raise UserError("the prompt is empty")
        if len(prompt) > self._limits.prompt:
            raise UserError(
                f"the prompt has {len(prompt):,} tokens, and {self._limits.prompt:,} leave room for an answer"
            )
        if (most := max((len(prompt) + len(answer) for answer in answers), default=0)) > self._limits.sequence:
            raise UserError(f"{most:,} tokens with the prompt, more than a row of {self._limits.sequence:,}")
        if len({tuple(answer) for answer in answers}) < len(answers):
            raise UserError("two answers are the same tokens, so neither is better")

    def _keep(
        self,
        found: Preference,
        prompt: Sequence[int] | np.ndarray,
        answers: Sequence[list[int]],
        *,
        size: int,
        digest: int | None,
    ) -> None:
        number, first = len(self._prompts), len(self._answers)
        self._prompts.append(np.asarray(prompt, np.int32))
        self._answers += answers
        self._of_answer += [number] * len(answers)
        pairs = [(first + better, first + worse) for better, worse in found.pairs] or [(number, number)]
        self._rows += pairs
        self._margins += [found.margin] * len(pairs)
        self._weights += [1 / len(pairs)] * len(pairs)
        self._sizes += [size] + [0] * (len(pairs) - 1)
        self._digests += [] if digest is None else [digest]
        if self._kind == "prompts":
            self.fields.append(found.fields)

    def close(self, most_rejected: float) -> "Records":
        """Turns what was read into arrays, and returns itself.

        Raises:
          UserError: not one record can be used, or a larger share than `most_rejected` cannot be.
        """
        self.rejected, self.num_rejected = tuple(self._rejects.first), self._rejects.count
        first = next(map(texts.place, self.rejected), None)
        if not self._prompts:
            raise texts.nothing_usable(self.where, first)
        texts.check_rejected(self.where, len(self._prompts), self.num_rejected, first, most_rejected)
        self.prompts, self.answers = Ragged(self._prompts), Ragged(self._answers)
        self.of_answer, self.rows = np.array(self._of_answer, np.int64), np.array(self._rows, np.int64)
        self.margins, self.weights = np.array(self._margins, np.float32), np.array(self._weights, np.float32)
        self.sizes = np.array(self._sizes, np.int64)
        del self._prompts, self._answers, self._of_answer, self._rows, self._margins, self._weights, self._sizes
        return self

    def __len__(self) -> int:
        return len(self.prompts)

    def account(self) -> str:
        """Says in a line how many records were rejected, and why the first."""
        first = next(map(texts.place, self.rejected), None)
        return texts.account(self.where, len(self), self.num_rejected, first)

    def notes(self) -> list[str]:
        """Returns no line: a record that is too long is rejected."""
        return []

    def line_digests(self) -> np.ndarray:
        """Returns `digest` of the line of every record, uint64 [n]; none of a Task."""
        return np.array(self._digests, np.uint64)

    @functools.cached_property
    def checksum(self) -> str:
        """Names all rows, wherever their files lie: BLAKE2 of the ids, margins, weights and fields, hexadecimal."""
        named = hashlib.blake2b(self._kind.encode(), digest_size=16)
        for array in (
            *vars(self.prompts).values(),
            *vars(self.answers).values(),
            self.rows,
            self.margins,
            self.weights,
        ):
            named.update(array.tobytes())
        named.update(json.dumps(self.fields, sort_keys=True, default=repr).encode())
        return named.hexdigest()
