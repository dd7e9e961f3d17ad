"""`tele data show --config PAGE`: the rows that a stage trains on, what is learned of them, and where it is from."""

import json
import re

import pytest

from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.stages import run_config
from tests.data import caches

PAGE = """
from ml_collections import ConfigDict

def get_config():
    data = dict(tokenizer="{tokenizer}", sources=dict(chat=dict(files=("{file}",), format="dialogues")))
    config = ConfigDict()
    config.run = ("pretrain", "tune")
    shared = dict(steps=3, batch_size=2, seq_len=40, optimizer=dict(learning_rate=1e-3))
    model = dict(num_layers=1, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24, vocab_size=1000)
    config.pretrain = dict(kind="pretrain", data=data, model=model, **shared)
    config.tune = dict(kind="sft", data=dict(data, dialogues=dict(next_user=True)), seed=7, **shared)
    return config
"""


@pytest.fixture
def page(model_file, tmp_path):
    short, long, wide = (
        caches.talk("Hi?", "Yes."),
        caches.talk(*("a b c d" for _ in range(10))),
        caches.talk("q", "z " * 60),
    )
    short["messages"][1]["weight"] = 0.42
    caches.write_lines(tmp_path / "chat.jsonl", [short, long, wide])
    (tmp_path / "page.py").write_text(PAGE.format(tokenizer=model_file, file=tmp_path / "chat.jsonl"))
    return tmp_path / "page.py"


def show(page, capsys, *flags):
    out = page.parent / "figures.json"
    assert main(["data", "show", "--config", str(page), "--json", str(out), *flags]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


def test_lines_that_cannot_be_used_are_told_in_a_note(page, capsys, recwarn):
    with (page.parent / "chat.jsonl").open("a") as file:
        file.write('{"messages": 3}\n')
    figures, text = show(page, capsys)
    assert figures["notes"][0].startswith("sources.chat.files: 1 of 4 documents cannot be used; the first is ")
    assert figures["notes"][0] in text and not recwarn.list


def test_the_rows_of_a_stage_are_shown_as_it_reads_them(page, capsys):
    figures, text = show(page, capsys, "--count", "6")
    stage = run_config(load_page(str(page))).stages["tune"]
    feed = caches.open_feed(stage.data, kind="sft", seq_len=40, batch_size=2, seed=7)
    batches = [next(feed) for _ in range(3)]
    expected = [segment for batch in batches for segment in caches.segments(batch)]
    shown = [segment for row in figures["rows"] for segment in row["segments"]]
    assert [s["end"] - s["begin"] for s in shown] == [len(segment["targets"]) for segment in expected]
    assert [s["learned"] for s in shown] == [int((segment["loss_weights"] > 0).sum()) for segment in expected]
    assert [row["domains"] for row in figures["rows"]] == [["chat"]] * 6
    file = re.escape(str(page.parent / "chat.jsonl"))
    notes = {segment["note"] for segment in shown}
    assert any(re.fullmatch(rf"{file}, byte 0", note) for note in notes)
    assert any(re.fullmatch(rf"{file}, byte \d+, split: turns 1 to \d of 5", note) for note in notes)
    assert any(re.fullmatch(rf"{file}, byte \d+, cut to 40 positions", note) for note in notes)
    assert "were split at turns" in text and "were cut to fit" in text
    assert re.search(r"^\+0\.42 Yes\.⟦<_end>⟧$", text, re.MULTILINE) and re.search(
        r"^\+ .*⟦<_end>⟧⟦<_user>⟧", text, re.M
    )
    later, _ = show(page, capsys, "--step", "1", "--count", "2")
    assert later["rows"] == figures["rows"][2:4]


def test_tokens_and_rows_of_pretraining_are_shown(page, capsys):
    figures, _ = show(page, capsys, "--tokens", "--stage", "pretrain", "--domain", "chat")
    ((segment, *_),) = (row["segments"] for row in figures["rows"])
    assert (
        segment["learned"]
        == segment["end"] - segment["begin"]
        == sum(p["text"].count("│") for p in segment["parts"]) - 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the directory of a cache, or --config PAGE"),
        (["rows", "--stage", "tune"], "--stage: is of a page"),
        (["--config", "PAGE", "--stage", "tun"], "--stage tun: no stage that trains on rows; did you mean 'tune'"),
        (["--config", "PAGE", "--domain", "chats"], "--domain chats: did you mean 'chat'"),
        (["--config", "PAGE", "--row", "-1"], "--row and --step must not be below 0"),
    ],
)
def test_what_is_not_there_is_named(page, capsys, arguments, message):
    assert main(["data", "show", *(str(page) if word == "PAGE" else word for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_pairs_and_prompts_are_shown_with_what_is_learned(page, capsys):
    """Both answers of a pair, the end among what is learned; bad lines in a note."""
    pairs = [{"prompt": "Hi?", "chosen": "Yes.", "rejected": "No no.", "margin": 2}, {"prompt": "Hi?", "chosen": ""}]
    file = caches.write_lines(page.parent / "pairs.jsonl", pairs)
    source = f"dict(files=({file!r},), format='pairs')"
    text = page.read_text().replace("tune", "prefer").replace('kind="sft"', 'kind="dpo"')
    text = text.replace("dict(data, dialogues=dict(next_user=True))", f"dict(data, sources=dict(pairs={source}))")
    page.write_text(text)
    figures, text = show(page, capsys, "--stage", "prefer")
    assert [row["what"] for row in figures["rows"]] == ["chosen", "rejected"] and "margin 2, weight 1" in text
    said = {
        learned: [
            "".join(p["text"] for p in row["segments"][0]["parts"] if p["learned"] == learned)
            for row in figures["rows"]
        ]
        for learned in (True, False)
    }
    assert [text.strip() for text in said[True]] == ["Yes.⟦<_end>⟧", "No no.⟦<_end>⟧"]
    assert said[False][0] == said[False][1] and "Hi?" in said[False][0]
    assert "1 of 2 documents cannot be used" in figures["notes"][0]
    assert main(["data", "show", "--config", str(page), "--stage", "prefer", "--domain", "no"]) == 2
