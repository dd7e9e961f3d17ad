"""Saving: one checkpoint by `save`, the checkpoints of a training run by `Manager`.

Arrays are copied from the devices to the host at once, and written in the background (host_leaves.py). Orbax makes a
save atomic (it writes into a temporary directory and renames it), asynchronous, and the same on one process or many.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tele_jax import axes
from tele_jax.axes import Params, PyTree, unflatten
from tele_jax.checkpoint import adapted, layout, locate, read
from tele_jax.checkpoint.host_leaves import HostLeaf, HostLeafHandler, copy_to_host, describe_leaves
from tele_jax.config import ModelConfig, require, whole
from tele_jax.errors import DamageError, UserError, abridged
from tele_jax.files import PathLike
from tele_jax.model import adapters
from tele_jax.model.spec import flat_spec
from tele_jax.processes import barrier, from_first, is_first


def save(
    path: PathLike,
    cfg: ModelConfig,
    params: Params,
    *,
    opt_state: PyTree = None,
    step: int = 0,
    provenance: Sequence[Mapping[str, object]] = (),
    data_state: bytes | None = None,
    spec: Params | None = None,
    adapter: layout.Adapter | None = None,
) -> None:
    """Writes one checkpoint, and returns when it is complete. A save that is killed leaves nothing under `path`.

    path: the step directory, which must not exist; parents are made.
    params: nested dict of arrays (jax, on any mesh, or numpy), as spec(cfg) describes it.
    opt_state: any pytree of arrays and Python numbers.
    provenance: what made this checkpoint, oldest first; dicts of JSON values.
    data_state: the position of the data feed, opaque.
    spec: tree of ParamSpec, where params are not those of cfg.
    adapter: as adapter_for(base, lora) makes it, where params are adapters, a tree as tele.lora.init makes it; `load`
      merges them into the base, which stays where it is.

    Raises:
      UserError: `path` exists; params are not what cfg describes (names the leaves that differ); a leaf or an entry of
        the provenance cannot be stored; the base of `adapter` is another model than cfg.
      DamageError: the files could not be written, for instance because the disk is full.
    """
    path = locate.absolute(path)
    _require_new(path)
    state = {"opt_state": opt_state, "data_state": data_state, "adapter": adapter}
    meta, host = _prepare(path, cfg, params, spec, step=step, provenance=provenance, **state)
    if adapter is not None:
        adapted.require_fit(adapter, cfg)
    checkpointer = make_checkpointer(layout.ITEMS)
    try:
        with in_one_line(path):
            checkpointer.save(path, save_args(meta, host))
            checkpointer.wait_until_finished()
    finally:
        with in_one_line(path):
            checkpointer.close()


class Manager:
    """The checkpoints of a training run, <directory>/<step>/: saved in the background, the last few kept.

        with Manager("W/pretrain/checkpoints", keep=2) as checkpoints:
            checkpoints.save(100, cfg, params, opt_state)     # returns when the arrays are copied to the host
            checkpoints.latest_step()                         # 100, once it is complete

    A save that a kill interrupted is never seen as a checkpoint, and its files are removed when the next Manager opens
    the directory. One Manager at a time may have a directory; several processes have one each for the same directory,
    which all of them see, and call the same methods in the same order.
    """

    def __init__(self, directory: PathLike, *, keep: int = 2):
        """Makes the directory where needed. keep: how many complete checkpoints stay, the latest ones; above 0."""
        if whole(keep, "keep") < 1:
            raise UserError(f"keep={keep} must be above 0")
        self.directory = locate.absolute(directory)
        self._keep = keep
        self._checkpointer = make_checkpointer(layout.ITEMS)
        self._saving: epath.Path | None = None
        self._deleting: list[threading.Thread] = []
        with in_one_line(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        if is_first():
            for left in locate.list_unfinished(self.directory):
                left.rmtree()

    def save(
        self,
        step: int,
        cfg: ModelConfig,
        params: Params,
        opt_state: PyTree = None,
        provenance: Sequence[Mapping[str, object]] = (),
        data_state: bytes | None = None,
        adapter: layout.Adapter | None = None,
    ) -> bool:
        """Saves in the background; arguments as `save` takes them. On return the arrays may be changed or donated.

        Waits first for the save before, and then removes checkpoints beyond `keep`. A step that is there already is
        left as it is, and the answer is False: a run that starts again at its last step has nothing to

        Raises:
          UserError: as `save`.
          DamageError: this or the save before could not be written.
        """
        self.wait()
        path = self.directory / str(step)
        if from_first(path.exists):
            return False
        state = {"opt_state": opt_state, "data_state": data_state, "adapter": adapter}
        meta, host = _prepare(path, cfg, params, None, step=step, provenance=provenance, **state)
        with in_one_line(path):
            self._checkpointer.save(path, save_args(meta, host))
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
            with in_one_line(path):
                self._checkpointer.wait_until_finished()
        return path is not None

    def close(self) -> None:
        """Waits for everything that runs in the background, but for no other process: one that failed may close."""
        try:
            if self._finish():
                self._remove_old()
        finally:
            with in_one_line(self.directory):
                self._checkpointer.close()
            for thread in self._deleting:
                thread.join()

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *exception: object) -> None:
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
    path: epath.Path,
    cfg: ModelConfig,
    params: Params,
    spec: Params | None,
    *,
    opt_state: PyTree,
    step: int,
    provenance: Sequence[Mapping[str, object]],
    data_state: bytes | None,
    adapter: layout.Adapter | None,
) -> tuple[layout.Meta, dict[str, dict[str, HostLeaf]]]:
    """The meta document, and the arrays copied to the host."""
    own = "params" if adapter is None else "adapters"
    if adapter is not None:
        adapter = adapted.with_near_base(adapter, path)
        spec = adapters.spec(cfg, adapter.lora)
    specs = flat_spec(cfg) if spec is None else axes.flatten(spec)
    axes.require_arrays(axes.flatten(params), "params")
    require(isinstance(data_state, (bytes, type(None))), f"data_state: expected bytes, got {type(data_state).__name__}")
    listing = isinstance(provenance, Sequence) and all(isinstance(entry, Mapping) for entry in provenance)
    require(listing, f"provenance: expected a list of dicts, got {provenance!r}")
    require(whole(step, "step") >= 0, f"step={step} must not be negative")
    trees = {own: params, "opt_state": opt_state}
    if data_state is not None:
        trees["data"] = {"state": np.frombuffer(data_state, np.uint8)}
    leaves = {item: layout.named_leaves(tree) for item, tree in trees.items() if tree is not None}
    described = {item: describe_leaves(named, specs, item) for item, named in leaves.items()}
    problems = read.differences({name: leaf.spec for name, leaf in described[own].items()}, specs, "given")
    if problems:
        raise UserError(f"{own}: not what the config describes: " + abridged(problems, ";\n  "))
    meta = layout.Meta(
        cfg=cfg,
        step=whole(step, "step"),
        provenance=tuple(dict(entry) for entry in provenance),
        items=described,
        versions=layout.package_versions(),
        adapter=adapter,
    )
    layout.meta_to_json(meta)  # raises before anything is copied or written
    return meta, {item: copy_to_host(named, described[item]) for item, named in leaves.items()}


def make_checkpointer(items: Sequence[str]) -> ocp.AsyncCheckpointer:
    """Orbax's checkpointer for our items: `meta` is JSON, the others trees of HostLeaf."""
    _quiet_orbax()
    registry = ocp.type_handlers.create_type_handler_registry((HostLeaf, HostLeafHandler()))
    handlers: dict[str, Any] = {
        item: ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
        for item in items
    }
    meta = ocp.JsonCheckpointHandler(filename=layout.META_FILE)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(meta=meta, **handlers))


@contextlib.contextmanager
def in_one_line(path: PathLike) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise where they cannot write, as on a full disk, into DamageError."""
    try:
        yield
    except Exception as error:
        reason = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
        raise DamageError(f"{path}: the checkpoint could not be written: {reason}") from error


def save_args(meta: layout.Meta, host: Mapping[str, Mapping[str, HostLeaf]]) -> ocp.args.Composite:
    """Makes the arguments of the checkpointer; an item without leaves stands in `meta` only, for Orbax refuses it."""
    items = {item: ocp.args.PyTreeSave(unflatten(leaves)) for item, leaves in host.items() if leaves}
    return ocp.args.Composite(meta=ocp.args.JsonSave(layout.meta_to_json(meta)), **items)


class _OrbaxWarnings(logging.Filter):
    """Lets Orbax warn only where absl was asked to be verbose: it warns about defaults that it chose itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        is_chatter = record.levelno < logging.ERROR and "orbax" in record.pathname
        return not is_chatter or absl.logging.get_verbosity() > absl.logging.WARNING


def _quiet_orbax() -> None:
    logger = absl.logging.get_absl_logger()
    if not any(isinstance(f, _OrbaxWarnings) for f in logger.filters):
        logger.addFilter(_OrbaxWarnings())
