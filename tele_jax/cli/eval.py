"""`tele eval ACTION`: finds out how good a model is, in one process or in several, as `tele train`."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import jax

from tele_jax import plots, tables
from tele_jax.checkpoint.adapted import fingerprint
from tele_jax.cli import Outcome, Progress, flag, note, pick, switch
from tele_jax.cli.generate import open_mesh
from tele_jax.cli.pages import load_page
from tele_jax.cli.train import place_arguments, together
from tele_jax.config import check_seed, from_dict, given, require
from tele_jax.errors import UserError
from tele_jax.eval import bpb, code, harness, judge, judges, results, sandbox, tasks
from tele_jax.eval import model as models
from tele_jax.eval.records import digest
from tele_jax.eval.text import BpbConfig, survey
from tele_jax.files import PathLike, Table, held_alone, read_table, write_json
from tele_jax.inference.sampling import sampling
from tele_jax.processes import barrier, find_place, is_distributed, is_first


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    for name, (text, add, run) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        add(action)
        action.set_defaults(run=run)


def run(args: argparse.Namespace) -> Outcome:
    """Raises what the action raises. Of several processes, the first one prints and writes."""
    if args.action == "table":  # loads no model
        return args.run(args)
    with together(find_place(vars(args))):
        outcome = args.run(args)
        barrier()  # JAX would wait for the first process at the end, but not for long
        return outcome if is_first() else Outcome()


def model_arguments(parser: argparse.ArgumentParser, more: str = "", **how: Any) -> None:
    """Adds the flags of actions that load a model. more: help of CKPT; how: nargs="+" where it takes several."""
    flag(parser, "ckpt CKPT", "step, stage or work directory; of several steps, the latest" + more, **how)
    flag(parser, "--tokenizer FILE", "default: tokenizer.model or tokenizer.json in or above the checkpoint")
    flag(parser, "--template NAME", "format of dialogues; default: as the tokenizer and the checkpoint say")
    mesh = "devices to spread the work over: tensor=4, or data=2,tensor=4; default: one, or all of several processes"
    flag(parser, "--mesh AXIS=N,...", mesh)
    dtype = "dtype of the computation; default: that of the checkpoint"
    flag(parser, "--dtype NAME", dtype, choices=("bfloat16", "float32"))
    place_arguments(parser)


def mesh_of(args: argparse.Namespace) -> jax.sharding.Mesh | None:
    """The mesh of --mesh. That of several processes has all their devices; by default they share the rows of a batch.

    Raises:
      UserError: as open_mesh; a device of several processes is left out.
    """
    if not is_distributed():
        return open_mesh(args.mesh)
    count = len(jax.devices())
    mesh = open_mesh(args.mesh or f"data={count}")
    if mesh is not None and mesh.size < count:
        raise UserError(f"--mesh {args.mesh}: takes {mesh.size} of the {count} devices of all processes; name all")
    return mesh


def load_model(args: argparse.Namespace, path: PathLike | None = None) -> models.EvalModel:
    """The model of a command line, or of one of its checkpoints; raises UserError as eval.model.load."""
    how = {"tokenizer": args.tokenizer, "template": args.template, "mesh": mesh_of(args)}
    model = models.load(path or args.ckpt, **how)
    if args.dtype is not None:
        model.cfg = model.cfg.replace(dtype=args.dtype)
    return model


def _harness_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, nargs="?")
    flag(parser, "--tasks NAMES", "names of tasks, with commas between them; list: show them all", required=True)
    flag(parser, "--data DIR", "directory with the files of the tasks; default: the harness downloads its own", Path)
    flag(parser, "--out DIR", "directory of the results; started again, a run goes on from it", Path)
    flag(parser, "--num-fewshot N", "examples before each question; default: as the task says", int)
    flag(parser, "--limit N", "most items of a task, or below 1 a share of them; default: all", float)
    switch(parser, "--chat", "ask in the dialogue form of the model, each example as a turn")
    flag(parser, "--system TEXT", "system message of the dialogues of --chat; default: none")
    longer = "prompts that are too long: cut: drop tokens at the beginning, and count the prompt; "
    longer += "refuse: end the command; default: cut"
    flag(parser, "--long HOW", longer, choices=("cut", "refuse"), default="cut")


def _harness(args: argparse.Namespace) -> Outcome:
    """Raises UserError for tasks that are not there or lack a field, and as eval.model.load."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if names == ["list"]:
        return _listing(args.data)
    if not names or args.ckpt is None or args.out is None:
        raise UserError("tele eval harness: name a checkpoint, --tasks and --out DIR; --tasks list shows the tasks")
    with tasks.offline(args.data):
        found = tasks.find(names, args.data, num_fewshot=args.num_fewshot)
        model = load_model(args)
        if (args.chat or found.chat) and model.template is None:
            raise UserError(f"{args.ckpt}: nothing says how its dialogues are written; give --template")
        with models.Leader(model) as leader:
            if not leader.leads:
                return Outcome()
            how = pick(args, "out", "num_fewshot", "limit", "chat", "system", "long")
            results = harness.evaluate(leader, found, **how)
    return Outcome(results, text=f"{_figures(results)}\n{_counts(results['counts'])}\n{args.out}/results.json")


