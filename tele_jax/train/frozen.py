"""Stages with LoRA: the step trains adapters, and the parameters that they adapt lie beside it, as they were loaded."""

from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from tele_jax import checkpoint
from tele_jax.axes import Params, PyTree
from tele_jax.config import ModelConfig, require
from tele_jax.files import PathLike
from tele_jax.model import adapters
from tele_jax.settings import LoraConfig
from tele_jax.train.step import Loss


class Frozen:
    """The parameters that a stage leaves as they are, and what it trains in their place.

    spec: of the adapters.  params: the parameters, on the mesh, in the dtype in which they are stored.
    provenance: of these.  adapter: describes the adapters in checkpoints.
    """

    def __init__(self, cfg: ModelConfig, lora: LoraConfig, previous: Path, mesh: Mesh):
        """Loads the model of the previous stage, merged where that left adapters. Raises as adapter_for and load."""
        self.cfg, self.lora, self.spec = cfg, lora, adapters.spec(cfg, lora)
        self.adapter = checkpoint.adapter_for(previous, lora)
        loaded = checkpoint.load(previous, mesh, cfg=cfg, items=("params",))
        self.params, self.provenance = loaded.params, loaded.provenance

    def __str__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.spec))
        return f"trains {size:,} parameters of new adapters; those of {self.adapter.base[-1]} stay as they are"

    def fresh(self, seed: int, shardings: PyTree) -> Params:
        """New adapters on the mesh."""
        make = jax.jit(lambda key: adapters.init(self.cfg, self.lora, key), out_shardings=shardings)
        return make(jax.random.key(seed))

    def restored(self, loaded: "checkpoint.Loaded", where: PathLike) -> PyTree:
        """The adapters of a checkpoint of this stage. Raises UserError where they were trained on another base."""
        known = None if loaded.adapter is None else loaded.adapter.fingerprint
        require(
            known == self.adapter.fingerprint,
            f"{where}: holds adapters for another base than {self.adapter.base[-1]}; start from the one they are for, "
            "or use another work directory",
        )
        return loaded.adapters

    def with_adapters(self, trained: Params) -> Params:
        """The whole model."""
        return adapters.attach(self.cfg, self.params, trained, self.lora)

    def loss(self, loss: Loss) -> Loss:
        """The whole model's loss in terms of the adapters; `beside` is (frozen parameters, the kind's own beside)."""

        def of_adapters(
            cfg: ModelConfig, trained: PyTree, batch: Mapping[str, jax.Array], masks: PyTree, beside: PyTree
        ):
            params, others = beside
            return loss(cfg, adapters.attach(cfg, params, trained, self.lora), batch, masks, others)

        return of_adapters
