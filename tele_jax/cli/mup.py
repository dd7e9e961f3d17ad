"""`tele mup ACTION`: checks muP, finds settings on small models, and predicts losses of large ones."""

import argparse
import math
from pathlib import Path

from tele_jax import files, tables
from tele_jax.cli import Outcome, flag, pick, refuse_flags
from tele_jax.cli.pages import load_page
from tele_jax.cli.train import set_up  # noqa: F401 - as `tele train`
from tele_jax.config import require
from tele_jax.errors import prefixed
from tele_jax.lab.mup import coords, pictures, predict, search, transfer
from tele_jax.lab.mup.widths import first_stage
from tele_jax.stages import run_config
from tele_jax.train.trainer import Stopped


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    for name, (text, action, add, epilog) in ACTIONS.items():
        added = actions.add_parser(name, help=text, description=text, epilog=epilog)
        added.set_defaults(run=action)
        add(added)


def run(args: argparse.Namespace) -> Outcome:
    """Raises what the action raises."""
    return args.run(args)


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 64,128,256")
    return tuple(map(int, parts))


# ---- coords ----------------------------------------------------------------------------------------------------------


def _coords_arguments(parser: argparse.ArgumentParser) -> None:
    page = "page of a run: model and rates of its first stage; default: two layers, rate 2^-6"
    flag(parser, "--config FILE", page)
    widths = ",".join(map(str, coords.WIDTH.sizes))
    flag(parser, "--widths N,N,...", f"widths, at least four; default: {widths}", _numbers)
    depths = "numbers of layers, at least four: checks CompleteP's rule of depth, and not muP"
    flag(parser, "--depths N,N,...", depths, _numbers)
    flag(parser, "--seeds N,N,...", "seeds; default: 0,1,2,3,4", _numbers, default=(0, 1, 2, 3, 4))
    flag(parser, "--steps N", "steps of training, at most 10; default: 5", int, default=5)
    rate = "learning rate at the base width; default: that of the page"
    flag(parser, "--learning-rate X", rate, float)
    flag(parser, "--out FILE", "picture to write; default: mup_coords.png", Path, default=Path("mup_coords.png"))


def _coords(args: argparse.Namespace) -> Outcome:
    require(args.out.suffix == ".png", f"--out {args.out}: the picture is a .png file")
    require(args.out.parent.is_dir(), f"--out {args.out}: there is no directory {args.out.parent}")
    cfg, rate, matrix_rate = coords.MODEL, 2**-6, None
    require(
        args.config is not None or not args.overrides, "--config.KEY=VALUE changes a page, and no --config names one"
    )
    if args.config is not None:
        stage, cfg = first_stage(run_config(load_page(args.config, args.overrides)))
        rate, matrix_rate = stage.optimizer.learning_rate, stage.optimizer.matrix_learning_rate
    require(args.widths is None or args.depths is None, "--widths and --depths are two checks; name one")
    axis = coords.WIDTH if args.depths is None else coords.DEPTH
    if (at := args.widths or args.depths) is not None:
        with prefixed(f"--{axis.name}s {','.join(map(str, at))}: "):
            coords.models_of(cfg, axis, at)
    if args.learning_rate is not None:
        rate, matrix_rate = args.learning_rate, None
    found = coords.check(
        cfg,
        learning_rate=rate,
        matrix_learning_rate=matrix_rate,
        axis=axis,
        at=at,
        **pick(args, "seeds", "steps"),
        say=lambda line: print(line, flush=True),
    )
    with files.writing(args.out):
        pictures.coordinates(found).savefig(args.out, dpi=120)
    rows = [
        (kind, f"{slope:.3f}", f"{axis.limits.get(kind, 'not judged')}", f"{found['slopes']['standard'][kind]:.3f}")
        for kind, slope in found["slopes"][axis.rule].items()
    ]
    text = tables.text(rows, (f"slope over log {axis.name}", f"with {axis.rule}", "at most", f"without {axis.rule}"))
    print(f"{text}\n\npicture: {args.out}")
    if found["problems"]:
        return Outcome(found, error=f"coordinate check failed: {'; '.join(found['problems'])}", code=1)
    return Outcome(found, "coordinate check passed")


# ---- predict ---------------------------------------------------------------------------------------------------------


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdirs", metavar="W", nargs="*", type=Path, help="work directories of runs at three widths or more"
    )
    flag(parser, "--points FILE", "instead of W: JSON file with [[size, loss], ...]", Path)
    flag(
        parser, "--at C,C,...", "sizes to predict; of work directories in millions of parameters", _sizes, required=True
    )
    flag(parser, "--figure NAME", "figure of metrics.jsonl to predict; default: loss", default="loss")
    flag(parser, "--step N", "step at which the runs are compared; default: the last that all have", int)


