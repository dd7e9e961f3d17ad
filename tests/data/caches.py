"""Small corpora and caches for the tests of caching and reading."""

import itertools
import json

import numpy as np

from tele_jax.data import batches, caching, domains, feed
from tele_jax.data.domains import OpenData
from tele_jax.settings import CacheConfig, DataConfig, SourceConfig


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def talk(*turns):
    """A dialogue of question, answer, question, answer, ..."""
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns)]}


def config(model_file, sources, *, kind="pretrain", seq_len=64, **fields):
    """sources: {domain: (path, format, rate)}."""
    made = {
        name: SourceConfig(files=(str(path),), format=format, rate=rate)
        for name, (path, format, rate) in sources.items()
    }
    data = DataConfig(tokenizer=str(model_file), sources=made)
    return CacheConfig(data=data, kind=kind, seq_len=seq_len, **fields)


def make(made, out):
    """The cache of a CacheConfig, without Beam."""
    return caching.make(made, out, runner="serial")


def segments(batch):
    """Every segment of the rows, as dicts of arrays."""
    for i, ids in enumerate(batch["segment_ids"]):
        for number in range(1, int(ids.max(initial=0)) + 1):
            yield {name: column[i, ids == number] for name, column in batch.items()}


def whole_domain(cache, name):
    """All rows of a domain, in the order of the disk."""
    count = cache.rows[name]
    return cache.read([name] * count, list(range(count)))


def documents(batch, eos_id):
    """The documents that rows of pretraining hold: their targets in a line, cut after every end of a sequence."""
    line = np.concatenate([segment["targets"] for segment in segments(batch)])
    return [part.tolist() for part in np.split(line, np.flatnonzero(line == eos_id) + 1) if len(part)]


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() and a[name].dtype == b[name].dtype for name in a)


def open_feed(data, *, kind, seq_len, index=None, on_rejects=domains.warn, **how):
    """The feed of a DataConfig."""
    return feed.open_feed(OpenData(data, kind=kind, seq_len=seq_len, index=index, on_rejects=on_rejects), **how)


def held_out(data, *, kind, seq_len, batch_size, on_rejects=domains.warn):
    """The held-out text of a DataConfig."""
    return batches.held_out(OpenData(data, kind=kind, seq_len=seq_len, on_rejects=on_rejects), batch_size=batch_size)
