"""`tele plan`: compiles a step for a TPU slice that is not there, and says whether it fits and what it costs.

The step is one of training or of growth, as `tele train` runs it, or one turn of the loop of `tele generate`. A stage
that generates while it trains (ppo, grpo) is planned as both, and so is one that opens masks: with them and without.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

from tele_jax import checkpoint, growth
from tele_jax.align.pairs import PairStage
from tele_jax.aot import compile as compiling
from tele_jax.aot import cost, topology
from tele_jax.aot.jobs import DecodeJob, GrowJob, Job, RolloutJob, TrainJob
from tele_jax.aot.topology import find_slice
from tele_jax.cli import Outcome, flag, switch
from tele_jax.cli.generate import parse_mesh
from tele_jax.cli.pages import load_page
from tele_jax.config import ModelConfig, convert
from tele_jax.errors import UserError, prefixed
from tele_jax.files import Table
from tele_jax.growth.masks import vectors
from tele_jax.growth.receipt import masked_plan
from tele_jax.published import STAGE_TOKENS, get_model
from tele_jax.settings import MeshConfig, TrainStage
from tele_jax.stages import find_kind, model_of, run_config
from tele_jax.train.compiler_options import options_of
from tele_jax.train.trainer import mask_schedule


def arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--config FILE", "page with stages, as in configs/")
    flag(parser, "--stage NAME", "stage of the page; default: the last that trains")
    flag(parser, "--model NAME", "published model, instead of a page or for what its config.start holds")
    flag(parser, "--grow-to NAME", "published model to plan the growth of --model into, instead of its training")
    flag(parser, "--policy P", "policy of that growth; default: exact")
    switch(parser, "--decode", "plan a step of decoding against a cache of --seq-len")
    flag(parser, "--topology T", "slice, such as v5p:8x16x16, v5p-4096, v6e-256", required=True)
    flag(parser, "--num-slices N", "number of slices, which data runs over; default: the page's, or 1", int)
    flag(parser, "--mesh M", "mesh, such as fsdp=64,tensor=2; default: the page's")
    flag(parser, "--batch-size N", "sequences a step, over all devices; default: the page's", int)
    flag(parser, "--seq-len N", "tokens a sequence; default: the page's, or the model's", int)
    flag(parser, "--microbatches N", "parts that the batch is computed in; default: the page's, or 1", int)
    flag(parser, "--remat POLICY", "none, full, attention, products or offload; default: the model's")
    flag(parser, "--compiler-options SET", "offload, or none; default: the page's, or the compiler's own")
    switch(parser, "--search", "try meshes, remat policies and microbatches, and compiler options on the best")
    flag(parser, "--tries N", "number of candidates to compile; default: 4", int, default=4)
    flag(parser, "--cache DIR", "directory of earlier results; default: $TELE_PLAN_CACHE", Path)
    parser.epilog = (
        "needs the extra [tpu]; compiles on the CPU, about a minute of a core for each program. A stage that draws "
        "replies (ppo, grpo) is compiled twice, as a step and as decoding beside it; --search leaves decoding out"
    )


def run(args: argparse.Namespace) -> Outcome:
    """Prints the figures of the plan; the outcome is a mistake where it does not fit.

    Raises:
      UserError: what is asked for is not known or does not divide; libtpu is missing.
    """
    jax.config.update("jax_platforms", "cpu")  # on a TPU host as well: the slice planned for is another one
    job, tokens = _job(args)
    if not args.search:
        job.check()
        topology.require_libtpu()
    found = _search(args, job, tokens) if args.search and isinstance(job, TrainJob) else _plan(args, job, tokens)
    if isinstance(job, TrainJob) and job.masks and not args.search and found["fits"]:
        print("\nand the plain step, once the masks are dropped:")
        found = _with(found, plain=_plan(args, dataclasses.replace(job, masks={}), _rest(job, tokens)))
    if isinstance(job, TrainJob) and not args.search and found["fits"] and (rollout := _rollout(job)) is not None:
        print("\nand its rollout, one step of decoding:")
        found = _with(found, rollout=_plan(args, rollout, None))
    return Outcome(found) if found["fits"] else Outcome(found, error=found["advice"], code=2)


def _with(found: Table, **further: Table) -> Table:
    """The figures of a step with those of a further program of its stage, by a name; both have to fit."""
    (more,) = further.values()
    return {**found, **further, "fits": more["fits"], **({"advice": more["advice"]} if "advice" in more else {})}


def _rest(job: TrainJob, masked: float | None) -> float | None:
    """The tokens of a stage after those of its masked steps."""
    assert job.stage is not None and masked is not None  # masks come with a stage
    return None if job.stage.steps is None else float(job.stage.steps * job.stage.tokens_per_step) - masked


def _plan(args: argparse.Namespace, job: Job, tokens: float | None) -> Table:
    print(f"compiling for {job.slice.name} ...", file=sys.stderr, flush=True)
    program = compiling.compile_job(job, args.cache)
    figures = cost.figures(job, program, tokens)
    print(cost.table(figures))
    if not program.fits:
        over = (program.needed_bytes - program.usable_bytes) / 2**30
        hint = compiling.advice(job, program.needed_bytes, sum(program.held.values()))
        needed = f"{program.needed_bytes / 2**30:,.1f} GiB a device, {over:,.1f} GiB more than there is"
        figures["advice"] = f"does not fit {job.slice.name}: {needed}; {hint}"
    return figures


def _rollout(job: TrainJob) -> RolloutJob | None:
    """The job of the rollouts of a stage; None where it has none."""
    draws = None if job.stage is None else getattr(find_kind(job.stage.kind), "rollout", None)
    if draws is None:
        return None
    rows, tokens = draws(job.stage)
    return RolloutJob(
        slice=job.slice, mesh=job.mesh, cfg=job.cfg, batch_size=rows, seq_len=tokens, optimizer=job.optimizer
    )


def _search(args: argparse.Namespace, job: TrainJob, tokens: float | None) -> Table:
    ranked = compiling.candidates(job)
    topology.require_libtpu()
    candidates, tried = ranked[: args.tries], []
    print(f"{len(ranked)} candidates fit by estimate; compiling the first {len(candidates)}", file=sys.stderr)
    for candidate in candidates:
        program = compiling.compile_job(candidate, args.cache)
        figures = cost.figures(candidate, program, tokens)
        figures["estimate"] = dataclasses.asdict(compiling.estimate(candidate))
        tried.append(figures)
        print(_line(figures), flush=True)
    good = [figures for figures in tried if figures["fits"] and figures["margin"] >= compiling.MARGIN]
    if not good:
        free = f"{compiling.MARGIN:.0%} of the HBM free (the best {max(figures['margin'] for figures in tried):.0%})"
        advice = f"none of the {len(tried)} tried leaves {free}; give more --tries, or a larger slice"
        return {"fits": False, "tried": tried, "advice": advice}
    fastest = lambda found: min(found, key=lambda f: (f["seconds"]["scheduled"], -f["margin"]))  # noqa: E731
    best = fastest(good)
    chosen = candidates[tried.index(best)]
    for name, options in job.option_sets.items() if args.compiler_options is None else ():
        if options != best["compiled_with"]:
            candidate = dataclasses.replace(chosen, compiler_options=dict(options))
            figures = cost.figures(candidate, compiling.compile_job(candidate, args.cache), tokens)
            tried.append(figures)
            print(f"{_line(figures)}; compiler options: {name}", flush=True)
    best = fastest([best, *(f for f in tried[len(candidates) :] if f["fits"] and f["margin"] >= compiling.MARGIN)])
    print("\nthe best:\n" + cost.table(best))
    return {**best, "tried": tried}


def _line(f: Table) -> str:
    mesh = ",".join(f"{axis}={size}" for axis, size in f["mesh"].items() if size > 1)
    head = f"mesh {mesh:28} microbatches {f['microbatches']:2} remat {f['remat']:9} margin {f['margin']:5.0%}"
    if not f["fits"]:
        return f"{head}  does not fit"
    seconds = f["seconds"]
    return f"{head}  step at least {seconds['scheduled']:.4g} s as scheduled, {seconds['step']:.4g} if all overlaps"


def _job(args: argparse.Namespace) -> tuple[Job, float | None]:
    """The job of the command line, and the tokens of its stage where they are known."""
    if args.config is None and args.model is None:
        raise UserError("give either --config FILE or --model NAME")
    if args.search:
        _refuse(args, "--search, which tries them", "mesh", "remat", "microbatches")
        if args.tries <= 0:
            raise UserError(f"--tries {args.tries}: must be above 0")
    cfg, values, tokens = _from_page(args) if args.config else _from_model(args)
    mesh, slices = values.pop("mesh", None), values.pop("num_slices", 1)
    tpu = find_slice(args.topology, slices if args.num_slices is None else args.num_slices)
    if args.mesh is not None:
        mesh = parse_mesh(args.mesh)
    if args.search:
        mesh = MeshConfig(fsdp=tpu.num_devices // tpu.num_slices, data=tpu.num_slices)
    elif mesh is None:
        raise UserError(f"--mesh: missing; for example fsdp={tpu.num_devices}, or --search for the best")
    where: Table = {"slice": tpu, "mesh": convert(MeshConfig, mesh, "--mesh")}
    if args.decode:
        return _decoding(args, cfg, values, where), tokens
    if "plan" in values:
        _refuse(args, "a growth", "search", "microbatches", "remat", "batch_size", "seq_len", "compiler_options")
        return GrowJob(**values, **where), tokens
    if args.remat is not None:
        cfg = cfg.replace(remat=convert(ModelConfig.__annotations__["remat"], args.remat, "--remat"))
    values |= _sizes(args, "batch_size", "seq_len", "microbatches")
    if "batch_size" not in values:
        raise UserError("--batch-size: missing; sequences a step over all devices")
    if args.compiler_options is not None:
        with prefixed("--compiler-options: "):
            values["compiler_options"] = dict(options_of(tpu.generation.device_kinds[0], args.compiler_options))
    return TrainJob(cfg=cfg, **values, **where), tokens


def _decoding(args: argparse.Namespace, cfg: ModelConfig, values: Table, where: Table) -> DecodeJob:
    _refuse(args, "--decode", "grow_to", "policy", "search", "microbatches", "remat", "compiler_options")
    if "plan" in values:
        raise UserError(f"--stage {args.stage}: is a growth, which does not decode; name a stage that trains")
    sizes = {"seq_len": values["seq_len"], **_sizes(args, "batch_size", "seq_len")}
    if "batch_size" not in sizes:
        raise UserError("--batch-size: missing; rows that are decoded together, over all devices")
    return DecodeJob(cfg=cfg, **sizes, **where)


def _refuse(args: argparse.Namespace, what: str, *names: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')}: has no meaning for {what}; leave it out")


def _sizes(args: argparse.Namespace, *names: str) -> dict[str, int]:
    """The sizes that the command line gives; raises UserError for one that is not above 0."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in given.items():
        if value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    return given


