"""Examples of registered seqio Tasks as documents, for live feeds and for caches.

A Task is gone through once, in its own order, and its encoded examples are kept in a scratch file, from where they are
read at random. So the order of every epoch, positions in the data and exact resuming are those of files (packing.py).
The next start compares checksums, in case the Task gives something else then.

A cache takes a Task by the shards of its source, each of which becomes one shard of rows (shards.py).
"""

import array
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tele_jax.data import documents, encode
from tele_jax.data.encode import Kind
from tele_jax.data.task_features import check_features, check_vocabularies, check_vocabulary, reason
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import FailedError, UserError
from tele_jax.extras import keep_off_accelerators, need
from tele_jax.settings import DataConfig, SourceConfig

tf = need("tensorflow")
seqio = need("seqio")
Task = Mixture = Dataset = Tensor = Any  # of seqio and TensorFlow, which are imported when they are used
keep_off_accelerators()  # a page may have loaded it

SAY_EVERY = 30  # seconds between lines about a task that takes long


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskShard:
    """A part of a split of a Task: shard `index` of `count` of its source.

    Attributes:
      task, split: by name.
      file: the local file that the shard is, to notice that it changes; empty where it is none.
    """

    task: str
    split: str
    index: int = 0
    count: int = 1
    file: str = ""


class TaskDocuments:
    """A split of a Task as documents.Documents, or a shard of the split for a cache.

    Attributes:
      checksum: BLAKE2 of all that the Task gave, hexadecimal; rejected examples are included.
      cut: 0, no document is cut.
      format: "task".
      where: names the Task in messages: "sources.lm.task".
      rejected: the first examples that cannot be used.
      num_rejected: number of examples that cannot be used.
    """

    cut = 0
    format = "task"

    def __init__(self, shard: TaskShard, vocabulary: Vocabulary, kind: Kind, seq_len: int | None, *, where: str = ""):
        """Goes through the Task once.

        Args:
          shard: part of the Task, which is registered.
          vocabulary: vocabulary of the run.
          kind: "pretrain", or "sft", which learns answers.
          seq_len: in fine-tuning, a longer example is rejected.
          where: names the Task in messages.

        Raises:
          UserError: there is no such Task or split; its features or its vocabulary are not those of the run; reading
            it fails.
          FailedError: the scratch file finds no room.
        """
        self.where = where or f"task {shard.task}"
        self._shard, self._vocabulary, self._rejects = shard, vocabulary, documents.Rejects()
        self._starts = array.array("q", [0])  # where the columns of a document begin, in positions
        self._scratch = tempfile.TemporaryFile(prefix="tele_task_")  # noqa: SIM115  as long as the documents
        digest = hashlib.blake2b(digest_size=16)
        task = find(shard.task)
        _check_split(task, shard.task, shard.split)
        check_features(task, kind)
        check_vocabularies(task, vocabulary)
        last_line = time.monotonic()
        for number, features in enumerate(_features(task, shard)):
            _update(digest, features)
            self._keep(number, features, kind, seq_len)
            if number % 1024 == 0 and time.monotonic() - last_line > SAY_EVERY:
                last_line = time.monotonic()
                print(f"tele: task {shard.task}: {number:,} examples of {shard.split} so far", file=sys.stderr)
        self.checksum = digest.hexdigest()
        self.rejected, self.num_rejected = tuple(self._rejects.first), self._rejects.count
        with _one_line_if_full():
            self._scratch.flush()

    def _keep(self, number: int, features: Mapping[str, np.ndarray], kind: Kind, seq_len: int | None) -> None:
        """Puts an example into the scratch file, or among the rejected ones."""
        shard, vocabulary = self._shard, self._vocabulary
        for name in features.keys() - {"loss_weights"}:
            ids = features[name]
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary.vocab_size:
                raise UserError(
                    f"task {shard.task}: {name} of example {number} has ids from {ids.min()} to {ids.max()}, and the "
                    f"tokenizer {vocabulary.path} has those from 0 to {vocabulary.vocab_size - 1}"
                )
        try:
            columns = encode.encode([documents.Document(features)], vocabulary, kind, seq_len or 0).columns
        except UserError as error:
            of = {"task": shard.task, "split": shard.split, "shard": shard.index, "example": number}
            sample = vocabulary.decode(features["targets"][:50].tolist())
            self._rejects.add({**of, "reason": str(error), "sample": sample})
            return
        with _one_line_if_full():
            self._scratch.write(columns.tobytes())
        self._starts.append(self._starts[-1] + columns.shape[1])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def account(self) -> str:
        """Says in a line how many examples were rejected, and why the first."""
        first = next(map(documents.place, self.rejected), None)
        return documents.account(self.where, len(self), self.num_rejected, first)

    def notes(self) -> list[str]:
        """Returns no line: an example that is longer than a row is rejected."""
        return []

    def example(self, i: int) -> np.ndarray:
        """Reads document `i` as int32 [3, n] (encode.COLUMNS)."""
        start, end = self._starts[i], self._starts[i + 1]
        size = np.dtype(np.int32).itemsize * len(encode.COLUMNS)
        data = os.pread(self._scratch.fileno(), size * (end - start), size * start)
        return np.frombuffer(data, np.int32).reshape(len(encode.COLUMNS), end - start).copy()

    def in_order(self, bytes_left: Callable[[], int]) -> Iterator[tuple[np.ndarray, bool]]:
        """Reads all documents in order; none is cut."""
        del bytes_left
        return ((self.example(i), True) for i in range(len(self)))


