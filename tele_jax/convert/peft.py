"""Adapters (LoRA) in the layout of PEFT, out and in: adapter_config.json and adapter_model.safetensors.

PEFT adapts modules, each with a matrix lora_A [rank, inputs] and a matrix lora_B [outputs, rank]; the tables of
families.py say which module holds which kernel. A module of several kernels (TeleChat's key_value) reads the same input
for all of them. What PEFT made is split exactly: the kernels share lora_A and have their own rows of lora_B. What is
made here has one a for each, so that the module gets the sum of their ranks, and a lora_B with zeros in between; these
blocks are split again on the way in.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tele_jax import checkpoint
from tele_jax.axes import Params, ParamSpec, flatten, unflatten
from tele_jax.config import ModelConfig, require
from tele_jax.convert import beside, families
from tele_jax.convert.configs import Keys
from tele_jax.convert.exporting import Exported
from tele_jax.convert.families import FORMATS, Part, Tensor
from tele_jax.convert.files import DTYPES, Files, Stored, create, read_header
from tele_jax.errors import UserError
from tele_jax.files import PathLike, new_directory, read_table
from tele_jax.model import adapters as lora_of
from tele_jax.model.adapters import kernels
from tele_jax.settings import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FORMATS = tuple(name for name in FORMATS if name != "gguf")  # those that PEFT has adapters for
_PREFIX, _ENDS = "base_model.model.", {".lora_A.weight": "a", ".lora_B.weight": "b"}
# Keys of adapter_config.json that are read; keys that do not affect a finished adapter; values of other keys that do
# not. Any other key that is set is refused.
_READ = {"r", "lora_alpha", "use_rslora", "peft_type", "fan_in_fan_out", "rank_pattern", "alpha_pattern"}
_IDLE = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_pattern", "megatron_core", "qalora_group_size",
    "runtime_config", "loftq_config", "eva_config", "ensure_weight_tying",
}  # fmt: skip
_IDLE_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}


@dataclasses.dataclass(frozen=True)
class Module:
    """A module that PEFT adapts: the tensor of its weight, without values.

    outputs: axes of the outputs as they lie in lora_B, * where kernels take turns. sizes: of these.
    transposed: the weight is [inputs, outputs] (transformers' Conv1D).
    """

    name: str
    parts: tuple[Part, ...]
    outputs: tuple[str, ...]
    sizes: tuple[int, ...]
    transposed: bool

    def rows(self, b: np.ndarray, turn: int) -> Any:
        """The view [*outputs of one kernel, rank] of lora_B [outputs, rank]."""
        whole = b.reshape(*self.sizes, b.shape[1])
        return whole[tuple(turn if axis == "*" else slice(None) for axis in self.outputs)]


def modules(cfg: ModelConfig, format: str) -> dict[str, Module]:
    """The modules of a format that hold kernels of the layers, by name; raises UserError as families.fold."""
    spec = kernels(cfg, LoraConfig(targets=("layers",)))
    # A tied model's file has no prefix, the module in memory has.
    prefix = "transformer." if format == "telechat" else None
    tensors = families.expected(families.fold(cfg, format).cfg, format, prefix=prefix)
    found = [_module(tensor, spec) for tensor in tensors if tensor.parts and tensor.parts[0].leaf in spec]
    return {module.name: module for module in found}


def _module(tensor: Tensor, spec: Mapping[str, ParamSpec]) -> Module:
    part = tensor.parts[0]
    axes, sizes, inputs = part.axes, part.sizes, spec[part.leaf].inputs
    transposed = axes[: len(inputs)] == inputs
    cut = slice(len(inputs), None) if transposed else slice(len(axes) - len(inputs))
    name = tensor.name.removesuffix(".weight")
    return Module(name, tensor.parts, axes[cut], sizes[cut], transposed)


# ---- out -------------------------------------------------------------------------------------------------------------


def save_peft(
    path: PathLike, cfg: ModelConfig, adapters: Params, lora: LoraConfig, *, format: str, base_model: str | None = None
) -> Exported:
    """Writes adapters as PEFT reads them, for the model that an export of their base in the same format gives.

    Args:
      path: the directory to write; must not exist.
      adapters: nested dict of arrays, as tele.lora.init makes it for cfg and lora.
      format: one of convert.FORMATS but gguf.
      base_model: the name or directory of that model, for adapter_config.json.

    Raises:
      UserError: `path` exists; adapters are not those of cfg and lora; the format cannot express the model.
    """
    began = time.monotonic()
    require(format in _FORMATS, f"format {format!r}: not one of {', '.join(_FORMATS)}")
    lora_of.check(cfg, adapters, lora)
    leaves = {name: np.asarray(leaf) for name, leaf in flatten(adapters).items()}
    chosen = [m for m in modules(cfg, format).values() if any(f"{part.leaf}.a" in leaves for part in m.parts)]
    values: dict[str, np.ndarray] = {}
    counts: dict[Module, int] = {}
    for module in chosen:
        parts = [part for part in module.parts if f"{part.leaf}.a" in leaves]
        rank = lora.rank * len(parts)
        a = [leaves[f"{part.leaf}.a"][part.layer].reshape(-1, lora.rank).T for part in parts]
        b = np.zeros((math.prod(module.sizes), rank), a[0].dtype)
        for i, part in enumerate(parts):
            own = module.rows(b, part.turn)[..., i * lora.rank : (i + 1) * lora.rank]
            own[...] = np.moveaxis(leaves[f"{part.leaf}.b"][part.layer], 0, -1)
        counts[module] = len(parts)
        values |= {f"{_PREFIX}{module.name}{end}": m for end, m in zip(_ENDS, (np.concatenate(a), b), strict=True)}
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted({_suffix(module) for module in chosen}),
        "fan_in_fan_out": chosen[0].transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **_patterns(lora, counts),
    }
    tensors = [Tensor(name, array.shape, array.dtype, ()) for name, array in values.items()]
    with new_directory(Path(os.fspath(path)), "export") as directory:
        stored = create(directory, {WEIGHTS: tensors})
        with Files(os.O_RDWR) as files:
            for name, array in values.items():
                raw = np.ascontiguousarray(array).view(np.uint8).reshape(1, -1)
                files.write(stored[name].file, np.array([stored[name].offset]), raw)
        (directory / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Exported(cfg, time.monotonic() - began, len(tensors), nbytes, [WEIGHTS], [])


def _patterns(lora: LoraConfig, kernels: Mapping[Module, int]) -> dict[str, dict[str, float]]:
    """The ranks of modules with several adapted kernels, and alphas that keep their scale; kernels: number of these."""
    several = {_suffix(module): count for module, count in kernels.items() if count > 1}
    factor = math.sqrt if lora.rank_stabilized else float
    return {
        "rank_pattern": {name: lora.rank * count for name, count in several.items()},
        "alpha_pattern": {name: lora.alpha * factor(count) for name, count in several.items()},
    }


def _suffix(module: Module) -> str:
    """The name of a module without its layer: self_attn.q_proj."""
    return module.name.split(f".{module.parts[0].layer}.", 1)[1]


def export_peft(src: PathLike, dst: PathLike, *, format: str) -> Exported:
    """Writes the adapters of a checkpoint of ours as `save_peft` does. Raises UserError where it holds none."""
    lazy = checkpoint.open_lazy(src)
    if lazy.adapter is None:
        raise UserError(f"{lazy.path}: holds parameters and no adapters, and PEFT's layout is for adapters alone")
    loaded = checkpoint.load(lazy.path, items=("adapters",))
    assert loaded.adapters is not None  # as lazy says
    done = save_peft(dst, lazy.cfg, loaded.adapters, lazy.adapter.lora, format=format)
    note = f"adapters of {lazy.adapter.base[-1]}: export the base as well; PEFT loads the adapters on top of it"
    return dataclasses.replace(done, notes=[note])


# ---- in --------------------------------------------------------------------------------------------------------------


def load_peft(path: PathLike, cfg: ModelConfig, format: str | None = None) -> tuple[LoraConfig, dict[str, Any]]:
    """Reads adapters that PEFT wrote: (their LoraConfig, the adapters as tele.lora.init makes them).

    Args:
      path: directory with adapter_config.json and adapter_model.safetensors.
      cfg: the model that they are for.
      format: one of convert.FORMATS but gguf, whose names the modules have; by default the first that fits.

    Raises:
      UserError: a file is missing or damaged; the adapter has what is not supported (DoRA, biases, other ranks for
        some modules, whole modules: the key is named); a module that the model does not have, or not in all layers;
        another shape; numbers that are not finite.
    """
    directory = Path(os.fspath(path))
    lora, patterns = _read_config(directory)
    stored = _by_module(directory)
    found = _find(directory, cfg, stored, format)
    expected = _patterns(lora, {module: len(module.parts) for module in found.values()})
    for key, value in patterns.items() if any(patterns.values()) else ():
        require(value == expected[key], f"{directory / CONFIG}: {key} is {value!r}, which is not supported")
    spec, dtype = kernels(cfg, LoraConfig(targets=("layers",))), jnp.promote_types(cfg.param_dtype, jnp.float32)
    leaves: dict[str, np.ndarray] = {}
    layers: dict[str, set[int | None]] = {}
    with Files() as files:
        for name, module in found.items():
            a, b = (_read(files, stored[name][part], dtype) for part in ("a", "b"))
            own = spec[module.parts[0].leaf]
            inputs = own.shape[1 : 1 + len(own.inputs)]
            blocks = len(module.parts) if _suffix(module) in patterns["rank_pattern"] else 1
            rank = lora.rank * blocks
            for which, values, shape in (
                ("A", a, (rank, math.prod(inputs))),
                ("B", b, (math.prod(module.sizes), rank)),
            ):
                where = f"{directory / WEIGHTS}: {name}.lora_{which}.weight"
                require(values.shape == shape, f"{where}: has shape {list(values.shape)}, expected {list(shape)}")
                require(bool(np.isfinite(values).all()), f"{where}: has numbers that are not finite")
            for i, part in enumerate(module.parts):
                layers.setdefault(part.leaf, set()).add(part.layer)
                block = slice(i * lora.rank, (i + 1) * lora.rank) if blocks > 1 else slice(None)
                rows = np.moveaxis(module.rows(b, part.turn), -1, 0)
                require(
                    not np.delete(rows, block, axis=0).any(),
                    f"{directory / WEIGHTS}: {name}.lora_B.weight: is not made of blocks as `tele export --peft` "
                    "writes them; other ranks for some modules are not supported",
                )
                for end, layer in (("a", a[block].T.reshape(*inputs, -1)), ("b", rows[block])):
                    leaf = leaves.setdefault(f"{part.leaf}.{end}", np.zeros((cfg.num_layers, *layer.shape), dtype))
                    leaf[part.layer] = layer
    for leaf, there in sorted(layers.items()):
        missing = sorted(set(range(cfg.num_layers)) - there)
        require(
            not missing, f"{directory / WEIGHTS}: {leaf} has no adapter in layers {missing}; ours are in all or none"
        )
    lora = dataclasses.replace(lora, targets=tuple(sorted(layers)))
    return lora, jax.tree.map(jnp.asarray, unflatten(leaves))


def _read_config(directory: Path) -> tuple[LoraConfig, dict[str, Mapping[str, Any]]]:
    """(The LoraConfig, {"rank_pattern": ..., "alpha_pattern": ...})."""
    file = directory / CONFIG
    keys = Keys(read_table(file, missing="missing; is this a directory that PEFT wrote?"), str(file))
    kind = keys.get("peft_type", str)
    require(kind == "LORA", f"{file}: peft_type is {kind!r}, and only LORA is read")
    for name, value in keys.values.items():
        known = name in _READ | _IDLE or not value or value in _IDLE_VALUES.get(name, ())
        require(known, f"{file}: {name} is {value!r}, which is not supported")
    patterns: dict[str, Mapping[str, Any]]
    patterns = {name: keys.get(name, dict, {}) for name in ("rank_pattern", "alpha_pattern")}
    alpha, stabilized = keys.get("lora_alpha", float), keys.get("use_rslora", bool, False)
    try:
        return LoraConfig(rank=keys.get("r", int), alpha=alpha, rank_stabilized=stabilized), patterns
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _by_module(directory: Path) -> dict[str, dict[str, Stored]]:
    """{module: {"a": tensor, "b": tensor}} of the file of weights."""
    file = directory / WEIGHTS
    modules: dict[str, dict[str, Stored]] = {}
    for name, stored in read_header(file, missing="missing; PEFT writes it, and a pickle (*.bin) is not read").items():
        end = next((end for end in _ENDS if name.startswith(_PREFIX) and name.endswith(end)), None)
        known = end is not None and stored.dtype in DTYPES
        require(known, f"{file}: {name} ({stored.dtype}) is no matrix of an adapter of a linear module")
        assert end is not None
        modules.setdefault(name.removeprefix(_PREFIX).removesuffix(end), {})[_ENDS[end]] = stored
    require(bool(modules), f"{file}: has no adapter in it")
    for name, pair in modules.items():
        require(len(pair) == 2, f"{file}: {name} has lora_{'A' if 'a' in pair else 'B'} alone")
    return modules


def _find(directory: Path, cfg: ModelConfig, stored: Mapping[str, object], format: str | None) -> dict[str, Module]:
    """The modules in a file of weights, by the first format that has all of them."""
    problem = ""
    for choice in _FORMATS if format is None else (format,):
        try:
            known = modules(cfg, choice)
        except UserError as error:
            problem = problem or str(error)
            continue
        unknown = sorted(stored.keys() - known.keys())
        if not unknown:
            return {name: known[name] for name in sorted(stored)}
        problem = f"{unknown[0]} is no kernel inside the layers of this model ({len(unknown)} such modules)"
    raise UserError(f"{directory / WEIGHTS}: {problem}")


def _read(files: Files, stored: Stored, dtype: Any) -> np.ndarray:
    raw = np.empty((1, stored.nbytes), np.uint8)
    files.read(stored.file, np.array([stored.offset]), raw)
    return raw.view(DTYPES[stored.dtype]).reshape(stored.shape).astype(dtype)


def import_peft(src: PathLike, dst: PathLike, *, base: PathLike, format: str | None = None) -> LoraConfig:
    """Reads adapters that PEFT wrote into a checkpoint of adapters `dst` of the checkpoint `base`.

    Raises:
      UserError: as load_peft; `dst` exists; no checkpoint at `base`.
    """
    lazy = checkpoint.open_lazy(base)
    lora, adapters = load_peft(src, lazy.cfg, format)
    name = Path(os.fspath(src)).resolve().name
    entry = {"stage": Path(os.fspath(dst)).name, "kind": "import_peft", "source": name}
    adapter = checkpoint.adapter_for(lazy.path, lora)
    checkpoint.save(dst, lazy.cfg, adapters, provenance=[*lazy.provenance, entry], adapter=adapter)
    beside.copy(beside.find_beside(Path(os.fspath(lazy.path)), programs=True), Path(os.fspath(dst)))
    return lora