def _listing(data: Path | None) -> Outcome:
    rows = tasks.listing(data)
    header = ("task", "examples", "metrics", *(("found",) if data else ()), "files below --data")
    cells = [
        (r["task"], r["num_fewshot"], ", ".join(r["metrics"]), *((r["found"],) if data else ()), r["files"])
        for r in rows
    ]
    more = (
        "\ngym_NAME: a generator of reasoning_gym. Tasks of the harness's YAML files below --data have their own names."
    )
    return Outcome({"tasks": rows}, text=tables.text(cells, header, align="lrlll"[: len(header)]) + more)


def _figures(results: Table) -> str:
    """The table of a run's results."""
    rows = [
        (task, *name.split(","), f"{value:.4f}", _number(figures.get(name.replace(",", "_stderr,", 1))))
        for task, figures in results["results"].items()
        for name, value in figures.items()
        if "," in name and "_stderr" not in name and isinstance(value, float)
    ]
    return tables.text(rows, ("task", "metric", "filter", "value", "stderr"), align="lllrr")


def _counts(counts: Table) -> str:
    text = f"{counts['requests']:,} requests, {counts['kept']:,} answered before; {counts['tokens']:,} tokens scored"
    return f"{text}; {counts['cut']:,} prompts were too long and lost their beginning" if counts["cut"] else text


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


# ------------------------------------------------------------------------------------------------------ bits per byte


def _bpb_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, nargs="+")
    text = "files of a domain, as path or pattern: a line of a .jsonl file is a document, any other file is one"
    flag(parser, "--text DOMAIN=FILES", text, nargs="+", action="extend", default=[])
    page = "page with the text and the settings, as configs/eval/bpb.py; flags replace its values"
    flag(parser, "--config FILE", page)
    flag(parser, "--window N", "tokens that the model reads at once; default: its max_seq_len", int)
    flag(parser, "--stride N", "new tokens that each further window of a document scores; default: the window", int)
    switch(parser, "--by-position", "print the figures by the position of a token in its document as well")
    switch(parser, "--eos", "score the end of sequence after each document as well; it adds no byte")
    out = "directory of results.json, of a picture, and of scores: started again, an evaluation goes on from them"
    flag(parser, "--out DIR", out, Path)
    text = "en=held_out/en/*.jsonl zh=held_out/zh/*.jsonl"
    parser.epilog = f"example: tele eval bpb runs/a runs/b --text {text} --out OUT"


def _bpb_config(args: argparse.Namespace) -> BpbConfig:
    """The page of a command line with its flags; raises UserError for what is not understood."""
    if args.overrides and args.config is None:
        raise UserError(f"{args.overrides[0]}: changes a page, and --config names none")
    values = dict(load_page(args.config, args.overrides).items()) if args.config else {}
    text: dict[str, tuple[str, ...]] = {}
    for entry in args.text:
        name, _, pattern = entry.partition("=")
        if not (name and pattern):
            raise UserError(f"--text {entry}: expected DOMAIN=FILES, for example --text en=held_out/*.jsonl")
        text[name] = (*text.get(name, ()), pattern)
    flags = {"window": args.window, "stride": args.stride, "by_position": args.by_position or None}
    flags |= {"eos": args.eos or None, "text": text or None if args.config else text}
    values |= {name: value for name, value in flags.items() if value is not None}
    return from_dict(BpbConfig, values, "config" if args.config else "tele eval bpb")


