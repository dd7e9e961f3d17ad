"""Checkpoints: saved through Orbax, stored as zarr3, readable whole, on any mesh, or layer by layer.

    checkpoint.save(path, cfg, params, opt_state=..., step=..., provenance=..., data_state=...)      manager.py
    ck = checkpoint.load(path, mesh)                     ck.cfg, ck.params, ck.opt_state, ck.step    read.py
    lazy = checkpoint.open_lazy(path)                    lazy.params["layers"]["attn"]["q"][3]       lazy.py
    checkpoint.Manager(directory, keep=2)                the checkpoints of a training run           manager.py
    checkpoint.verify(lazy)                              reads every chunk and checks it             damage.py

growth.stream and imports read and write chunk files directly (chunks.py), in steps that no kill undoes (chunked.py).

What is in a step directory: layout.py. Which directories a path may name: locate.py. This package alone imports Orbax
and TensorStore, and only when one of its names is used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tele_jax.checkpoint.damage import Damage, verify
    from tele_jax.checkpoint.lazy import Lazy, LazyArray, open_lazy
    from tele_jax.checkpoint.manager import Manager, save
    from tele_jax.checkpoint.read import Loaded, load

_HOMES = {
    "Damage": "damage",
    "Lazy": "lazy",
    "LazyArray": "lazy",
    "Loaded": "read",
    "Manager": "manager",
    "load": "read",
    "open_lazy": "lazy",
    "save": "manager",
    "verify": "damage",
}

__all__ = ["Damage", "Lazy", "LazyArray", "Loaded", "Manager", "load", "open_lazy", "save", "verify"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"tele_jax.checkpoint.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tele_jax.checkpoint' has no attribute {name!r}")
