"""Finds the step directory that a user's path means, and checks paths of new ones; lists files, reads none."""

import os
from pathlib import Path

from etils import epath

from tele_jax.config import as_written
from tele_jax.errors import DamageError, UserError, abridged
from tele_jax.files import PathLike, is_plain_name, parse_json

# Any one of these tells a step directory, so that one that has lost some of them is reported as damaged.
STEP_FILES = ("meta/meta.json", "_CHECKPOINT_METADATA", "params/_METADATA")
INTERRUPTED = ".orbax-checkpoint-tmp"  # what Orbax calls a step directory until it is complete
DELETED = ".deleted"  # what a step directory is renamed to before its files are removed
_COMMIT_FILE = "commit_success.txt"  # Orbax's mark where directories cannot be renamed: object stores


def find_step(path: PathLike) -> epath.Path:
    """The step directory that `path` means: itself, or the latest step inside it.

    path: one of
      a step directory                  W/pretrain/checkpoints/100
      a directory of steps              W/pretrain/checkpoints
      a stage directory                 W/pretrain              -> checkpoints/<latest>
      a work directory                  W                       -> of the last stage that has any; the order of stages
                                                                   is "run" in W/config.json, without it there must be
                                                                   one such stage only

    Raises:
      UserError: nothing there, or nothing complete; says what was looked for.
    """
    path = absolute(path)
    if not path.exists():
        raise UserError(f"{path}: no such directory; expected a checkpoint or a work directory")
    if not path.is_dir():
        raise UserError(f"{path}: a file, but a checkpoint is a directory")
    if path.name.endswith((INTERRUPTED, DELETED)):
        raise UserError(f"{path}: a save that was interrupted, or a checkpoint being deleted; name a complete one")
    if is_step(path):
        return path
    for directory in (path, path / "checkpoints"):
        if found := list_steps(directory):
            return directory / str(found[-1])
    if stage := _last_stage(path):
        return stage / str(list_steps(stage)[-1])
    names = [child.name for child in path.iterdir()]
    interrupted = [name for name in names if name.endswith(INTERRUPTED)]
    what = "an empty directory" if not names else "no complete checkpoint here"
    skipped = f"; skipped interrupted saves: {abridged(sorted(interrupted))}" if interrupted else ""
    raise UserError(
        f"{path}: {what}; looked for meta/meta.json, <step>/, checkpoints/<step>/, <stage>/checkpoints/<step>/{skipped}"
    )


def list_steps(directory: PathLike) -> list[int]:
    """The steps that are complete in a directory of steps, ascending; [] where there is none, or no directory."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(child.name) for child in directory.iterdir() if _names_step(child.name) and is_step(child))


def _names_step(name: str) -> bool:
    """Tells whether a directory is called as the Manager calls a step: not 007, and in no other script's digits."""
    return name.isascii() and name.isdecimal() and name == str(int(name))


def list_unfinished(directory: PathLike) -> list[epath.Path]:
    """Directories that an interrupted save or an interrupted deletion left."""
    children = list(epath.Path(directory).iterdir())
    found = [child for child in children if child.name.endswith((INTERRUPTED, DELETED))]
    if _is_object_store(directory):
        found += [c for c in children if _names_step(c.name) and not (c / _COMMIT_FILE).exists()]
    return found


def absolute(path: PathLike) -> epath.Path:
    """Absolute, with ~ resolved; addresses such as gs://bucket/name are left as they are.

    Raises:
      UserError: the path is empty, or no path; it has a zero byte or a backslash, which TensorStore takes for a
        separator.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip():
        raise UserError(f"expected the path of a checkpoint, got {path!r}; '.' is the current directory")
    if any(character in str(path) for character in "\\\0"):
        raise UserError(f"{str(path)!r}: a path of a checkpoint cannot have a backslash or a zero byte; choose another")
    path = epath.Path(path)
    return path if _is_object_store(path) else path.expanduser().resolve()


def is_step(path: Path | epath.Path) -> bool:
    """Tells whether a directory is a complete checkpoint, or what damage left of one."""
    if _is_object_store(path) and not (path / _COMMIT_FILE).exists():
        return False
    return any((path / name).is_file() for name in STEP_FILES)


def _is_object_store(path: PathLike) -> bool:
    return "://" in str(path)


def _last_stage(work: epath.Path) -> epath.Path | None:
    """The `checkpoints` directory of the last stage of a work directory that has a complete step."""
    order = _run_order(work)
    if order is not None:
        having = [name for name in order if list_steps(work / name / "checkpoints")]
        return work / having[-1] / "checkpoints" if having else None
    having = sorted(child.name for child in work.iterdir() if list_steps(child / "checkpoints"))
    if len(having) > 1:
        raise UserError(
            f"{work}: several stages have checkpoints, and no config.json orders them; name one of {having}"
        )
    return work / having[0] / "checkpoints" if having else None


def _run_order(work: epath.Path) -> list[str] | None:
    """The order of the stages; None where there is no config.json, or one of something else than a run."""
    file = work / "config.json"
    if not file.is_file():
        return None
    page = parse_json(file.read_bytes(), str(file))
    if not isinstance(page, dict) or "run" not in page:
        return None
    names = as_written(tuple[str, ...], page["run"], f"{file}: run")
    if wrong := [name for name in names if not is_plain_name(name)]:
        raise DamageError(f"{file}: run: damaged, {wrong[0]!r} is not the name of a stage")
    return list(names)


def local_path(path: PathLike, work: str = "growth from checkpoint to checkpoint") -> Path:
    """The absolute path of a directory on this machine. Raises UserError for an address such as gs://bucket/name."""
    if "://" in str(path):
        raise UserError(f"{path}: {work} needs a file system; copy or mount the bucket")
    return Path(os.fspath(absolute(path)))


def new_path(dst: PathLike, src: PathLike, work: str) -> Path:
    """The absolute path of a directory that is to be made from the one at `src`, on this machine.

    Raises:
      UserError: `dst` is an address, empty, the root or the current directory; it lies inside src, or src inside it: a
        checkpoint is not written into; something above it is a file.
    """
    is_path = isinstance(dst, (str, os.PathLike))
    text = os.fspath(dst) if is_path else str(dst)
    if not is_path or not text.strip() or text in (".", "..", "/"):
        raise UserError(f"{text!r}: names no new directory for {work}; give a path such as runs/larger")
    target, source = local_path(dst, work), local_path(src, work)
    if not target.name:
        raise UserError(f"{text!r}: is the root; name a new directory inside it")
    if source in target.parents:
        raise UserError(f"{target}: lies inside the source {source}, which stays as it is; choose a directory outside")
    if target in source.parents:
        raise UserError(f"{target}: the source {source} lies inside this directory; choose another one")
    if inside := next((path for path in target.parents if is_step(path)), None):
        raise UserError(f"{target}: lies inside the checkpoint {inside}; choose another place")
    above = next(path for path in target.parents if os.path.lexists(path))
    if not above.is_dir():
        raise UserError(f"{target}: {above} is a file, not a directory")
    return target
