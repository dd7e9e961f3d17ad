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
from tele_jax.config import ModelConfig, differing_fields, require, to_dict
from tele_jax.errors import UserError
from tele_jax.files import PathLike
from tele_jax.model.adapters import kernels
from tele_jax.settings import LoraConfig


def fingerprint(lazy: Lazy) -> str:
    """SHA-256 of the content that determines the parameters: of the parameters, or of the base and its adapters.

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
      UserError: no checkpoint there, or an address such as gs://bucket/name; as model.adapters.kernels.
      DamageError: a chunk of it is missing.
    """
    locate.local_path(base, "training adapters")
    lazy = open_lazy(base)
    kernels(lazy.cfg, lora)  # raises
    return layout.Adapter(lora, (str(lazy.path),), fingerprint(lazy))


def with_near_base(adapter: layout.Adapter, path: epath.Path) -> layout.Adapter:
    """The description for a checkpoint at `path`, with the relative path to the base: both may be moved together.

    Raises UserError for what is no description.
    """
    made_by = f"adapter: expected what checkpoint.adapter_for(base, lora) returns, got {type(adapter).__name__}"
    require(isinstance(adapter, layout.Adapter), made_by)
    if "://" in f"{path}{adapter.base[0]}":
        return adapter
    return dataclasses.replace(adapter, base=(os.path.relpath(adapter.base[0], path), *adapter.base))


def require_fit(adapter: layout.Adapter, cfg: ModelConfig) -> None:
    """Raises UserError where the base is there and its model is not cfg, whose adapters are to be saved."""
    base = epath.Path(adapter.base[-1])
    lines = differing_fields(open_lazy(base).cfg, cfg) if base.exists() else {}
    require(not lines, f"adapters are of another model than their base {base}: config.{', config.'.join(lines)} differ")


def unfold(lazy: Lazy, base: PathLike | None = None) -> tuple[Lazy, list[Lazy]]:
    """Returns the checkpoint of the parameters below any adapters, and the adapters in the order of their merging.

    base: where a checkpoint that was adapted lies now, if it was moved: the lowest, or one in between.

    Raises:
      UserError: a base is not there; `base`, or what lies in the place of one, has other parameters than those that the
        adapters were trained on.
    """
    moved: dict[str, Lazy] = {}
    if base is not None and lazy.adapter is not None:
        of = f"{lazy.path}: holds adapters of the checkpoint {lazy.adapter.base[-1]}"
        require(epath.Path(base).exists(), f"{of}, which is not at base={base}")
        opened = open_lazy(base)
        moved[fingerprint(opened)] = opened
    upon: list[Lazy] = []
    while lazy.adapter is not None:
        upon.insert(0, lazy)
        lazy = moved.pop(lazy.adapter.fingerprint, None) or _open_base(lazy, *moved.values())
    for unused in moved.values():
        raise _other_base(upon[-1], unused)
    return lazy, upon


def _open_base(lazy: Lazy, *others: Lazy) -> Lazy:
    """Opens the base of the adapters in `lazy` where it was when they were made; others: what is no base of them."""
    adapter = lazy.adapter
    assert adapter is not None  # the caller has looked
    places = [epath.Path(path) if "://" in path else lazy.path / path for path in adapter.base]
    there = [path for path in places if path.exists()]
    if not there and others:
        raise _other_base(lazy, *others)
    if not there:
        raise UserError(
            f"{lazy.path}: holds adapters of the checkpoint {adapter.base[-1]}, which is not there; move it back or "
            "leave a link, or write the merged model: ck = tele.checkpoint.load(path, base=...), "
            "tele.checkpoint.save(new_path, ck.cfg, ck.params, provenance=ck.provenance)"
        )
    opened = open_lazy(there[0])
    if fingerprint(opened) != adapter.fingerprint:
        raise _other_base(lazy, opened)
    return opened


def _other_base(lazy: Lazy, found: Lazy) -> UserError:
    return UserError(
        f"{lazy.path}: holds adapters for another base than {found.path}, whose parameters differ from those the "
        "adapters were trained on"
    )
