"""--json FILE of every verb: what cannot be written is refused before the work begins, not after hours of it."""

import pytest

from tele_jax.cli.main import VERBS, main

COMMANDS = {
    "train": ["train", "--config", "page.py", "--workdir", "w"],
    "report": ["report", "w"],
    "grow": ["grow", "src", "dst", "--config", "page.py"],
    "merge": ["merge", "a", "b", "dst"],
    "plan": ["plan", "--config", "page.py", "--topology", "v5p:2x2x1"],
    "inspect": ["inspect", "ckpt"],
    "import": ["import", "src", "dst"],
    "export": ["export", "src", "dst", "--format", "llama"],
    "tokenizer": ["tokenizer", "inspect", "t.model"],
    "data": ["data", "show", "rows"],
    "sft": ["sft", "select", "--config", "page.py", "--out", "out"],
    "generate": ["generate", "ckpt", "--prompt", "x"],
    "chat": ["chat", "ckpt"],
    "eval": ["eval", "table", "results.json"],
    "score-reward": ["score-reward", "ckpt", "pairs.jsonl", "--out", "scores.jsonl"],
    "lab": ["lab", "list"],
    "mup": ["mup", "coords"],
    "preflight": ["preflight", "--installed"],
}


def test_every_verb_is_here():
    assert COMMANDS.keys() == VERBS.keys()


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_file_that_cannot_be_written_is_refused_at_once(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for target, message in ((".", "is a directory; name a file"), ("no/a.json", "there is no directory no")):
        capsys.readouterr()
        assert main([*COMMANDS[verb], "--json", target]) == 2
        assert capsys.readouterr().err == f"tele: --json {target}: {message}\n"
    assert not list(tmp_path.iterdir())
