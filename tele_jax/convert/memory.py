"""A release as arrays, and arrays as a release: for models that fit in memory."""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from tele_jax.axes import flatten, unflatten
from tele_jax.config import ModelConfig, require
from tele_jax.convert import exporting, region
from tele_jax.convert.exporting import Exported, Piece
from tele_jax.convert.files import Files
from tele_jax.convert.release import Release, open_release
from tele_jax.errors import UserError
from tele_jax.growth.masks import require_unmasked
from tele_jax.model.spec import flat_spec


def load_hf(
    path: Any,
    format: str | None = None,
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    rope_tables: str = "float32",
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a released checkpoint onto the default device.

        cfg, params = load_hf("TeleChat-7B")
        logits = tele.forward(cfg, params, tokens)

    Arguments as `release.open_release` takes them. A model that does not fit on one device is imported (`tele import`)
    and loaded onto a mesh (checkpoint.load).

    Raises:
      UserError: as open_release; float64 without jax_enable_x64; numbers that are not finite, named by file and tensor.
    """
    release = open_release(path, format, dtype=dtype, vocab_size=vocab_size, rope_tables=rope_tables)
    require(
        release.cfg.param_dtype != "float64" or jax.config.jax_enable_x64,
        f'{path}: float64 needs jax.config.update("jax_enable_x64", True), or --dtype float32',
    )
    leaves = {}
    with Files() as files, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, spec in flat_spec(release.cfg).items():
            values = np.empty(spec.shape, spec.dtype)
            layers = range(len(values)) if spec.stack else [None]
            list(pool.map(functools.partial(_read, release, files, name, values), layers))
            leaves[name] = jax.device_put(values)
    return release.cfg, unflatten(leaves)


def _read(release: Release, files: Files, name: str, values: np.ndarray, layer: int | None) -> None:
    part, stored = release.parts[name, layer]
    axes = flat_spec(release.cfg)[name].axes[layer is not None :]
    out = values if layer is None else values[layer]
    region.read(files, stored, part, axes, [0] * len(axes), out)


def save_hf(
    path: Any,
    cfg: ModelConfig,
    params: Mapping[str, Any],
    *,
    format: str,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    shard_gb: float = exporting.SHARD_GB,
    provenance: Sequence[Mapping[str, Any]] = (),
) -> Exported:
    """Writes parameters as a directory that is like a release: config.json and *.safetensors.

    path: must not exist.  params: nested dict of arrays (jax, or numpy), as spec(cfg) describes it.
    format, dtype, max_seq_len, provenance: as `exporting.outline` takes them. A tokenizer is for the caller to add.

    Raises:
      UserError: `path` exists; params are not those of cfg; the format cannot express the model; numbers become
        infinite in dtype.
      DamageError: numbers that are not finite.
    """
    from tele_jax.checkpoint import read  # brings Orbax

    specs, leaves = flat_spec(cfg), flatten(params)
    if problems := read.differences(leaves, specs, "given"):
        raise UserError("params: not what the config describes: " + ";\n  ".join(problems))
    require_unmasked(provenance, "params")
    plan = exporting.outline(cfg, format, dtype=dtype, max_seq_len=max_seq_len, provenance=provenance)
    pieces = []
    for name, spec in specs.items():
        for layer in range(spec.shape[0]) if spec.stack else [None]:
            start = (0,) * len(spec.shape) if layer is None else (layer, *[0] * (len(spec.shape) - 1))
            shape = spec.shape if layer is None else (1, *spec.shape[1:])
            read_piece = functools.partial(_of_array, leaves[name], layer)
            pieces.append(Piece(name, spec.axes, len(spec.stack), start, shape, read_piece))
    return exporting.write(path, plan, pieces, (), shard_gb=shard_gb, workers=os.cpu_count() or 1)


@contextlib.contextmanager
def _of_array(array: Any, layer: int | None) -> Iterator[np.ndarray]:
    if layer is None:
        yield np.asarray(array)
    elif isinstance(array, jax.Array):  # with an index that is data, a program is compiled once and not once a layer
        yield np.asarray(jax.lax.dynamic_slice_in_dim(array, np.int32(layer), 1))
    else:
        yield np.asarray(array[layer : layer + 1])
