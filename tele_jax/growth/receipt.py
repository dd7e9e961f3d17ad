"""Growth that is verified and vouched for by a receipt: of a stage in memory (`grow`), and between checkpoints.

`tele grow` (grow_stored) makes a checkpoint DST:

    DST.unverified.partial/    while it is written (growth.stream)
    DST.unverified/            complete, but not verified yet
    DST/                       verified, with growth_receipt.json, plan.json and the tokenizer of the source

After a kill the same call goes on from where it was. A growth that fails its verification stays as DST.unverified, with
its receipt, for inspection.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from tele_jax import checkpoint, files, growth
from tele_jax.axes import PyTree, check_tree, flatten
from tele_jax.checkpoint import adapted, chunk_files, unfinished
from tele_jax.config import ModelConfig, checked, given, require, written_table
from tele_jax.errors import DamageError, FailedError, UserError
from tele_jax.files import Table
from tele_jax.growth.layers import distances
from tele_jax.growth.masks import require_unmasked
from tele_jax.model.inputs import has_x64
from tele_jax.settings import GrowStage

RECEIPT_FILE, PLAN_FILE = "growth_receipt.json", "plan.json"

# Both trees, a gradient and Adam's two moments of the larger one, and room for XLA to work in.
_LARGE_TREES = 5

Say = Callable[[str], None]


def plan_of(cfg: ModelConfig, stage: GrowStage, where: str, scores: Sequence[float] | None = None) -> growth.Plan:
    """The plan by which a growth stage grows a model; where: names the stage in messages.

    Layers that the stage chooses by distance need `scores`, one per layer; without, copies are spread evenly: which
    layers are copied makes no difference to whether a growth is possible.

    Raises:
      UserError: as growth.plan and growth.check.
    """
    larger = cfg.replace_from(stage.model, f"{where}.model")
    layers = "uniform" if stage.layers == "distance" and scores is None else stage.layers
    how = {"policy": stage.policy, "seed": stage.seed, "epsilon": stage.epsilon}
    try:
        made = growth.plan(cfg, larger, layers=layers, scores=scores, **how)
        growth.check(made)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return made


def choose_plan(
    plan: growth.Plan, params: PyTree, stage: GrowStage, tokens: np.ndarray, where: str
) -> tuple[growth.Plan, list[float] | None]:
    """The plan of `plan_of`, made anew with the scores of the source layers where the stage chooses by distance.

    params: of the source, may be lazy. The scores, of every source layer, are None where the stage needs none.
    """
    check_tree(flatten(params), plan.src_spec)
    if stage.layers != "distance":
        return plan, None
    scores = distances(plan.src_cfg, params, tokens)
    return plan_of(plan.src_cfg, stage, where, scores), scores


def grow(
    plan: growth.Plan, params: PyTree, opt_state: PyTree, stage: GrowStage, mesh: Mesh, tokens: np.ndarray, where: str
) -> tuple[growth.Plan, PyTree, PyTree, Table]:
    """Grows on a mesh and verifies: (plan, grown parameters, grown optimizer state, receipt).

    Args:
      plan: as `plan_of` makes it for the stage.
      opt_state: may be None.
      tokens: int32[B, S], to verify on.
      where: the name of the stage, for messages.

    Raises:
      UserError: params or opt_state are not what the plan grows.
      FailedError: a preserving policy did not preserve, or left units that cannot learn.
    """
    plan, scores = choose_plan(plan, params, stage, tokens, where)
    state = opt_state if stage.optimizer_state else None
    with jax.set_mesh(mesh):
        big, grown_state = growth.sharded(plan, mesh, state)(params, state)
        states = None if state is None else (state, grown_state)
        report = growth.verify(plan, params, big, tokens, opt_state=states)
    _require_ok(report, stage, where)
    return plan, big, grown_state, receipt(plan, report, stage, scores, optimizer_state=grown_state is not None)


# ---- receipts ----------------------------------------------------------------------------------------------------


RECEIPT_FIELDS = {
    **{"plan": str, "policy": str, "ok": bool, "levels": tuple[str, ...]},
    **{"source": Table, "destination": Table},
    **{"max_abs": float | None, "max_rel": float | None, "kl": float | None},
    **{"dead": tuple[str, ...] | None, "locked": tuple[str, ...] | None},
    **{"layers": tuple[int, ...], "layer_scores": tuple[float, ...] | None},
}


def receipt(
    plan: growth.Plan, report: growth.Report, stage: GrowStage, scores: list[float] | None, **more: object
) -> Table:
    """The document beside a grown checkpoint: the report, and all that says how the growth was made."""
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


def _require_ok(report: growth.Report, stage: GrowStage, where: str, outcome: str = "nothing was written") -> None:
    """Raises FailedError where the report is not ok, or the logits moved by more than the stage allows."""
    if not report.ok:
        raise FailedError(f"{where}: the growth failed its verification; {outcome}: {report}")
    moved, allowed = report.max_abs if report.preserving else None, stage.tolerance
    if moved is not None and allowed is not None and moved > allowed:
        raise FailedError(f"{where}: the logits moved by {moved:.3g}, more than tolerance={allowed:g}; {outcome}")


def provenance_entry(name: str, plan: growth.Plan) -> Table:
    """The entry of a growth in the provenance of a checkpoint. mask: where the masks stand; None without masks."""
    entry = {"stage": name, "kind": "grow", "policy": plan.policy, "seed": plan.seed, "plan": plan.digest}
    return entry | {"mask": 0.0 if plan.masked else None}


def fingerprints(lazy: "checkpoint.Lazy") -> dict[str, str]:
    """SHA-256 of the content of each item of a checkpoint, from the checksums of its chunks."""
    if lazy.adapter is not None:  # the growth is that of the merged model
        return {"params": adapted.fingerprint(lazy)}
    return {i: chunk_files.fingerprint(lazy.items[i].values()) for i in ("params", "opt_state") if i in lazy.items}


def require_receipt(directory: Path, src: "checkpoint.Lazy", dst: "checkpoint.Lazy") -> Table:
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
        # An item that only the destination has was never verified.
        for item in ("params", "opt_state"):
            looked_at = item in known or (which == "destination" and item in found)
            if looked_at and found.get(item) != known.get(item):
                raise UserError(f"{lazy.path}: its {item} are not those of the {which} in {directory / RECEIPT_FILE}")
    return receipt


def read_plan(directory: Path) -> growth.Plan:
    """The plan in a directory. Raises UserError where there is none, DamageError where it is not what was written."""
    file = directory / PLAN_FILE
    try:
        return growth.Plan.from_json(files.read_json(file))
    except UserError as error:
        raise error if not file.exists() else DamageError(f"{file}: damaged, {error}") from None


def read_receipt(directory: Path) -> Table:
    """The receipt in a directory. Raises UserError where there is none, DamageError where it is damaged."""
    file = directory / RECEIPT_FILE
    return written_table(files.read_json(file), str(file), RECEIPT_FIELDS)


def masked_plan(start: "checkpoint.Lazy", where: str) -> growth.Plan | None:
    """The plan of the growth that left a checkpoint behind closed masks, for a run to open them; None without masks.

    The plan lies in the checkpoint (`tele grow`), or in the directory of the stage that grew it.

    Raises:
      UserError: the checkpoint is from the middle of a mask ramp, or its plan is not there.
      DamageError: the plan is damaged.
    """
    entry = start.provenance[-1] if start.provenance else {}
    if entry.get("mask") != 0 or entry.get("kind") != "grow":
        require_unmasked(start.provenance, where)
        return None
    return _plan_beside(start, f"{where}: its masks are closed")


def new_units(start: "checkpoint.Lazy | None", where: str) -> dict[str, np.ndarray]:
    """Marks what the growth that made a checkpoint has added: bool[size] by axis name.

    Raises:
      UserError: the checkpoint is not from a growth, its plan is not there, or nothing is new. DamageError: damage.
    """
    if start is None or not start.provenance or start.provenance[-1].get("kind") != "grow":
        raise UserError(f"{where}: optimizer.trained='new' has to follow a growth, and the stage before is not one")
    new = {axis: axis_map.fresh for axis, axis_map in _plan_beside(start, where).maps.items()}
    nothing = f"{where}: optimizer.trained='new', and the growth added no unit that is not a copy"
    require(any(fresh.any() for fresh in new.values()), nothing)
    return new


def _plan_beside(start: "checkpoint.Lazy", where: str) -> growth.Plan:
    """The plan of the growth that made a checkpoint: in it, or in the directory of the stage."""
    entry, places = start.provenance[-1], [Path(start.path), Path(start.path).parent.parent]
    missing = f"{where}, and {PLAN_FILE}, which says which units are new, is not there"
    place = given(next((place for place in places if (place / PLAN_FILE).exists()), None), missing)
    plan = read_plan(place)
    require(plan.digest == entry.get("plan"), f"{where}: was made by another plan than that of {place / PLAN_FILE}")
    return plan


# ---- from checkpoint to checkpoint -------------------------------------------------------------------------------


@checked
class Request:
    """The arguments of `tele grow`.

    Attributes:
      stage, where: the settings of the growth, and their name in messages.
      tokens: int32[B, S] to verify on; verified_on says where they come from.
      opt: grow the optimizer state as well.
      memory_gb: 10^9 bytes for streaming, and for a verification on all levels.
      files: files to copy into DST, such as the tokenizer.
    """

    src: str
    dst: Path
    stage: GrowStage
    where: str
    tokens: np.ndarray
    verified_on: str
    opt: bool = False
    memory_gb: float = 4.0
    workers: int | None = None
    shard: tuple[int, int] = (0, 1)
    files: tuple[Path, ...] = ()

    @property
    def unverified(self) -> Path:
        return self.dst.with_name(self.dst.name + ".unverified")


def grow_stored(request: Request, say: Say, progress: Callable[[int, int], None] | None = None) -> Table | None:
    """Grows and verifies a checkpoint, and returns its receipt.

    The result is None where other shards have still to finish, or another process verifies.

    Raises:
      UserError: DST exists; the source is in the middle of a mask ramp, or holds no optimizer state to grow; what
        growth.plan, growth.check and growth.stream refuse.
      FailedError: the verification failed.
    """
    lazy, plan, scores = _planned(request)
    unverified, how = request.unverified, {"opt": request.opt, "memory_gb": request.memory_gb}
    say(str(plan))
    if not unverified.exists():
        how |= {"workers": request.workers, "shard": request.shard, "progress": progress}
        entry = provenance_entry(request.dst.name, plan)
        figures = growth.stream(plan, lazy.path, unverified, provenance=entry, **how)
        say(f"wrote {figures.bytes_written:,} bytes in {figures.seconds:.1f} s with {figures.workers} threads")
        if not figures.complete:
            say("shard {} of {} is done; the last to finish verifies".format(*request.shard))
            return None
    with _alone(unverified) as alone:
        if not alone:
            say("another process verifies")
            return None
        grown = checkpoint.open_lazy(unverified)
        again = "remove it, or finish it as it was begun"
        require(grown.provenance[-1].get("plan") == plan.digest, f"{unverified}: was made by another plan; {again}")
        made = "without" if request.opt else "with"
        require(request.opt == (grown.opt_state is not None), f"{unverified}: was made {made} --opt; {again}")
        unfinished.clear(unverified)
        return _verify_and_name(request, plan, scores, lazy, grown)


def _planned(request: Request) -> tuple["checkpoint.Lazy", growth.Plan, list[float] | None]:
    """(the open source, the plan, the scores of its layers); raises UserError for what is not to be grown."""
    require(
        not request.dst.exists(),
        f"{request.dst}: exists already, and checkpoints are never overwritten; choose another DST",
    )
    lazy = checkpoint.open_lazy(request.src)
    require_unmasked(lazy.provenance, request.src)
    no_state = request.opt and lazy.opt_state is None
    require(not no_state, f"{request.src}: holds no optimizer state to grow; leave out --opt")
    opened = plan_of(lazy.cfg, request.stage, request.where)
    plan, scores = choose_plan(opened, lazy.params, request.stage, request.tokens, request.where)
    grows = plan.dst_cfg != plan.src_cfg or not all(axis_map.is_identity for axis_map in plan.maps.values())
    require(grows, f"{request.where}.model: nothing grows; it has to be larger than {lazy.path} in some field")
    return lazy, plan, scores


def outline(request: Request, say: Say) -> Table:
    """Says and returns what `grow_stored` would do; writes nothing. Raises UserError as `grow_stored`."""
    lazy, plan, _ = _planned(request)
    how = {"opt": request.opt, "memory_gb": request.memory_gb, "workers": request.workers}
    figures = growth.stream_outline(plan, lazy.path, request.dst, **how)
    wholly = verifies_wholly(plan, lazy, request.memory_gb)
    levels = ["configs", "parameters", *(["optimizer state"] if request.opt else []), "parts"]
    levels += ["logits", "liveness"] if wholly else []
    short = "" if figures.free_bytes >= figures.disk_bytes else ", TOO LITTLE"
    say(f"""{plan}
