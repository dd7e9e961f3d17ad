"""Saving: one checkpoint by `save`, and the checkpoints of a training run by `Manager`."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from tele_jax import axes
from tele_jax.axes import ParamSpec
from tele_jax.checkpoint import layout, locate, read, write
from tele_jax.config import ModelConfig
from tele_jax.errors import UserError
from tele_jax.model.spec import flat_spec
from tele_jax.processes import barrier, from_first, is_first


def save(
    path: Any,
    cfg: ModelConfig,
    params: Mapping[str, Any],
    *,
    opt_state: Any = None,
    step: int = 0,
    provenance: Sequence[Mapping[str, Any]] = (),
    data_state: bytes | None = None,
    spec: Mapping[str, Any] | None = None,
) -> None:
    """Writes one checkpoint, and returns when it is complete. A save that is killed leaves nothing under `path`.

    path: the step directory, which must not exist; parents are made.
    params: nested dict of arrays (jax, on any mesh, or numpy), as spec(cfg) describes it.
    opt_state: any pytree of arrays and Python numbers.
    provenance: what made this checkpoint, oldest first; dicts of JSON values.
    data_state: the position of the data feed, opaque.
    spec: tree of ParamSpec, where params are not those of cfg.

    Raises:
      UserError: `path` exists; params are not what cfg describes (names every leaf that differs); a leaf or an entry of
        the provenance cannot be stored.
      DamageError: the files could not be written, for instance because the disk is full.
    """
    path = locate.absolute(path)
    _require_new(path)
    specs = flat_spec(cfg) if spec is None else axes.flatten(spec)
    state = {"opt_state": opt_state, "data_state": data_state}
    meta, host = _prepare(cfg, params, specs, step=step, provenance=provenance, **state)
    checkpointer = write.make_checkpointer(layout.ITEMS)
    try:
        with write.in_one_line(path):
            checkpointer.save(path, write.save_args(meta, host))
            checkpointer.wait_until_finished()
    finally:
        with write.in_one_line(path):
            checkpointer.close()


class Manager:
    """The checkpoints of a training run, <directory>/<step>/: saved in the background, the last few kept.

    >>> with Manager("W/pretrain/checkpoints", keep=2) as checkpoints:
    ...     checkpoints.save(100, cfg, params, opt_state)     # returns when the arrays are copied to the host
    ...     checkpoints.latest_step()                         # 100, once it is complete

    A save that a kill interrupted is never seen as a checkpoint, and its files are removed when the next Manager opens
    the directory. One Manager at a time may have a directory; several processes have one each for the same directory,
    which all of them see, and call the same methods in the same order.
    """

    def __init__(self, directory: Any, *, keep: int = 2):
        """Makes the directory where needed. keep: how many complete checkpoints stay, the latest ones; above 0."""
        if keep < 1:
            raise UserError(f"keep={keep} must be above 0")
        self.directory = locate.absolute(directory)
        self._keep = keep
        self._checkpointer = write.make_checkpointer(layout.ITEMS)
        self._saving: epath.Path | None = None
        self._deleting: list[threading.Thread] = []
        with write.in_one_line(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        if is_first():
            for left in locate.list_unfinished(self.directory):
                left.rmtree()

    def save(
        self,
        step: int,
        cfg: ModelConfig,
        params: Mapping[str, Any],
        opt_state: Any = None,
        provenance: Sequence[Mapping[str, Any]] = (),
        data_state: bytes | None = None,
    ) -> bool:
        """Saves in the background; arguments as `save` takes them. On return the arrays may be changed or donated.

        Waits first for the save before, and then removes checkpoints beyond `keep`. A step that is there already is
        left as it is, and the answer is False: a run that starts again at its last step has nothing to write.

        Raises:
          UserError: as `save`.
          DamageError: this or the save before could not be written.
        """
        self.wait()
        path = self.directory / str(step)
        if from_first(path.exists):
            return False
        state = {"opt_state": opt_state, "data_state": data_state}
        meta, host = _prepare(cfg, params, flat_spec(cfg), step=step, provenance=provenance, **state)
        with write.in_one_line(path):
            self._checkpointer.save(path, write.save_args(meta, host))
        self._saving = path
        return True

    def latest_step(self) -> int | None:
        """The last step that is complete on disk; None where there is none."""
        return from_first(lambda: (locate.list_steps(self.directory) or [None])[-1])

    def load(self, step: int | None = None, **how: Any) -> read.Loaded:
        """Loads a step, by default the latest, with the keywords of `load`; waits for a running save first."""
        self.wait()
        step = self.latest_step() if step is None else step
        return read.load(self.directory if step is None else self.directory / str(step), **how)

    def wait(self) -> None:
        """Returns when the running save is complete. Raises DamageError where it could not be written."""
        if self._finish():
            barrier()  # process 0 gives it its name
            self._remove_old()

    def _finish(self) -> bool:
        """Waits for this process's part in the running save. False: there is none."""
        path, self._saving = self._saving, None
        if path is not None:
            with write.in_one_line(path):
                self._checkpointer.wait_until_finished()
        return path is not None

    def close(self) -> None:
        """Waits for everything that runs in the background, but for no other process: one that failed may close."""
        try:
            if self._finish():
                self._remove_old()
        finally:
            with write.in_one_line(self.directory):
                self._checkpointer.close()
            for thread in self._deleting:
                thread.join()

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _remove_old(self) -> None:
        if not is_first():
            return
        self._deleting = [thread for thread in self._deleting if thread.is_alive()]
        for step in locate.list_steps(self.directory)[: -self._keep]:
            # Renamed first: a deletion that is interrupted must not leave what looks like a damaged checkpoint.
            doomed = (self.directory / str(step)).rename(self.directory / f"{step}{locate.DELETED}")
            self._deleting.append(threading.Thread(target=doomed.rmtree))
            self._deleting[-1].start()


def _require_new(path: epath.Path) -> None:
    if path.exists():
        raise UserError(f"{path}: exists already, and checkpoints are never overwritten; choose another path")


def _prepare(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
    *,
    opt_state: Any,
    step: int,
    provenance: Sequence[Mapping[str, Any]],
    data_state: bytes | None,
) -> tuple[layout.Meta, dict[str, dict[str, write.HostLeaf]]]:
    """The meta document, and the arrays copied to the host."""
    trees = {"params": params, "opt_state": opt_state}
    if data_state is not None:
        trees["data"] = {"state": np.frombuffer(data_state, np.uint8)}
    leaves = {item: layout.named_leaves(tree) for item, tree in trees.items() if tree is not None}
    described = {item: write.describe_leaves(named, specs, item) for item, named in leaves.items()}
    problems = read.differences({name: leaf.spec for name, leaf in described["params"].items()}, specs, "given")
    if problems:
        raise UserError("params: not what the config describes: " + ";\n  ".join(problems))
    meta = layout.Meta(
        cfg=cfg,
        step=int(step),
        provenance=tuple(dict(entry) for entry in provenance),
        items=described,
        versions=layout.package_versions(),
    )
    layout.meta_to_json(meta)  # raises before anything is copied or written
    return meta, {item: write.copy_to_host(named, described[item]) for item, named in leaves.items()}
