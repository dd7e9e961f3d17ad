"""Batches for training and for evaluation, from what a DataConfig names.

`open_feed` gives a LiveFeed, straight from files and seqio Tasks, or a CachedFeed (cached_feed.py); `held_out` reads
what is held out.
"""

import dataclasses
import difflib
import functools
import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tele_jax.data import apart, cache, examples, live_feed, order, packing, sources, templates
from tele_jax.data import position as positions_
from tele_jax.data.cached_feed import AHEAD, ELSEWHERE, Batch, CachedFeed, difference, parse_state
from tele_jax.data.position import Position
from tele_jax.data.vocabulary import Vocabulary, load_vocabulary
from tele_jax.errors import UserError
from tele_jax.files import expand
from tele_jax.settings import DataConfig, SourceConfig

if TYPE_CHECKING:
    from tele_jax.data import task_documents

SPAN_BYTES = 16_384
SPAN_BYTES_PER_TOKEN = 32  # a span is about eight rows of English

# Is given a corpus (or a task_documents.TaskDocuments, which has the same account of what cannot be used).
Aside = Callable[[Any], None]
Index = Callable[..., sources.Corpus]  # sources.index, or a sources.Indexes


def warn(corpus: Any) -> None:
    """Warns of the documents of a domain that cannot be used, if there are such: what becomes of them by default."""
    if corpus.rejected:
        warnings.warn(corpus.account(), stacklevel=2)


def ignore(corpus: Any) -> None:
    """Says nothing of them: for a first look, before the one that does."""


def open_feed(
    data: DataConfig,
    *,
    kind: examples.Kind,
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    place: Callable[[Batch], Any] = lambda batch: batch,
    aside: Aside = warn,
    known: Sequence[Position] = (),
    index: Index = sources.index,
) -> "LiveFeed | CachedFeed":
    """The feed of a stage. Its batches have been through `place`, which may put them on devices.

    Args:
      data, kind, seq_len, batch_size, seed: as LiveFeed.
      rows: which rows of every batch this process needs; None: all. A live feed gives all in every process.
      place: is given every batch; by a cached feed ahead of time.
      aside: as LiveFeed. (What a cache could not use was kept aside when it was made.)
      known, index: as LiveFeed.

    Raises:
      UserError: as LiveFeed and check.
      DamageError: as cache.RowCache.
    """
    if data.cache is None:
        shape = {"kind": kind, "seq_len": seq_len, "batch_size": batch_size}
        return LiveFeed(data, **shape, seed=seed, place=place, aside=aside, known=known, index=index)
    check(data, kind=kind, seq_len=seq_len, index=index)
    rates = {name: source.rate for name, source in resolve(data).sources.items()}
    row_cache = cache.RowCache(data.cache)
    return CachedFeed(row_cache, rates, batch_size=batch_size, seed=seed, rows=rows, place=place, known=known)


def resolve(data: DataConfig) -> DataConfig:
    """`data` with the sources that it leaves to its cache, and with a domain for every task of a Mixture.

    Raises:
      UserError: the cache is missing, has no such domain, or was made from other files; seqio has no such task.
      DamageError: the cache is damaged.
    """
    if any(source.task for source in data.sources.values()):
        from tele_jax.data import task_documents

        data = task_documents.expand(data)
    if data.cache is None:
        return data
    domains = cache.read_manifest(Path(data.cache)).domains
    resolved = {}
    for name, source in data.sources.items():
        if name not in domains:
            near = difflib.get_close_matches(name, domains, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(domains)}"
            raise UserError(f"sources.{name}: the cache {data.cache} has no such domain; {hint}")
        made_from = domains[name].source
        of_task = (source.task, source.split)
        differs = source.files and source.files != made_from.files and not _same_sizes(source, domains[name], name)
        if differs or (source.task and of_task != (made_from.task, made_from.split)):
            field = "files" if differs else "task"
            what = f"the split {made_from.split!r} of the task {made_from.task}"
            raise UserError(
                f"sources.{name}.{field}: the cache {data.cache} was made from "
                f"{what if made_from.task else ', '.join(made_from.files)}; make it again, or leave {field} out"
            )
        # What is held out comes from the task that the cache was made from.
        resolved[name] = dataclasses.replace(
            source, task=made_from.task, split=made_from.split, files=source.files or made_from.files
        )
    return dataclasses.replace(data, sources=resolved or {name: d.source for name, d in domains.items()})


