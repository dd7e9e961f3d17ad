"""Resolves, checks and opens a DataConfig: its tokenizer, the domains to train on and the domains held out."""

import dataclasses
import filecmp
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from tele_jax.config import nearest
from tele_jax.data import cache, dialogue, documents, encode, sources
from tele_jax.data.corpus_documents import CorpusDocuments
from tele_jax.data.dialogue_formats import DIALOGUES
from tele_jax.data.documents import Documents
from tele_jax.data.encode import Kind
from tele_jax.data.vocabulary import TokenizersVocabulary, load_vocabulary
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.files import Table, expand
from tele_jax.settings import DEFAULT_DIALOGUES, DataConfig, SourceConfig

OnRejects = Callable[[Documents], None]  # is given every domain, to report the documents that cannot be used


def warn(domain: Documents) -> None:
    """Warns of the documents of a domain that cannot be used, if there are some; the default."""
    if domain.num_rejected:
        warnings.warn(domain.account(), stacklevel=2)


class RowStore(Protocol):
    """Rows by domain, any of which can be read without the others. Reading is thread-safe.

    Attributes:
      where: names the store in messages.
      rows: number of rows by domain.
      identity: what the rows depend on beside their content, such as the tokenizer; a saved place has to agree with it.
      reads_alone: whether a process can read a part of a batch: the shape of its rows does not depend on the others.
    """

    @property
    def where(self) -> str: ...
    @property
    def rows(self) -> Mapping[str, int]: ...
    @property
    def identity(self) -> Table: ...
    @property
    def reads_alone(self) -> bool: ...

    def checksum(self, domain: str) -> str:
        """Names the rows of a domain, wherever they lie."""
        ...

    def read(self, domains: Sequence[str], rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Reads the rows `rows[i]` of `domains[i]` as one batch."""
        ...

    def close(self) -> None:
        """Lets go of what reading took; the next read takes it again."""
        ...


class OpenData:
    """A DataConfig with its tokenizer and caches resolved. Domains are opened on use, once.

    Attributes:
      data: the configuration after `resolve`.
      kind: "pretrain": every token counts; "sft": answers only, of dialogues.
      seq_len: tokens in a row.
      vocabulary: the tokenizer.
      index: shares indexes of text files, and other things that are made once, among stages.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        kind: Kind,
        seq_len: int,
        index: sources.Indexes | None = None,
        on_rejects: OnRejects = warn,
    ):
        """Reads the tokenizer, and the manifest of a cache.

        Raises:
          UserError: as open_vocabulary and resolve.
          DamageError: the cache is damaged.
        """
        self.kind: Kind = kind
        self.seq_len, self.index, self._on_rejects = seq_len, index or sources.Indexes(), on_rejects
        self.vocabulary, self.data = open_vocabulary(data, kind), resolve(data)

    @functools.cached_property
    def cache(self) -> cache.RowCache | None:
        """The cache, whose shards have their sizes; None where data is read live.

        Raises:
          UserError: the rows are of another kind, length, tokenizer or template.
          DamageError: as cache.RowCache.
        """
        if self.data.cache is None:
            return None
        opened = cache.RowCache(self.data.cache)
        asked = {"tokenizer": self.data.tokenizer, "sha256": self.vocabulary.sha256, "template": self.data.template}
        asked |= {"dialogues": self.data.dialogues}
        cache.check_fits(opened.manifest, self.data.cache, kind=self.kind, seq_len=self.seq_len, **asked)
        return opened

    @property
    def store(self) -> RowStore | None:
        """The rows that are read at random; None where data is read live. Errors as `cache`."""
        return self.cache

    @functools.cached_property
    def train(self) -> Mapping[str, Documents]:
        """The documents of every domain that is read live, by name in order; none where there is a cache.

        Raises:
          UserError: files that are missing, empty or compressed; a domain without one usable document; fine-tuning on
            what is not dialogues; a system message that the template has no place for; a Task that does not fit.
        """
        if self.data.cache is not None:
            return {}
        return dict(sorted([*self._tasks("split"), *self.files("files")]))

    @functools.cached_property
    def held_out(self) -> Mapping[str, Documents]:
        """The held-out documents of every domain that has some, by name. Errors as `train`."""
        found = dict([*self._tasks("validation_split"), *self.files("validation_files")])
        return {name: found[name] for name in self.data.sources if name in found}

    def files(self, field: Literal["files", "validation_files"]) -> Iterator[tuple[str, Documents]]:
        """Opens the files of every domain that has some in `field`. Errors as `train`."""
        for name, source in self.data.sources.items():
            if getattr(source, field):
                opened = self._open_files(name, source, field)
                self._on_rejects(opened)
                yield name, opened

    def _open_files(self, name: str, source: SourceConfig, field: str) -> Documents:
        check_format(name, source.format, self.kind)
        where, how, patterns = f"sources.{name}.{field}", self.data.dialogues, getattr(source, field)
        if field == "validation_files":  # bits per byte are of text alone
            how = dataclasses.replace(how, next_user=False)
        span_bytes = sources.span_bytes_for(self.seq_len)
        corpus = self.index(where, name, patterns, source.format, span_bytes=span_bytes, how=how)
        if source.format in DIALOGUES:
            corpus.check_rejected()
        check_systems(corpus, self.vocabulary)
        key = ("samples", where, corpus.checksum, corpus.format, how, self.kind, self.seq_len)
        key += (self.vocabulary.sha256, self.data.template)
        return self.index.once(key, lambda: CorpusDocuments(corpus, self.vocabulary, self.kind, self.seq_len))

    def _tasks(self, field: Literal["split", "validation_split"]) -> Iterator[tuple[str, Documents]]:
        for name, source in self.data.sources.items():
            if source.task and (split := getattr(source, field)):
                where = f"sources.{name}.{'task' if field == 'split' else field}"
                opened = self._open_task(source, where, split)
                self._on_rejects(opened)
                yield name, opened

    def _open_task(self, source: SourceConfig, where: str, split: str) -> Documents:
        from tele_jax.data import task_documents

        how = (where, self.vocabulary, self.kind, self.seq_len if self.kind == "sft" else None)
        make = functools.partial(task_documents.open_task, source, *how, split=split)
        return self.index.once(("task", source.task, split, *how), make)

    def shared(self) -> list[str]:
        """Returns a line for every domain with documents that are trained on and held out, in any domain.

        Lines of files are compared, byte for byte but for their ends. The text of a cache was compared when it was
        made, with what its own page holds out.
        """
        if self.cache is not None:
            made_from = self.cache.manifest.domains
            counts = {f"sources.{name}.files": made_from[name].counts.held_out for name in self.data.sources}
        else:
            lines = {
                part: {
                    one.where: one.line_digests()  # pyright: ignore[reportAttributeAccessIssue]
                    for one in found.values()
                    if hasattr(one, "line_digests")  # what a Task reads is not known
                }
                for part, found in (("train", self.train), ("held out", self.held_out))
            }
            held = np.concatenate([np.zeros(0, np.uint64), *lines["held out"].values()])
            counts = {where: int(np.isin(digests, held).sum()) for where, digests in lines["train"].items()}
        return [f"{where}: {count:,} documents are held out as well" for where, count in counts.items() if count]


