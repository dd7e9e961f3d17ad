"""Pools of dialogues of our making, with defects that are known."""

import json
import random

SUBJECTS = ("harbour", "mountain", "library", "railway", "orchard", "theatre", "glacier", "volcano", "museum", "bridge")
VERBS = (
    "carries",
    "shelters",
    "attracts",
    "frightens",
    "feeds",
    "delights",
    "divides",
    "protects",
    "outlives",
    "names",
)
CHINESE = "山川河流春夏秋冬风雨雷电花草树木鸟兽虫鱼金石丝竹诗书礼乐东西南北天地日月"


def sentence(rng):
    parts = [f"the old {rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.randrange(1000)} people" for _ in range(3)]
    return f"In {rng.randrange(1000, 2000)} {parts[0]}, {parts[1]} and {parts[2]}."


def chinese(rng):
    return "，".join("".join(rng.choice(CHINESE) for _ in range(8)) for _ in range(3)) + "。"


def pair(rng, category):
    if category == "zh":
        return f"请说说{''.join(rng.choice(CHINESE) for _ in range(9))}的故事？", chinese(rng)
    if category == "maths":
        a, b = rng.randrange(1000), rng.randrange(1000)
        return f"Li has {a} pears and buys {b} more pears. How many pears has Li now?", f"{a + b}"
    return (
        f"What is told of {rng.choice(SUBJECTS)} number {rng.randrange(10**6)} in the year of {sentence(rng)}",
        sentence(rng),
    )


def planted(count=200, seed=0):
    """(records, defects): each record a question and an answer; defects: {row: name}, of 40% of the rows.

    `copy` rows repeat an earlier row but for one word.
    """
    rng = random.Random(seed)
    rows, defects = [], {}
    for i in range(count):
        category = ("en", "zh", "maths")[i % 3]
        question, answer = pair(rng, category)
        kind = rng.choice(("copy", "truncated", "language", "", "", "")) if i > 10 and category != "maths" else ""
        clean = [j for j in range(i) if j not in defects and rows[j][2] == category]
        if kind == "copy":
            question, answer, _ = rows[rng.choice(clean)]
            answer += "好。" if category == "zh" else " Indeed."
        elif kind == "truncated":
            answer = answer[: len(answer) * 2 // 3].rstrip("。.")
        elif kind == "language":
            answer = chinese(rng) if category == "en" else sentence(rng)
        if kind:
            defects[i] = kind
        rows.append((question, answer, category))
    return [record(*row) for row in rows], defects


def record(question, answer, category):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "category": category}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
