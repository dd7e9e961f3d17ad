"""Batches for training and for evaluation, from what a DataConfig names.

`open_feed` gives a LiveFeed, straight from files, or a CachedFeed (cached_feed.py); `held_out` reads validation files.
"""

import dataclasses
import difflib
import io
import json
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tele_jax.data import cache, examples, packing, sources, templates
from tele_jax.data.cached_feed import Batch, CachedFeed, difference
from tele_jax.data.vocabulary import Vocabulary, load_vocabulary
from tele_jax.errors import DamageError, UserError
from tele_jax.run import DataConfig

SPAN_BYTES = 16_384
SPAN_BYTES_PER_TOKEN = 32  # a span is about eight rows of English

Aside = Callable[[sources.Corpus], None]


def warn(corpus: sources.Corpus) -> None:
    """Warns of the documents of a domain that cannot be used, if there are such: what becomes of them by default."""
    if corpus.rejected:
        warnings.warn(corpus.account(), stacklevel=2)


def ignore(corpus: sources.Corpus) -> None:
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
) -> "LiveFeed | CachedFeed":
    """The feed of a stage. Its batches have been through `place`, which may put them on devices.

    Args:
      data, kind, seq_len, batch_size, seed: as LiveFeed.
      rows: which rows of every batch this process needs; None: all. A live feed gives all in every process.
      place: is given every batch; by a cached feed ahead of time.
      aside: as LiveFeed. (What a cache could not use was kept aside when it was made.)

    Raises:
      UserError: as LiveFeed and check.
      DamageError: as cache.RowCache.
    """
    if data.cache is None:
        return LiveFeed(data, kind=kind, seq_len=seq_len, batch_size=batch_size, seed=seed, place=place, aside=aside)
    check(data, kind=kind, seq_len=seq_len)
    rates = {name: source.rate for name, source in resolve(data).sources.items()}
    row_cache = cache.RowCache(data.cache)
    return CachedFeed(row_cache, rates, batch_size=batch_size, seed=seed, rows=rows, place=place)


def resolve(data: DataConfig) -> DataConfig:
    """`data` with the sources that it leaves to its cache.

    Raises:
      UserError: the cache is missing, has no such domain, or was made from other files; DamageError: it is damaged.
    """
    if data.cache is None:
        return data
    domains = cache.read_manifest(Path(data.cache)).domains
    for name, source in data.sources.items():
        if name not in domains:
            near = difflib.get_close_matches(name, domains, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(domains)}"
            raise UserError(f"sources.{name}: the cache {data.cache} has no such domain; {hint}")
        made_from = domains[name].source.files
        if source.files and source.files != made_from:
            raise UserError(
                f"sources.{name}.files: the cache {data.cache} was made from {', '.join(made_from)}; make it again, or "
                "leave files out"
            )
    return dataclasses.replace(data, sources=data.sources or {name: d.source for name, d in domains.items()})


def check(data: DataConfig, *, kind: examples.Kind, seq_len: int) -> Vocabulary:
    """Looks through all that `data` names, as a feed would, and returns the tokenizer. Of rejects it says nothing.

    Raises:
      UserError: as LiveFeed, as resolve; a cache that was made for another kind, length or tokenizer.
      DamageError: a cache is damaged, as far as can be seen without reading the rows.
    """
    vocabulary = open_vocabulary(data, kind)
    if data.cache is None:
        open_corpora(data, vocabulary, kind, seq_len, "files", aside=ignore)
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
    open_corpora(resolve(data), vocabulary, kind, seq_len, "validation_files", aside=ignore)
    return vocabulary


