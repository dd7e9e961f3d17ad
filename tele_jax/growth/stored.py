"""Growth from checkpoint to checkpoint, verified before the new one has its name: what `tele grow` does.

    DST.unverified.partial/    while it is written (growth.stream)
    DST.unverified/            complete, but not looked at yet
    DST/                       verified, with growth_receipt.json, plan.json and the tokenizer of the source

Whatever a kill interrupts, the same call goes on from. A growth that fails its verification stays as DST.unverified,
with its receipt, to be looked at.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tele_jax import checkpoint, files, growth
from tele_jax.checkpoint import unfinished
from tele_jax.config import ModelConfig
from tele_jax.errors import UserError
from tele_jax.growth import receipt as receipts
from tele_jax.settings import GrowStage

# Both trees, a gradient and Adam's two moments of the larger one, and room for XLA to work in.
_LARGE_TREES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to grow, and how. tokens: int32[B, S] to verify on, `verified_on` says what they are. opt: the optimizer
    state as well. memory_gb: 10^9 bytes for streaming, and for a verification of the whole function.
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
    files: tuple[Path, ...] = ()  # copied into DST, such as the tokenizer

    @property
    def unverified(self) -> Path:
        return self.dst.with_name(self.dst.name + ".unverified")


def grow(
    request: Request, say: Callable[[str], None], progress: Callable[[int, int], None] | None = None
) -> dict[str, Any] | None:
    """The receipt; None where other shards have still to finish, or another process verifies.

    Raises:
      UserError: DST exists; the source is in the middle of a mask ramp, or holds no optimizer state to grow; what
        growth.plan, growth.check and growth.stream refuse.
      FailedError: the verification failed.
    """
    lazy, plan, scores = _planned(request)
    say(str(plan))
    if not request.unverified.exists():
        figures = growth.stream(
            plan,
            lazy.path,
            request.unverified,
            opt=request.opt,
            memory_gb=request.memory_gb,
            workers=request.workers,
            shard=request.shard,
            provenance=receipts.provenance_entry(request.dst.name, plan),
            progress=progress,
        )
        say(f"wrote {figures.bytes_written:,} bytes in {figures.seconds:.1f} s with {figures.workers} threads")
        if not figures.complete:
            say("shard {} of {} is done; the last to finish verifies".format(*request.shard))
            return None
    with _alone(request.unverified) as alone:
        if not alone:
            say("another process verifies")
            return None
        grown = checkpoint.open_lazy(request.unverified)
        if grown.provenance[-1].get("plan") != plan.digest:
            raise UserError(f"{request.unverified}: was made by another plan; remove it, or finish it as it was begun")
        if request.opt != (grown.opt_state is not None):
            how = "without" if request.opt else "with"
            raise UserError(f"{request.unverified}: was made {how} --opt; remove it, or finish it as it was begun")
        unfinished.clear(request.unverified)
        return _verify(request, plan, scores, lazy, grown)


def _planned(request: Request) -> tuple["checkpoint.Lazy", growth.Plan, Any]:
    """(the open source, the plan, the scores of its layers); raises UserError for what is not to be grown."""
    if request.dst.exists():
        raise UserError(f"{request.dst}: exists already, and checkpoints are never overwritten; choose another DST")
    lazy = checkpoint.open_lazy(request.src)
    growth.masks.require_unmasked(lazy.provenance, request.src)
    if request.opt and lazy.opt_state is None:
        raise UserError(f"{request.src}: holds no optimizer state to grow; leave out --opt")
    plan, scores = receipts.choose_plan(lazy.cfg, lazy.params, request.stage, request.tokens, request.where)
    if plan.dst_cfg == plan.src_cfg and all(axis_map.is_identity for axis_map in plan.maps.values()):
        raise UserError(f"{request.where}.model: nothing grows; it has to be larger than {lazy.path} in some field")
    return lazy, plan, scores


def outline(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Says and returns what `grow` would do; writes nothing. Raises UserError as `grow`."""
    lazy, plan, _ = _planned(request)
    say(str(plan))
    how = {"opt": request.opt, "memory_gb": request.memory_gb, "workers": request.workers}
    figures = growth.stream_outline(plan, lazy.path, request.dst, **how)
    wholly = verifies_wholly(plan, lazy, request.memory_gb)
    levels = ["configs", "parameters", *(["optimizer state"] if request.opt else []), "parts"]
    levels += ["logits", "liveness"] if wholly else []
    short = "" if figures.free_bytes >= figures.disk_bytes else ", TOO LITTLE"
    say(f"would read       {figures.bytes_to_read:,} bytes, and again to verify")
    say(f"would write      {figures.bytes_to_write:,} bytes, with {figures.workers} threads")
    say(f"disk             {figures.disk_bytes:,} bytes needed, {figures.free_bytes:,} free{short}")
    say(f"memory           {figures.memory_bytes:,} bytes to write")
    say(f"would verify     {', '.join(levels)}" + ("" if wholly else "; logits need more --memory-gb"))
    say("nothing was written")
    return {"plan": plan.to_json(), "verified": levels, **dataclasses.asdict(figures)}


