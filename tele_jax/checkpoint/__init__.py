"""Checkpoints: saved through Orbax, stored as zarr3, readable whole, on any mesh, or layer by layer.

    checkpoint.save(path, cfg, params, opt_state=..., step=..., provenance=..., data_state=...)      saving.py
    ck = checkpoint.load(path, mesh)                     ck.cfg, ck.params, ck.opt_state, ck.step    read.py
    lazy = checkpoint.open_lazy(path)                    lazy.params["layers"]["attn"]["q"][3]       lazy.py
    checkpoint.Manager(directory, keep=2)                the checkpoints of a training run           saving.py
    checkpoint.verify(lazy)                              reads every chunk and checks it             read.py
    checkpoint.adapter_for(path, lora)                   for a checkpoint of adapters alone          adapted.py

Growth on disk and imports write through `chunked.write_leaves`, in steps that no kill undoes (unfinished.py), and read
and write chunk files directly (chunk_files.py). The content of a step directory: layout.py; which directories a path
may name: locate.py. This package alone imports Orbax and TensorStore, and only when one of its names is used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tele_jax.checkpoint.adapted import adapter_for, fingerprint
    from tele_jax.checkpoint.lazy import Lazy, LazyArray, open_lazy
    from tele_jax.checkpoint.read import Damage, Loaded, load, verify
    from tele_jax.checkpoint.saving import Manager, save

_HOMES = {name: "lazy" for name in ("Lazy", "LazyArray", "open_lazy")}
_HOMES |= {name: "read" for name in ("Damage", "Loaded", "load", "verify")}
_HOMES |= {name: "adapted" for name in ("adapter_for", "fingerprint")}
_HOMES |= {name: "saving" for name in ("Manager", "save")}

__all__ = [
    "Damage", "Lazy", "LazyArray", "Loaded", "Manager", "adapter_for", "fingerprint", "load", "open_lazy", "save",
    "verify",
]  # fmt: skip


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"tele_jax.checkpoint.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tele_jax.checkpoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
