"""The tables that the reports of Tele-FLM and TeleChat print, as data."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from decimal import ROUND_HALF_UP, Decimal
from types import MappingProxyType

TELE_FLM = "Tele-FLM, arXiv 2404.16645"
TELECHAT = "TeleChat, arXiv 2401.03804, and the cards of the released models"
MODEL_CARD = "model card of Tele-FLM-52B-Instruct"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published table.

    Attributes:
      title, source: name of the table, and where it is printed.
      family: "en", "zh" or "tokens": its columns are domains of `tele eval bpb`, and `figure` says which figure of a
        domain; "tasks": they are tasks of the harness, in percent, and `figure` is the prefix of those that ask in the
        way of the table, which go first; "positions": lengths; "alignbench", "teleeval": categories of dialogues.
      columns: names of the cells, in the printed order.
      rows: cells as they are printed, by name of the model.
      averages: for columns that are averages, the weights of all other columns in their order.
      shots: examples before a question, by column.
      metrics: metric of a column of tasks, by column; METRICS, of results.py, for the others.
    """

    title: str
    source: str
    family: str
    figure: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    averages: Mapping[str, tuple[float, ...]]
    shots: Mapping[str, int]
    metrics: Mapping[str, str]

    @property
    def parts(self) -> list[str]:
        """The columns that are no averages."""
        return [column for column in self.columns if column not in self.averages]

    def average(self, name: str, values: Mapping[str, float]) -> float:
        """The average of this name, of a value for each of `parts`."""
        weights = self.averages[name]
        return sum(w * values[part] for w, part in zip(weights, self.parts, strict=True)) / sum(weights)

    def unlike_their_cells(self) -> Iterator[tuple[str, str, str, str]]:
        """Yields (row, average, as printed, computed) where the two differ, rounded to the printed digits."""
        for row, cells in self.rows.items():
            named = dict(zip(self.columns, cells, strict=True))
            for name, weights in self.averages.items():
                exact = [Decimal(str(w)) for w in weights]
                products = (w * Decimal(named[part]) for w, part in zip(exact, self.parts, strict=True))
                computed = (sum(products, Decimal(0)) / sum(exact)).quantize(Decimal(named[name]), ROUND_HALF_UP)
                if computed != Decimal(named[name]):
                    yield row, name, named[name], str(computed)


def _published(
    title: str,
    source: str,
    kind: str,
    text: str,
    averages: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
    metrics: Mapping[str, str] = MappingProxyType({}),
) -> Published:
    """Reads a table: a line of columns, each a name or NAME/SHOTS, then the rows. kind: "FAMILY" or "FAMILY FIGURE"."""
    header, *lines = text.strip().splitlines()
    named = [column.partition("/") for column in header.split()]
    split = [line.rsplit(maxsplit=len(named)) for line in lines]
    rows = {name.strip(): tuple(cells) for name, *cells in split}
    shots = {name: int(number) for name, _, number in named if number}
    family, _, figure = kind.partition(" ")
    return Published(title, source, family, figure, tuple(name for name, _, _ in named), rows, averages, shots, metrics)


def _mean(count: int) -> tuple[float, ...]:
    return (1.0,) * count


# Weights of the domains: WebText, Github, Wikipedia, Book, ArXiv, StackExchange, as Llama and as Tele-FLM mixed them;
# WebText, Code, Book, WorldKnowledge, QA, Classical, Professional.
ENGLISH = {"L-Prop": (82, 4.5, 4.5, 4.5, 2.5, 2.0), "F-Prop": (75.17, 13.48, 3.56, 5.26, 1.46, 1.07)}
CHINESE = {"avg": _mean(7), "weighted": (76.60, 1.91, 11.61, 1.44, 4.50, 0.07, 3.87)}

NORMALISED = {"ARC": "acc_norm", "HellaSwag": "acc_norm"}  # by the length of the answer