def _from_model(args: argparse.Namespace) -> tuple[ModelConfig, Table, float | None]:
    if args.stage is not None:
        raise UserError(f"--stage {args.stage}: is a stage of a page, and --model names none")
    if args.overrides:
        raise UserError(f"{args.overrides[0]}: changes a page, and --model names none")
    cfg = get_model(args.model)
    if args.grow_to is not None:
        plan = growth.plan(cfg, get_model(args.grow_to), policy=args.policy or "exact", layers="uniform")
        return cfg, {"plan": plan}, None
    if args.policy is not None:
        raise UserError("--policy: is that of a growth; give --grow-to NAME as well")
    tokens = None if args.decode else STAGE_TOKENS.get(args.model)
    return cfg, {"seq_len": min(cfg.max_seq_len, 4096)}, tokens


def _from_page(args: argparse.Namespace) -> tuple[ModelConfig, Table, float | None]:
    _refuse(args, "a page, whose stages name them", "grow_to", "policy")
    config = run_config(load_page(args.config, args.overrides))
    (cfg, masks), optimizer, has_state = _start(args, config.start), None, True
    trained = [name for name in config.run if isinstance(config.stages[name], TrainStage)]
    name = args.stage or trained[-1]
    if name not in config.run:
        raise UserError(f"--stage {name}: no stage of {args.config}; it has {', '.join(config.run)}")
    for before in config.lineage(name):
        stage = config.stages[before]
        if isinstance(stage, TrainStage):
            model = stage.model_after(cfg)
            assert model is not None  # the first stage has one, or config.start
            cfg, optimizer, has_state = model_of(stage, model), stage.optimizer, stage.lora is None
            masks = masks if before == name else None
        else:
            cfg, plan = find_kind(stage.kind).outline(stage, cfg, f"config.{before}")
            masks, has_state = plan, has_state and stage.optimizer_state
    assert cfg is not None
    where: Table = {"mesh": config.mesh, "num_slices": config.num_slices}
    if not isinstance(stage, TrainStage):
        values: Table = {"plan": plan, "optimizer_state": has_state, **where}
        return cfg, values | ({"optimizer": optimizer} if optimizer else {}), None
    if stage.lora is not None:
        raise UserError(f"config.{name}.lora: tele plan compiles training of all parameters; name another --stage")
    if args.batch_size not in (None, stage.batch_size) and isinstance(stage, PairStage) and stage.rows is not None:
        raise UserError(
            f"--batch-size {args.batch_size}: config.{name}.rows={stage.rows} is that of {stage.batch_size} pairs; "
            f"give --config.{name}.batch_size={args.batch_size} and --config.{name}.rows=N instead"
        )
    values = {key: getattr(stage, key) for key in ("batch_size", "seq_len", "microbatches", "optimizer")} | where
    values |= {} if args.decode else {"stage": stage, "compiler_options": config.compiler_options}
    if masks is not None and not args.decode and (opened := mask_schedule(stage, masks)).masked_steps:
        values["masks"] = {axis: len(mask) for axis, mask in vectors(masks, 0.0).items()}
        return cfg, values, float(opened.masked_steps * stage.tokens_per_step)
    known = stage.steps is not None and not args.decode  # epochs become steps when the data is opened
    tokens = float(stage.steps * stage.tokens_per_step) if known else None
    return cfg, values, tokens


def _start(args: argparse.Namespace, start: str | None) -> tuple[ModelConfig | None, growth.Plan | None]:
    """The model of the checkpoint that the first stage of a page starts from, None where the page has its own; and the
    plan of the growth behind whose closed masks that model is, if one is.
    """
    if start is None:
        if args.model is not None:
            raise UserError(f"--model {args.model}: {args.config} has a model of its own; leave one of the two out")
        return None, None
    if args.model is not None:
        return get_model(args.model), None
    try:
        lazy = checkpoint.open_lazy(start)
        return lazy.cfg, masked_plan(lazy, f"config.start={start}")
    except UserError as error:
        raise UserError(f"config.start: {error}; or --model NAME says which published model it holds") from None