def resolve(data: DataConfig) -> DataConfig:
    """Returns `data` with what it leaves to its cache, sources and dialogues, and a domain for every task of a Mixture.

    Raises:
      UserError: the cache is missing, has no such domain, or was made from other files; seqio has no such task.
      DamageError: the cache is damaged.
    """
    if any(source.task for source in data.sources.values()):
        from tele_jax.data import task_documents

        data = task_documents.expand(data)
    if data.cache is None:
        return data
    manifest = cache.read_manifest(Path(data.cache))
    domains = manifest.domains
    if data.dialogues == DEFAULT_DIALOGUES and manifest.dialogues is not None:
        data = dataclasses.replace(data, dialogues=manifest.dialogues)
    resolved = {}
    for name, source in data.sources.items():
        if name not in domains:
            hint = nearest(name, domains, "it has")
            raise UserError(f"sources.{name}: the cache {data.cache} has no such domain; {hint}")
        made_from = domains[name].source
        differs = source.files and source.files != made_from.files and not _same_sizes(source, domains[name], name)
        if differs or (source.task and (source.task, source.split) != (made_from.task, made_from.split)):
            field = "files" if differs else "task"
            what = f"the split {made_from.split!r} of the task {made_from.task}"
            raise UserError(
                f"sources.{name}.{field}: the cache {data.cache} was made from "
                f"{what if made_from.task else ', '.join(made_from.files)}; make it again, or leave {field} out"
            )
        # The task that the cache was made from also gives what is held out.
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


