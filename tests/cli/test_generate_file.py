"""tele generate with stop strings, log-probabilities and a file of prompts, and what it refuses."""

import json

import pytest

from tele_jax import checkpoint
from tele_jax.cli import generate as verb
from tele_jax.data import dialogue
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.inference.generate import generate_scored
from tests.cli.test_talk import RELEASED, spoken, tele
from tests.inference.test_chat import model, tokenizer_bytes, work_directory

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return work_directory(tmp_path_factory.mktemp("run") / "W")


@pytest.fixture
def vocabulary(work):
    return load_vocabulary(work / "tokenizer.model")


def drawn(vocabulary, prompts, count, **options):
    options = dict(stop_ids=[vocabulary.end_id], **RELEASED) | options
    return generate_scored(*model(), prompts, max_new_tokens=count, **options)


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_stop_string_and_log_probabilities(work, vocabulary, capsys, tmp_path):
    common = ("generate", work, "--prompt", "The 蛇", "--max-new-tokens", 7, "--json", tmp_path / "figures.json")
    whole = tele(capsys, *common)[:-1]
    stop = whole[3:5]
    assert (
        tele(capsys, *common, "--stop", "never in it", "--stop", stop, "--logprobs") == whole[: whole.find(stop)] + "\n"
    )
    ((tokens, logprobs),) = drawn(vocabulary, [vocabulary.encode("The 蛇")], 7)
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["continuations"]
    count = figures["new_tokens"]
    assert figures["ended"] == "stop" and figures["text"] == whole[: whole.find(stop)] and count < len(tokens)
    assert [entry["token"] for entry in figures["logprobs"]] == tokens[:count]
    assert [entry["logprob"] for entry in figures["logprobs"]] == pytest.approx(logprobs[:count], abs=1e-5)
    assert all(isinstance(entry["text"], str) for entry in figures["logprobs"])


PROMPTS = [
    {"prompt": "The cat", "id": 7},
    {"prompt": "画\n蛇"},
    {"prompt": "The cat sat on the mat. "},
    {"prompt": "a"},
]


@pytest.fixture
def ask(work, capsys, tmp_path):
    """Runs `tele generate` on a file of prompts; returns what is printed."""
    prompts, out = write(tmp_path / "prompts.jsonl", PROMPTS), tmp_path / "out.jsonl"

    def run(*flags, code=0, **others):
        paths = {"ckpt": work, "prompts": prompts, "out": out} | others
        files = ("--prompts", paths["prompts"], "--out", paths["out"])
        return tele(capsys, "generate", paths["ckpt"], *files, "--max-new-tokens", 5, *flags, code=code)

    return run


