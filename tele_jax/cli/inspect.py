"""tele inspect CKPT: what a checkpoint holds, without reading its arrays."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from tele_jax import checkpoint
from tele_jax.config import to_dict
from tele_jax.errors import DamageError
from tele_jax.growth.masks import mask_of

HELP = "show what a checkpoint holds"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ckpt", metavar="CKPT", help="a step, stage or work directory; of several steps, the latest")
    parser.add_argument("--verify", action="store_true", help="read everything, and check it against its checksums")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints config, parameter tree, totals and provenance, and returns them.

    Raises:
      UserError: there is no checkpoint.
      DamageError: its structure is damaged; with --verify, any chunk is.
    """
    lazy = checkpoint.open_lazy(args.ckpt)
    figures = _figures(lazy)
    _print(figures)
    if args.verify:
        figures["verified"] = _verify(lazy)
    return figures


def _figures(lazy: Any) -> dict[str, Any]:
    params = lazy.items["params"].values()
    return {
        "path": str(lazy.path),
        "step": lazy.step,
        "config": to_dict(lazy.cfg),
        "leaves": [
            {
                "name": array.name.removeprefix("params/"),
                "axes": list(array.axes),
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "bytes": array.nbytes,
                "chunks": list(array.chunks),
            }
            for array in params
        ],
        "parameters": sum(array.leaf.spec.size for array in params),
        "parameter_bytes": sum(array.nbytes for array in params),
        "optimizer_leaves": len(lazy.items.get("opt_state", {})),
        "optimizer_bytes": sum(array.nbytes for array in lazy.items.get("opt_state", {}).values()),
        "mask": mask_of(lazy.provenance, str(lazy.path)),
        "holds_data_position": "data" in lazy.items,
        "provenance": list(lazy.provenance),
        "versions": lazy.versions,
    }


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['path']}    step {figures['step']:,}")
    print("\nconfig")
    for name, value in figures["config"].items():
        print(f"  {name:18} {value}")
    print()
    rows = [("leaf", "axes", "shape", "dtype", "bytes")]
    for leaf in figures["leaves"]:
        shape = " x ".join(f"{size:,}" for size in leaf["shape"])
        rows.append((leaf["name"], " ".join(leaf["axes"]), shape, leaf["dtype"], f"{leaf['bytes']:,}"))
    _print_table(rows)
    print(f"\nparameters       {figures['parameters']:,}, {_size(figures['parameter_bytes'])}")
    if figures["optimizer_leaves"]:
        leaves, size = figures["optimizer_leaves"], _size(figures["optimizer_bytes"])
        print(f"optimizer state  {leaves} leaves, {size}")
    else:
        print("optimizer state  none")
    print(f"data position    {'yes' if figures['holds_data_position'] else 'none'}")
    if (mask := figures["mask"]) is not None:
        closed = "closed" if mask == 0 else f"at {mask:.2f}"
        print(f"masks            {closed}: what growth added takes no full part yet; train on with mask_ramp")
    print(f"written by       {', '.join(f'{name} {version}' for name, version in figures['versions'].items())}")
    print("\nprovenance, oldest first" if figures["provenance"] else "\nprovenance       none")
    for entry in figures["provenance"]:
        print(f"  {json.dumps(_short(entry), ensure_ascii=False)}")


def _short(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with the positions in the data as "next / total" of every domain; --json has all of them."""
    positions = entry["data"].get("positions") if isinstance(entry.get("data"), dict) else None
    if not isinstance(positions, dict):
        return entry
    short = {name: f"{at.get('next')} / {at.get('total')}" for name, at in positions.items() if isinstance(at, dict)}
    return entry | {"data": entry["data"] | {"positions": short}}


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the last, of numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        print("  ".join([*cells, row[-1].rjust(widths[-1])]))


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def _verify(lazy: Any) -> dict[str, int]:
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
    figures = {"arrays": len(arrays), "bytes": sum(array.nbytes for array in arrays)}
    print(f"\nverified         {figures['arrays']} arrays, {_size(figures['bytes'])}: every checksum is right")
    return figures
