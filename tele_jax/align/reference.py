"""Log-probabilities of answers by a reference model: computed once, and kept in the work directory.

    W/<stage>/reference/<name>.npz        one for each key: the data, how it is encoded, the reference and its dtype

The name is the beginning of the SHA-256 of the key. Where a key changes, another file is made; the file says its key.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from tele_jax import checkpoint
from tele_jax.align.pairs import compiled_log_probabilities
from tele_jax.axes import Params
from tele_jax.config import ModelConfig, given
from tele_jax.data.record_rows import RecordBatches, RecordRows
from tele_jax.data.surroundings import Surroundings
from tele_jax.errors import DamageError
from tele_jax.files import Table, write_file
from tele_jax.processes import from_first, is_distributed, is_first
from tele_jax.sharding import put_batch, to_host

VERSION = 1  # of the computation and of the file


class Reference:
    """The reference model of a stage: a checkpoint, whose parameters are loaded where something is not known yet."""

    def __init__(self, around: Surroundings, path: Path | None, rows: int):
        """Opens the checkpoint.

        Args:
          path: the checkpoint; None: the model that the stage begins with, without the adapters that it trains.
          rows: pairs of answers that go through the model at once.

        Raises:
          UserError: there is no model before the stage.
        """
        where = "there is no model to align before the first stage; config.start names a checkpoint"
        self._path = given(path or around.previous, where)
        self._lazy = checkpoint.open_lazy(self._path)
        self._around, self._rows = around, rows
        self._is_base = path is None and around.base is not None
        self._model: tuple[ModelConfig, Params] | None = None
        self._fingerprint: str = from_first(lambda: _named(self._lazy))

    def log_probabilities(self, store: RecordRows, count: int, name: str) -> np.ndarray:
        """Log-probabilities of the first `count` answers of a store, float32 [count], read or computed.

        name: what the answers are, for messages.

        Raises:
          DamageError: the file that holds them is not what was written.
        """
        key: Table = {
            "version": VERSION,
            "answers": count,
            "data": {domain: store.checksum(domain) for domain in store.rows},
            "encoding": store.identity,
            "reference": self._fingerprint,
            "dtype": self._around.cfg.dtype,
        }
        if self._lazy.cfg.rope_length_factors(store.longest) != self._lazy.cfg.rope_length_factors(1):
            key["rope_length"] = store.longest
        key = json.loads(json.dumps(key))
        named = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        file = self._around.directory / "reference" / f"{named[:16]}.npz"
        if from_first(file.exists):
            return _shared(lambda: _read(file, key), count)
        self._around.say(f"  computes the log-probabilities of {count:,} answers of {name} by {self._lazy.path}")
        cfg, params = self._opened()
        found = compute(cfg, params, store, count, self._around.mesh, self._rows)
        if is_first():
            _write(file, key, found)
        return found

    def _opened(self) -> tuple[ModelConfig, Params]:
        if self._model is None:
            own, around = self._lazy.cfg, self._around
            cfg = own.replace(attention=around.cfg.attention, remat="none", dtype=around.cfg.dtype)
            if self._is_base:
                assert around.base is not None
                self._model = cfg, around.base
            else:
                self._model = cfg, checkpoint.load(self._path, around.mesh, items=("params",)).params
        return self._model


def attach(batches: RecordBatches, around: Surroundings, path: Path | None, rows: int) -> None:
    """Adds to all batches `reference`, float32 [B, 2]: the log-probabilities of the two answers by the reference.

    path, rows: as Reference. Raises as Reference.
    """
    reference = Reference(around, path, rows)
    trained = reference.log_probabilities(batches.store, batches.store.num_answers, "the training data")
    held = {}
    for domain, found in batches.held_out.items():
        count = 1 + max(int(batch["sequences"].max()) for batch in found.batches)
        held[domain] = reference.log_probabilities(batches.held_out_store(domain), count, f"{domain}, held out")
    batches.tabulate("reference", trained, held)


def compute(cfg: ModelConfig, params: Params, store: RecordRows, count: int, mesh: Mesh, rows: int) -> np.ndarray:
    """Computes the log-probabilities of the first `count` answers of a store on a mesh: float32 [count].

    rows: pairs of answers at once, which divide over the mesh. They are drawn at random, so that batches have the few
    widths of training.
    """
    order, found = np.random.default_rng(0).permutation(count), np.zeros(count, np.float32)
    with jax.set_mesh(mesh):
        for first in range(0, count, 2 * rows):
            numbers = np.resize(order[first : first + 2 * rows], (rows, 2))  # the last are repeated to fill the batch
            placed = put_batch(store.read_answers(numbers), mesh, rows)
            found[numbers] = to_host(compiled_log_probabilities(cfg, params, placed, None, store.longest))
    return found


def _named(model: checkpoint.Lazy) -> str:
    """Names the content of a checkpoint; of one in a bucket, whose files are not opened, its address and history."""
    if "://" in str(model.path):
        return json.dumps([str(model.path), model.step, list(model.provenance)], sort_keys=True)
    return checkpoint.fingerprint(model)


def _read(file: Path, key: Table) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as arrays:  # checks its CRC-32
            found, about = arrays["log_probabilities"], json.loads(arrays["key"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamageError(f"{file}: damaged ({error}); remove it, and the next start computes it again") from None
    if about != key or found.shape != (key["answers"],) or found.dtype != np.float32 or not np.isfinite(found).all():
        raise DamageError(f"{file}: damaged, it is not what its name says; remove it, and it is computed again")
    return found


def _write(file: Path, key: Table, found: np.ndarray) -> None:
    written = io.BytesIO()
    np.savez(written, log_probabilities=found, key=np.frombuffer(json.dumps(key).encode(), np.uint8))
    write_file(file, written.getvalue())


def _shared(read: Callable[[], np.ndarray], count: int) -> np.ndarray:
    """Reads in process 0, and gives the array to all processes."""
    found = read() if is_first() else np.zeros(count, np.float32)
    if not is_distributed():
        return found
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(found))
