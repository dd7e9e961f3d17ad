"""Tasks for the harness: published sets in a directory, generated ones, and those of YAML files of the harness."""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tele_jax.config import require
from tele_jax.errors import UserError
from tele_jax.eval import reading
from tele_jax.eval.sets import SETS, EvalSet
from tele_jax.extras import need
from tele_jax.files import Table

EXTRA = "pip install tele_jax[eval]"
GYM, GYM_ITEMS, GYM_SEED = "gym_", 200, 0  # generated tasks; number and seed are ours, since nobody published any
PREFACES = ("preface.txt", "cot-prompts/{subject}.txt")  # texts before every question; BBH has the second


@dataclasses.dataclass(frozen=True)
class Found:
    """Tasks as the harness takes them.

    Attributes:
      names: as asked for.
      tasks: the harness's Task and Group objects.
      manager: the harness's TaskManager.
      digests: SHA-256 of the items of each task whose items are read or generated here, by its name.
      chat: True where the tasks are asked as dialogues alone.
    """

    names: list[str]
    tasks: list[Any]
    manager: Any
    digests: dict[str, str]
    chat: bool


def find(names: Sequence[str], data: Path | None, *, num_fewshot: int | None = None) -> Found:
    """Finds tasks by name.

    A name is a set of sets.SETS, whose files are below `data`; such a name with a subject, as mmlu_anatomy; gym_NAME, a
    generator of reasoning_gym; or a task of a YAML file of the harness, below `data` or, without it, in the harness.

    Raises:
      UserError: no such directory or task; a task without files, with fewer examples than are asked for, or with a
        file that lacks a field; no name; a set beside one of its subjects; tasks that are asked as dialogues beside
        others; the harness is not installed.
    """
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: is no directory")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num-fewshot {num_fewshot}: must not be below 0")
    names = list(dict.fromkeys(names))
    require(bool(names), "--tasks: names no task; --tasks list shows those that are known")
    manager = _manager(data, all(_is_own(name) and (data or name.startswith(GYM)) for name in names))
    built, digests, chats = [], {}, set()
    for name in names:
        whole = "" if name in manager.task_index else name.removesuffix(f"_{_own(name)[1]}")
        require(whole == name or whole not in names, f"--tasks: {name} is part of {whole}; name one of them")
        known, subject = (None, "") if name in manager.task_index else _own(name)
        if name in manager.task_index:
            built += _loaded(manager, name)
        elif name.startswith(GYM):
            built.append(_generated(name, num_fewshot, digests))
        elif known is None or data is None:
            raise UserError(_unknown(name, data, manager, known))
        else:
            built += _read(name, known, subject, data, num_fewshot, digests)
        chats.add(known is not None and known.chat)
    require(len(chats) == 1, "--tasks: telechat_... tasks are asked as dialogues; run them in a command of their own")
    return Found(names, built, manager, digests, chats.pop())


def listing(data: Path | None) -> list[Table]:
    """The sets that are known: name, files, examples, metrics, and `found`, which says what of it is below `data`."""
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: is no directory")
    rows = []
    for name, known in SETS.items():
        found = "" if data is None else _state(known, reading.find(data / known.folder))
        row = {"task": name, "files": known.files, "num_fewshot": known.num_fewshot, "metrics": list(known.metrics)}
        rows.append(row | {"found": found})
    return rows


def _state(known: EvalSet, found: dict[str, dict[str, list[Path]]]) -> str:
    split = next((split for split in (*known.scored, "") if split in found), None)
    if split is None:
        return "no"
    counts = f"{len(found[split])} subjects" if known.average else f"{sum(map(len, found[split].values()))} files"
    lacks_shots = known.shots and known.num_fewshot and known.shots not in found
    return f"{counts}, no {known.shots} split" if lacks_shots else counts


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what the harness logs and prints to stderr: it is about its own files and defaults."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)  # a handler of the program may hold the real stderr
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def offline(data: Path | None) -> Iterator[None]:
    """Keeps the harness from looking for data sets on a hub, and what it makes of local files in a temporary directory.

    Without `data`, tasks are the harness's own, which it downloads as its user has set it up to.
    """
    if data is None:
        yield
        return
    with quiet():
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # read where the package is imported
            os.environ.setdefault(name, "1")
        config = need("datasets", how=EXTRA).config
    before = config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="tele_eval_") as cache:
        config.HF_DATASETS_CACHE = Path(cache)
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE = before


