"""Checkpoints of adapters (LoRA): small, for they name the checkpoint whose parameters are adapted, and its content.

    adapter = checkpoint.adapter_for("W/pretrain", lora)                 names that checkpoint
    checkpoint.save(path, cfg, adapters, adapter=adapter)                saving.py
    checkpoint.load(path).params                                         read.py: merged into the base

A base may itself hold adapters; they are merged first.
"""

import dataclasses
import hashlib
import json
import os

from etils import epath

from tele_jax.checkpoint import chunk_files, layout, locate
from tele_jax.checkpoint.lazy import Lazy, open_lazy
from tele_jax.config import to_dict
from tele_jax.errors import UserError
from tele_jax.files import PathLike
from tele_jax.settings import LoraConfig


def fingerprint(lazy: Lazy) -> str:
    """SHA-256 of the content that makes the model: of the parameters, or of the base and its adapters.

    Reads 4 bytes of every chunk. Raises DamageError where one is missing or of another size.
    """
    if lazy.adapter is None:
        return chunk_files.fingerprint(lazy.items["params"].values())
    own = chunk_files.fingerprint(lazy.items["adapters"].values())
    return hashlib.sha256(json.dumps([lazy.adapter.fingerprint, own, to_dict(lazy.adapter.lora)]).encode()).hexdigest()


def adapter_for(base: PathLike, lora: LoraConfig) -> layout.Adapter:
    """Describes adapters of the parameters in a checkpoint, for `save`.

    base: as locate.find_step takes it, on this machine.

    Raises:
      UserError: no checkpoint there, or an address such as gs://bucket/name.
      DamageError: a chunk of it is missing.
    """
    locate.local_path(base, "training adapters")
    lazy = open_lazy(base)
    return layout.Adapter(lora, (str(lazy.path),), fingerprint(lazy))


def with_near_base(adapter: layout.Adapter, path: epath.Path) -> layout.Adapter:
    """The description for a checkpoint at `path`, with the way from there to the base: both may be moved together."""
    if "://" in f"{path}{adapter.base[0]}":
        return adapter
    return dataclasses.replace(adapter, base=(os.path.relpath(adapter.base[0], path), *adapter.base))


def open_base(lazy: Lazy, base: PathLike | None = None) -> Lazy:
    """Opens the checkpoint whose parameters the adapters in `lazy` are for; base: where it lies now, if it was moved.

    Raises:
      UserError: it is not there, or has another content than when the adapters were made.
    """
    adapter = lazy.adapter
    assert adapter is not None  # the caller has looked
    places = [path if "://" in path else lazy.path / path for path in adapter.base] if base is None else [base]
    there = [path for path in map(epath.Path, places) if path.exists()]
    if not there:
        raise UserError(
            f"{lazy.path}: holds adapters of the checkpoint {adapter.base[-1]}, which is not there; "
            "tele.checkpoint.load(path, base=...) says where it is now"
        )
    opened = open_lazy(there[0])
    if fingerprint(opened) != adapter.fingerprint:
        raise UserError(f"{lazy.path}: holds adapters for another base than {opened.path}, whose content is not theirs")
    return opened


def unfold(lazy: Lazy) -> tuple[Lazy, list[Lazy]]:
    """Returns the checkpoint of the parameters below any adapters, and the adapters in the order of their merging.

    Raises UserError as open_base.
    """
    upon: list[Lazy] = []
    while lazy.adapter is not None:
        upon.insert(0, lazy)
        lazy = open_base(lazy)
    return lazy, upon
