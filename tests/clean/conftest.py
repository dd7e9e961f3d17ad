"""Text for the cleaning tests, written for them or made from a fixed seed."""

import json
import random

import pytest

WORDS = (
    "anchor apple autumn baker barrel basket bottle bridge bright broken bucket butter candle canvas captain carriage "
    "castle cellar chapel cheese cherry chimney circle clever cliff cloud coffee copper corner cotton cousin crowd "
    "curtain daughter desert dinner doctor dragon eagle early empty engine evening fabric farmer feather fence fiddle "
    "finger flower forest forgotten fountain friend frozen garden gentle glass golden grain hammer harbor harvest "
    "heavy hidden hollow honest honey horse hungry island ivory jacket journey kettle kitchen ladder lantern larger "
    "leather letter little lonely market meadow merchant mirror morning mother mountain narrow needle neighbor "
    "northern orchard painter paper parrot pebble pepper pilot planet pocket potter prince quarrel quiet rabbit "
    "railway ribbon river rusty sailor salmon school seldom shadow shepherd silver singer sister soldier spider "
    "spring stable station steady stone stranger summer tailor temple thirsty thunder timber tower travel tunnel "
    "uncle valley velvet village violin wagon walnut weaver western whisper widow willow window winter wooden yellow "
    "younger "
)


@pytest.fixture(scope="session")
def prose():
    """English sentences of everyday words; every document of its own, breaking no rule."""
    rng = random.Random(7)

    def sentence(kind):
        a, b, c, d, e, f = rng.sample(WORDS.split(), 6)
        return (
            f"The {a} of the {b} was {c} to {d} with {e} and {f}.",
            f"It is {a} that those who have {b} know {c} as well as the {d} of {e} {f}.",
            f"Nobody who {a} would {b} with them to the {c} that {d} and {e} had {f}.",
            f"There were {rng.randrange(3, 900)} {a} near the {b}, and {c} was {d} from {e} or {f}.",
        )[kind]

    # Each kind at most three times in a document, or its words would be a repetition.
    return [" ".join(map(sentence, rng.sample([0, 1, 2, 3] * 3, 9))) for _ in range(60)]


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
