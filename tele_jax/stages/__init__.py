"""The stages of a run: how a page is read, and the kinds of stages, each of which is one file of this folder.

A page in configs/ returns a ConfigDict with `run`, the names of the stages in order, and one table per stage:

    config.run = ("pretrain_small", "grow", "pretrain_large", "sft")
    config.grow = dict(kind="grow", model=dict(embed_dim=160), policy="msg")

`kind` is the name of a module of this folder. Its `Settings` is the frozen dataclass that the table becomes. A kind
that trains derives it from settings.TrainStage, and has

    batches(stage, index) -> Batches     what the stage reads, opened and checked (data/batches.py)
    loss(stage, cfg, params, batch, masks, beside) -> (sum, weight, figures)
                                         pure: the sum over a batch, the weights it is divided by, and other sums by
                                         name, which are divided by the weights and logged
    beside(stage, cfg, previous, mesh)   optional: arrays that the loss reads and no step changes, such as a reference
                                         model; `previous` holds the checkpoints of the stage before, or is None
    model(stage, cfg) -> cfg             optional: the config that it trains, such as one with a scalar head; leaves
                                         that the model before lacks are drawn from the stage's seed
    check(stage, models)                 optional: raises UserError, beginning with a field, for what would be found out
                                         when the stage begins; models: configs of those of stage.models, by field
    feed(stage, batches, around)         optional: what gives the batches, in the place of batches.feed; `around` says
                                         what it may know (data/surroundings.py). It has the methods of data/feed.py;
                                         stepped(figures), if it has that, is called after every step, and figures()
                                         once for every line of figures, which it adds its own to;
                                         watch(check) gets a function that raises where the run was asked to stop.
                                         fails_everywhere=True: all processes raise its UserErrors, and those of
                                         `evaluate`, so that they can save together before they end
    SCORES = True                        optional: it leaves a model that scores text; a stage right behind it that
                                         trains a language model has to say which stage it continues (`after`)
    UNREAD = (axis, ...)                 optional: leaves with these outputs, which its loss does not read, stay as
                                         they are
    evaluate(stage, cfg, params, held_out, mesh) -> {name: figure}
                                         optional: evaluates batches.held_out, in the place of bits per byte

    shapes(stage) -> {name: jax.ShapeDtypeStruct}
                                         optional: the arrays of a batch, where they are not those of data/feed.py
    rollout(stage) -> (rows, tokens)     optional: how many rows it generates together, and the most tokens of a row;
                                         these two are for `tele plan`, which allocates nothing

A kind that makes another model out of what the stage before left has

    outline(stage, cfg, where) -> (config of the model it leaves, Plan | None)         checked before the first step
    carry_out(stage, directory, plan=, previous=, mesh=, text=, where=, say=) -> summary
                                         plan: that of `outline`; text: Batches to verify on
    read_plan(directory) -> Plan | None  the growth that the next stage opens the masks of
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from tele_jax.config import ModelConfig, checked, convert, from_dict, nearest, require
from tele_jax.errors import UserError
from tele_jax.settings import GrowStage, MeshConfig, TrainStage

Stage = TrainStage | GrowStage


@checked
class RunConfig:
    """The stages of a run in order, and where they run."""

    run: tuple[str, ...]  # names of the stages, in the order in which they run
    stages: dict[str, Stage]  # the tables of the stages; on a page they stand beside `run`, each under its name
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # how many devices lie along each mesh axis
    # TPU slices that the mesh lies on, joined by a slower network (DCN): mesh.data runs over them, and only gradients
    # cross from one to another.
    num_slices: int = 1
    start: str | None = None  # checkpoint that the first stage starts from, such as an imported one
    # Options of the compiler for the step of training, such as dict(xla_tpu_scoped_vmem_limit_kib=98304). None: those
    # of the TPU generation (train/compiler_options.py), now the compiler's own; an empty table: the compiler's own.
    compiler_options: dict[str, bool | int | str] | None = None

    @property
    def parents(self) -> dict[str, str | None]:
        """The stage that each stage goes on from, see `parents_of`."""
        return parents_of({name: self.stages[name].after for name in self.run})

    def lineage(self, name: str) -> list[str]:
        """The stages that lead to a stage, each going on from the one before it, with the stage itself at the end."""
        found, parents = [name], self.parents
        while (parent := parents[found[0]]) is not None:
            found.insert(0, parent)
        return found


def parents_of(after: Mapping[str, str | None]) -> dict[str, str | None]:
    """The stage that each stage goes on from: the one that its `after` names, else the one right before in the run.

    after: of every stage, in the order of the run. The first stage has None: it begins anew, or with config.start.

    >>> parents_of({"small": None, "grow_a": None, "a": None, "grow_b": "small", "b": None})
    {'small': None, 'grow_a': 'small', 'a': 'grow_a', 'grow_b': 'small', 'b': 'grow_b'}
    """
    return {name: named or before for before, (name, named) in zip((None, *after), after.items())}


def known_kinds() -> list[str]:
    """Names of the kinds: the modules of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_kind(name: str) -> ModuleType:
    """The module of a kind; raises ModuleNotFoundError for an unknown one."""
    return importlib.import_module(f"{__name__}.{name}")