def _verify(request: Request, plan: growth.Plan, scores: Any, lazy: Any, grown: Any) -> dict[str, Any]:
    report = verify(plan, lazy, grown, request.tokens, request.memory_gb)
    receipt = receipts.receipt(
        plan,
        report,
        request.stage,
        scores,
        optimizer_state=request.opt,
        verified_on=request.verified_on,
        source={"path": str(lazy.path), "step": lazy.step, **receipts.fingerprints(lazy)},
        destination=receipts.fingerprints(grown),
    )
    files.write_json(request.unverified / receipts.RECEIPT_FILE, receipt)
    files.write_json(request.unverified / receipts.PLAN_FILE, plan.to_json())
    receipts.require_ok(report, request.stage, request.where, f"it is left at {request.unverified}")
    for file in request.files:
        (request.unverified / file.name).write_bytes(file.read_bytes())
    os.rename(request.unverified, request.dst)
    return receipt


def verify(plan: growth.Plan, src: Any, dst: Any, tokens: np.ndarray, memory_gb: float) -> growth.Report:
    """The report on two open checkpoints: at all levels where memory_gb holds both models, else without logits."""
    if not verifies_wholly(plan, src, memory_gb):
        return growth.verify_stored(plan, src, dst)
    return growth.verify(plan, src, dst, tokens)


def verifies_wholly(plan: growth.Plan, src: Any, memory_gb: float) -> bool:
    """Tells whether both models, and what their gradients need, fit into memory_gb; src: the open source."""
    small = sum(array.nbytes for array in src.items["params"].values())
    large = sum(spec.size * np.dtype(spec.dtype).itemsize for spec in plan.dst_spec.values())
    return small + _LARGE_TREES * large <= memory_gb * 1e9 and _computes(plan.dst_cfg)


def _computes(cfg: ModelConfig) -> bool:
    return jax.config.jax_enable_x64 or "float64" not in (cfg.dtype, cfg.param_dtype)


def recheck(src: str, dst: Path, tokens: np.ndarray, memory_gb: float) -> growth.Report:
    """Verifies a growth that is there again, after a comparison of its receipt with both checkpoints.

    Raises:
      UserError: no receipt, or that of another plan, source or destination.
    """
    old, new = checkpoint.open_lazy(src), checkpoint.open_lazy(dst)
    receipt = receipts.require_receipt(Path(dst), old, new)
    if "source" not in receipt or "destination" not in receipt:
        raise UserError(
            f"{dst}: {receipts.RECEIPT_FILE} does not say what was grown into what; `tele grow` writes that"
        )
    plan = receipts.read_plan(Path(dst))
    return verify(plan, old, new, tokens, memory_gb)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether this process is the one that verifies `path`."""
    lock = path.with_name(path.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield path.exists()
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