# --------------------------------------------------------------------------------------------------------------- names


def _is_own(name: str) -> bool:
    return name.startswith(GYM) or _own(name)[0] is not None


def _own(name: str) -> tuple[EvalSet | None, str]:
    """(set, subject) of a name of ours; the set is None for others."""
    if name in SETS:
        return SETS[name], ""
    whole = max((known for known in SETS if name.startswith(f"{known}_")), key=len, default=None)
    if whole is None or not SETS[whole].average:
        return None, ""
    return SETS[whole], name[len(whole) + 1 :]


def _unknown(name: str, data: Path | None, manager: Any, known: EvalSet | None) -> str:
    if known is not None:
        return f"--tasks {name}: is read from files; give --data DIR, with {known.files}"
    close = difflib.get_close_matches(name, [*SETS, *manager.task_index], 1)
    guess = f"; did you mean {close[0]}?" if close else "; --tasks list shows those that are known"
    return f"--tasks {name}: no such task{f' in {data}' if data else ''}{guess}"


def _manager(data: Path | None, own: bool) -> Any:
    """The harness's list of tasks: that of the YAML files below `data`, or its own, which takes a while."""
    with quiet():
        tasks = need("lm_eval.tasks", how=EXTRA)
        include = None if data is None else str(data)
        return tasks.TaskManager(include_path=include, include_defaults=data is None and not own)


def _loaded(manager: Any, name: str) -> list[Any]:
    """The group or the tasks that a name of YAML files means."""
    try:
        with quiet():
            found = manager.load([name])
    except Exception as error:  # whatever its file says wrongly, in any part of the harness
        raise UserError(f"--tasks {name}: {told(error)}") from None
    inner = {child for children in found.get("group_map", {}).values() for child in children}
    groups = [group for name, group in found.get("groups", {}).items() if name not in inner]
    return groups or list(found["tasks"].values())