class LiveFeed:
    """An endless iterator of batches, read, tokenised, packed and mixed while training goes on.

    A batch is a dict of arrays [batch_size, seq_len]: tokens int32 (inputs), targets int32, loss_weights float32,
    segment_ids int32 (1, 2, ... in a row; 0 is padding), positions int32 (from 0 in every segment).

    Every epoch of a domain has every document once, in an order of its own. The domains' shares of the rows are their
    rates. The same configuration, files and seed give the same batches, bit for bit, and `state` and `restore` go on
    in the middle as if nothing had happened, in another process too.
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
    ):
        """Checks all files, and builds the pipeline.

        Args:
          data: domains, rates and the tokenizer.
          kind: "pretrain": every token counts; "sft": answers only, of dialogues.
          seq_len: tokens in a row.
          batch_size: rows in a batch.
          seed: of the orders and of the mixture.
          place: is given every batch before it is given out.
          aside: is given the index of every domain, whose `rejected` are the documents that cannot be used.

        Raises:
          UserError: files that are missing, empty or compressed; a domain without one usable document (sources.index);
            a tokenizer that is missing or lacks what is needed; a system message that its template has no place for;
            `[data]` not installed.
        """
        vocabulary = open_vocabulary(data, kind)
        corpora = open_corpora(data, vocabulary, kind, seq_len, "files", aside=aside)
        from tele_jax.data import tasks  # TensorFlow

        self._errors: list[Exception] = []
        built = [
            tasks.task(corpus, vocabulary, kind=kind, seq_len=seq_len, report=self._errors.append)
            for corpus in corpora.values()
        ]
        converter = tasks.RowConverter(vocabulary, kind)
        mixture = tasks.mixture(
            built, [data.sources[name].rate for name in corpora], converter=converter, seq_len=seq_len
        )
        self._tf = tasks.tf
        self._holder = [iter(tasks.row_dataset(mixture, seed=seed, batch_size=batch_size))]
        # Its threads call Python. They have to be stopped while there still is an interpreter: finalize sees to that
        # at exit, and as soon as the feed is dropped.
        self._finalize = weakref.finalize(self, self._holder.clear)
        self._place = place
        self._batches = 0
        self._identity = {
            "kind": kind,
            "seq_len": seq_len,
            "batch_size": batch_size,
            "seed": seed,
            "tokenizer": vocabulary.sha256,
            "sources": {
                name: {"checksum": corpus.checksum, "format": corpus.format, "rate": data.sources[name].rate}
                for name, corpus in corpora.items()
            },
        }

    def __iter__(self) -> "LiveFeed":
        return self

    def __next__(self) -> Any:
        """The next batch, as `place` gives it.

        Raises:
          UserError: a file has changed since the feed was made.
        """
        batch = next(self._holder[0])
        if self._errors:
            raise self._errors[0]
        self._batches += 1
        return self._place({name: tensor.numpy() for name, tensor in batch.items()})

    def close(self) -> None:
        """Stops reading ahead and frees what the feed holds; it cannot be used after."""
        self._finalize()

    @property
    def batches(self) -> int:
        """How many batches have been given out, those before a restore included."""
        return self._batches

    def state(self) -> bytes:
        """The place in the data after the last batch that was returned."""
        out = io.BytesIO()
        with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            self._tf.train.Checkpoint(iterator=self._holder[0]).write(f"{directory}/feed")
            archive.writestr("feed.json", json.dumps({"batches": self._batches, **self._identity}))
            for path in sorted(Path(directory).iterdir()):
                archive.write(path, path.name)
        return out.getvalue()

    def restore(self, state: bytes) -> None:
        """Goes to a place that `state` gave; the next batch is the one that came after it.

        Raises:
          UserError: the state is of a feed of other files, rates, tokenizer, sizes or seed.
          DamageError: the bytes are not what `state` gave.
        """
        if state[:1] == b"{":
            raise UserError("the position in the data was saved for a feed from a cache")
        try:
            with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(io.BytesIO(state)) as archive:
                header = json.loads(archive.read("feed.json"))
                batches = header.pop("batches")
                changed = difference(header, self._identity)
                if not changed:
                    archive.extractall(directory)
                    self._tf.train.Checkpoint(iterator=self._holder[0]).read(f"{directory}/feed").assert_consumed()
        except (zipfile.BadZipFile, zipfile.zlib.error, KeyError, ValueError, self._tf.errors.OpError) as error:
            raise DamageError(f"the saved position in the data is damaged: {error}") from None
        if changed:
            raise UserError(f"the position in the data was saved for another feed: {changed}")
        self._batches = batches


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
    data: DataConfig, *, kind: examples.Kind, seq_len: int, batch_size: int, aside: Aside = warn
) -> dict[str, HeldOut]:
    """The first data.eval_bytes of the validation files of each domain that has some, always the same batches.

    A document longer than what is left of eval_bytes is cut at a character; a dialogue never is, and the last one may
    go beyond. (Of a dialogue, answers are counted.) Documents longer than seq_len are cut into pieces, each beginning
    with the separator as its only context. Documents that cannot be used are left out; `aside` is as in LiveFeed.

    Raises:
      UserError: as LiveFeed.
    """
    vocabulary = open_vocabulary(data, kind)
    corpora = open_corpora(resolve(data), vocabulary, kind, seq_len, "validation_files", aside=aside)
    return {
        name: _held_out(corpus, vocabulary, kind, seq_len, batch_size, data.eval_bytes)
        for name, corpus in corpora.items()
    }


def _held_out(
    corpus: sources.Corpus, vocabulary: Vocabulary, kind: examples.Kind, seq_len: int, batch_size: int, max_bytes: int
) -> HeldOut:
    sizes = np.array([len(spelled) for spelled in vocabulary.piece_bytes])
    num_bytes, num_tokens, pieces = 0, 0, []
    for i in range(len(corpus)):
        if num_bytes >= max_bytes:
            break
        example = examples.example(corpus, i, vocabulary, kind, seq_len, max_bytes=max_bytes - num_bytes)
        _, targets, weights = example
        weights *= sizes[targets] > 0
        num_tokens += int(weights.sum())
        num_bytes += int((sizes[targets] * weights).sum())
        if vocabulary.adds_dummy_prefix:  # a space that is not in the text, at the start of each
            num_bytes -= int(np.count_nonzero(np.diff(weights, prepend=0) == 1))
        for start in range(0, example.shape[1], seq_len):
            piece = example[:, start : start + seq_len].copy()
            if start:
                piece[0, 0] = vocabulary.eos_id
            pieces.append(piece)
    if not num_bytes:
        raise UserError(
            f"eval_bytes={max_bytes} holds no character of sources.{corpus.name}.validation_files; give more"
        )
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
    return kind == "sft" or any(source.format == "dialogues" for source in data.sources.values())


def open_corpora(
    data: DataConfig,
    vocabulary: Vocabulary,
    kind: examples.Kind,
    seq_len: int,
    field: Literal["files", "validation_files"],
    *,
    aside: Aside = warn,
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
            # Rows of one document come near each other: a span is short enough to bound how many, and long enough that
            # few rows begin inside a document.
            span_bytes = max(SPAN_BYTES, SPAN_BYTES_PER_TOKEN * seq_len)
            corpora[name] = sources.index(
                f"sources.{name}.{field}", name, patterns, source.format, span_bytes=span_bytes
            )
            examples.check_systems(corpora[name], vocabulary)
            aside(corpora[name])
    return corpora