def _bpb(args: argparse.Namespace) -> Outcome:
    """Raises UserError for text that cannot be read and a model that does not fit, before anything is scored."""
    config = _bpb_config(args)
    opened, wanted = {}, {}
    for path in dict.fromkeys(args.ckpt):
        opened[path], vocabulary = models.examine(path, args.tokenizer)
        window, stride = config.sizes(opened[path].cfg, vocabulary)
        how: Table = {"window": window, "stride": stride, "eos": config.eos, "parameters": fingerprint(opened[path])}
        wanted[path] = how | {"tokenizer": vocabulary.sha256, "dtype": args.dtype or opened[path].cfg.dtype}
    domains = survey(config) if is_first() else []
    total, found = sum(domain.num_bytes for domain in domains), {}
    with contextlib.ExitStack() as stack:
        if args.out is not None and is_first():
            stack.enter_context(held_alone(args.out / ".lock", f"{args.out}: another tele eval writes there"))
            bpb.require_same(args.out / "results.json", bpb.results_of(config, domains, wanted))
        for path, lazy in opened.items():
            with models.Leader(load_model(args, lazy.path)) as leader:
                if leader.leads:
                    shown = Progress(path, least=10**6)
                    how = {"directory": args.out, "progress": lambda done, shown=shown: shown(done, total)}
                    found[path] = bpb.evaluate(leader, config, domains, fingerprint=fingerprint(lazy), **how)
        if not is_first():
            return Outcome()
        results = bpb.results_of(config, domains, found)
        if args.out is not None:
            write_json(args.out / "results.json", results)
            try:
                plots.bits_per_byte(results).savefig(args.out / "bits_per_byte.png")
            except UserError as error:  # the extra is not installed
                note(f"no picture: {error}")
    return Outcome(results, text=bpb.text_of(results, by_position=config.by_position))


def _require_own(file: Path, *kinds: str) -> None:
    """Raises UserError where there are results of another kind already, which would be overwritten."""
    if file.exists() and read_table(file).get("kind") not in kinds:
        raise UserError(f"{file}: holds results of something else; choose another --out")


# ------------------------------------------------------------------------------------------------------------- tables


def _table_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "results RESULTS", "results.json of bpb, harness, dialogue or code, or its directory", Path, nargs="+")


def _table(args: argparse.Namespace) -> Outcome:
    """Raises UserError for files that hold no results, or none that a published table has."""
    figures, text = results.compare([result for path in args.results for result in results.read_results(path)])
    return Outcome(figures, text=text)


# ----------------------------------------------------------------------------------------------------- judged dialogue


def _dialogue_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, "; or a file of answers, .jsonl or .jsonl.gz")
    flag(parser, "--questions FILE", "questions in AlignBench's layout, .jsonl or .jsonl.gz", Path)
    who = "a checkpoint, the URL of a chat endpoint (https://host/v1), or `reference`: the overlap with the reference"
    flag(parser, "--judge JUDGE", who, required=True)
    flag(parser, "--judge-model NAME", "name of the model at the endpoint")
    flag(parser, "--judge-key VARIABLE", "environment variable with the key of the endpoint; default: no key is sent")
    flag(
        parser,
        "--judge-template NAME",
        "format of dialogues of the judge; default: as the judge's tokenizer and checkpoint say",
    )
    flag(parser, "--judge-tokens N", "most new tokens of a checkpoint's verdict; default: 1024", int, default=1024)
    flag(parser, "--parallel N", "requests to the endpoint at a time; default: 4", int, default=4)
    flag(parser, "--against ANSWERS", "answers of another model, .jsonl: which is better, asked in both orders", Path)
    flag(parser, "--max-new-tokens N", "most new tokens of an answer; default: 1024", int, default=1024)
    out = "directory of answers, verdicts, results.json; started again, goes on"
    flag(parser, "--out DIR", out, Path, required=True)


