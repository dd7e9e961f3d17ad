"""`tele data cache`, `show` and `stats` as a user runs them, and `tele train` on what they made."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tele_jax import checkpoint
from tele_jax.axes import flatten
from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.settings import cache_config
from tests.data import caches

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGES = """
from pathlib import Path
from ml_collections import ConfigDict

HERE = Path(__file__).parent
TOKENIZER = str(HERE / "tokenizer.model")
"""

DATA = """
def get_config():
    config = ConfigDict()
    config.kind = "{kind}"
    config.seq_len = 32
    config.shard_bytes = 6000
    config.data = dict(tokenizer=TOKENIZER, sources={{
        name: dict(files=(str(HERE / f"{{name}}.jsonl"),),
                   validation_files=(str(HERE / f"{{name}}_held_out.jsonl"),), format="{format}", rate=rate)
        for name, rate in {rates}.items()
    }})
    return config
"""

TRAIN = """
def get_config():
    data = dict(tokenizer=TOKENIZER, cache=str(HERE / "rows"), eval_bytes=500)
    shared = dict(batch_size=4, seq_len=32, log_every=5, checkpoint_every=5, optimizer=dict(learning_rate=3e-3))
    model = dict(num_layers=2, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=600)
    config = ConfigDict()
    config.run = ("pretrain", "sft")
    config.pretrain = dict(
        kind="pretrain", data=data, steps=20, model=dict(model, dtype="float32", remat="none"), **shared
    )
    config.sft = dict(kind="sft", data=dict(data, cache=str(HERE / "dialogue_rows")), steps=5, **shared)
    return config
"""


FIRST = """
both = get_config