@contextlib.contextmanager
def _one_line_if_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = os.strerror(error.errno or errno.EIO)
        raise FailedError(
            f"{tempfile.gettempdir()}: {what}; a large task belongs into a cache (tele data cache)"
        ) from None


def open_task(
    source: SourceConfig, where: str, vocabulary: Vocabulary, kind: Kind, seq_len: int | None, *, split: str
) -> TaskDocuments:
    """Opens a split of the Task that `source` names; `where` names it in messages.

    Raises:
      UserError, FailedError: as TaskDocuments; not one example can be used.
    """
    made = TaskDocuments(TaskShard(task=source.task, split=split), vocabulary, kind, seq_len, where=where)
    if not len(made) and made.rejected:
        raise documents.nothing_usable(where, documents.place(made.rejected[0]))
    if not len(made):
        raise UserError(f"{where}: the split {split!r} of the task {source.task} has no example")
    return made


def checksum(shard: TaskShard) -> str:
    """Computes the present TaskDocuments.checksum: goes through the Task once, and keeps nothing.

    Raises:
      UserError: there is no such Task or split; reading it fails.
    """
    digest = hashlib.blake2b(digest_size=16)
    for features in _features(find(shard.task), shard):
        _update(digest, features)
    return digest.hexdigest()


def _update(digest: Any, features: Mapping[str, np.ndarray]) -> None:
    for name in sorted(features):
        digest.update(f"{name} {len(features[name])} ".encode())
        digest.update(np.ascontiguousarray(features[name], np.int64).tobytes())


def find(name: str) -> Task | Mixture:
    """Returns the registered seqio Task or Mixture of this name.

    Raises:
      UserError: there is none.
    """
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "register it, or a mixture, in a module that the page imports"
        raise UserError(f"seqio has no task {name!r}; {hint}")
    return seqio.get_mixture_or_task(name)


def is_registered(name: str) -> bool:
    """Tells whether seqio has a Task or Mixture of this name in this process."""
    return name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def expand(data: DataConfig) -> DataConfig:
    """Returns `data` with a domain for every task of the Mixtures that it names.

    Raises:
      UserError: no such task, mixture or split; two domains would have one name.
    """
    found: dict[str, SourceConfig] = {}
    for name, source in data.sources.items():
        try:
            parts = _parts(name, source) if source.task else {name: source}
        except UserError as error:
            raise UserError(f"sources.{name}.task: {error}") from None
        for part, of in parts.items():
            if part in found:
                raise UserError(f"sources.{name}.task: its domain would be {part!r}, which another one has; rename one")
            found[part] = of
    return dataclasses.replace(data, sources=found)