TOKENS = _published(
    "Tokens per UTF-8 byte", TELE_FLM, "tokens tokens_per_byte",
    """
            English Chinese ClassicalChinese Code  Multilingual Math  Weighted
    GPT-4       0.221   0.420   0.478            0.267 0.303        0.508 0.291
    Llama 1, 2  0.262   0.515   0.558            0.367 0.314        0.974 0.356
    Llama 3     0.220   0.294   0.353            0.267 0.274        0.508 0.251
    Tele-FLM    0.248   0.235   0.307            0.363 0.340        0.965 0.261
    """,
)  # fmt: skip
ENGLISH_LOSS = _published(
    "English, loss in nats per token", TELE_FLM, "en loss",
    """
            WebText Github Wikipedia Book  ArXiv StackExchange L-Prop F-Prop
    Llama-65B     1.650   0.543  1.297     1.791 1.205 1.293         1.572  1.485
    Llama2-70B    1.588   0.471  1.198     1.695 1.103 1.220         1.506  1.418
    Llama3-70B    1.729   0.597  1.300     1.886 1.042 1.388         1.642  1.556
    Qwen1.5-72B   1.996   0.592  1.433     2.107 1.111 1.393         1.878  1.773
    Tele-FLM 52B  1.598   0.314  1.163     1.843 1.153 1.193         1.512  1.411
    """,
    ENGLISH,
)  # fmt: skip
ENGLISH_BPB = _published(
    "English, bits per byte", TELE_FLM, "en bits_per_byte",
    """
            WebText Github Wikipedia Book  ArXiv StackExchange L-Prop F-Prop
    Llama-65B     0.615   0.286  0.595     0.710 0.590 0.570         0.602  0.574
    Llama2-70B    0.592   0.249  0.544     0.672 0.540 0.538         0.576  0.547
    Llama3-70B    0.542   0.229  0.513     0.633 0.479 0.497         0.528  0.502
    Qwen1.5-72B   0.642   0.234  0.601     0.717 0.521 0.515         0.620  0.586
    Tele-FLM 52B  0.562   0.164  0.570     0.700 0.567 0.531         0.550  0.516
    """,
    ENGLISH,
)  # fmt: skip
CHINESE_LOSS = _published(
    "Chinese, loss in nats per token", TELE_FLM, "zh loss",
    """
            WebText Code  Book  WorldKnowledge QA    Classical Professional avg   weighted
    Llama-65B     1.773   1.236 2.029 1.586          2.076 2.819     1.215        1.819 1.782
    Llama2-70B    1.419   1.019 1.542 1.189          1.681 2.233     0.896        1.426 1.414
    Llama3-70B    2.152   1.264 2.210 1.722          2.568 2.844     1.109        1.981 2.114
    Qwen1.5-72B   2.260   1.405 2.520 1.751          2.888 2.748     0.908        2.069 2.243
    Tele-FLM 52B  1.923   1.096 2.135 1.612          2.530 2.144     0.846        1.755 1.913
    """,
    CHINESE,
)  # fmt: skip
CHINESE_BPB = _published(
    "Chinese, bits per byte", TELE_FLM, "zh bits_per_byte",
    """
            WebText Code  Book  WorldKnowledge QA    Classical Professional avg   weighted
    Llama-65B     1.325   0.744 1.503 1.161          1.528 2.280     0.919        1.351 1.326
    Llama2-70B    1.060   0.614 1.142 0.869          1.237 1.811     0.678        1.059 1.052
    Llama3-70B    0.913   0.498 0.943 0.752          1.063 1.458     0.485        0.873 0.897
    Qwen1.5-72B   0.759   0.537 0.871 0.663          0.951 1.237     0.329        0.764 0.759
    Tele-FLM 52B  0.643   0.478 0.741 0.619          0.831 0.949     0.290        0.650 0.646
    """,
    CHINESE,
)  # fmt: skip
ENGLISH_TASKS = _published(
    "English benchmarks, percent", TELE_FLM + "; HumanEval is pass@5", "tasks",
    """
            Avg   ARC/25 HellaSwag/10 MMLU/5 TruthfulQA/0 WinoGrande/5 GSM8K/5 HumanEval/0 BBH/3
    Llama2-70B    63.39 67.32  87.33        69.83  44.92        83.74        54.06   46.95       52.94
    Llama2-13B    50.29 59.39  82.13        55.77  37.38        76.64        22.82   28.66       39.52
    Llama-65B     56.98 63.48  86.09        63.93  43.43        82.56        37.23   33.54       45.54
    Llama-13B     46.20 56.23  80.93        47.67  39.48        76.24        7.58    23.78       37.72
    Tele-FLM 52B  56.60 59.47  82.25        64.00  43.09        79.40        45.19   34.76       44.60
    """,
    {"Avg": _mean(8)},
    NORMALISED | {"HumanEval": "pass@5"},
)  # fmt: skip
CHINESE_TASKS = _published(
    "Chinese benchmarks, percent", TELE_FLM + "; by OpenCompass", "tasks",
    """
            Avg   C-Eval CMMLU C3    CHID  CSL
    GPT-4         76.64 69.90  71.00 95.10 82.20 65.00
    GPT-3.5       61.86 52.50  53.90 85.60 60.40 56.90
    Qwen1.5-72B   80.45 83.72  83.09 81.86 91.09 62.50
    Qwen-72B      83.00 83.30  83.60 95.80 91.10 61.20
    DeepSeek-67B  73.46 66.90  70.40 77.80 89.10 63.10
    Tele-FLM 52B  71.13 65.48  66.98 66.25 92.57 64.38
    """,
    {"Avg": _mean(5)},
)  # fmt: skip
TELECHAT_TASKS = _published(
    "TeleChat chat models, percent", TELECHAT, "tasks telechat_",
    """
        MMLU/5 C-Eval/5 CMMLU/5 AGIEval/0 GAOKAO/0 GSM8K/4 MATH/4 HumanEval/0 CSL/0 CHID/0 EPRSTMT/0 BBH/3 HellaSwag/0
    TeleChat-1B   36.5 53.3 42.1 32.1 34.5 36.8 7.2  12.8 45.62 69.8 87.5 37.4 29.6
    TeleChat-7B   60.5 64.6 64.3 46.8 59   36.7 10.3 20.1 66.8  88.0 87.5 19.5 36.7
    TeleChat-12B  73.3 66.6 74.2 51.7 53.1 57.2 16.0 22.0 60.6  83.2 86.3 52.2 71.5
    """,
    metrics=NORMALISED | {"HumanEval": "pass@1"},
)  # fmt: skip
LENGTHS = _published(
    "Perplexity of text of so many tokens", TELECHAT, "positions",
    """
                                      2k   4k   8k   16k  32k  64k  96k
    TeleChat-7B, without scaling      4.81 4.66 39.3 98.3 155  487  448
    TeleChat-7B, NTK and attention    4.81 4.66 5.19 4.04 4.14 9.41 7.97
    """,
)  # fmt: skip
# The overall score is the mean of two means, of reasoning (Math, Logi) and of language (the other six).
ALIGNBENCH = _published(
    "AlignBench, 1 to 10", MODEL_CARD, "alignbench",
    """
            Overall Math Logi Fund Chi  Open Writ Role Pro
    gpt-4-1106-preview       7.58 7.39 6.83 7.69 7.07 8.66 8.23 8.08 8.55
    gpt-4-0613               6.83 6.33 5.15 7.16 6.76 7.26 7.31 7.48 7.56
    gpt-3.5-turbo-0613       5.68 4.90 4.79 6.01 5.60 6.97 7.27 6.98 6.29
    chatglm-turbo            6.36 4.88 5.09 7.50 7.03 8.45 8.05 7.67 7.70
    FLM-2-52B-Instruct-2407  6.23 3.79 5.15 7.69 7.86 8.45 8.17 7.88 7.85
    """,
    {"Overall": (3, 3, 1, 1, 1, 1, 1, 1)},
)  # fmt: skip
TELEEVAL = _published(
    "TeleEval", "Tele-FLM's internal set of 2,500 dialogues; no figure is published", "teleeval",
    "ChitChat Knowledge Translation Logic LongWriting Hallucination Safety RolePlay TaskExecution Mathematics",
)  # fmt: skip
TABLES = (
    TOKENS, ENGLISH_LOSS, ENGLISH_BPB, CHINESE_LOSS, CHINESE_BPB, ENGLISH_TASKS, CHINESE_TASKS, TELECHAT_TASKS,
    LENGTHS, ALIGNBENCH, TELEEVAL,
)  # fmt: skip

FAMILIES = {"en": ENGLISH_BPB.parts, "zh": CHINESE_BPB.parts, "tokens": TOKENS.parts[:-1]}


def find_domains(family: str, names: Iterable[str]) -> dict[str, str]:
    """The domains of a family of tables among those of results: {column: name of the domain}.

    A name that two families have (WebText, Book, Code) counts for the one whose other names are there, and for none
    where both are. The names en.Book and zh.Book, tokens.Code and zh.Code say which they belong to.

    >>> find_domains("zh", ["WebText", "QA", "en.WebText", "Law"])
    {'WebText': 'WebText', 'QA': 'QA'}
    """
    names = set(names)
    owners = {name: [f for f, columns in FAMILIES.items() if name in columns] for name in names}
    present = {found[0] for found in owners.values() if len(found) == 1}
    found = {}
    for column in FAMILIES[family]:
        if f"{family}.{column}" in names:
            found[column] = f"{family}.{column}"
        elif family in owners.get(column, ()) and present & set(owners[column]) == {family}:
            found[column] = column
    return found
