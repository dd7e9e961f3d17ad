"""`tele eval ACTION`: finds out how good a model is."""

import argparse
from pathlib import Path

from tele_jax import tables
from tele_jax.cli import Outcome, flag, switch
from tele_jax.cli.generate import open_mesh
from tele_jax.errors import UserError
from tele_jax.eval import harness, tasks
from tele_jax.eval import model as models


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    for name, (text, add, run) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        add(action)
        action.set_defaults(run=run)


def run(args: argparse.Namespace) -> Outcome:
    """Raises what the action raises."""
    return args.run(args)


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every action that loads a model."""
    flag(parser, "ckpt CKPT", "step, stage or work directory; of several steps, the latest")
    flag(parser, "--tokenizer FILE", "default: tokenizer.model or tokenizer.json in or above the checkpoint")
    flag(parser, "--template NAME", "format of dialogues; default: as the tokenizer and the checkpoint say")
    flag(parser, "--mesh AXIS=N,...", "devices to spread the model over: tensor=4, or data=2,tensor=4; default: one")
    dtype = "dtype of the computation; default: that of the checkpoint"
    flag(parser, "--dtype NAME", dtype, choices=("bfloat16", "float32"))


def load_model(args: argparse.Namespace) -> models.EvalModel:
    """The model of a command line; raises UserError as eval.model.load."""
    mesh = open_mesh(args.mesh)
    model = models.load(args.ckpt, tokenizer=args.tokenizer, template=args.template, mesh=mesh)
    if args.dtype is not None:
        model.cfg = model.cfg.replace(dtype=args.dtype)
    return model


def _harness_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    flag(parser, "--tasks NAMES", "names of tasks, with commas between them", required=True)
    flag(parser, "--data DIR", "directory with the files of the tasks; default: the harness downloads its own", Path)
    flag(parser, "--out DIR", "directory of the results; started again, a run goes on from it", Path, required=True)
    flag(parser, "--num-fewshot N", "examples before each question; default: as the task says", int)
    flag(parser, "--limit N", "most items of a task, or below 1 a share of them; default: all", float)
    switch(parser, "--chat", "ask in the dialogue form of the model, each example as a turn")
    flag(parser, "--system TEXT", "system message of the dialogues; default: none")
    longer = "what to do with a prompt that is too long: cut its left end, and count it, or refuse; default: cut"
    flag(parser, "--long HOW", longer, choices=("cut", "refuse"), default="cut")


def _harness(args: argparse.Namespace) -> Outcome:
    """Raises UserError for tasks that are not there or lack a field, and as eval.model.load."""
    asked = [name.strip() for name in args.tasks.split(",") if name.strip()]
    found, manager = tasks.find(asked, args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args)
    if args.chat and model.template is None:
        raise UserError(f"--chat: nothing says how the dialogues of {args.ckpt} are written; give --template")
    how = {"num_fewshot": args.num_fewshot, "limit": args.limit, "chat": args.chat, "system": args.system}
    with models.Leader(model) as leader:
        if not leader.leads:
            return Outcome()
        results = harness.evaluate(leader, found, manager, out=args.out, long=args.long, **how)
    rows = [
        (
            task,
            *name.split(","),
            f"{value:.4f}",
            _number(figures.get(f"{name.split(',')[0]}_stderr,{name.split(',')[1]}")),
        )
        for task, figures in results["results"].items()
        for name, value in figures.items()
        if "," in name and "_stderr" not in name and isinstance(value, float)
    ]
    text = tables.text(rows, ("task", "metric", "filter", "value", "stderr"), align="lllrr")
    return Outcome(results, text=text)


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


ACTIONS = {
    "harness": ("run tasks of lm-evaluation-harness (extra [eval])", _harness_arguments, _harness),
}
