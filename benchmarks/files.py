"""What the benchmarks of files share: the page cache, the disk, sizes, and the peer, `cp -r`."""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
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


def memory(field: str) -> int:
    """Bytes of this process, as the kernel counts them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def copy_seconds(src: Path, dst: Path) -> float:
    """Of `cp -r`, and of waiting for every file of the copy to be on the disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", src, dst], check=True)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(flush, (path for path in dst.rglob("*"))))
    return round(time.perf_counter() - began, 3)
