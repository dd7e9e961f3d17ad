"""The receipt of a growth: what it says, and the plan, the growth and the verification that it vouches for."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tele_jax import checkpoint, growth
from tele_jax.axes import flatten
from tele_jax.checkpoint import chunk_files
from tele_jax.config import ModelConfig, written_table
from tele_jax.errors import DamageError, FailedError, UserError
from tele_jax.files import read_json
from tele_jax.growth.apply import check_tree
from tele_jax.growth.layers import distances
from tele_jax.model.spec import flat_spec
from tele_jax.settings import GrowStage

RECEIPT_FILE, PLAN_FILE = "growth_receipt.json", "plan.json"


def plan_of(src: ModelConfig, dst: ModelConfig, stage: GrowStage, *, layers=None, scores=None) -> growth.Plan:
    """The plan that a growth stage asks for; raises UserError as growth.plan and growth.check."""
    how = stage.layers if layers is None else layers
    made = growth.plan(src, dst, policy=stage.policy, layers=how, seed=stage.seed, scores=scores, epsilon=stage.epsilon)
    growth.check(made)
    return made


def choose_plan(
    cfg: ModelConfig, params: Any, stage: GrowStage, tokens: np.ndarray, where: str
) -> tuple[growth.Plan, list[float] | None]:
    """(plan, the score of every source layer where the stage chooses layers by distance); params may be lazy."""
    larger = cfg.replace_from(stage.model, f"{where}.model")
    plan_of(cfg, larger, stage, layers="uniform" if stage.layers == "distance" else None)  # wrong before slow
    check_tree(flatten(params), flat_spec(cfg))
    scores = distances(cfg, params, tokens) if stage.layers == "distance" else None
    return plan_of(cfg, larger, stage, scores=scores), scores


def grow(
    cfg: ModelConfig, params: Any, opt_state: Any, stage: GrowStage, mesh: Mesh, tokens: np.ndarray, where: str
) -> tuple[growth.Plan, Any, Any, dict[str, Any]]:
    """(plan, grown parameters, grown optimizer state, receipt); verified on tokens int32[B, S].

    `opt_state` may be None. `where` names the stage in messages.

    Raises:
      UserError: the config asks for something that growth cannot do.
      FailedError: a preserving policy did not preserve, or left units that cannot learn.
    """
    plan, scores = choose_plan(cfg, params, stage, tokens, where)
    state = opt_state if stage.optimizer_state else None
    with jax.set_mesh(mesh):
        big, grown_state = growth.sharded(plan, mesh, state)(params, state)
        states = None if state is None else (state, grown_state)
        report = growth.verify(plan, params, big, tokens, opt_state=states)
    require_ok(report, stage, where)
    return plan, big, grown_state, receipt(plan, report, stage, scores, optimizer_state=grown_state is not None)


def receipt(
    plan: growth.Plan, report: growth.Report, stage: GrowStage, scores: list[float] | None, **more: Any
) -> dict[str, Any]:
    """What is written beside a grown checkpoint: the report, and all that says how the growth was made."""
    data = plan.to_json()
    return report.to_json() | {
        "seed": plan.seed,
        "masked": plan.masked,
        "layers": plan.maps["layers"].index.tolist(),
        "layer_scores": scores,
        "layer_metric": None if scores is None else "cosine",
        "src_cfg": data["src_cfg"],
        "dst_cfg": data["dst_cfg"],
        "absolute_tolerance": stage.tolerance,
        "notes": list(plan.notes),
        **more,
    }


def require_ok(report: growth.Report, stage: GrowStage, where: str, outcome: str = "nothing was written") -> None:
    """Raises FailedError where the report is not ok, or the logits moved by more than the stage allows."""
    if not report.ok:
        raise FailedError(f"{where}: the growth failed its verification; {outcome}: {report}")
    moved = report.max_abs if report.preserving and stage.tolerance is not None else None
    if moved is not None and moved > stage.tolerance:
        raise FailedError(
            f"{where}: the logits moved by {moved:.3g}, more than tolerance={stage.tolerance:g}; {outcome}"
        )


def provenance_entry(name: str, plan: growth.Plan) -> dict[str, Any]:
    """What a checkpoint says of the growth that made it. mask: where the masks stand, None where there are none."""
    entry = {"stage": name, "kind": "grow", "policy": plan.policy, "seed": plan.seed, "plan": plan.digest}
    return entry | {"mask": 0.0 if plan.masked else None}


def fingerprints(lazy: "checkpoint.Lazy") -> dict[str, str]:
    """SHA-256 of what each item of a checkpoint holds, from the checksums of its chunks."""
    return {
        item: chunk_files.fingerprint(lazy.items[item].values())
        for item in ("params", "opt_state")
        if item in lazy.items
    }


def require_receipt(directory: Path, src: "checkpoint.Lazy", dst: "checkpoint.Lazy") -> dict[str, Any]:
    """The receipt in a directory, if it is that of the growth of `src` into `dst`; reads 4 bytes a chunk.

    Raises:
      UserError: there is none, or it is of another plan, source or destination: says which.
    """
    receipt, digest = read_receipt(directory), read_plan(directory).digest
    if receipt.get("plan") != digest:
        raise UserError(f"{directory}: {RECEIPT_FILE} is of the plan {receipt.get('plan')}, {PLAN_FILE} is {digest}")
    if not dst.provenance or dst.provenance[-1].get("plan") != digest:
        raise UserError(f"{dst.path}: was made by another plan than that of {directory / RECEIPT_FILE}")
    for lazy, which in ((src, "source"), (dst, "destination")):
        if which not in receipt:  # a growth stage that was killed before it could look at its checkpoint
            continue
        known, found = receipt[which], fingerprints(lazy)
        # An item that is in the destination alone is one that nobody looked at.
        for item in ("params", "opt_state"):
            looked_at = item in known or (which == "destination" and item in found)
            if looked_at and found.get(item) != known.get(item):
                raise UserError(f"{lazy.path}: its {item} are not those of the {which} in {directory / RECEIPT_FILE}")
    return receipt


def read_plan(directory: Path) -> growth.Plan:
    """The plan in a directory. Raises UserError where there is none, DamageError where it is not what was written."""
    file = directory / PLAN_FILE
    try:
        return growth.Plan.from_json(read_json(file))
    except UserError as error:
        raise error if not file.exists() else DamageError(f"{file}: damaged, {error}") from None


def masked_plan(start: "checkpoint.Lazy", where: str) -> growth.Plan | None:
    """The plan of the growth that left a checkpoint behind closed masks, for a run to open them; None without masks.

    The plan lies in the checkpoint (`tele grow`), or in the directory of the stage that grew it.

    Raises:
      UserError: the checkpoint is from the middle of a mask ramp, or its plan is not there.
      DamageError: the plan is damaged.
    """
    entry = start.provenance[-1] if start.provenance else {}
    if entry.get("mask") != 0 or entry.get("kind") != "grow":
        growth.masks.require_unmasked(start.provenance, where)
        return None
    places = [Path(start.path), Path(start.path).parent.parent]
    place = next((place for place in places if (place / PLAN_FILE).exists()), None)
    if place is None:
        raise UserError(f"{where}: its masks are closed, and {PLAN_FILE}, which says which units are new, is not there")
    plan = read_plan(place)
    if plan.digest != entry.get("plan"):
        raise UserError(f"{where}: was made by another plan than that of {place / PLAN_FILE}")
    return plan


def read_receipt(directory: Path) -> dict[str, Any]:
    """The receipt in a directory. Raises UserError where there is none, DamageError where it is damaged."""
    file = directory / RECEIPT_FILE
    return written_table(read_json(file), str(file), RECEIPT_FIELDS)


RECEIPT_FIELDS = {
    **{"plan": str, "policy": str, "ok": bool, "levels": tuple[str, ...]},
    **{"source": dict[str, Any], "destination": dict[str, Any]},
    **{"max_abs": float | None, "max_rel": float | None, "kl": float | None},
    **{"dead": tuple[str, ...] | None, "locked": tuple[str, ...] | None},
    **{"layers": tuple[int, ...], "layer_scores": tuple[float, ...] | None},
}