def _dialogue(args: argparse.Namespace) -> Outcome:
    """Raises UserError for files, judges and models that cannot be used, FailedError for a judge without answer."""
    http, lazy = args.judge.partition("://")[1], None
    _require_some(args, "judge_tokens", "parallel", "max_new_tokens")
    if http:
        model = given(args.judge_model, "--judge-model: is needed with the URL of a judge")
        asked = judges.HttpJudge(args.judge, model, args.judge_key, args.parallel)
        about: Table = {"judge": args.judge, "judge_model": model}
    elif args.judge == "reference":
        asked, about = None, {"judge": "reference"}
    else:
        asked, (lazy, _) = None, models.examine(args.judge)
        about = {"judge": args.judge, "parameters": fingerprint(lazy), **pick(args, "judge_tokens", "judge_template")}
    others = None if args.against is None else judge.read_questions(args.against, answered=True)
    _require_own(args.out / "pairs.json", "pairs")
    _require_own(args.out / "results.json", "alignbench", "teleeval", "dialogue", "reference_overlap")
    answers = _answers(args)
    if lazy is not None:
        model = models.load(lazy.path, template=args.judge_template, mesh=mesh_of(args))
        given(model.template, f"nothing says how the dialogues of {args.judge} are written; give --judge-template")
        with models.Leader(model) as leader:
            if not leader.leads:
                return Outcome()
            return _judged(args, answers, others, judges.of_model(leader, args.judge_tokens), about)
    return _judged(args, answers, others, asked, about) if is_first() else Outcome()


def _answers(args: argparse.Namespace) -> list[Table]:
    """The answers to judge, on process 0: those of a file, or what the model answers to the questions."""
    referenced = args.judge == "reference"
    if Path(args.ckpt).is_file() or args.ckpt.lower().endswith((".jsonl", ".jsonl.gz")):
        require(
            args.questions is None, f"--questions: {args.ckpt} holds answers with their questions; leave the flag out"
        )
        return judge.read_questions(Path(args.ckpt), answered=True, referenced=referenced)
    file = given(args.questions, "--questions: is needed with a checkpoint")
    questions = judge.read_questions(file, referenced=referenced)
    lazy, vocabulary = models.examine(args.ckpt, args.tokenizer)
    model = load_model(args, lazy.path)
    given(model.template, f"nothing says how the dialogues of {args.ckpt} are written; give --template")
    about = {"questions": digest(questions), "parameters": fingerprint(lazy), "tokenizer": vocabulary.sha256}
    about |= {"template": args.template, "dtype": model.cfg.dtype, "max_new_tokens": args.max_new_tokens}
    with models.Leader(model) as leader:
        if leader.leads:
            return judge.answer(leader, questions, args.out, about, max_new_tokens=args.max_new_tokens)
    return []