def _same_sizes(source: SourceConfig, domain: cache.Domain, name: str) -> bool:
    """Compares the sizes of files with those that a cache was made from: they may lie elsewhere, and are not read."""
    try:
        files = expand(source.files, f"sources.{name}.files")
    except UserError:
        return False
    return tuple(os.path.getsize(file) for file in files) == domain.text_files


def check(data: DataConfig, *, kind: examples.Kind, seq_len: int, index: Index = sources.index) -> Vocabulary:
    """Looks through all that `data` names, as a feed would, and returns the tokenizer. Of rejects it says nothing.

    Raises:
      UserError: as LiveFeed, as resolve; a cache that was made for another kind, length or tokenizer.
      DamageError: a cache is damaged, as far as can be seen without reading the rows.
    """
    vocabulary = open_vocabulary(data, kind)
    resolved = resolve(data)
    apart.require_other_files(resolved)
    if data.cache is None:
        open_documents(resolved, vocabulary, kind, seq_len, aside=ignore, index=index)
    else:
        cache.check_fits(
            cache.RowCache(data.cache).manifest,
            data.cache,
            kind=kind,
            seq_len=seq_len,
            tokenizer=data.tokenizer,
            sha256=vocabulary.sha256,
            template=data.template,
        )
    open_corpora(resolved, vocabulary, kind, seq_len, "validation_files", aside=ignore, index=index)
    open_tasks(resolved, vocabulary, kind, seq_len, "validation_split", aside=ignore, index=index)
    return vocabulary


def shared(data: DataConfig, seq_len: int, *, index: Index = sources.index) -> list[str]:
    """Lines for people, one for each domain with documents that are held out and trained on.

    Compared are lines, byte for byte, of all domains with each other. What a cache was made from was compared with what
    its own page holds out, and is not read again.
    """
    corpora: dict[str, list[sources.Corpus]] = {"files": [], "validation_files": []}
    if data.cache is not None:
        domains = cache.read_manifest(Path(data.cache)).domains
        counts = {f"sources.{name}.files": domains[name].counts.held_out for name in resolve(data).sources}
    elif not any(source.validation_files for source in data.sources.values()):
        return []
    else:
        for field, found in corpora.items():
            for name, source in data.sources.items():
                if (patterns := getattr(source, field)) and source.format != "text":
                    where = f"sources.{name}.{field}"
                    found.append(index(where, name, patterns, source.format, span_bytes=_span_bytes(seq_len)))
        held = apart.HeldOutLines.of(corpora["validation_files"])
        counts = {corpus.where: held.count(corpus) for corpus in corpora["files"]}
    return [f"{where}: {count:,} documents are held out as well" for where, count in counts.items() if count]


