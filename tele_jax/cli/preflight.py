"""`tele preflight`: checks a command before it is started on other machines, and says what the launchers ask for.

    tele preflight --topology v5p:4x4x8 --bucket gs://B --checkout . -- tele train --config configs/X.py --workdir W

The command will run on other machines, with a copy of the checkout at CODE and with the bucket, mounted, as its current
directory. Whatever can be known to be wrong is said here, before anything is asked for; what the launchers need comes
out as assignments that a shell reads: names of the slice, versions, inputs that must be in the bucket, the command.
"""

import argparse
import importlib.metadata
import itertools
import math
import re
import shlex
from pathlib import Path, PurePosixPath

from jax.sharding import AbstractMesh
from packaging.requirements import Requirement

from tele_jax.aot import topology
from tele_jax.aot.topology import Slice, find_slice, libtpu_requirement, require_libtpu
from tele_jax.clean.settings import CleanConfig, clean_config
from tele_jax.cli import Outcome, flag, grow, main, switch
from tele_jax.cli.pages import load_page
from tele_jax.config import ModelConfig
from tele_jax.data.cache import MANIFEST
from tele_jax.errors import UserError
from tele_jax.files import Table
from tele_jax.model.spec import spec
from tele_jax.processes import VARIABLES
from tele_jax.settings import DataConfig, TrainStage, cache_config
from tele_jax.sharding import MESH_AXES, batch_sharding, param_shardings
from tele_jax.stages import RunConfig, run_config

CODE, MOUNT = "/opt/tele", "/mnt/tele"


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--topology T", "slice that the command runs on: v5p:4x4x8, v5p-256, v6e-256")
    flag(parser, "--num-slices N", "number of slices; default: 1", int, default=1)
    apis = ("tpu", "gke", "dataflow")
    flag(parser, "--api", "service that gives the machines; default: gke", choices=apis, default="gke")
    flag(parser, "--bucket gs://B", "bucket of the data and the results")
    flag(parser, "--checkout DIR", "directory that the machines get a copy of", Path)
    switch(parser, "--installed", "check this machine only: jax and its libtpu")
    flag(parser, "command -- tele VERB ...", "command", nargs="*")


def run(args: argparse.Namespace) -> Outcome:
    """Prints the assignments, which are the figures.

    Raises:
      UserError: the versions, the slice, the bucket or the command are wrong: says what.
    """
    found = versions()
    if args.installed:
        found["libtpu"] = require_libtpu()
    elif args.bucket is None or args.checkout is None or not args.command:
        raise UserError("--bucket, --checkout and -- tele VERB ... are needed, or --installed")
    else:
        found |= _command(args)
    lines = [
        f"{name}=({shlex.join(value)})" if isinstance(value, list) else f"{name}={shlex.quote(str(value))}"
        for name, value in found.items()
    ]
    return Outcome(found, text="\n".join(lines))


def versions() -> dict[str, str]:
    """The jax of this machine, which the others will install, and the libtpu that it names.

    Raises:
      UserError: jax is not one that tele_jax is made for.
    """
    version = importlib.metadata.version("jax")
    wanted = next(r for text in importlib.metadata.requires("tele_jax") or () if (r := Requirement(text)).name == "jax")
    if not wanted.specifier.contains(version):
        raise UserError(f"jax {version}: tele_jax needs jax{wanted.specifier}; pip install 'jax{wanted.specifier}'")
    return {"jax": version, "libtpu": str(libtpu_requirement().specifier)}


def _command(args: argparse.Namespace) -> Table:
    """Names of the slice, addresses of the inputs, and the command as the machines will run it."""
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9]", args.bucket):
        raise UserError(f"--bucket {args.bucket}: no bucket; it looks like gs://my-bucket, without a path behind it")
    if args.command[0] != "tele" or args.command[1:2] == ["preflight"]:
        raise UserError(f"-- {args.command[0]}: the command begins with tele and a verb: -- tele train --config ...")
    words = args.command[1:]
    _, inner = main.parse(words)
    tpu = None if args.topology is None else find_slice(args.topology, args.num_slices)
    names: Table = {"code": CODE, "mount": MOUNT, "num_slices": args.num_slices}
    if tpu is not None:
        names |= topology.tpu_api_names(tpu) if args.api == "tpu" else topology.gke_names(tpu)
    verb = inner.verb if inner.verb != "data" else f"data {inner.action}"
    if (verb == "train") != (tpu is not None):
        without = "trains on a slice; give --topology"
        how = without if tpu is None else "uses no slice; it runs on one machine: launch/cpu_vm.sh"
        raise UserError(f"tele {verb}: {how}")
    inputs = _INPUTS.get(verb, lambda *_: [])(inner, tpu)
    if args.api == "dataflow":
        _on_dataflow(inner, inputs)
    page = getattr(inner, "config", None)
    if page is not None:
        words = _with_page(words, page, _on_machines(page, args.checkout))
    return {
        **names,
        "inputs": [path if path.startswith("gs://") else f"{args.bucket}/{path}" for path in inputs],
        "command": ["tele", *words],
    }


def _with_page(words: list[str], page: str, other: str) -> list[str]:
    changed = [f"--config={other}" if word == f"--config={page}" else word for word in words]
    return [other if before == "--config" else word for before, word in itertools.pairwise(["", *changed])]