def _require_some(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")


def _judged(
    args: argparse.Namespace, answers: list[Table], others: list[Table] | None, asked: Any, about: Table
) -> Outcome:
    """The judgements of answers, as figures and a table."""
    about = about | {"answers": digest(answers), "against": digest(others)}
    if others is None:
        results = judge.scores_of(judge.score(answers, asked, args.out, about), by_judge=args.judge != "reference")
    else:
        results = judge.pairs_of(judge.compare(answers, others, asked, args.out, about))
    results |= {"model": str(answers[0].get("model_id", args.ckpt)), "judge": args.judge}
    write_json(args.out / ("results.json" if others is None else "pairs.json"), results)
    unreadable = results["unreadable"] if others is None else results["counts"]["unreadable"]
    error = "no verdict of the judge can be read; its replies are in " if unreadable == len(answers) else ""
    return Outcome(results, judge.text_of(results), error and f"{error}{args.out}", code=1 if error else 0)


# --------------------------------------------------------------------------------------------------------------- code


def _code_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    flag(parser, "--tasks FILE", "tasks in HumanEval's layout, .jsonl or .jsonl.gz", Path)
    flag(parser, "--data DIR", f"directory with {code.FILE}, in the place of --tasks", Path)
    out = "directory of programs, verdicts, results.json; started again, goes on"
    flag(parser, "--out DIR", out, Path, required=True)
    switch(parser, "--chat", "ask in the dialogue form of the model for the whole function")
    flag(parser, "--samples N", "programs for each task; default: 1", int, default=1)
    flag(parser, "--k K,...", "the k of pass@k, at most --samples; default: 1", default="1")
    flag(parser, "--temperature T", "temperature of the draws; default: 0 for one sample, 0.8 for several", float)
    flag(parser, "--top-p P", "sum of the likeliest tokens to draw among; default: all", float)
    flag(parser, "--seed N", "seed of the draws; default: 0", int, default=0)
    flag(parser, "--max-new-tokens N", "most new tokens of a program; default: 512", int, default=512)
    flag(parser, "--seconds N", "most seconds of processor time of a program; default: 5", int, default=5)
    flag(parser, "--memory MIB", "most memory of a program in MiB; default: 512", int, default=512)
    unsafe = "run programs with limits alone: they can read, write and send all you can"
    switch(parser, "--unsafe-without-isolation", unsafe)


def _code(args: argparse.Namespace) -> Outcome:
    """Raises UserError for tasks that cannot be read, and where programs cannot be isolated on this system."""
    require(args.tasks is None or args.data is None, "--tasks and --data: both name the tasks; give one of them")
    _require_some(args, "samples", "max_new_tokens")
    file = args.tasks or given(args.data, "--tasks FILE or --data DIR: is needed") / code.FILE
    found, ks = code.read_tasks(file), [int(k) if k.isdecimal() else 0 for k in args.k.split(",")]
    require(all(1 <= k <= args.samples for k in ks), f"--k {args.k}: expected numbers from 1 to --samples, as 1,5")
    require(args.seconds >= 1 and args.memory >= 64, "--seconds must be at least 1, --memory at least 64")
    temperature = args.temperature if args.temperature is not None else 0.8 if args.samples > 1 else 0.0
    require(temperature > 0 or args.samples == 1, "--samples: at temperature 0 all programs of a task are the same")
    how: Table = {"temperature": temperature, "top_p": args.top_p}
    sampling(**how)
    check_seed(args.seed)
    _require_own(args.out / "results.json", "code")
    mode = "none" if args.unsafe_without_isolation else sandbox.find_mode()
    lazy, vocabulary = models.examine(args.ckpt, args.tokenizer)
    settings = how | pick(args, "chat", "samples", "max_new_tokens", "seed")
    about = {
        "tasks": digest(found),
        "parameters": fingerprint(lazy),
        "tokenizer": vocabulary.sha256,
        **settings,
    }
    with models.Leader(load_model(args, lazy.path)) as leader:
        if not leader.leads:
            return Outcome()
        about["dtype"] = leader.model.cfg.dtype
        limits = sandbox.Limits(args.seconds, args.memory << 20)
        code.check_tests(found, mode, limits)
        written = code.complete(leader, found, args.out, about, **settings)
    verdicts = code.run(found, written, args.out, chat=args.chat, mode=mode, limits=limits)
    name = file.name.partition(".")[0].lower()
    results = code.results_of(name, args.ckpt, verdicts, ks, settings | {"isolation": mode})
    write_json(args.out / "results.json", results)
    return Outcome(results, code.text_of(results))


ACTIONS = {
    "bpb": ("bits per byte of text, by domain, of one or several models", _bpb_arguments, _bpb),
    "code": ("run the programs that a model writes for tasks, as HumanEval", _code_arguments, _code),
    "dialogue": ("let a judge score a model's answers, or compare two models'", _dialogue_arguments, _dialogue),
    "harness": ("run tasks of lm-evaluation-harness (extra [eval])", _harness_arguments, _harness),
    "table": ("print results beside the published ones, in the published tables", _table_arguments, _table),
}