def test_a_file_of_prompts_is_continued_and_goes_on_after_an_interruption(work, vocabulary, ask, tmp_path, monkeypatch):
    out, whole, flags = tmp_path / "out.jsonl", tmp_path / "whole.jsonl", ("--logprobs", "--batch-size", 2)
    printed = ask(*flags, "--json", tmp_path / "figures.json", out=whole)
    assert printed.splitlines()[-1] == f"4 continuations in {whole}"
    results = drawn(vocabulary, [vocabulary.encode(record["prompt"]) for record in PROMPTS], 5)
    for record, line, (tokens, logprobs) in zip(PROMPTS, lines_of(whole), results, strict=True):
        prompt_tokens = len(vocabulary.encode(record["prompt"]))
        figures = {"prompt_tokens": prompt_tokens, "new_tokens": len(tokens), "ended": "length"}
        tokens_of_line = line.pop("logprobs")
        # The text goes on from the prompt: a space of the first token is one.
        assert line.pop("text").lstrip() == spoken(vocabulary, tokens).lstrip()
        assert line == record | figures
        assert [entry["token"] for entry in tokens_of_line] == tokens
        assert [entry["logprob"] for entry in tokens_of_line] == pytest.approx(logprobs, abs=1e-4)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["prompts"], figures["prompts_before"], figures["new_tokens"]) == (4, 0, 20)

    original, calls = verb.continue_texts, []

    def interrupted(*args, **how):
        calls.append(how["numbers"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **how)

    monkeypatch.setattr(verb, "continue_texts", interrupted)
    ask(*flags, code=130)
    assert calls == [[0, 2], [3, 1]]  # of like length
    with out.open("ab") as file:
        file.write(b'{"prompt": "\xe7')
    assert ask(*flags).splitlines()[-1] == f"4 continuations in {out}, 1 of them from before"
    assert out.read_bytes() == whole.read_bytes()
    calls.clear()
    assert ask(*flags).splitlines()[-1] == f"4 continuations in {out}, 4 of them from before"
    assert calls == []


def test_a_file_made_otherwise_is_refused(work, ask, tmp_path):
    out = tmp_path / "out.jsonl"
    ask()
    kept = out.read_bytes()
    other = tmp_path / "11"
    cfg, params = model()
    params = dict(params, final_norm={"scale": params["final_norm"]["scale"] * 2})
    checkpoint.save(other, cfg, params, step=11)
    (other / "tokenizer.model").write_bytes(tokenizer_bytes())
    more = write(tmp_path / "more.jsonl", [*PROMPTS, {"prompt": "b"}])
    for flags, paths, message in (
        (["--stop", "x"], {}, "stop was [] and is ['x']"),
        (["--seed", "1"], {}, "seed was 0 and is 1"),
        (["--temperature", "0.5"], {}, "temperature was None and is 0.5"),
        (["--logprobs"], {}, "logprobs was False and is True"),
        ([], {"ckpt": other}, "checkpoint was "),
        ([], {"prompts": more}, "prompts was "),
    ):
        refused = ask(*flags, **paths, code=2)
        assert f"--out {out}: was made from something else ({message}" in refused
    ask("--batch-size", "3")  # which changes nothing but the speed
    assert out.read_bytes() == kept


def test_a_file_of_dialogues(work, vocabulary, ask, tmp_path):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The cat?"}]
    prompts = write(tmp_path / "dialogues.jsonl", [{"messages": asked, "id": "x"}, {"messages": asked[1:]}])
    ask(prompts=prompts)
    stop_ids = [vocabulary.end_id, vocabulary.user_id, vocabulary.bot_id]
    rendered = [dialogue.render_prompt(messages, vocabulary) for messages in (asked, asked[1:])]
    results = drawn(vocabulary, rendered, 5, stop_ids=stop_ids)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["text"] for line in lines] == [spoken(vocabulary, tokens) for tokens, _ in results]
    assert lines[0]["messages"] == asked and lines[0]["id"] == "x"
    bad = write(tmp_path / "bad.jsonl", [{"messages": asked}, {"messages": asked[:1]}])
    assert f"{bad}:2: " in ask(prompts=bad, out=tmp_path / "bad.out", code=2)


def test_wrong_flags_and_files(work, ask, capsys, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new.jsonl"
    assert "--prompts needs --out" in tele(capsys, "generate", work, "--prompts", prompts, code=2)
    both = ("generate", work, "--prompts", prompts, "--prompt", "a")
    assert "not allowed with argument --prompts" in tele(capsys, *both, code=2)
    for flags, message in ((["--out", out], "--out goes with"), (["--batch-size", 2], "--batch-size goes with")):
        assert message in tele(capsys, "generate", work, "--prompt", "a", *flags, code=2)
    assert "--batch-size 0: must be at least 1" in ask("--batch-size", 0, code=2)
    assert "--stop is empty" in ask("--stop", "", code=2)
    assert "nowhere.jsonl: No such file" in ask(prompts=tmp_path / "nowhere.jsonl", code=2)
    assert "exists, and no prompts.jsonl.made_by.json says" in ask(out=prompts, code=2)
    assert "is a directory" in ask(out=tmp_path, code=2)
    assert "there is no directory" in ask(out=prompts / "below", code=2)
    long = write(tmp_path / "long.jsonl", [{"prompt": "a"}, {"prompt": "cat " * 40}])
    assert f"{long}:2: a prompt of" in ask(prompts=long, out=out, code=2)
    assert prompts.read_bytes() and not out.exists()
    one = write(tmp_path / "one.jsonl", [{"prompt": "a"}, {"prompt": "cat " * 14}])
    tele(capsys, "generate", work, "--prompts", one, "--out", out)
    longest = max(line["prompt_tokens"] for line in lines_of(out))
    assert {line["new_tokens"] for line in lines_of(out)} == {64 - longest}