def open_vocabulary(data: DataConfig, kind: Kind) -> Vocabulary:
    """Reads the tokenizer of `data`, and checks it for what training needs.

    Raises:
      UserError: there is none, or it lacks pieces for the bytes, for the end of a sequence or, if there are dialogues,
        for their markers.
    """
    vocabulary = load_vocabulary(data.tokenizer).with_template(data.template)
    # A JSON tokenizer lacks pieces for control characters at most, and refuses a text that has one.
    spells = vocabulary.spells_bytes or (kind == "sft" and isinstance(vocabulary, TokenizersVocabulary))
    if not spells or vocabulary.eos_id < 0:
        raise UserError(f"tokenizer {data.tokenizer}: it needs pieces for the 256 bytes and for the end of a sequence")
    if has_dialogues(data, kind):
        dialogue.shortest(vocabulary, next_user=data.dialogues.next_user)
    return vocabulary


def has_dialogues(data: DataConfig, kind: Kind) -> bool:
    """Tells whether dialogues are written, for which a tokenizer needs markers: fine-tuning on Tasks alone has none."""
    if kind == "sft" and data.cache is not None and not data.sources:
        return cache.read_manifest(Path(data.cache)).template is not None
    files = [source for source in data.sources.values() if not source.task]
    return any(kind == "sft" or source.format in DIALOGUES for source in files)


def check_format(domain: str, format: documents.Format, kind: Kind) -> None:
    """Raises UserError where fine-tuning is to be fed with files that have no answers."""
    if format in ("pairs", "prompts"):
        raise UserError(f"sources.{domain}: stages of the kinds reward, dpo, ppo and grpo read {format}, not this one")
    if kind == "sft" and format not in DIALOGUES:
        raise UserError(
            f"sources.{domain}: fine-tuning learns answers, so its files have to be dialogues, not {format}"
        )


def check_systems(corpus: sources.Corpus, vocabulary: Vocabulary) -> None:
    """Raises UserError, with its place, for the first system message that the template has no place for."""
    for i in np.flatnonzero(corpus.spans["system"])[:1]:
        where = f"{corpus.files[corpus.spans['file'][i]]}: dialogue at byte {corpus.spans['offset'][i]:,}"
        encode.check_system(corpus.document(i).content, vocabulary, where)


def check(data: DataConfig, *, kind: Kind, seq_len: int, index: sources.Indexes | None = None) -> OpenData:
    """Opens all that `data` names, and checks it. Rejected documents are not reported.

    Raises:
      UserError: as OpenData; text that is both trained on and held out.
      DamageError: a cache is damaged, as far as can be seen without reading the rows.
    """
    return checked(OpenData(data, kind=kind, seq_len=seq_len, index=index, on_rejects=lambda domain: None))


_Opened = TypeVar("_Opened", bound=OpenData)


def checked(opened: _Opened) -> _Opened:
    """Opens all that is opened on use, and returns what it was given. Raises as `check`."""
    require_other_files(opened.data)
    _ = opened.cache, opened.train, opened.held_out
    return opened


def require_other_files(data: DataConfig) -> None:
    """Raises UserError where a file, by its path or its content, or a split of a Task is trained on and held out.

    Files of a cache that are not here any more are not compared.
    """
    trained: dict[str, str] = {}  # real path -> its domain
    splits: dict[tuple[str, str], str] = {}
    for name, source in data.sources.items():
        if source.task:
            splits[source.task, source.split] = name
        for path in _paths(source.files, f"sources.{name}.files", missing_ok=data.cache is not None):
            trained[os.path.realpath(path)] = name
    sizes: dict[int, list[str]] = {}
    for path in trained if any(source.validation_files for source in data.sources.values()) else ():
        sizes.setdefault(os.path.getsize(path), []).append(path)
    for name, source in data.sources.items():
        if (other := splits.get((source.task, source.validation_split))) is not None:
            raise UserError(
                f"sources.{name}.validation_split: {source.validation_split!r} is what {other} is trained on"
            )
        for path in _paths(source.validation_files, f"sources.{name}.validation_files", missing_ok=False):
            real = os.path.realpath(path)
            same = [real] if real in trained else sizes.get(os.path.getsize(path), [])
            for each in same:
                if each == real or filecmp.cmp(each, path, shallow=False):
                    raise UserError(
                        f"sources.{name}.validation_files: {path} is trained on as well (sources.{trained[each]}.files"
                        f"{'' if each == real else f', {each} is the same text'}); hold other text out"
                    )


def _paths(patterns: Sequence[str], where: str, *, missing_ok: bool) -> tuple[str, ...]:
    try:
        return sources.expand_domain(patterns, where) if patterns else ()
    except UserError:
        if missing_ok:
            return ()
        raise
