"""The directory of a checkpoint until it is complete, safe from kills at any moment.

    DST.partial/header.json                        what is being written, so that nothing else goes on with it
    DST.partial/journal/<i>-of-<n>                 the tiles that one process has finished; locked while it is at work
    DST.partial/lock                               held while these are made, and while they become DST
    DST.partial/checkpoint.orbax-checkpoint-tmp/   DST as it will be, but with chunks missing; named so that
                                                   locate.find_step takes it for a save that was interrupted

What Orbax and TensorStore know of a checkpoint is written by themselves, before the first chunk.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tele_jax.checkpoint import layout, locate, packing
from tele_jax.checkpoint.chunk_files import flush
from tele_jax.errors import DamageError, UserError
from tele_jax.files import PathLike, Table, parse_json

FLUSHING = 16  # threads that wait for the disk: a file system commits the names of many files in one go
_BLOCK_BYTES = 4096  # of a file system: what the last part of a file, and its directory, take at least


@dataclasses.dataclass(frozen=True)
class Tile:
    """The chunks of one file, in the order in which they are made. Leaf: item "params", name "layers.attn.q"."""

    item: str
    name: str
    leaf: layout.Leaf
    index: tuple[int, ...]  # of the file, in leaf.file_grid
    chunks: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def nbytes(self) -> int:
        return packing.file_bytes(self.leaf, self.index)

    @property
    def file(self) -> str:
        """Path of the file inside the checkpoint."""
        return f"{self.item}/{self.name}/{layout.chunk_key(self.index)}"


def cut(item: str, name: str, leaf: layout.Leaf, order: Callable[[tuple[int, ...]], Any] | None = None) -> list[Tile]:
    """The tiles of a leaf, and the chunks in each, sorted by `order` of the (first) chunk."""
    files = itertools.product(*map(range, leaf.file_grid))
    tiles = [Tile(item, name, leaf, file, tuple(sorted(packing.chunks_of(leaf, file), key=order))) for file in files]
    return sorted(tiles, key=lambda tile: tile.chunks[0] if order is None else order(tile.chunks[0]))


class Unfinished:
    """A checkpoint that is being written. One process holds each shard of it.

    done: numbers of the tiles that this or another process, now or in an earlier life, has finished.
    complete: DST is there.
    """

    def __init__(
        self,
        dst: PathLike,
        header: Mapping[str, object],
        meta: layout.Meta,
        tiles: Sequence[Tile],
        *,
        shard: tuple[int, int],
        resume: bool,
    ):
        """Begins, or goes on with what an earlier call with the same header began.

        Raises:
          UserError: dst exists or cannot be made; what was begun has another header, or is being written by another
            process; too little disk for what is left to write.
        """
        self.dst = locate.local_path(dst)
        self.partial = self.dst.with_name(self.dst.name + ".partial")
        self.path = self.partial / f"checkpoint{locate.INTERRUPTED}"
        self._header = json.loads(json.dumps(header))  # as it will be read
        self._tiles, self._shard = tiles, shard
        self._journal = -1  # a file descriptor
        self.complete = self.dst.exists()
        if not self.complete or not self._was_moved():
            self._require_new()
        if not self.partial.exists():
            self._require_space(tiles)
        make_directory(self.partial)
        with self._locked():
            if self.complete:
                self._remove()
                self.done = set(range(len(tiles)))
                return
            self._require_new()  # it may have been completed while this process waited for the lock
            if not resume:
                self._start_over()
            if (self.partial / "header.json").exists():
                self._require_same_header()
            else:
                self._begin(meta)
            self._claim()
            self.done = self._finished()
            self._require_space([tile for i, tile in enumerate(tiles) if i not in self.done])

    def finish(self, number: int) -> None:
        """Notes that the files of a tile are on the disk. The note need not be: without it they are made again."""
        os.write(self._journal, b"%010d\n" % number)
        self.done.add(number)

    def discard(self) -> None:
        """Removes what was written: it cannot become a checkpoint. Other processes must not be at work on it."""
        self.close()
        if not self.complete:
            shutil.rmtree(self.partial, ignore_errors=True)

    def commit(self) -> bool:
        """Turns it into DST where all tiles are finished, whoever finished them. Says whether DST is there."""
        with self._locked():
            if not self.complete and not (self.partial / "header.json").exists():
                self.complete = self.dst.exists()  # another process was the last
            elif not self.complete and len(self._finished()) == len(self._tiles):
                with ThreadPoolExecutor(FLUSHING) as pool:
                    list(pool.map(flush, self._not_flushed()))
                self._require_new()
                os.rename(self.path, self.dst)
                flush(self.dst.parent)
                self._remove()
                self.complete = True
        return self.complete

    def _not_flushed(self) -> list[Path]:
        """Lists directories and files that are not chunks; chunks are on the disk already."""
        paths = []
        for directory, _, files in os.walk(self.path):
            paths += [Path(directory), *(Path(directory, name) for name in files if Path(name).suffix)]
        return paths

    def close(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The lock of a directory that another process completed meanwhile is of no use, but does no harm either: what
        # is looked at under it is then gone.
        try:
            descriptor = os.open(self.partial / "lock", os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _require_new(self) -> None:
        if os.path.lexists(self.dst):  # a link that leads nowhere counts: nothing can be renamed to it
            if not self.path.exists() and not (self.partial / "header.json").exists():
                self._remove()  # of an earlier life that was killed at its very end
            raise UserError(f"{self.dst}: exists already, and checkpoints are never overwritten; choose another path")

    def _was_moved(self) -> bool:
        """Tells whether an earlier call was killed after the checkpoint became DST, and before the rest was removed."""
        return not self.path.exists() and self._read_header() == self._header

    def _read_header(self) -> Table | None:
        try:
            found = parse_json((self.partial / "header.json").read_bytes(), "header.json")
        except FileNotFoundError:
            return None
        except DamageError:
            return {}
        return found if isinstance(found, dict) else {}

    def _require_same_header(self) -> None:
        found = self._read_header() or {}
        # The first that differs: what comes later in the header may differ because of it.
        if different := next((key for key, value in self._header.items() if found.get(key) != value), None):
            raise UserError(
                f"{self.partial}: was begun with another {different}; finish it as it was begun, or start over with "
                "resume=False"
            )

    def _start_over(self) -> None:
        if self._shard[1] > 1:
            raise UserError(
                "resume=False: one of several processes cannot start over; remove the directory before them"
            )
        if busy := self._busy():
            raise UserError(f"{self.partial}: is being written by another process ({', '.join(busy)})")
        (self.partial / "header.json").unlink(missing_ok=True)

    def _begin(self, meta: layout.Meta) -> None:
        for child in self.partial.iterdir():  # of an earlier life that was killed right here
            if child.name in ("journal", "checkpoint") or child.name.endswith((locate.INTERRUPTED, ".tmp")):
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            elif child.name != "lock":
                raise UserError(f"{self.partial}: is needed for the unfinished checkpoint, but holds {child.name}")
        _write_empty(self.partial / "checkpoint", meta)
        os.rename(self.partial / "checkpoint", self.path)
        (self.partial / "journal").mkdir()
        temporary = self.partial / "header.json.tmp"
        temporary.write_text(json.dumps(self._header, indent=2))
        flush(temporary)
        os.rename(temporary, self.partial / "header.json")

    def _claim(self) -> None:
        """Takes the journal of this shard, for as long as this process lives."""
        name, (index, count) = "{}-of-{}".format(*self._shard), self._shard
        busy = self._busy()
        if name in busy:
            raise UserError(f"{self.partial}: shard {index} of {count} is being written by another process")
        if others := [other for other in busy if not other.endswith(f"-of-{count}")]:
            raise UserError(
                f"{self.partial}: is being written in other shards ({', '.join(others)}); use the same number"
            )
        self._journal = os.open(self.partial / "journal" / name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._journal, b"\n")  # after a line that a kill or a full disk cut short

    def _busy(self) -> list[str]:
        """Lists the journals that live processes hold."""
        busy = []
        for journal in sorted((self.partial / "journal").glob("*-of-*")):
            with journal.open() as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    busy.append(journal.name)
        return busy

    def _finished(self) -> set[int]:
        """Lists the tiles of all journals whose files are there: a loss of power may leave a note without them."""
        noted: set[int] = set()
        for journal in (self.partial / "journal").iterdir():
            noted |= {int(line) for line in re.findall(rb"^\d{10}$", journal.read_bytes(), re.MULTILINE)}
        return {i for i in noted if _size(self.path / self._tiles[i].file) == self._tiles[i].nbytes}

    def _require_space(self, tiles: Sequence[Tile]) -> None:
        needed, free = disk_bytes(tiles), free_bytes(self.dst)
        if free < needed:
            raise UserError(f"{self.dst}: {needed:,} bytes are to be written, but the disk has only {free:,} free")

    def _remove(self) -> None:
        """Removes what is left beside DST; the header last, because it tells what the rest is."""
        shutil.rmtree(self.partial / "journal", ignore_errors=True)
        (self.partial / "lock").unlink(missing_ok=True)
        (self.partial / "header.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.partial.rmdir()


def disk_bytes(tiles: Sequence[Tile]) -> int:
    """Counts the bytes of disk that the files of some tiles take, their directories included."""
    return sum(tile.nbytes + 2 * _BLOCK_BYTES for tile in tiles)


def free_bytes(path: Path) -> int:
    """The free bytes of the disk that a path lies on, or would lie on."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def clear(dst: Path) -> None:
    """Removes what a process that was killed at its very end left beside the complete `dst`."""
    partial = dst.with_name(dst.name + ".partial")
    if dst.exists() and not any(partial.glob(f"*{locate.INTERRUPTED}")):
        shutil.rmtree(partial, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Makes a directory and those above it. Raises UserError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); choose another place") from None


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _write_empty(path: Path, meta: layout.Meta) -> None:
    """Writes a checkpoint as saving.py does, with all arrays described, but without chunks."""
    from tele_jax.checkpoint import saving  # brings Orbax
    from tele_jax.checkpoint.host_leaves import HostLeaf

    empty = {item: {name: HostLeaf(leaf, ()) for name, leaf in leaves.items()} for item, leaves in meta.items.items()}
    checkpointer = saving.make_checkpointer(list(meta.items))
    with saving.in_one_line(path):
        try:
            checkpointer.save(path, saving.save_args(meta, empty))
            checkpointer.wait_until_finished()
        finally:
            checkpointer.close()