def get_config():
    config = both()
    config.run = ("pretrain",)
    del config.sft
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with text, a tokenizer, pages, and the caches `rows` and `dialogue_rows`."""
    directory = tmp_path_factory.mktemp("rows")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 8))) for _ in range(300)]
    for name, count in (("code", 200), ("prose", 100)):
        lines = [{"text": f"{name} {i}: {' '.join(rng.choices(words, k=20))} 第{i}个"} for i in range(count)]
        write(directory / f"{name}.jsonl", lines)
    messages = [[("user", f"{i}+1?"), ("assistant", f"{i + 1}, surely.")] for i in range(120)]
    dialogues = [{"messages": [{"role": r, "content": c} for r, c in each]} for each in messages]
    write(directory / "dialogues.jsonl", dialogues)
    for name in ("code", "prose", "dialogues"):
        lines = (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (directory / f"{name}_held_out.jsonl").write_text("".join(lines[::-2]), encoding="utf-8")
    sft = DATA.format(kind="sft", format="dialogues", rates={"dialogues": 1})
    pretrain = DATA.format(kind="pretrain", format="jsonl", rates={"code": 3, "prose": 1})
    for name, page in (("data", pretrain), ("sft", sft), ("train", TRAIN), ("pretrain", TRAIN + FIRST)):
        (directory / f"{name}.py").write_text(PAGES + page)
    arguments = ["tokenizer", "train", "--preset", "tele_flm", "--vocab-size", "480", "--out"]
    assert main([*arguments, str(directory / "tokenizer.model"), str(directory / "code.jsonl")]) == 0
    for page, out in (("data", "rows"), ("sft", "dialogue_rows")):
        assert make(directory, page, out, "--json", str(directory / f"{out}.json")) == 0
    return directory


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def make(place, page, out, *more):
    config, out = str(place / f"{page}.py"), str(place / out)
    return main(["data", "cache", "--config", config, "--out", out, "--runner", "serial", *more])


def fails(capsys, code, *arguments):
    """The one line that a command says."""
    assert main([str(word) for word in arguments]) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


def test_a_cache_is_counted_as_it_is_made(place):
    figures = json.loads((place / "rows.json").read_text())
    texts = [json.loads(line)["text"] for line in (place / "code.jsonl").read_text().splitlines()]
    code = figures["domains"]["code"]
    assert (code["documents"], code["text_bytes"]) == (200, sum(len(text.encode()) for text in texts))
    assert code["tokens"] == code["learned_tokens"] == code["text_tokens"] + 200
    assert figures["domains"]["prose"]["documents"] == 100
    held_out = {name: domain["held_out"] for name, domain in figures["domains"].items()}
    assert held_out == {"code": 100, "prose": 50}, "every second one"


def test_stats_print_and_draw(place, capsys, tmp_path):
    arguments = ["data", "stats", str(place / "rows"), "--tokens", "64e3", "--verify"]
    more = ["--plot", str(tmp_path / "stats.png"), "--json", str(tmp_path / "stats.json")]
    assert main([*arguments, *more]) == 0
    out = capsys.readouterr().out
    assert "75.0000%     75.0000%" in out and "verified:" in out and "tokens/byte" in out
    assert (tmp_path / "stats.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    figures = json.loads((tmp_path / "stats.json").read_text())
    for domain in figures["domains"].values():
        assert abs(domain["share_drawn"] - domain["share"]) < 1e-3
        assert domain["epochs"] == pytest.approx(figures["rows_of_run"] * domain["share"] / domain["rows"])
        assert domain["tokens_per_byte"] == pytest.approx(domain["text_tokens"] / domain["text_bytes"])
    assert figures["rows_of_run"] == 2000


def test_show_prints_rows_with_borders_and_weights(place, capsys, tmp_path):
    file = tmp_path / "rows.json"
    assert main(["data", "show", str(place / "dialogue_rows"), "--row", "1", "--count", "2", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count("=== dialogues, row") == 2 and "--- segment 1: positions" in out and "\x1b[" not in out
    (segment, *_) = json.loads(file.read_text())["rows"][0]["segments"]
    question, answer = segment["parts"]
    number = int(question["text"].removeprefix("⟦<_user>⟧").split("+")[0])
    assert (question["text"], question["learned"]) == (f"⟦<_user>⟧{number}+1?⟦<_bot>⟧", False)
    assert (answer["text"], answer["learned"]) == (f"{number + 1}, surely.⟦<_end>⟧", True)
    assert f"- ⟦<_user>⟧{number}+1?⟦<_bot>⟧\n+ {number + 1}, surely.⟦<_end>⟧\n" in out
    assert main(["data", "show", str(place / "dialogue_rows"), "--row", "1", "--color", "always"]) == 0
    assert f"\x1b[2m⟦<_user>⟧{number}+1?⟦<_bot>⟧\x1b[0m\x1b[32m{number + 1}, surely" in capsys.readouterr().out


def test_a_marker_that_somebody_typed_is_shown_as_text(place):
    from tele_jax.data import describe
    from tele_jax.data.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(place / "tokenizer.model")
    real = describe.spell([vocabulary.bot_id], vocabulary)
    for typed in ("<_bot>", real, "\\u27e6<_bot>\\u27e7"):
        assert real not in describe.spell(vocabulary.encode(f"a {typed} b"), vocabulary)


def test_show_follows_the_order_of_a_run(place, capsys, tmp_path):
    from tele_jax.data.vocabulary import load_vocabulary
    from tele_jax.settings import DataConfig

    data = DataConfig(tokenizer=str(place / "tokenizer.model"), cache=str(place / "rows"))
    batch = caches.open_feed(data, kind="pretrain", seq_len=32, batch_size=4, seed=2).read(9)
    arguments = ["data", "show", str(place / "rows"), "--step", "9", "--batch-size", "4", "--seed", "2"]
    assert main([*arguments, "--count", "4", "--json", str(tmp_path / "rows.json")]) == 0
    vocabulary = load_vocabulary(place / "tokenizer.model")
    shown = json.loads((tmp_path / "rows.json").read_text())["rows"]
    for i, row in enumerate(shown):
        ids = batch["targets"][i][batch["segment_ids"][i] == 1].tolist()
        text = "".join(part["text"] for part in row["segments"][0]["parts"])
        assert text.removeprefix("⟦</s>⟧").removesuffix("⟦</s>⟧") == vocabulary.decode(ids)
    assert "epoch" in capsys.readouterr().out


def test_mistakes_are_one_line(place, capsys, tmp_path):
    cache = ["data", "cache", "--config", place / "data.py", "--runner", "serial"]
    out = ["--out", tmp_path / "rows"]
    for arguments, message in (
        ([*cache, "--out", place / "rows"], "rows: is there already"),
        (
            [*cache, *out, "--config.data.sources.code.rate=0", "--config.data.sources.prose.rate=0"],
            "config.data: sources: rate=0 leaves every domain out",
        ),
        ([*cache, *out, "--config.data.sources.code.rate=-2"], "rate=-2.0 must be 0 or above, and finite"),
        ([*cache, *out, "--config.kind=sft"], "sources.code: fine-tuning learns answers"),
        ([*cache, *out, "--config.sequence=5"], "config.sequence: unknown key of CacheConfig; did you mean 'seq_len'"),
        ([*cache, *out, "--config.data.tokenizer=absent"], "absent: No such file or directory"),
        ([*cache, *out, "--workers", "0"], "--workers 0: must be above 0"),
        ([*cache, *out, "--workers", "2"], "workers=2 is for the DirectRunner"),
        (["data", "show", place / "rows", "--domain", "cod"], "--domain cod:"),
        (["data", "show", place / "rows", "--row", "9999"], "--row 9999 --count 1: code has the rows 0 to"),
        (["data", "show", place / "rows", "--row", "-1"], "--row -1"),
        (["data", "show", place / "rows", "--row", "1", "--step", "2"], "--step: not below 0, and without"),
        (["data", "stats", tmp_path / "absent"], "not a row cache"),
        (["data", "show", place / "rows", "--step", "9" * 20], "a run has at most 549,755,813,888 rows"),
        (["data", "stats", place / "rows", "--tokens", "0"], "--tokens 0: must be above 0"),
        (["data", "stats", place / "rows", "--tokens", "inf"], "--tokens inf: must be above 0 and finite"),
        (["data", "stats", place / "rows", "--plot", tmp_path / "x.weird"], "x.weird: Format 'weird' is not supported"),
        ([*cache, *out, "--config.data.sources={'a.b': {}}"], "does not accept dots in field names"),
        (["data", "stats", place / "rows", "--config.seed=1"], "tele data stats takes no --config"),
    ):
        assert message in fails(capsys, 2, *arguments)
    assert not list(tmp_path.iterdir())


def test_figures_of_a_cache_that_cannot_be_written_to(place, capsys, tmp_path, monkeypatch):
    from tele_jax.data import describe

    def refuse(manifest, path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(describe, "plot", refuse)  # root may write everywhere, so that no mode of a file would do
    assert main(["data", "stats", str(place / "rows"), "--json", str(tmp_path / "stats.json")]) == 0
    assert "stats.png: Permission denied; --plot FILE puts it elsewhere" in capsys.readouterr().out
    assert json.loads((tmp_path / "stats.json").read_text())["domains"]


def test_a_damaged_shard_is_named_by_verify(place, capsys, tmp_path):
    import shutil

    shutil.copytree(place / "rows", tmp_path / "rows")
    shard = tmp_path / "rows/code/00000.array_record"
    content = bytearray(shard.read_bytes())
    content[300] ^= 1
    shard.write_bytes(content)
    assert "1 of" in fails(capsys, 1, "data", "stats", tmp_path / "rows", "--verify")
    assert "code/00000.array_record: damaged" in fails(capsys, 1, "data", "show", tmp_path / "rows", "--count", 30)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.pretrain.seq_len=16", "its rows have seq_len=32, the stage asks for seq_len=16"),
        ("--config.pretrain.data.cache='nowhere'", "nowhere: not a row cache"),
        ("--config.sft.data.cache={rows!r}", "its rows have kind=pretrain, the stage asks for kind=sft"),
        ("--config.pretrain.data.sources={{'cod': {{}}}}", "has no such domain; did you mean 'code'?"),
        ("--config.pretrain.data.sources={{'code': {{'rate': -1}}}}", "rate=-1.0 must be 0 or above, and finite"),
    ],
)
def test_a_cache_that_does_not_fit_a_run_is_refused_before_it_starts(place, capsys, tmp_path, override, expected):
    override = override.format(rows=str(place / "rows"))
    line = fails(capsys, 2, "train", "--config", place / "train.py", "--workdir", tmp_path / "w", override)
    assert expected in line
    assert not list((tmp_path / "w").rglob("checkpoints/*"))


def start(place, workdir):
    command = [sys.executable, "-m", "tele_jax.cli.main", "train", "--config", str(place / "pretrain.py"), "--workdir"]
    return subprocess.Popen([*command, str(workdir)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_from_a_cache_that_was_killed_ends_as_one_that_was_not(place, capsys):
    page = ["train", "--config", str(place / "pretrain.py"), "--workdir"]
    assert main([*page, str(place / "undisturbed")]) == 0
    workdir = place / "killed"
    process = start(place, workdir)
    while not (workdir / "pretrain/checkpoints/5").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    output = process.communicate()[0]
    assert process.returncode != 0, output
    assert main([*page, str(workdir)]) == 0
    assert "goes on at step" in capsys.readouterr().out
    states = {}
    for run in ("killed", "undisturbed"):
        loaded = checkpoint.load(place / run / "pretrain")
        states[run] = json.loads(loaded.data_state)
        assert loaded.provenance[-1]["data"]["domains"] == ["code", "prose"]
    assert states["killed"] == states["undisturbed"] and states["killed"]["batches"] == 20
    got, expected = (flatten(checkpoint.load(place / run / "pretrain").params) for run in ("killed", "undisturbed"))
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(value), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["tele_flm", "quickstart", "quickstart_sft"])
def test_the_pages_of_the_project_are_pages(name):
    config = cache_config(load_page(str(Path(__file__).parents[2] / f"configs/data/{name}.py")))
    if name == "tele_flm":
        rates = {domain: source.rate for domain, source in config.data.sources.items()}
        assert len(rates) == 11 and sum(rates.values()) == pytest.approx(100, abs=0.02)
        assert rates["WebText"] == 75.21 and rates["ClassicalChinese"] == 0.02 and config.seq_len == 4096
