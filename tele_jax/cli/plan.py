"""`tele plan`: compile a training step for a TPU slice that is not there; whether it fits, and what it costs."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from tele_jax.errors import UserError

HELP = "compile a training step for a TPU slice, without one: does it fit, what does it cost"
OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a page with a training stage, as in configs/")
    parser.add_argument("--stage", metavar="NAME", help="which training stage of the page; by default the last")
    parser.add_argument("--model", metavar="NAME", help="instead of a page: a published model, such as tele_flm_52b")
    parser.add_argument("--topology", required=True, metavar="T", help="such as v5p:8x16x16, v5p-4096, v6e-256")
    parser.add_argument("--num-slices", type=int, default=1, metavar="N", help="so many of them, data over all (1)")
    parser.add_argument("--mesh", metavar="M", help="such as fsdp=64,tensor=2; by default the page's")
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences a step, over all devices")
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens a sequence; by default the page's, or the model's"
    )
    parser.add_argument("--microbatches", type=int, metavar="N", help="parts that the batch is computed in")
    parser.add_argument("--remat", metavar="POLICY", help="full, attention, offload or none; by default the model's")
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and microbatches")
    parser.add_argument("--tries", type=int, default=4, metavar="N", help="how many of them to compile (4)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of earlier results; by default $TELE_PLAN_CACHE")
    parser.epilog = "needs the extra [tpu]; compiles on the CPU, about a minute of a core for each program"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the figures of the plan, and returns them.

    Raises:
      UserError: what is asked for is not known, does not divide, or does not fit; libtpu is missing.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # on a TPU host as well: the slice planned for is another one
    from tele_jax.scale import compile as compiling
    from tele_jax.scale import topology

    job, tokens = _job(args)
    if not args.search:
        compiling.check(job)
    topology.require_libtpu()
    found = _search(args, job, tokens) if args.search else _plan(args, job, tokens)
    if not found["fits"]:
        _write_now(args, found)
        raise UserError(found["advice"])
    return found


def _write_now(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    import json

    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def _plan(args: argparse.Namespace, job: Any, tokens: float | None) -> dict[str, Any]:
    from tele_jax.scale import compile as compiling
    from tele_jax.scale import cost, search

    print(f"compiling for {job.slice.name} ...", file=sys.stderr, flush=True)
    program = compiling.compile_job(job, args.cache)
    figures = cost.figures(job, program, tokens)
    print(cost.table(figures))
    if not program.fits:
        over = (program.needed_bytes - program.usable_bytes) / 2**30
        state = program.parameter_bytes + program.optimizer_bytes
        hint = search.advice(job, program.needed_bytes, state)
        figures["advice"] = (
            f"does not fit {job.slice.name}: {program.needed_bytes / 2**30:,.1f} GiB a device, {over:,.1f} GiB more "
            f"than there is; {hint}"
        )
    return figures


def _search(args: argparse.Namespace, job: Any, tokens: float | None) -> dict[str, Any]:
    from tele_jax.scale import compile as compiling
    from tele_jax.scale import cost, search

    ranked = search.candidates(job)
    print(
        f"{len(ranked)} candidates fit by estimate; compiling the first {min(args.tries, len(ranked))}", file=sys.stderr
    )
    tried = []
    for candidate in ranked[: args.tries]:
        program = compiling.compile_job(candidate, args.cache)
        figures = cost.figures(candidate, program, tokens)
        figures["estimate"] = dataclasses.asdict(search.estimate(candidate))
        tried.append((candidate, figures))
        print(_line(figures), flush=True)
    good = [figures for _, figures in tried if figures["fits"] and figures["margin"] >= search.MARGIN]
    if not good:
        worst = max(figures["margin"] for _, figures in tried)
        return {"fits": False, "tried": [f for _, f in tried], "advice": (
            f"none of the {len(tried)} tried leaves {search.MARGIN:.0%} of the HBM free (the best {worst:.0%}); "
            "give more --tries, or a larger slice"
        )}  # fmt: skip
    best = min(good, key=lambda f: (f["seconds"]["step"], -f["margin"]))
    print("\nthe best:\n" + cost.table(best))
    return {**best, "tried": [f for _, f in tried]}


def _line(f: dict[str, Any]) -> str:
    mesh = ",".join(f"{axis}={size}" for axis, size in f["mesh"].items() if size > 1)
    head = f"mesh {mesh:28} microbatches {f['microbatches']:2} remat {f['remat']:9} margin {f['margin']:5.0%}"
    if not f["fits"]:
        return f"{head}  does not fit"
    return f"{head}  step {f['seconds']['step']:.3f} s, {f['limit']}, utilisation {f['utilisation_bound']:.1%}"


# --------------------------------------------------------------------------------------------------- what is asked for


def _job(args: argparse.Namespace) -> tuple[Any, float | None]:
    """The job of the command line, and the tokens of its stage where they are known."""
    from tele_jax.config import convert
    from tele_jax.run import MeshConfig
    from tele_jax.scale.compile import Job
    from tele_jax.scale.topology import find_slice

    if (args.config is None) == (args.model is None):
        raise UserError("give either --config FILE or --model NAME")
    of = find_slice(args.topology, args.num_slices)
    cfg, values, tokens = _from_page(args) if args.config else _from_model(args)
    if args.remat is not None:
        cfg = cfg.replace_from({"remat": args.remat}, "--remat")
    for name in ("batch_size", "seq_len", "microbatches"):
        given = getattr(args, name)
        if given is not None:
            if given <= 0:
                raise UserError(f"--{name.replace('_', '-')} {given}: must be above 0")
            values[name] = given
    mesh = values.pop("mesh", None) if args.mesh is None else _mesh(args.mesh)
    if args.search:
        mesh = MeshConfig(fsdp=of.num_devices)
    elif mesh is None:
        raise UserError(f"--mesh: missing; for example fsdp={of.num_devices}, or --search for the best")
    if "batch_size" not in values:
        raise UserError("--batch-size: missing; sequences a step over all devices")
    return Job(cfg=cfg, slice=of, mesh=convert(MeshConfig, mesh, "--mesh"), **values), tokens


def _mesh(text: str) -> Any:
    from tele_jax.config import from_dict
    from tele_jax.run import MeshConfig

    sizes = {}
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        if not equals or not size.isdigit():
            raise UserError(
                f"--mesh {text}: expected AXIS=SIZE,... with data, fsdp and tensor, such as fsdp=64,tensor=2"
            )
        sizes[axis.strip()] = int(size)
    return from_dict(MeshConfig, sizes, "--mesh")


def _from_model(args: argparse.Namespace) -> tuple[Any, dict[str, Any], float | None]:
    from tele_jax.published import STAGE_TOKENS, get_model

    if args.overrides:
        raise UserError(f"{args.overrides[0]}: changes a page, and --model names none")
    cfg = get_model(args.model)
    return cfg, {"seq_len": min(cfg.max_seq_len, 4096)}, STAGE_TOKENS.get(args.model)


def _from_page(args: argparse.Namespace) -> tuple[Any, dict[str, Any], float | None]:
    from tele_jax.cli.pages import load_page
    from tele_jax.run import GrowStage, TrainStage, run_config

    config = run_config(load_page(args.config, args.overrides))
    trained = [name for name in config.run if isinstance(config.stages[name], TrainStage)]
    name = args.stage or trained[-1]
    if name not in trained:
        raise UserError(f"--stage {name}: no training stage of {args.config}; it has {', '.join(trained)}")
    cfg = None
    for before in config.run[: config.run.index(name) + 1]:
        stage = config.stages[before]
        if isinstance(stage, GrowStage):
            cfg = cfg.replace_from(stage.model, f"config.{before}.model")
        else:
            cfg = stage.model or cfg
    values = {key: getattr(stage, key) for key in ("batch_size", "seq_len", "microbatches", "optimizer")}
    return cfg, {**values, "mesh": config.mesh}, float(stage.steps * stage.batch_size * stage.seq_len)
