"""`tele inspect CKPT`: shows what a checkpoint holds, without reading its arrays."""

import argparse
import json

from tele_jax import checkpoint, tables
from tele_jax.cli import Outcome, flag, switch
from tele_jax.config import to_dict
from tele_jax.errors import DamageError
from tele_jax.files import Table
from tele_jax.growth.masks import mask_of


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "ckpt CKPT", "step, stage or work directory; of several steps, the latest")
    switch(parser, "--verify", "read everything, and compare it with its checksums")


def run(args: argparse.Namespace) -> Outcome:
    """Prints config, parameter tree, totals and provenance, which are the figures.

    Raises:
      UserError: there is no checkpoint.
      DamageError: its structure is damaged; with --verify, any chunk is.
    """
    lazy = checkpoint.open_lazy(args.ckpt)
    found = figures(lazy)
    print(describe(found))
    return Outcome(found | {"verified": _verify(lazy)} if args.verify else found)


def figures(lazy: checkpoint.Lazy) -> Table:
    """Everything that `describe` prints, and where each leaf is cut."""
    own = "params" if lazy.adapter is None else "adapters"
    params = lazy.items[own].values()
    return {
        "path": str(lazy.path),
        "step": lazy.step,
        "config": to_dict(lazy.cfg),
        "leaves": [
            {"name": array.name.removeprefix(f"{own}/"), "dtype": array.dtype.name, "bytes": array.nbytes}
            | {what: list(getattr(array, what)) for what in ("axes", "shape", "chunks")}
            for array in params
        ],
        "parameters": sum(array.leaf.spec.size for array in params),
        "parameter_bytes": sum(array.nbytes for array in params),
        "optimizer_leaves": len(lazy.items.get("opt_state", {})),
        "optimizer_bytes": sum(array.nbytes for array in lazy.items.get("opt_state", {}).values()),
        "adapter": None if lazy.adapter is None else to_dict(lazy.adapter),
        "mask": mask_of(lazy.provenance, str(lazy.path)),
        "holds_data_position": "data" in lazy.items,
        "provenance": list(lazy.provenance),
        "versions": lazy.versions,
    }


def describe(figures: Table) -> str:
    """The figures as text for people."""
    rows = []
    for leaf in figures["leaves"]:
        shape = " x ".join(f"{size:,}" for size in leaf["shape"])
        rows.append((leaf["name"], " ".join(leaf["axes"]), shape, leaf["dtype"], f"{leaf['bytes']:,}"))
    opt, mask = "none", figures["mask"]
    if figures["optimizer_leaves"]:
        opt = f"{figures['optimizer_leaves']} leaves, {_size(figures['optimizer_bytes'])}"
    totals = [
        ("parameters", f"{figures['parameters']:,}, {_size(figures['parameter_bytes'])}"),
        ("optimizer state", opt),
        ("data position", "yes" if figures["holds_data_position"] else "none"),
        ("written by", ", ".join(f"{name} {version}" for name, version in figures["versions"].items())),
    ]
    if adapter := figures["adapter"]:
        lora, base = adapter["lora"], adapter["base"][-1]
        how = "rank-stabilized, " if lora["rank_stabilized"] else ""
        what = f"rank {lora['rank']}, alpha {lora['alpha']:g}, {how}of {', '.join(lora['targets'])}; base {base}"
        totals.insert(0, ("adapters", what))
    if mask is not None:
        closed = "closed" if mask == 0 else f"at {mask:.2f}"
        masks = f"{closed}: what growth added takes no full part yet; train on with mask_ramp"
        totals.insert(-1, ("masks", masks))
    parts = [
        f"{figures['path']}    step {figures['step']:,}",
        "config\n" + tables.text([(f"  {name}", value) for name, value in figures["config"].items()], align="ll"),
        tables.text(rows, ("leaf", "axes", "shape", "dtype", "bytes"), align="llllr"),
        tables.text(totals, align="ll"),
        "provenance       none",
    ]
    if figures["provenance"]:
        entries = [f"  {json.dumps(_short(entry), ensure_ascii=False)}" for entry in figures["provenance"]]
        parts[-1] = "\n".join(["provenance, oldest first", *entries])
    return "\n\n".join(parts)


def _short(entry: Table) -> Table:
    """An entry with the positions in the data as "next / total" of every domain; --json has all of them."""
    positions = entry["data"].get("positions") if isinstance(entry.get("data"), dict) else None
    if not isinstance(positions, dict):
        return entry
    short = {name: f"{at.get('next')} / {at.get('total')}" for name, at in positions.items() if isinstance(at, dict)}
    return entry | {"data": entry["data"] | {"positions": short}}


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def _verify(lazy: checkpoint.Lazy) -> dict[str, int]:
    found = []
    for damage in checkpoint.verify(lazy):
        found.append(damage)
        print(f"damaged: {damage.leaf}: {damage.file}: {damage.problem}")
    if found:
        first = found[0]
        raise DamageError(
            f"{lazy.path}: {len(found)} damaged chunks, the first: {first.leaf}: {first.file}: {first.problem}"
        )
    arrays = [array for item in lazy.items.values() for array in item.values()]
    size = sum(array.nbytes for array in arrays)
    print(f"\nverified         {len(arrays)} arrays, {_size(size)}: every checksum is right")
    return {"arrays": len(arrays), "bytes": size}
