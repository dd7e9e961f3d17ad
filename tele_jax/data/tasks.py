"""Domains of a page as seqio Tasks, Mixtures and a FeatureConverter. (task_documents.py is the other way round.)

A domain is a Task: its source gives the spans of its files, each once an epoch, in an order that is drawn anew every
epoch; its preprocessor encodes them (encode.py). A Mixture draws from the domains at their rates, and it draws rows,
not documents: each domain is packed before it is mixed, so that a rate is a share of the tokens whatever the lengths of
the documents. `register` puts the domains of a page, and their mixture, into seqio's registries:

    tasks.register("tele_flm", cache_config(load_page("configs/data/tele_flm.py")))
    rows = seqio.get_mixture_or_task("tele_flm").get_dataset(split="train", seed=0, trim_output_features=False)
"""

import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from tele_jax.data import domains, packing, task_documents
from tele_jax.data.corpus_documents import CorpusDocuments
from tele_jax.data.documents import Document
from tele_jax.data.encode import COLUMNS, Kind, encode
from tele_jax.data.sources import Corpus
from tele_jax.data.task_documents import Dataset, Mixture, Task, Tensor
from tele_jax.data.templates import separator
from tele_jax.data.vocabulary import SentencePieceVocabulary
from tele_jax.data.vocabulary_base import Vocabulary
from tele_jax.errors import UserError
from tele_jax.extras import need
from tele_jax.settings import CacheConfig

tf = need("tensorflow")
seqio = need("seqio")

seqio.Vocabulary.register(Vocabulary)
seqio.SentencePieceVocabulary.register(SentencePieceVocabulary)

# Our functions are graph code already; to rewrite them costs time at every start.
as_written = tf.autograph.experimental.do_not_convert

Example = dict[str, Tensor]
BLOCK = 16  # examples that go through numpy together
OPEN_ROWS = 8  # for fit_rows


class SpanSource(seqio.DataSource):
    """The spans of a domain as {"split", "span": int64 []}, shuffled by a keyed hash of the index, without a buffer.

    The key is drawn anew each time that the dataset is repeated. A run that has to go on exactly is fed by
    feed.LiveFeed.
    """

    def __init__(self, corpora: Mapping[str, Corpus]):
        """corpora: by split."""
        self._corpora = dict(corpora)
        # The number of examples stays unsaid: seqio would cache a small source, and with it its first order.
        super().__init__(splits=tuple(corpora), caching_permitted=False, performs_internal_shuffling=True)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return list(self._corpora[split].files)

    def get_dataset(
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, shard_info: Any = None, **_: Any
    ) -> Any:
        """Makes a dataset of one epoch; repeated, each epoch has another order."""
        corpus, number = self._corpora[split], list(self._corpora).index(split)
        count = len(corpus)
        numbers = tf.data.Dataset.range(count)
        if shuffle:
            # Domains of one mixture get one seed from seqio; they need not go in step.
            own = None if seed is None else zlib.crc32(corpus.name.encode(), seed & 0xFFFFFFFF)
            keys = tf.data.Dataset.random(seed=own, rerandomize_each_iteration=True).batch(2, drop_remainder=True)

            def epoch(key: object) -> Dataset:
                key = tf.bitcast(tf.cast(key, tf.int32), tf.uint32)
                return numbers.map(as_written(lambda i: tf.random.experimental.index_shuffle(i, key, count - 1)))

            order = keys.take(1).flat_map(as_written(epoch))
        else:
            order = numbers
        if shard_info is not None:
            order = order.shard(shard_info.num_shards, shard_info.index)
        return order.map(as_written(lambda i: {"split": tf.constant(number, tf.int64), "span": i}))