class LiveFeed:
    """An endless iterator of batches, read, tokenised, packed and mixed while training goes on.

    A batch is a dict of arrays [batch_size, seq_len]: tokens int32 (inputs), targets int32, loss_weights float32,
    segment_ids int32 (1, 2, ... in a row; 0 is padding), positions int32 (from 0 in every segment).

    Every epoch of a domain has every document once, in an order of its own. The domains' shares of the rows are their
    rates. The same configuration, files and seed give the same batches, bit for bit, and `state` and `restore` go on
    in the middle as if nothing had happened, in any epoch and in another process too. What is read is compared with the
    checksums of the index: a document that changed since ends the run when it is read, and no two versions are mixed.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        kind: examples.Kind,
        seq_len: int,
        batch_size: int,
        seed: int,
        place: Callable[[Batch], Any] = lambda batch: batch,
        aside: Aside = warn,
        known: Sequence[Position] = (),
        index: Index = sources.index,
    ):
        """Checks all files; reading begins with the first batch.

        Args:
          data: domains, rates and the tokenizer.
          kind: "pretrain": every token counts; "sft": answers only, of dialogues.
          seq_len: tokens in a row.
          batch_size: rows in a batch.
          seed: of the orders; a domain that goes on keeps that of the stage which began to read it.
          place: is given every batch, in a thread, before it is asked for.
          aside: is given the index of every domain, whose `rejected` are the documents that cannot be used.
          known: positions that earlier stages came to, the latest first; a domain goes on where it was left.
          index: makes the indexes; sources.Indexes() where several feeds read the same files.

        Raises:
          UserError: files that are missing, empty or compressed; a domain without one usable document (sources.index);
            a tokenizer that is missing or lacks what is needed; a system message that its template has no place for.
        """
        self._vocabulary = open_vocabulary(data, kind)
        data = resolve(data)
        self._documents = open_documents(data, self._vocabulary, kind, seq_len, aside=aside, index=index)
        self._shape = {"kind": kind, "seq_len": seq_len}
        self._batch_size, self._place = batch_size, place
        self._weights = order.integer_weights([data.sources[name].rate for name in self._documents])
        self.taken_over = positions_.choose(known, {name: each.checksum for name, each in self._documents.items()})
        self._identity = {
            "feed": "live",
            **self._shape,
            "batch_size": batch_size,
            "seed": seed,
            "tokenizer": self._vocabulary.sha256,
            "order": order.VERSION,
            "sources": {
                name: {"checksum": each.checksum, "format": each.format, "rate": data.sources[name].rate}
                for name, each in self._documents.items()
            },
        }
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="documents")
        self._pending: deque[Future] = deque()
        self._begin(
            {
                name: live_feed.go_on(self.taken_over.get(name), name, documents, **self._shape, seed=seed)
                for name, documents in self._documents.items()
            },
            batches=0,
        )

    def _begin(self, starts: dict[str, Position], batches: int) -> None:
        """Sets where the next batch comes from; nothing may be at work."""
        self._batches, self._made, self._positions, self._starts = batches, batches, starts, starts
        self._rows: list[Any] = []
        self._broken: Exception | None = None

    def _packers(self) -> list[Any]:
        """One of each domain, made in the thread that reads: what was open is read again."""
        pad_id, separator = max(self._vocabulary.pad_id, 0), examples.separator(self._vocabulary)
        made = []
        for name, documents in self._documents.items():
            start = self._starts[name]
            read = documents.reader(start)
            if self._shape["kind"] == "pretrain":
                made.append(live_feed.CutRows(read, start, separator=separator, pad_id=pad_id))
            else:
                made.append(live_feed.WholeRows(read, start, pad_id=pad_id))
        return made

    def _make(self) -> tuple[Any, dict[str, Position]]:
        """The next batch, and the position of every domain after it."""
        if self._broken is not None:  # a packer may stand in the middle of a row
            raise self._broken
        try:
            return self._make_next()
        except Exception as error:
            self._broken = error
            raise

    def _make_next(self) -> tuple[Any, dict[str, Position]]:
        self._rows = self._rows or self._packers()
        first = self._made * self._batch_size
        domain, _ = order.mixture(np.arange(first, first + self._batch_size), self._weights)
        rows = np.stack([self._rows[i].row() for i in domain.tolist()])
        self._made += 1
        positions = {name: packer.position() for name, packer in zip(self._documents, self._rows, strict=True)}
        return self._place(packing.to_batch(rows)), positions

    def __iter__(self) -> "LiveFeed":
        return self

    def __next__(self) -> Any:
        """The next batch, as `place` gives it.

        Raises:
          UserError: a file has changed, or is gone, since the feed was made.
        """
        while len(self._pending) <= AHEAD:
            self._pending.append(self._pool.submit(self._make))
        batch, self._positions = self._pending.popleft().result()
        self._batches += 1
        return batch

    def close(self) -> None:
        """Stops reading ahead; the feed cannot be used after."""
        self._forget()
        self._pool.shutdown()

    def _forget(self) -> None:
        """Returns when nothing is read any more."""
        for future in self._pending:
            future.cancel()
        wait([future for future in self._pending if not future.cancelled()])
        self._pending.clear()

    @property
    def batches(self) -> int:
        """How many batches have been given out, those before a restore included."""
        return self._batches

    def positions(self) -> dict[str, Position]:
        """The position of every domain after the last batch that was returned, for `known` of a later stage."""
        return self._positions

    def state(self) -> bytes:
        """The place in the data after the last batch that was returned."""
        positions = {name: position.to_json() for name, position in self._positions.items()}
        return json.dumps({"batches": self._batches, **self._identity, "positions": positions}).encode()

    def restore(self, state: bytes) -> None:
        """Goes to a place that `state` gave; the next batch is the one that came after it.

        Raises:
          UserError: the state is of a feed of other files, rates, tokenizer, sizes or seed.
          DamageError: the bytes are not what `state` gave.
        """
        saved, batches, positions = parse_state(state)
        if saved.get("feed") == "cache":
            raise UserError("the position in the data was saved for a feed from a cache")
        if changed := difference(saved, self._identity):
            raise UserError(f"the position in the data was saved for another feed: {changed}; {ELSEWHERE}")
        for name, documents in self._documents.items():
            live_feed.check_own(positions.get(name), name, documents, **self._shape)
        self._forget()
        self._begin({name: positions[name] for name in self._documents}, batches)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out text of one domain.

    Weights are 1 on tokens of text only: not on the end-of-sequence token, nor on `<_end>`. So the loss summed over
    the weights, in bits, over num_bytes is the number of bits per byte of text exactly, whatever the tokenizer and
    however the text falls into documents. (Training does count these tokens.)

    Attributes:
      batches: as LiveFeed's; the last one is filled up with rows of padding.
      num_bytes: UTF-8 bytes whose tokens are predicted.
      num_tokens: number of those tokens: the sum of all loss_weights.
    """

    batches: list[Batch]
    num_bytes: int
    num_tokens: int