def _parts(name: str, source: SourceConfig) -> dict[str, SourceConfig]:
    made = find(source.task)
    held_out = source.validation_split
    for split in filter(None, (source.split, held_out)):
        _check_split(made, source.task, split)
    if isinstance(made, seqio.Task):
        return {name: source}
    parts = {}
    for task, share in shares(made).items():
        _check_split(find(task), task, source.split)
        evaluated = held_out if _has_split(find(task), held_out) else ""
        rate = source.rate * share
        parts[f"{name}.{task}"] = dataclasses.replace(source, task=task, rate=rate, validation_split=evaluated)
    return parts


def shares(mixture: Task) -> dict[str, float]:
    """Returns the share of every task in a seqio Mixture, by name; they sum to 1.

    Raises:
      UserError: its rates cannot be.
    """
    try:
        rates = {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}
    except Exception as error:  # a rate may be a function of the user's
        raise UserError(f"the rates of the mixture {mixture.name} fail: {reason(error)}") from None
    total = sum(rates.values())
    if not (min(rates.values()) >= 0 and 0 < total < float("inf")):
        raise UserError(f"the rates of the mixture {mixture.name} are {rates}, not 0 or above, and one above 0")
    return {name: rate / total for name, rate in rates.items() if rate > 0}


def _has_split(provider: Task, split: str) -> bool:
    return split.split("[")[0] in provider.splits  # data sets of TFDS have slices of them, "train[:1%]"


def _check_split(provider: Task, name: str, split: str) -> None:
    if not _has_split(provider, split):
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(sorted(provider.splits))}")


def list_shards(task_name: str, split: str) -> list[TaskShard]:
    """Lists the parts of a split that a cache makes independently: the shards of the Task's source, if it has some.

    Raises:
      UserError: there is no such Task or split, or its source fails.
    """
    task = find(task_name)
    _check_split(task, task_name, split)
    try:
        names = [] if task.requires_caching else [str(name) for name in task.source.list_shards(split)]
    except Exception as error:
        raise UserError(f"task {task_name}: its source fails: {reason(error)}") from None
    count = max(1, len(names))
    files = [name if os.path.isfile(name) else "" for name in names] or [""]
    return [TaskShard(task=task_name, split=split, index=i, count=count, file=files[i]) for i in range(count)]


def prompts(name: str, split: str, vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """Reads a split of a Task of prompts: `inputs`, int [n], and all else that its examples have; bytes as text.

    Raises:
      UserError: there is no such Task or split; it has no `inputs` of token ids of this vocabulary; reading it fails.
    """
    task = find(name)
    _check_split(task, name, split)
    inputs = task.output_features.get("inputs")
    if inputs is None or not inputs.dtype.is_integer or inputs.rank != 1:
        raise UserError(f"task {name}: prompts are its feature inputs, token ids in a row, and it has none")
    check_vocabulary(name, "inputs", inputs.vocabulary, vocabulary)
    for features in _features(task, TaskShard(task=name, split=split), outputs_alone=False):
        yield {key: _plain(value) for key, value in features.items()} | {"inputs": features["inputs"]}


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _features(task: Task, shard: TaskShard, *, outputs_alone: bool = True) -> Iterator[dict[str, Any]]:
    """Reads the features of all examples in the Task's own order, not cut, int [n] each.

    outputs_alone: whether only the features that the Task declares are read.
    """
    names = list(task.output_features)
    info = seqio.ShardInfo(index=shard.index, num_shards=shard.count) if shard.count > 1 else None
    try:
        dataset = task.get_dataset(
            sequence_length=None,
            split=shard.split,
            shuffle=False,
            seed=_seed(task),
            num_epochs=1,
            shard_info=info,
            use_cached=task.requires_caching,
            try_in_mem_cache=False,
        )
        if outputs_alone:
            dataset = dataset.map(lambda example: {name: example[name] for name in names})
        options = tf.data.Options()
        options.deterministic = True
        yield from dataset.with_options(options).as_numpy_iterator()
    except Exception as error:  # the preprocessors are the user's, and TensorFlow wraps what they raise
        raise UserError(f"task {shard.task}, split {shard.split}: reading it fails: {reason(error)}") from None


def _seed(task: Task) -> int | None:
    """Returns a seed that fixes random preprocessors; None for a source whose function takes none."""
    function = getattr(task.source, "_dataset_fn", None)
    return 0 if function is None or "seed" in inspect.signature(function).parameters else None