def task(
    name: str, corpus: Corpus, validation: Corpus | None, vocabulary: Vocabulary, kind: Kind, seq_len: int
) -> Task:
    """Makes the Task of one domain, with the int32 features inputs, targets and loss_weights (0 or 1).

    Args:
      name: name of the task.
      corpus: the domain.
      validation: becomes the split of this name, beside "train".
      vocabulary, kind, seq_len: as encode.encode.
    """
    corpora = {"train": corpus} | ({} if validation is None else {"validation": validation})

    def read(split: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part = list(corpora.values())[split[0]]
        block = encode(list(part.documents(numbers.tolist())), vocabulary, kind, seq_len, how=part.how)
        if block.columns.dtype != np.int32:
            raise UserError(f"{part.where}: loss weights other than 0 and 1 have no place in a seqio Task")
        return block.columns, block.lengths

    def encoded(dataset: Dataset) -> Dataset:
        # In blocks: a call from TensorFlow into Python costs more than a short document.
        def one_block(element: Mapping[str, object]) -> Example:
            columns, lengths = tf.numpy_function(
                read, [element["split"], element["span"]], [tf.int32, tf.int64], stateful=False
            )
            columns, lengths = tf.ensure_shape(columns, [3, None]), tf.ensure_shape(lengths, [None])
            return {
                name: tf.RaggedTensor.from_row_lengths(column, lengths, validate=False)
                for name, column in zip(COLUMNS, tf.unstack(columns), strict=True)
            }

        return dataset.batch(BLOCK).map(as_written(one_block)).unbatch()

    return seqio.Task(
        name,
        source=SpanSource(corpora),
        preprocessors=[encoded],
        output_features=_features(vocabulary),
        shuffle_buffer_size=None,
    )


def as_examples(task: Task, vocabulary: Vocabulary, kind: Kind, seq_len: int, name: str) -> Task:
    """Turns a Task of targets, or inputs and targets, into one with the features of ours.

    Examples of which nothing is learned, and in fine-tuning those longer than a row, are left out with a warning.

    Raises:
      UserError: its features or its vocabulary are not such.
    """
    task_documents.check_features(task, kind)
    task_documents.check_vocabularies(task, vocabulary)
    names = sorted(task.output_features)

    def columns(*features: np.ndarray) -> np.ndarray:
        try:
            document = Document(dict(zip(names, features, strict=True)))
            return encode([document], vocabulary, kind, seq_len).columns
        except UserError as error:
            warnings.warn(f"task {task.name}: some examples are left out ({error})", stacklevel=1)
        return np.zeros((len(COLUMNS), 0), np.int32)

    def one(example: Mapping[str, object]) -> Example:
        made = tf.numpy_function(columns, [example[name] for name in names], tf.int32, stateful=False)
        made = tf.ensure_shape(made, [len(COLUMNS), None])
        return dict(zip(COLUMNS, tf.unstack(made), strict=True))

    def encoded(dataset: Dataset) -> Dataset:
        return dataset.map(as_written(one)).filter(as_written(lambda example: tf.size(example["targets"]) > 0))

    def as_before(step: object) -> Dataset:
        # The user's preprocessors look at the user's features: which vocabulary, and whether a sequence gets its end.
        if isinstance(step, seqio.CacheDatasetPlaceholder):
            return step

        def run(dataset: object, sequence_length: object = None) -> Dataset:
            known = {"sequence_length": sequence_length, "output_features": task.output_features}
            return seqio.utils.add_kwargs_to_transform(step, **known)(dataset)

        return run

    steps = [*map(as_before, task.preprocessors), encoded]
    return task.replace(name=name, preprocessors=steps, output_features=_features(vocabulary))


def _features(vocabulary: Vocabulary) -> Example:
    token = seqio.Feature(vocabulary, add_eos=False)
    weight = seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False)
    return {"inputs": token, "targets": token, "loss_weights": weight}