def _on_machines(page: str, checkout: Path) -> str:
    """The path of a page on the machines; the page may be "page.py:7b"."""
    file = Path(page).absolute()
    root = checkout.absolute()
    if not file.is_relative_to(root):
        raise UserError(f"--config {page}: is outside {checkout}, and the machines get only that; copy it there")
    return str(PurePosixPath(CODE, file.relative_to(root).as_posix()))


def _inside(what: str, path: str) -> str:
    """A path in the bucket, as the machines see it from their current directory."""
    parts = PurePosixPath(path).parts
    if PurePosixPath(path).is_absolute() or ".." in parts or ":" in path or not parts:
        raise UserError(f"{what}={path}: the machines see the bucket as their current directory; give the path in it")
    return path


def _train(inner: argparse.Namespace, tpu: Slice | None) -> list[str]:
    """Checks the mesh against the slice, and every stage against the mesh; returns what has to be in the bucket."""
    assert tpu is not None  # a run without a slice was refused
    for name in VARIABLES:
        if getattr(inner, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: leave it out; the workers of a slice find each other")
    config = run_config(load_page(inner.config, inner.overrides))
    _inside("--workdir", str(inner.workdir))
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    devices = math.prod(sizes.values())
    if devices != tpu.num_devices:
        mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"config.mesh: {mesh} = {devices} devices, but {tpu.name} has {tpu.num_devices}; change the mesh"
        )
    if config.num_slices != tpu.num_slices:
        raise UserError(
            f"config.num_slices={config.num_slices}, but --num-slices {tpu.num_slices} are asked for; make them equal"
        )
    data = _fits(config, AbstractMesh(tuple(sizes.values()), MESH_AXES))
    start = [] if config.start is None else [_inside("config.start", config.start)]
    return [*start, *dict.fromkeys(data)]


def _fits(config: RunConfig, mesh: AbstractMesh) -> list[str]:
    """Checks models and batches against the mesh; returns the data of all stages."""
    models, data = dict[str | None, ModelConfig | None](), []
    for name, parent in config.parents.items():
        stage, cfg = config.stages[name], models.get(parent)
        try:
            if isinstance(stage, TrainStage):
                cfg = stage.model_after(cfg)
                batch_sharding(mesh, stage.batch_size // stage.microbatches)
                data += _data(stage.data, "data")
            else:
                cfg = None if cfg is None else cfg.replace_from(stage.model, "model")
            if cfg is not None:  # else config.start holds it, elsewhere: the stage checks its sizes when it begins
                param_shardings(spec(cfg), mesh)
                if isinstance(stage, TrainStage):
                    cfg.require_positions(stage.seq_len)
        except UserError as error:
            raise UserError(f"config.{name}: {error}") from None
        models[name] = cfg
    return data


def _data(data: DataConfig, where: str) -> list[str]:
    """The files that data is made of, in the bucket."""
    found = [_inside(f"{where}.tokenizer", data.tokenizer)]
    if data.cache is not None:
        found.append(f"{_inside(f'{where}.cache', data.cache)}/{MANIFEST}")
    for name, source in data.sources.items():
        files = (*(() if data.cache else source.files), *source.validation_files)
        found += [_inside(f"{where}.sources.{name}", file) for file in files]
    return found


def _grow(inner: argparse.Namespace, tpu: Slice | None) -> list[str]:
    if inner.config is not None:
        grow.read_stage(load_page(inner.config, inner.overrides), inner)
    sources = [_inside("SRC", inner.src)]
    destination = _inside("DST", inner.dst)
    return [*sources, destination] if inner.check else sources


def _cache(inner: argparse.Namespace, tpu: Slice | None) -> list[str]:
    config = cache_config(load_page(inner.config, inner.overrides))
    _inside("--out", str(inner.out))
    return _data(config.data, "config.data")


def _clean(inner: argparse.Namespace, tpu: Slice | None) -> list[str]:
    config = clean_config(load_page(inner.config, inner.overrides))
    read = [file for source in config.sources.values() for file in source.files]
    return [*read, *(file for _, file in _side_files(config))]


def _side_files(config: CleanConfig) -> list[tuple[str, str]]:
    """(stage, file) of models and lists, which every worker opens by its own path."""
    files = {
        "quality": lambda table: [table.model],
        "perplexity": lambda table: table.models.values(),
        "overlap": lambda table: table.files,
        "safety": lambda table: table.files,
    }
    return [(name, file) for name in config.stages if name in files for file in files[name](getattr(config, name))]


def _on_dataflow(inner: argparse.Namespace, inputs: list[str]) -> None:
    for stage, file in _side_files(clean_config(load_page(inner.config, inner.overrides))):
        raise UserError(
            f"config.stages: {stage!r} opens {file} on every worker, and Dataflow's have no files; leave the stage out"
        )
    for path in (*inputs, f"{inner.out}/"):
        if not path.startswith("gs://"):
            raise UserError(f"{path}: Dataflow reads and writes buckets only; give gs://..., in the page and as --out")


_INPUTS = {"train": _train, "grow": _grow, "data cache": _cache, "data clean": _clean}
