"""What the benchmarks of files share: the page cache, the disk, and sizes."""

import os
from pathlib import Path


def read_all(path: Path) -> None:
    """So that neither waits for what the other has in the page cache already."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(2**24):
                    pass


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def tree_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
