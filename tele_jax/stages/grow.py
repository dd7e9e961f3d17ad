"""Growth on the mesh: the model that the stage before left becomes a larger one, verified before it is saved."""

from collections.abc import Callable
from pathlib import Path

import jax

from tele_jax import checkpoint, files
from tele_jax.config import ModelConfig
from tele_jax.data.batches import Batches
from tele_jax.files import Table
from tele_jax.growth import Plan
from tele_jax.growth import receipt as receipts
from tele_jax.growth.receipt import read_plan
from tele_jax.growth.verify import require_configs
from tele_jax.model.spec import count_params
from tele_jax.processes import from_first
from tele_jax.settings import GrowStage

__all__ = ["Settings", "carry_out", "outline", "read_plan"]

Settings = GrowStage

VERIFY_ROWS, VERIFY_TOKENS = 4, 256  # of held-out text, to verify a growth on


def outline(stage: GrowStage, cfg: ModelConfig, where: str) -> tuple[ModelConfig, Plan]:
    """The config of the grown model, and a plan that leads there; raises UserError for what cannot grow."""
    plan = receipts.plan_of(cfg, stage, where)
    return plan.dst_cfg, plan


def carry_out(
    stage: GrowStage,
    directory: Path,
    *,
    plan: Plan,
    previous: Path,
    mesh: jax.sharding.Mesh,
    text: Batches,
    where: str,
    say: Callable[[str], None],
) -> Table:
    """Grows what lies in `previous` into `directory`, unless an earlier start did, and returns the stage's summary.

    plan: of `outline`.

    Raises:
      UserError, FailedError: as growth.receipt.grow.
    """
    saved = directory / "checkpoints"
    manager = checkpoint.Manager(saved, keep=1)
    try:
        if manager.latest_step() is None:
            loaded = checkpoint.load(previous, mesh=mesh)
            if loaded.adapter is not None:
                say("  merged the adapters of the stage before into their base, which has no optimizer state to grow")
            tokens = text.sample(VERIFY_ROWS, VERIFY_TOKENS)
            plan, params, opt_state, receipt = receipts.grow(
                plan, loaded.params, loaded.opt_state, stage, mesh, tokens, where
            )
            from_first(lambda: files.write_json(directory / receipts.PLAN_FILE, plan.to_json()))
            from_first(lambda: files.write_json(directory / receipts.RECEIPT_FILE, receipt))
            entry = receipts.provenance_entry(directory.name, plan)
            manager.save(0, plan.dst_cfg, params, opt_state, [*loaded.provenance, entry])
            manager.wait()
        receipt = from_first(lambda: _complete_receipt(directory, previous, saved))
    finally:
        manager.close()
    dead, locked = len(receipt["dead"]), len(receipt["locked"])
    say(f"  logits moved by {receipt['max_abs']:.3g} at most; dead units {dead}, locked units {locked}")
    return {
        "parameters": count_params(checkpoint.open_lazy(saved).cfg),
        "receipt": {key: receipt[key] for key in ("policy", "max_abs", "max_rel", "kl", "ok")},
    }


def _complete_receipt(directory: Path, previous: Path, saved: Path) -> Table:
    """The receipt of a growth whose checkpoint is there, with what it was made from and became."""
    source, grown = (checkpoint.open_lazy(path) for path in (previous, saved))
    receipt = receipts.require_receipt(directory, source, grown)
    if "destination" not in receipt:  # a kill may fall between the checkpoint and this
        require_configs(read_plan(directory), source, grown)
        receipt["levels"] = ["configs", *receipt["levels"]]
        receipt["source"] = {"path": str(source.path), "step": source.step, **receipts.fingerprints(source)}
        files.write_json(directory / receipts.RECEIPT_FILE, receipt | {"destination": receipts.fingerprints(grown)})
    return receipt
