"""The documents of files, encoded: spans of text, whole dialogues, and in fine-tuning samples of long dialogues."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from tele_jax.data import dialogue, encode, sources
from tele_jax.data.dialogue_formats import DIALOGUES
from tele_jax.data.documents import WHOLE, Document, nothing_fits, too_long_notes
from tele_jax.data.encode import Kind
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.settings import DEFAULT_DIALOGUES


class CorpusDocuments:
    """The spans of a corpus as Documents. In fine-tuning a dialogue that is longer than a row becomes several, or none.

    Attributes:
      corpus: the spans.
      samples: int64 [n, 3], of every document its span, first turn and end (dialogue.Sample); None where the documents
        are the spans.
      split, shortened, dropped: numbers of dialogues that were split at turns, that lost turns or text, and of which
        nothing is left.
    """

    def __init__(self, corpus: sources.Corpus, vocabulary: Vocabulary, kind: Kind, seq_len: int):
        """Encodes the dialogues that may be longer than a row. UserError where none is left."""
        self.corpus = corpus
        self.where, self.checksum, self.account = corpus.where, corpus.checksum, corpus.account
        self.line_digests = corpus.line_digests
        self.rejected, self.num_rejected = corpus.rejected, corpus.num_rejected
        self.cut = 0 if corpus.spans["last"].all() else sources.span_bytes_for(seq_len)
        self.split = self.shortened = self.dropped = 0
        self._kind: Kind = kind
        self._vocabulary, self._seq_len = vocabulary, seq_len
        if kind == "sft" and corpus.format in DIALOGUES and (least := dialogue.shortest(vocabulary)) > seq_len + 1:
            raise UserError(f"seq_len={seq_len}: a row of dialogues needs at least {least - 1} tokens")
        self.samples = self._samples() if kind == "sft" and corpus.format in DIALOGUES else None
        if self.samples is not None:
            self.cut = seq_len
        # What changes the examples stands beside the format, with which a saved place in the data has to agree.
        default, how = DEFAULT_DIALOGUES, corpus.how
        fields = ("learned", "next_user", "system") if corpus.format in DIALOGUES else ()
        changed = [name for name in fields if getattr(how, name) != getattr(default, name)]
        changed += ["too_long"] if self.samples is not None else []
        self.format = " ".join([corpus.format, *(f"{name}={getattr(how, name)!r}" for name in changed)])

    def _samples(self) -> np.ndarray | None:
        """Counts the dialogues that are too long; returns `samples`, None where every dialogue is one sample."""
        spans, how, max_tokens = self.corpus.spans, self.corpus.how, self._seq_len + 1
        longest = dialogue.most_tokens(spans["num_bytes"], spans["messages"], self._vocabulary)
        long = np.flatnonzero(longest > max_tokens).tolist()
        rows = {i: [(i, 0, int(count) // 2)] for i, count in enumerate(spans["messages"])}
        for i, document in zip(long, self.corpus.documents(long), strict=True):
            what = {"too_long": how.too_long, "next_user": how.next_user}
            found = dialogue.samples(cast(Any, document.content), self._vocabulary, max_tokens, **what)
            self.split += any(sample.is_part for sample in found)
            self.shortened += any(sample.is_cut for sample in found)
            self.dropped += not found
            rows[i] = [(i, sample.first, sample.end) for sample in found]
        if self.dropped == len(rows):
            raise nothing_fits(self.where, self._seq_len)
        if not (self.split or self.dropped):
            return None
        return np.array([row for each in rows.values() for row in each])

    def notes(self) -> list[str]:
        """Says in lines what became of dialogues that are longer than a row."""
        return too_long_notes(self.where, split=self.split, shortened=self.shortened, dropped=self.dropped)

    def __len__(self) -> int:
        return len(self.corpus if self.samples is None else self.samples)

    def example(self, i: int) -> np.ndarray:
        """Reads document `i`; UserError where its file has changed."""
        span = i if self.samples is None else int(self.samples[i, 0])
        return self._encode(self.corpus.document(span), i)

    def origin(self, i: int) -> str:
        """Says where document `i` is from: file and byte, turns of a dialogue that was split, whether it was cut."""
        span, first, end = (i, 0, WHOLE) if self.samples is None else self.samples[i].tolist()
        corpus, found = self.corpus, self.corpus.spans[span]
        said = f"{corpus.files[found['file']]}, byte {found['offset']:,}"
        if self._kind != "sft" or corpus.format not in DIALOGUES:
            return said
        messages = cast(Any, corpus.document(span).content)
        part = dialogue.turns_of(messages, first, end)
        if len(part) < len(messages):
            said += f", split: turns {first + 1} to {end} of {len(messages) // 2}"
        is_cut = len(dialogue.render(part, self._vocabulary)[0]) > self._seq_len + 1
        return f"{said}, cut to {self._seq_len} positions" if is_cut else said

    def in_order(self, bytes_left: Callable[[], int]) -> Iterator[tuple[np.ndarray, bool]]:
        """Reads all documents, opening each file once."""
        spans = range(len(self)) if self.samples is None else self.samples[:, 0].tolist()
        for i, document in enumerate(self.corpus.documents(spans)):
            left = bytes_left()
            if isinstance(document.content, str) and self.corpus.spans["num_bytes"][i] > left:
                text = document.content.encode()[:left].decode(errors="ignore")
                document = dataclasses.replace(document, content=text, ends=False)
            yield self._encode(document, i), document.begins

    def _encode(self, document: Document, i: int) -> np.ndarray:
        how = self.corpus.how
        if self.samples is not None:
            _, first, end = self.samples[i].tolist()
            document = dataclasses.replace(document, content=dialogue.turns_of(cast(Any, document.content), first, end))
            how = dataclasses.replace(how, too_long="cut")  # into one sample: it is one already
        return encode.encode([document], self._vocabulary, self._kind, self._seq_len, how=how).columns