def held_out(
    data: DataConfig,
    *,
    kind: examples.Kind,
    seq_len: int,
    batch_size: int,
    aside: Aside = warn,
    index: Index = sources.index,
) -> dict[str, HeldOut]:
    """The first data.eval_bytes of what is held out of each domain that has some, always the same batches.

    A document longer than what is left of eval_bytes is cut at a character; a dialogue or an example of a Task never
    is, and the last one may go beyond. (Of these, what is learned is counted.) Documents longer than seq_len are cut
    into pieces, each beginning with the separator as its only context. Documents that cannot be used are left out;
    `aside` is as in LiveFeed.

    Raises:
      UserError: as LiveFeed.
    """
    vocabulary, data = open_vocabulary(data, kind), resolve(data)
    how = {"aside": aside, "index": index}
    corpora = open_corpora(data, vocabulary, kind, seq_len, "validation_files", **how)
    readers = {name: _reader(corpus, vocabulary, kind, seq_len) for name, corpus in corpora.items()}
    for name, documents in open_tasks(data, vocabulary, kind, seq_len, "validation_split", **how).items():
        readers[name] = (len(documents), lambda i, left, documents=documents: (documents.example(i), True))
    held = {
        name: _held_out(*readers[name], vocabulary, seq_len, batch_size, data.eval_bytes)
        for name in data.sources
        if name in readers
    }
    for name, text in held.items():
        if text is None:
            field = "validation_files" if name in corpora else "validation_split"
            raise UserError(f"eval_bytes={data.eval_bytes} holds no character of sources.{name}.{field}; give more")
    return held


# Gives document i, of at most so many bytes where it can be cut, and whether its text begins with it.
_Read = Callable[[int, int], tuple[np.ndarray, bool]]


def _reader(corpus: sources.Corpus, vocabulary: Vocabulary, kind: examples.Kind, seq_len: int) -> tuple[int, _Read]:
    def read(i: int, left: int) -> tuple[np.ndarray, bool]:
        example = examples.example(corpus, i, vocabulary, kind, seq_len, max_bytes=left)
        return example, not examples.continues(corpus, i, vocabulary)

    return len(corpus), read


def _held_out(
    count: int, read: _Read, vocabulary: Vocabulary, seq_len: int, batch_size: int, max_bytes: int
) -> HeldOut | None:
    """None where max_bytes holds no character."""
    sizes = np.array([len(spelled) for spelled in vocabulary.piece_bytes])
    spaced = np.array([spelled[:1] == b" " for spelled in vocabulary.piece_bytes])
    num_bytes, num_tokens, pieces = 0, 0, []
    for i in range(count):
        if num_bytes >= max_bytes:
            break
        example, begins = read(i, max_bytes - num_bytes)
        _, targets, weights = example
        weights *= sizes[targets] > 0
        num_tokens += int(weights.sum())
        num_bytes += int((sizes[targets] * weights).sum())
        # A space that is not in the text, at the start of each.
        if vocabulary.adds_dummy_prefix and begins:
            num_bytes -= int(np.count_nonzero(spaced[targets] & (np.diff(weights, prepend=0) == 1)))
        for start in range(0, example.shape[1], seq_len):
            piece = example[:, start : start + seq_len].copy()
            if start:
                piece[0, 0] = examples.separator(vocabulary)
            pieces.append(piece)
    if not num_bytes:
        return None
    pad_id = max(vocabulary.pad_id, 0)
    open_rows, full_rows = packing.fit_rows(packing.empty_rows(64, seq_len, pad_id), pieces, pad_id=pad_id)
    rows = np.stack([*full_rows, *filter(packing.used, open_rows)])
    padding = packing.empty_rows(-len(rows) % batch_size, seq_len, pad_id)
    batches = np.concatenate([rows, padding]).reshape(-1, batch_size, *rows.shape[1:])
    return HeldOut([packing.to_batch(batch) for batch in batches], num_bytes, num_tokens)