class RowConverter(seqio.FeatureConverter):
    """Packs examples into rows (packing.py): the features tokens, targets, loss_weights, segment_ids, positions.

    seqio's own packing cannot serve here: it takes loss weights of 0 for padding, and it has to see seq_len examples
    before the first row.
    """

    TASK_FEATURES: ClassVar = {name: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32) for name in COLUMNS}
    MODEL_FEATURES: ClassVar = {
        "tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "loss_weights": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32),
    }
    PACKING_FEATURE_DTYPES: ClassVar = {"segment_ids": tf.int32, "positions": tf.int32}

    def __init__(self, vocabulary: Vocabulary, kind: Kind):
        """`kind` pretrain cuts examples where a row is full; sft keeps them whole."""
        # The lengths are right by construction, and the check costs more than the packing.
        super().__init__(pack=True, apply_length_check=False, bos_id=separator(vocabulary))
        self._pad_id = max(vocabulary.pad_id, 0)
        self._cut = kind == "pretrain"

    def _convert_features(self, ds: Dataset, task_feature_lengths: Mapping[str, int]) -> Dataset:
        seq_len = task_feature_lengths["targets"]

        def step(open_rows: np.ndarray, lengths: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if self._cut:
                left, rows = packing.cut_rows(
                    open_rows, np.stack(columns), lengths, separator=self.bos_id, pad_id=self._pad_id
                )
            else:
                parts = np.split(np.stack(columns), np.cumsum(lengths)[:-1], axis=1)
                left, rows = packing.fit_rows(open_rows, parts, pad_id=self._pad_id)
            return left, packing.spread(rows, len(lengths))

        count = 1 if self._cut else OPEN_ROWS

        def scan(open_rows: Tensor, block: Example) -> tuple[Tensor, Tensor]:
            columns = [block[name].flat_values for name in COLUMNS]
            lengths = block["targets"].row_lengths()
            left, rows = tf.numpy_function(step, [open_rows, lengths, *columns], [tf.int32, tf.int32], stateful=False)
            return tf.ensure_shape(left, [count, 5, seq_len]), tf.ensure_shape(rows, [None, 5, seq_len])

        def name(row: object) -> Example:
            features: Example = dict(zip(packing.COLUMNS, tf.unstack(row), strict=True))
            features["loss_weights"] = tf.cast(features["loss_weights"], tf.float32)
            return features

        start = packing.empty_rows(count, seq_len, self._pad_id)
        return ds.ragged_batch(BLOCK).scan(start, as_written(scan)).unbatch().map(as_written(name))

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Returns the one length of all rows."""
        return dict.fromkeys(packing.COLUMNS, task_feature_lengths["targets"])


def mixture(
    tasks: Sequence[Task],
    rates: Sequence[float],
    *,
    converter: RowConverter,
    seq_len: int,
    name: str = "tele_mixture",
) -> Mixture:
    """Makes the Mixture of the tasks, whose dataset is endless and gives rows in shares of the rates."""
    lengths = dict.fromkeys(COLUMNS, seq_len)

    def sample(datasets: Sequence[Dataset], rates: Sequence[float], seed: int | None) -> Dataset:
        packed = [converter(dataset.map(as_written(_even)).repeat(), lengths) for dataset in datasets]
        weights = [rate / sum(rates) for rate in rates]
        return tf.data.Dataset.sample_from_datasets(packed, weights, seed)

    return seqio.Mixture(name, list(zip(tasks, rates, strict=True)), sample_fn=sample)


def _even(example: Example) -> Example:
    """Cuts the columns of an example to the shortest: seqio cuts only those whose length its user names."""
    columns = {name: example[name] for name in COLUMNS}
    length = tf.reduce_min([tf.size(column) for column in columns.values()])
    return {name: column[:length] for name, column in columns.items()}


def register(name: str, config: CacheConfig) -> Mixture:
    """Registers a Task `name`.`domain` for every domain of a page, and the Mixture `name` of their rates; returns it.

    Each has the splits "train" and, where the page names files for it, "validation".

    Raises:
      UserError: as feed.LiveFeed; the name is taken; two domains have one name once seqio's characters are left.
    """
    opened = domains.OpenData(config.data, kind=config.kind, seq_len=config.seq_len)
    data, vocabulary = opened.data, opened.vocabulary
    train, validation = (
        {name: found.corpus for name, found in opened.files(field) if isinstance(found, CorpusDocuments)}
        for field in ("files", "validation_files")
    )
    rates: dict[str, float] = {}
    for domain, source in data.sources.items():
        if (own := source.task or _task_name(name, domain)) in rates:
            raise UserError(f"sources.{domain}: its task would be {own!r}, which another domain has; rename one")
        rates[own] = source.rate
    for taken in (name, *(_task_name(name, domain) for domain in train)):
        if task_documents.is_registered(taken):
            raise UserError(f"seqio already has a task or mixture {taken!r}; choose another name")
    for domain, corpus in train.items():
        own = _task_name(name, domain)
        built = task(own, corpus, validation.get(domain), vocabulary, config.kind, config.seq_len)
        seqio.TaskRegistry.add_provider(own, built)
    return register_mixture(name, rates, config)


def register_mixture(name: str, rates: Mapping[str, float], config: CacheConfig) -> Mixture:
    """Registers the Mixture `name` of registered tasks at relative rates, packed into rows as `config` says.

    A registered Mixture among them stands for its tasks, which share its rate. Tasks that are not of this project, with
    the features targets, or inputs and targets, become such (as_examples).

    Raises:
      UserError: a task that is not registered or cannot be trained on so, a rate that is not above 0.
    """
    vocabulary = domains.open_vocabulary(domains.resolve(config.data), config.kind)
    made: dict[str, list[Any]] = {}
    for own, rate in rates.items():
        try:
            found = task_documents.find(own)
        except UserError as error:
            raise UserError(f"mixture {name}: {error}") from None
        if not 0 < rate < float("inf"):
            raise UserError(f"mixture {name}: the rate {rate} of {own} must be above 0 and finite")
        parts = {own: 1.0} if isinstance(found, seqio.Task) else task_documents.shares(found)
        for part, share in parts.items():
            if part in made:
                made[part][1] += rate * share
                continue
            one = task_documents.find(part)
            if set(one.output_features) != set(COLUMNS):
                one = as_examples(one, vocabulary, config.kind, config.seq_len, f"{name}.{part}")
            made[part] = [one, rate * share]
    registered = mixture(
        [one for one, _ in made.values()],
        [rate for _, rate in made.values()],
        converter=RowConverter(vocabulary, config.kind),
        seq_len=config.seq_len,
        name=name,
    )
    seqio.MixtureRegistry.add_provider(name, registered)
    return registered


def _task_name(mixture_name: str, domain: str) -> str:
    return f"{mixture_name}." + re.sub(r"\W", "_", domain)
