"""Released checkpoints in and out: Tele-FLM, TeleChat, TeleChat-52B and Llama, as directories of safetensors.

    cfg, params = convert.load_hf(directory)                                 importing.py
    convert.save_hf(directory, cfg, params, format="llama")                  exporting.py
    convert.import_checkpoint(directory, step_dir)                           importing.py: streamed, bounded memory
    convert.export_checkpoint(step_dir, directory, format="llama")           exporting.py: streamed
    convert.load_peft(directory, cfg), convert.save_peft(directory, ...)     peft.py: adapters (LoRA) in PEFT's layout
    convert.import_peft(directory, step_dir, base=), convert.export_peft(step_dir, directory, format="llama")
    convert.tensors(cfg, "telechat")                                         families.py: what an export would write

One table per family (families.py) says which tensor of theirs holds which leaf of ours, in named axes; configs.py
translates config.json. Both serve import and export.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tele_jax.convert.exporting import export_checkpoint, save_hf
    from tele_jax.convert.families import FORMATS, tensors
    from tele_jax.convert.importing import import_checkpoint, load_hf
    from tele_jax.convert.peft import export_peft, import_peft, load_peft, save_peft

_HOMES = {
    "FORMATS": "families",
    "export_checkpoint": "exporting",
    "import_checkpoint": "importing",
    "load_hf": "importing",
    "save_hf": "exporting",
    "tensors": "families",
}

_HOMES |= dict.fromkeys(("export_peft", "import_peft", "load_peft", "save_peft"), "peft")

__all__ = [
    "FORMATS",
    "export_checkpoint",
    "export_peft",
    "import_checkpoint",
    "import_peft",
    "load_hf",
    "load_peft",
    "save_hf",
    "save_peft",
    "tensors",
]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"tele_jax.convert.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tele_jax.convert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