def model_of(stage: TrainStage, cfg: ModelConfig) -> ModelConfig:
    """The config of the model that a stage trains, which begins with the model of cfg."""
    kind = find_kind(stage.kind)
    return kind.model(stage, cfg) if hasattr(kind, "model") else cfg


def read_stage(table: Mapping[str, Any], where: str) -> Stage:
    """The settings of one stage from its table; raises UserError with the full path of what is wrong."""
    kind, known = (table.get("kind") if hasattr(table, "get") else None), known_kinds()
    if kind not in known:
        raise UserError(f"{where}.kind: {kind!r} is not one of {', '.join(map(repr, known))}")
    settings = find_kind(kind).Settings
    if issubclass(settings, TrainStage):
        given = [length for length in ("steps", "epochs") if table.get(length) is not None]
        are_known = set(table) <= {field.name for field in dataclasses.fields(settings)}
        require(bool(given) or not are_known, f"{where}.steps: missing; give it, or in fine-tuning epochs")
        require(len(given) < 2, f"{where}.steps and {where}.epochs: both say how long the stage is; leave one out")
    return from_dict(settings, table, where)


def run_config(page: Mapping[str, Any] | ConfigDict) -> RunConfig:
    """Reads a config page (ConfigDict or dict).

    Raises:
      UserError: an unknown or missing key, a stage that is named but absent or present but not named, a first stage
        without a model, a stage that nothing leads to.
    """
    page = dict(page.items())
    names = page.pop("run", None)
    require(bool(names), "config.run: missing; it names the stages in order, e.g. ('pretrain', 'sft')")
    names = convert(tuple[str, ...], names, "config.run")
    for name in names:
        require(name.isidentifier(), f"config.run: {name!r} is no name for a stage: letters, digits and _ make one")
    require(len(set(names)) == len(names), f"config.run: a stage is named twice in {names}")
    mesh = from_dict(MeshConfig, page.pop("mesh", {}), "config.mesh")
    num_slices = convert(int, page.pop("num_slices", 1), "config.num_slices")
    require(num_slices > 0, f"config.num_slices={num_slices} must be above 0")
    require(
        mesh.data % num_slices == 0,
        f"config.mesh.data={mesh.data}: only data crosses slices; make it a multiple of config.num_slices={num_slices}",
    )
    start = convert(str | None, page.pop("start", None), "config.start")
    hint = dict[str, bool | int | str] | None
    options = convert(hint, page.pop("compiler_options", None), "config.compiler_options")
    for name in names:
        require(name in page, f"config.run names the stage {name!r}, but config.{name} is missing")
    for key in page:
        if key not in names:
            known = (*names, "mesh", "num_slices", "start", "compiler_options")
            hint = nearest(key, known, "known keys")
            raise UserError(f"config.{key}: unknown key; {hint}; stages have to be named in config.run = {names}")
    stages = {name: read_stage(page[name], f"config.{name}") for name in names}
    first = stages[names[0]]
    if start is None and not isinstance(first, TrainStage):
        raise UserError(
            f"config.run: the first stage, {names[0]!r}, grows, but there is nothing to grow yet; config.start names a "
            "checkpoint to start from"
        )
    require(
        any(isinstance(stage, TrainStage) for stage in stages.values()),
        "config.run: no stage trains; `tele grow` grows a checkpoint",
    )
    require(
        start is not None or not isinstance(first, TrainStage) or first.lora is None,
        f"config.{names[0]}.lora: there is nothing to adapt before the first stage; config.start names a checkpoint",
    )
    require(
        start is not None or first.model is not None,
        f"config.{names[0]}.model: missing; the first stage has to say which model, or config.start where to start",
    )
    for name in names if start is not None else names[1:]:
        require(
            not isinstance(stages[name], TrainStage) or stages[name].model is None,
            f"config.{name}.model: only growth stages, and the first stage of a run without config.start, set a model; "
            "this one continues with what is there",
        )
    trains = lambda name: isinstance(stages[name], TrainStage)  # noqa: E731
    for place, name in enumerate(names):
        earlier = names[:place] if trains(name) else tuple(filter(trains, names[:place]))
        _check_names(name, stages[name], earlier, names[place:])
    where = {"mesh": mesh, "num_slices": num_slices, "start": start, "compiler_options": options}
    config = RunConfig(run=names, stages=stages, **where)
    for name, parent in config.parents.items():
        # Whether the masks of config.start are closed is known when it is opened.
        if parent is not None or start is None or not trains(name):
            _check_masks(parent, stages.get(parent or ""), name, stages[name])
    _check_continued(config)
    for name, stage in stages.items():
        for field, model in stage.models.items() if isinstance(stage, TrainStage) else ():
            grown = stages.get(model)
            require(
                not isinstance(grown, GrowStage) or grown.policy != "msg",
                f"config.{name}.{field}={model!r}: grows by policy 'msg', and its masks are closed; name the stage "
                "that opens them",
            )
    adapters = dict[str | None, str]()  # the stage that left adapters, which the next to train merges
    for name, parent in config.parents.items():
        stage, left = stages[name], adapters.get(parent, "")
        if isinstance(stage, TrainStage):
            require(
                not left or not stage.optimizer.new_warmup_steps,
                f"config.{name}.optimizer.new_warmup_steps needs the moments of the stage before, and "
                f"config.{left} trains adapters (lora), which leave none",
            )
            left = name if stage.lora is not None else ""
        adapters[name] = left
    return config