def told(error: Exception) -> str:
    """An error of the harness, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --------------------------------------------------------------------------------------------------------------- items


def _read(name: str, known: EvalSet, subject: str, data: Path, num_fewshot: int | None, digests: dict[str, str]) -> Any:
    """The task of a set, or the group of its subjects."""
    found = reading.find(data / known.folder)
    split = next((split for split in (*known.scored, "") if split in found), None)
    if split is None:
        raise UserError(f"--tasks {name}: {data} has no such file as {known.files}")
    by_subject = _by_subject(found, split, known)
    if subject and subject not in by_subject:
        raise UserError(f"--tasks {name}: {data / known.folder} has no subject {subject!r}")
    tasks = []
    for one in [subject] if subject else by_subject:
        task_name = name if subject or not known.average else f"{name}_{one}"
        preface = _preface(data / known.folder, one)
        count = num_fewshot if num_fewshot is not None else 0 if preface else known.num_fewshot
        docs, shots = _items(known, one, by_subject[one], _by_subject(found, known.shots, known).get(one, []), count)
        if not docs or len(shots) < count:
            raise UserError(
                f"--tasks {name}: {count} examples before each question are asked for, but {data / known.folder} has "
                f"{len(shots)} {'besides questions' if not known.shots else f'in its split {known.shots}'}"
                f"{f' of {one}' if one else ''}; --num-fewshot 0 asks for none"
            )
        about = preface or (known.about and known.about.format(subject=one.replace("_", " ")) + "\n\n")
        digests[task_name] = _digest(docs, shots, about)
        tasks.append(_task(task_name, known, docs, shots, about))
    return tasks if subject or not known.average else [_group(name, known, tasks)]


def _by_subject(found: dict[str, dict[str, list[Path]]], split: str, known: EvalSet) -> dict[str, list[Path]]:
    """Files of a split by subject; of a set without subjects, all of them under ""."""
    files = found.get(split, {})
    return files if known.average else {"": sorted(itertools.chain.from_iterable(files.values()))}


def _items(
    known: EvalSet, subject: str, files: Sequence[Path], examples: Sequence[Path], count: int
) -> tuple[list[Table], list[Table]]:
    """(questions, examples) of a subject; of the examples no more than `count` are read."""

    def items(paths: Sequence[Path]) -> Iterator[Table]:
        for path in paths:
            for record in reading.read(path, subject, columns=known.columns):
                for item in known.item(record):
                    if not all(choice.strip() for choice in item.get("choices", ())):
                        raise record.error("has an empty choice")
                    yield item

    docs = list(items(files))
    if odd := next((doc for doc in docs if doc.keys() != docs[0].keys()), None):
        raise UserError(f"{files[0]}: some questions have choices and some have none: {odd['prompt']!r:.80}")
    if not known.shots:
        return docs[count:], docs[:count]
    return docs, list(itertools.islice(items(examples), count))


def _preface(folder: Path, subject: str) -> str:
    """The text that a file of the set puts before every question, in place of examples; "" without such a file."""
    for name in PREFACES:
        path = folder / name.format(subject=subject)
        if path.is_file():
            text = reading.read_text(path)
            return text.partition("-----\n")[2].strip() + "\n\n" if "-----\n" in text else text.strip() + "\n\n"
    return ""


def _generated(name: str, num_fewshot: int | None, digests: dict[str, str]) -> Any:
    """A task of a generator of reasoning_gym, whose own verifier grades the replies."""
    gym = need("reasoning_gym", how="pip install reasoning-gym==0.1.25")
    generator = name.removeprefix(GYM)
    count = 5 if num_fewshot is None else num_fewshot
    try:
        entries = list(gym.create_dataset(generator, size=GYM_ITEMS + count, seed=GYM_SEED))
    except ValueError:
        close = difflib.get_close_matches(generator, gym.factory.DATASETS, 1)
        guess = f"; did you mean {GYM}{close[0]}?" if close else ""
        raise UserError(f"--tasks {name}: reasoning_gym has no such generator{guess}") from None
    verify = gym.get_score_answer_fn(generator)
    entries = [entry for entry in entries if entry["answer"] is not None]
    docs: list[Table] = [
        {"prompt": f"Question: {e['question'].strip()}\nAnswer:", "shown": str(e["answer"]), "entry": i}
        for i, e in enumerate(entries)
    ]

    def grade(item: Table, replies: Sequence[str]) -> Table:
        reply = replies[0].strip()
        return {"score": float(verify(reply, entries[item["entry"]])), "unreadable": float(not reply)}

    known = EvalSet("", lambda record: iter(()), metrics=("score",), grade=grade, until=("Question:", "\n\n"))
    digests[name] = _digest(docs[count:], docs[:count], "")
    return _task(name, known, docs[count:], docs[:count], "")


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- the harness's forms


def _task(name: str, known: EvalSet, docs: list[Table], shots: list[Table], about: str) -> Any:
    """The harness's task of these items."""
    api, datasets = need("lm_eval.api.task", how=EXTRA), need("datasets", how=EXTRA)
    chosen = "choices" in docs[0]
    metrics = [*known.metrics, *([] if chosen else ["unreadable"])]
    config: Table = {
        "task": name,
        "custom_dataset": lambda **_: {
            "asked": datasets.Dataset.from_list([doc | {"about": about} for doc in docs]),
            "shots": datasets.Dataset.from_list([doc | {"about": about} for doc in shots or docs[:1]]),
        },
        "test_split": "asked",
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": len(shots),
        "description": "about",
        "target_delimiter": known.delimiter,
        "doc_to_text": "prompt",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": metric != "unreadable"} for metric in metrics
        ],
        "metadata": {"version": 1.0},
    }
    if not chosen:
        kwargs = {"until": list(known.until), "max_gen_toks": known.max_new_tokens, "do_sample": False}
        config |= {"output_type": "generate_until", "doc_to_target": "shown", "generation_kwargs": kwargs}
    elif "ending" in docs[0]:
        config |= {"doc_to_text": "gold", "doc_to_target": "ending"}
    else:
        config |= {"doc_to_target": "gold"}
    if chosen:
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices"}
    if known.grade is not None and (not chosen or "labels" in docs[0]):
        config["process_results"] = known.grade
    with quiet():
        return api.ConfigurableTask(config=config | known.overrides)


def _group(name: str, known: EvalSet, tasks: list[Any]) -> Any:
    """The harness's group of the subjects of a set, with the mean that reports print."""
    group = need("lm_eval.api.group", how=EXTRA).Group
    metrics: Sequence[str] = sorted({metric for task in tasks for metric in task.aggregation()})
    weighed = [{"metric": metric, "weight_by_size": known.average == "items"} for metric in metrics]
    found = group.from_config({"group": name, "aggregate_metric_list": weighed, "metadata": {"version": 1.0}})
    for task in tasks:
        found.add(task)
    return found