def open_vocabulary(data: DataConfig, kind: examples.Kind) -> Vocabulary:
    """The tokenizer of `data`, checked for what training needs.

    Raises:
      UserError: there is none, or it lacks pieces for the bytes, for the end of a sequence or, if there are dialogues,
        for their markers.
    """
    vocabulary = load_vocabulary(data.tokenizer).with_template(data.template)
    if not vocabulary.spells_bytes or vocabulary.eos_id < 0:
        raise UserError(f"tokenizer {data.tokenizer}: it needs pieces for the 256 bytes and for the end of a sequence")
    if has_dialogues(data, kind):
        templates.marker_ids(templates.choose(vocabulary), vocabulary)
    return vocabulary


def has_dialogues(data: DataConfig, kind: examples.Kind) -> bool:
    """True where dialogues are written, for which a tokenizer needs markers: fine-tuning on Tasks alone has none."""
    if kind == "sft" and data.cache is not None and not data.sources:
        return cache.read_manifest(Path(data.cache)).template is not None
    files = [source for source in data.sources.values() if not source.task]
    return any(kind == "sft" or source.format == "dialogues" for source in files)


def open_corpora(
    data: DataConfig,
    vocabulary: Vocabulary,
    kind: examples.Kind,
    seq_len: int,
    field: Literal["files", "validation_files"],
    *,
    aside: Aside = warn,
    index: Index = sources.index,
) -> dict[str, sources.Corpus]:
    """The indexed files of every domain that has some in `field`; each has been given to `aside`.

    Raises:
      UserError: as sources.index; fine-tuning on what is not dialogues; a system message that the template of the
        vocabulary has no place for.
    """
    corpora = {}
    for name, source in data.sources.items():
        if patterns := getattr(source, field):
            examples.check_format(name, source.format, kind)
            span_bytes = _span_bytes(seq_len)
            corpora[name] = index(f"sources.{name}.{field}", name, patterns, source.format, span_bytes=span_bytes)
            examples.check_systems(corpora[name], vocabulary)
            aside(corpora[name])
    return corpora


def open_documents(
    data: DataConfig,
    vocabulary: Vocabulary,
    kind: examples.Kind,
    seq_len: int,
    *,
    aside: Aside = warn,
    index: Index = sources.index,
) -> dict[str, live_feed.Documents]:
    """The documents of every domain to be read live, by name in order.

    Raises:
      UserError, FailedError: as open_corpora and open_tasks.
    """
    corpora = open_corpora(data, vocabulary, kind, seq_len, "files", aside=aside, index=index)
    found: dict[str, live_feed.Documents] = {
        name: live_feed.CorpusDocuments(corpus, vocabulary, kind, seq_len, _span_bytes(seq_len))
        for name, corpus in corpora.items()
    }
    found |= open_tasks(data, vocabulary, kind, seq_len, "split", aside=aside, index=index)
    return {name: found[name] for name in sorted(found)}


def open_tasks(
    data: DataConfig,
    vocabulary: Vocabulary,
    kind: examples.Kind,
    seq_len: int,
    field: Literal["split", "validation_split"],
    *,
    aside: Aside = warn,
    index: Index = sources.index,
) -> dict[str, "task_documents.TaskDocuments"]:
    """The examples of every domain that is a seqio Task (`resolve`) and has a split in `field`.

    Raises:
      UserError, FailedError: as task_documents.open_task.
    """
    found = {}
    for name, source in data.sources.items():
        if source.task and (split := getattr(source, field)):
            from tele_jax.data import task_documents

            where = f"sources.{name}.{'task' if field == 'split' else field}"
            made = functools.partial(task_documents.open_task, source, where, vocabulary, kind, seq_len, split=split)
            longest = seq_len if kind == "sft" else None
            key = ("task", where, source.task, split, vocabulary.sha256, kind, longest)
            found[name] = index.once(key, made) if isinstance(index, sources.Indexes) else made()
            aside(found[name])
    return found


def _span_bytes(seq_len: int) -> int:
    """Bytes at which long documents are cut.

    Rows of one document come near each other: a span is short enough to bound how many, and long enough that few rows
    begin inside a document.
    """
    return max(SPAN_BYTES, SPAN_BYTES_PER_TOKEN * seq_len)
