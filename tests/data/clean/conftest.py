"""Text for the cleaning tests, written for them or made from a fixed seed."""

import json
import random
import re

import pytest


@pytest.fixture(scope="session")
def prose():
    """English sentences of words from Python's documentation; every document of its own, breaking no rule."""
    from pydoc_data import topics

    words = sorted({w for text in topics.topics.values() for w in re.findall(r"\b[a-z]{4,9}\b", text)})
    rng = random.Random(7)

    def sentence():
        a, b, c, d, e, f = rng.sample(words, 6)
        return rng.choice(
            (
                f"The {a} of the {b} was {c} to {d} with {e} and {f}.",
                f"It is {a} that those who have {b} know {c} as well as the {d} of {e} {f}.",
                f"Nobody who {a} would {b} with them to the {c} that {d} and {e} had {f}.",
                f"There were {rng.randrange(3, 900)} {a} near the {b}, and {c} was {d} from {e} or {f}.",
            )
        )

    return [" ".join(sentence() for _ in range(9)) for _ in range(60)]


@pytest.fixture(scope="session")
def chinese():
    """Chinese documents that break no rule."""
    rng = random.Random(8)
    parts = ("山里的人", "河边的老人", "城里的孩子", "南方来的商人", "北门外的学生", "卖花的姑娘")
    verbs = ("说起了", "想不到会有", "修好了", "忘记了", "看见了", "写下了")
    things = ("一座石桥", "那年的大雪", "三条旧船", "村口的大树", "远方的来信", "这本小书", "桥下的流水")

    def sentence():
        return f"{rng.choice(parts)}在{rng.randrange(1900, 1999)}年{rng.choice(verbs)}{rng.choice(things)}。"

    return ["".join(sentence() for _ in range(6)) for _ in range(40)]


@pytest.fixture
def jsonl(tmp_path):
    """Writes records (dicts or raw lines) to a file below tmp_path."""

    def write(name, records):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in records]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write
