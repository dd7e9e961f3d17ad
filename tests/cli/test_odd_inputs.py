"""Inputs of the verbs that are no files: one line, at once, and never a wait for a pipe that nobody writes to."""

import os
import re

import pytest

from tele_jax.cli.main import main

KINDS = {
    "directory": (lambda path: path.mkdir(), "is a directory"),
    "pipe": (os.mkfifo, "is a named pipe, not a file|is not a plain file"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links|INPUT: .*no"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file or directory|INPUT: .*no"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        "a Git-LFS pointer",
    ),
}
TRAIN = ["tokenizer", "train", "--preset", "tele_flm", "--vocab-size", "400", "--out"]
COMMANDS = {
    "tokenizer train text": lambda path: [*TRAIN, str(path.with_name("t.model")), str(path)],
    "tokenizer train out": lambda path: [*TRAIN, str(path), __file__],
    "tokenizer inspect": lambda path: ["tokenizer", "inspect", str(path)],
    "tokenizer inspect text": lambda path: ["tokenizer", "inspect", str(path), str(path)],
    "generate prompts": lambda path: ["generate", "ckpt", "--prompts", str(path), "--out", "out"],
    "eval table": lambda path: ["eval", "table", str(path)],
    "chat": lambda path: ["chat", "ckpt", "--tokenizer", str(path)],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named_at_once(command, kind, tmp_path, capsys):
    make, message = KINDS[kind]
    path = tmp_path / "input.jsonl"
    make(path)
    if "out" in command and kind in ("pointer", "loop", "dangling"):
        return  # a file like others, or none
    assert main(COMMANDS[command](path)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("tele: ") and printed.count("\n") == 1 and str(path) in printed
    if command != "tokenizer train text" or kind != "pointer":  # which is text, though of no use
        assert re.search(message, printed)