def _check_names(name: str, stage: Stage, earlier: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Raises UserError where a stage continues, or reads the model of, a stage that does not come before it."""
    before, do = f"the stages before {name} are {', '.join(earlier)}", "name one of them"
    if not earlier:
        before, do = f"no stage comes before {name}", "leave it out"
    if isinstance(stage, GrowStage):
        before = f"those before {name} are {', '.join(earlier)}" if earlier else f"there is none before {name}"
        before = f"a growth goes on after a training stage; {before}"
    require(stage.after is None or stage.after in earlier, f"config.{name}.after={stage.after!r}: {before}; {do}")
    for field, model in stage.models.items() if isinstance(stage, TrainStage) else ():
        require(model not in others, f"config.{name}.{field}={model!r}: {before}; {do}, or name a checkpoint")


def _check_continued(config: RunConfig) -> None:
    """Raises UserError where a stage would go on training a model that scores (SCORES) as a language model."""
    scorers = dict[str | None, str]()  # the stage that made the model a scorer, by the stage that left it; "": none did
    others = list[str]()  # stages that left a language model
    for name, parent in config.parents.items():
        stage, scorer = config.stages[name], scorers.get(parent, "")
        if not isinstance(stage, TrainStage):
            scorers[name] = scorer
            continue
        if getattr(find_kind(stage.kind), "SCORES", False):
            scorers[name] = name
            continue
        do = f"name the stage that it continues, such as after={others[-1]!r}" if others else "put it before that stage"
        require(
            stage.after is not None or not scorer,
            f"config.{name} would continue the model of config.{scorer}, which scores text; {do}",
        )
        scorers[name] = ""
        others.append(name)


def _check_masks(parent: str | None, growth: Stage | None, name: str, stage: Stage) -> None:
    """Raises UserError where a growth by policy msg is not followed by a mask ramp, or a ramp has no such growth.

    parent: the stage that `name` goes on from, of which `growth` are the settings.
    """
    growth = growth if isinstance(growth, GrowStage) else None
    masked = growth is not None and growth.policy == "msg"
    if not isinstance(stage, TrainStage):
        require(
            not masked,
            f"config.{name}: cannot grow while the masks of config.{parent} are closed (policy 'msg'); put a training "
            "stage with mask_ramp between them",
        )
        return
    if masked and stage.mask_ramp == 0:
        raise UserError(
            f"config.{name}.mask_ramp: has to be above 0: config.{parent} grows by policy 'msg', "
            "whose masks rise in the training stage that follows"
        )
    if not masked and stage.mask_fields:
        why = "no growth comes right before" if stage.after is None else f"after={parent!r} is no growth"
        why = why if growth is None else f"config.{parent} grows by policy {growth.policy!r}"
        raise UserError(f"config.{name}.{stage.mask_fields[0]}: {why}, and only growth by policy 'msg' has masks")
    if growth is None and stage.optimizer.trained == "new":
        what = "the stage before" if stage.after is None else f"config.{parent}"
        raise UserError(f"config.{name}.optimizer.trained='new' has to follow a growth, and {what} is not one")
    if growth is not None and not growth.optimizer_state and stage.optimizer.new_warmup_steps:
        raise UserError(f"config.{name}.optimizer.new_warmup_steps: config.{parent} grows without optimizer_state")