def _sizes(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 194.24,676.48") from None


def _predict(args: argparse.Namespace) -> Outcome:
    if args.points is not None:
        require(not args.workdirs, "mup predict: name work directories or --points, not both")
        refuse_flags(args, {"figure": "loss", "step": None}, "is of work directories, not of --points")
        points = predict.read_points(args.points)
    else:
        require(bool(args.workdirs), "mup predict: name work directories, or --points FILE")
        points = predict.of_runs(args.workdirs, args.figure, args.step)
    fit = predict.fit(points)
    rows, figures = [], []
    for size, loss in points:
        rows.append((f"{size:g}", f"{loss:.4f}", f"{fit.at(size)[0]:.4f}", ""))
    for size in args.at:
        loss, ends = fit.at(size)
        figures.append({"size": size, "loss": loss, "interval": ends})
        rows.append(
            (
                f"{size:g}",
                "",
                f"{loss:.4f}",
                "none: the points fix the law exactly" if ends is None else "{:.4f} to {:.4f}".format(*ends),
            )
        )
    text = tables.text(rows, ("size", "loss", "a*C^b + c", "95% interval"))
    found = {"a": fit.a, "b": fit.b, "c": fit.c, "points": points, "predicted": figures}
    return Outcome(found, f"{text}\n\na = {fit.a:.4g}, b = {fit.b:.4g}, c = {fit.c:.4g}")


# ---- search and transfer ---------------------------------------------------------------------------------------------


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--config FILE", "page of a run with a table `search`, as configs/mup_search.py", required=True)
    flag(parser, "--out DIR", "directory of the trials; started again, the search goes on", Path, required=True)


def _search(args: argparse.Namespace) -> Outcome:
    try:
        found = search.search(load_page(args.config, args.overrides), args.out)
    except Stopped as stopped:
        return Outcome(error=f"{stopped}; finished trials are kept", code=130 if stopped.interrupted else 143)
    names = list(found["trials"][0]["values"])
    shown = sorted(found["trials"], key=lambda trial: math.inf if trial["value"] is None else trial["value"])
    columns = ("value", "decrease", "trend", "gradient")
    rows = [
        (
            t["number"],
            *(f"{t['values'][n]:g}" for n in names),
            *("" if t[c] is None else f"{t[c]:.4f}" for c in columns),
        )
        for t in shown
    ]
    text = tables.text(rows, ("trial", *names, found["figure"], *columns[1:]))
    if found["best"] is None:
        return Outcome(found, text, error=f"{args.out}: every trial diverged; lower the rates", code=1)
    return Outcome(found, f"{text}\n\nbest: trial {found['best']}; picture: {args.out / 'parallel.png'}")


def _transfer_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "searched DIR", "directory of `tele mup search`", Path)
    flag(parser, "--width N", "embed_dim of the model to make a page for", int, required=True)
    flag(parser, "--out FILE", "page to write, a .py file", Path, required=True)
    depth = "another number of layers, with residual_mult by CompleteP's rule; default: that of the search"
    flag(parser, "--layers N", depth, int)
    flag(parser, "--trial N", "trial to take; default: the best", int)


def _transfer(args: argparse.Namespace) -> Outcome:
    found = transfer.write_page(args.searched, args.width, args.out, args.trial, args.layers)
    depth = "" if args.layers is None else f" and {args.layers} layers"
    return Outcome(found, f"{args.out}: trial {found['number']} at width {args.width}{depth}")


ACTIONS = {
    "coords": (
        "check that activations keep their size when the width, or the depth, grows",
        _coords,
        _coords_arguments,
        "Trains a model at several widths (or depths) for a few steps, with muP (or CompleteP) and without, on random "
        "ids. Exit codes: 0 passed, 1 failed. example: tele mup coords --out coords.png",
    ),
    "search": (
        "search rates, initial values and multipliers on a small model",
        _search,
        _search_arguments,
        "Every trial is a run of the page. decrease, trend, gradient: how fast the loss falls, its standard deviation "
        "around that line, how much the gradient norm varies. example: tele mup search --config "
        "configs/mup_search.py --out runs/search",
    ),
    "transfer": (
        "write a found setting as the page of a larger width",
        _transfer,
        _transfer_arguments,
        "example: tele mup transfer runs/search --width 256 --out w256.py",
    ),
    "predict": (
        "predict the loss of a large width from those of small ones",
        _predict,
        _predict_arguments,
        "Fits L = a*C^b + c over widths at one step. example: tele mup predict runs/w64 runs/w128 runs/w256 --at 30.5",
    ),
}