would read       {figures.bytes_to_read:,} bytes, and again to verify
would write      {figures.bytes_to_write:,} bytes, with {figures.workers} threads
disk             {figures.disk_bytes:,} bytes needed, {figures.free_bytes:,} free{short}
memory           {figures.memory_bytes:,} bytes to write
would verify     {", ".join(levels)}{"" if wholly else "; logits need more --memory-gb"}
nothing was written""")
    return {"plan": plan.to_json(), "verified": levels, **dataclasses.asdict(figures)}


def _verify_and_name(
    request: Request, plan: growth.Plan, scores: list[float] | None, lazy: "checkpoint.Lazy", grown: PyTree
) -> Table:
    """Verifies DST.unverified and renames it to DST, or leaves it there with its receipt and raises FailedError."""
    report, unverified = verify(plan, lazy, grown, request.tokens, request.memory_gb), request.unverified
    made = receipt(
        plan,
        report,
        request.stage,
        scores,
        optimizer_state=request.opt,
        verified_on=request.verified_on,
        source={"path": str(lazy.path), "step": lazy.step, **fingerprints(lazy)},
        destination=fingerprints(grown),
    )
    files.write_json(unverified / RECEIPT_FILE, made)
    files.write_json(unverified / PLAN_FILE, plan.to_json())
    _require_ok(report, request.stage, request.where, f"it is left at {unverified}")
    for file in request.files:
        (unverified / file.name).write_bytes(file.read_bytes())
    files.move(unverified, request.dst)
    return made


def verify(
    plan: growth.Plan, src: "checkpoint.Lazy", dst: "checkpoint.Lazy", tokens: np.ndarray, memory_gb: float
) -> growth.Report:
    """The report on two open checkpoints: on all levels where memory_gb holds both models, else without logits."""
    if not verifies_wholly(plan, src, memory_gb):
        return growth.verify_stored(plan, src, dst)
    return growth.verify(plan, src, dst, tokens)


def verifies_wholly(plan: growth.Plan, src: "checkpoint.Lazy", memory_gb: float) -> bool:
    """True where both models, and what their gradients need, fit into memory_gb; src: the open source."""
    small = sum(array.nbytes for array in src.items["params"].values())
    large = sum(spec.size * np.dtype(spec.dtype).itemsize for spec in plan.dst_spec.values())
    computes = has_x64() or "float64" not in (
        plan.dst_cfg.dtype,
        plan.dst_cfg.param_dtype,
    )
    return small + _LARGE_TREES * large <= memory_gb * 1e9 and computes


def recheck(src: str, dst: Path, tokens: np.ndarray, memory_gb: float) -> growth.Report:
    """Verifies a grown checkpoint again, after a comparison of its receipt with both checkpoints.

    Raises:
      UserError: no receipt, or that of another plan, source or destination.
    """
    old, new = checkpoint.open_lazy(src), checkpoint.open_lazy(dst)
    known = require_receipt(Path(dst), old, new)
    says = "source" in known and "destination" in known
    require(says, f"{dst}: {RECEIPT_FILE} does not say what was grown into what; `tele grow` writes that")
    return verify(read_plan(Path(dst)), old, new, tokens, memory_gb)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Yields True in the one process that verifies `path`."""
    lock = path.with_name(path.name + ".lock")
    with files.locked(lock) as free:
        try:
            yield free and path.exists()
        finally:
            if free:
                lock.unlink(missing_ok=True)
