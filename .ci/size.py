"""Counts the lines and files of tele_jax/ against the design's budgets, and prints both.

    python .ci/size.py

The newcomer's core is what has to be read to train and to grow a model; CORE names its files.
"""

import sys
from pathlib import Path

MAX_LINES, MAX_FILES, MAX_CORE_LINES = 21_500, 130, 8_000
# Verification and surgery are read when a growth is doubted or a tree is changed by hand, not to train and grow.
CORE = (
    *("errors.py", "config.py", "settings.py", "axes.py", "sharding.py", "model/*.py", "train/*.py"),
    *("stages/pretrain.py", "stages/grow.py"),
    *(f"growth/{name}.py" for name in ("axis_map", "plan", "policies", "masks", "kernel", "apply", "opt_state")),
)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def main() -> int:
    package = Path(__file__).resolve().parent.parent / "tele_jax"
    files = sorted(package.rglob("*.py"))
    core = sorted({path for pattern in CORE for path in package.glob(pattern)})
    rooms: dict[str, list[int]] = {}
    for path in files:
        inside = path.relative_to(package).parts
        rooms.setdefault(inside[0] if len(inside) > 1 else "(top)", []).append(lines(path))
    for room, counts in sorted(rooms.items(), key=lambda item: -sum(item[1])):
        print(f"{room:12} {sum(counts):6,} lines {len(counts):4} files")
    figures = (
        ("lines of tele_jax/", sum(map(lines, files)), MAX_LINES),
        ("files of tele_jax/", len(files), MAX_FILES),
        ("lines of the newcomer's core", sum(map(lines, core)), MAX_CORE_LINES),
    )
    for name, count, most in figures:
        print(f"{name}: {count:,} of at most {most:,}{'' if count <= most else '  <- over'}")
    return 0 if all(count <= most for _, count, most in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
