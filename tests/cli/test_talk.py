"""tele generate and tele chat: what they print and return, over a pipe as well, and how they fail."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys

import pytest

from tele_jax import checkpoint
from tele_jax.cli.main import main
from tele_jax.data import dialogue
from tele_jax.data.templates import TEMPLATES
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.inference.chat import Chat, TextStream
from tele_jax.inference.generate import generate
from tests.data.test_vocabulary_tokenizers import byte_level
from tests.inference.test_chat import model, tokenizer_bytes, work_directory

RELEASED = {"repetition_penalty": 1.01}  # of the 12B, whose tokenizer's layout the checkpoints here have

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return work_directory(tmp_path_factory.mktemp("run") / "W")


@pytest.fixture
def texts():
    return ["The cat sat on the mat. ", "画蛇添足是什么意思？"] * 20


@pytest.fixture
def vocabulary(work):
    return load_vocabulary(work / "tokenizer.model")


def tele(capsys, *arguments, code=0):
    """Runs the command and returns what it printed; where it fails, its one line."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == code
    printed = capsys.readouterr()
    if code == 0:
        return printed.out
    assert printed.err.startswith("tele: ") and printed.err.count("\n") == 1
    return printed.err


def spoken(vocabulary, tokens):
    stream = TextStream(vocabulary)
    return "".join([*map(stream.add, tokens), stream.end()])


def test_one_prompt_is_continued(work, vocabulary, capsys, tmp_path):
    printed = tele(
        capsys, "generate", work, "--prompt", "The 蛇", "--max-new-tokens", 7, "--json", tmp_path / "figures.json"
    )
    ids = vocabulary.encode("The 蛇")
    (tokens,) = generate(*model(), [ids], max_new_tokens=7, stop_ids=[vocabulary.end_id], **RELEASED)
    assert printed == spoken(vocabulary, tokens) + "\n"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["continuations"] == [
        {
            **{"prompt": "The 蛇", "text": printed[:-1], "prompt_tokens": len(ids), "new_tokens": len(tokens)},
            "ended": "length",
        }
    ]
    assert figures["new_tokens"] == len(tokens)
    assert figures["tokens_per_second"] > 0 and figures["seconds_to_first_token"] > 0


def test_several_prompts_are_continued_as_a_batch_with_the_options(work, vocabulary, capsys):
    prompts = ["The cat", "画\n蛇"]
    options = dict(temperature=0.9, top_k=7, top_p=0.9, repetition_penalty=1.1, seed=4)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    printed = tele(
        capsys, "generate", work, "--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", 5, *flags
    )
    outputs = generate(
        *model(),
        [vocabulary.encode(prompt) for prompt in prompts],
        max_new_tokens=5,
        stop_ids=[vocabulary.end_id],
        **options,
    )
    texts = [spoken(vocabulary, output) for output in outputs]
    assert printed == f"--- 1: The cat\n{texts[0]}\n--- 2: 画 蛇\n{texts[1]}\n"


def test_without_a_length_the_context_is_filled(work, capsys, tmp_path):
    tele(capsys, "generate", work, "--prompt", "The cat", "--json", tmp_path / "figures.json")
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["continuations"]
    assert figures["prompt_tokens"] + figures["new_tokens"] == 64 and figures["ended"] == "context"


def test_sampling_as_released_and_with_one_flag_changed(work, vocabulary, capsys):
    common = ("generate", work, "--prompt", "The", "--max-new-tokens", 5)
    released = dict(temperature=0.3, top_k=5, top_p=0.85, **RELEASED)
    for flags, options in (
        (["--sample"], released),
        (["--sample", "--temperature=2"], released | {"temperature": 2.0}),
    ):
        (tokens,) = generate(
            *model(), [vocabulary.encode("The")], max_new_tokens=5, stop_ids=[vocabulary.end_id], **options
        )
        assert tele(capsys, *common, *flags) == spoken(vocabulary, tokens) + "\n"


def test_one_message_is_answered(work, vocabulary, capsys, tmp_path):
    printed = tele(
        *(capsys, "chat", work, "--message", "The cat?", "--system", "Be brief."),
        *("--max-new-tokens", 6, "--json", tmp_path / "figures.json"),
    )
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The cat?"}]
    prompt = dialogue.render_prompt(asked, vocabulary)
    stop_ids = [vocabulary.end_id, vocabulary.user_id, vocabulary.bot_id]
    (tokens,) = generate(*model(), [prompt], max_new_tokens=6, stop_ids=stop_ids, **RELEASED)
    assert printed == spoken(vocabulary, tokens) + "\n"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["messages"] == [*asked, {"role": "assistant", "content": printed[:-1]}]
    assert figures["replies"][0]["new_tokens"] == len(tokens)
    assert figures["replies"][0]["prompt_tokens"] == len(prompt)


def test_a_template_by_name_and_how_its_family_draws(tmp_path, capsys):
    work = work_directory(tmp_path / "W")
    (work / "tokenizer.model").write_bytes(tokenizer_bytes("tele_flm"))
    vocabulary = load_vocabulary(work / "tokenizer.model")
    template = TEMPLATES["telechat_52b"]
    printed = tele(
        *(capsys, "chat", work, "--template", "telechat_52b", "--sample", "--top-k", 9, "--system", "Be brief."),
        *("--message", "The cat?", "--max-new-tokens", 6),
    )
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The cat?"}]
    prompt = dialogue.render_prompt(asked, vocabulary, template=template)
    options = dict(template.sampling) | {"top_k": 9}
    (tokens,) = generate(*model(), [prompt], max_new_tokens=6, stop_ids=[vocabulary.eos_id], **options)
    assert options["repetition_penalty"] == 1.02
    assert printed == spoken(vocabulary, tokens) + "\n"


def test_on_a_mesh_the_same_is_said(tmp_path, capsys):
    cfg, params = model(vocab_size=440)
    work = work_directory(tmp_path / "W", cfg, params)
    ask = (capsys, "generate", work, "--prompt", "The cat", "--prompt", "画", "--max-new-tokens", 5)
    assert tele(*ask, "--mesh", "data=2,tensor=2") == tele(*ask)


def converse(monkeypatch, capsys, work, text, *flags):
    """(printed, complaints) of a conversation over a pipe."""
    stdin = io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    code = main(["chat", str(work), "--max-new-tokens", "6", *map(str, flags)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_conversation_over_a_pipe(work, monkeypatch, capsys, tmp_path):
    saved, figures, pipe = tmp_path / "dialogues.jsonl", tmp_path / "figures.json", tmp_path / "pipe"
    os.mkfifo(pipe)
    lines = [
        "Hello",
        "",
        "More?",
        f"/save {saved}",
        "/reset",
        "Hello",
        "/system Be brief.",
        " /help is not a command here",
        f"/save {saved}",
        "/nonsense",
        f"/save {tmp_path / 'no' / 'such' / 'directory'}",
        "/save ~nobody-here/x",
        "/save a\0b",
        f"/save {pipe}",
        "/quit",
        "never asked",
    ]
    code, printed, complaints = converse(monkeypatch, capsys, work, "\n".join(lines), "--json", figures)
    assert code == 0
    answers = printed.split("\n")
    first, second = map(json.loads, saved.read_text().splitlines())
    for conversation in (first, second):
        dialogue.check(conversation["messages"])
    assert [m["content"] for m in first["messages"] if m["role"] == "user"] == ["Hello", "More?"]
    assert [m["content"] for m in second["messages"]][:2] == ["Be brief.", "/help is not a command here"]
    assert printed.startswith(first["messages"][1]["content"] + "\n" + first["messages"][3]["content"] + "\n")
    assert answers.count(first["messages"][1]["content"]) >= 2  # after /reset the same question, the same answer
    cut = "tele: the answer was cut after 6 tokens (--max-new-tokens)"  # said once a conversation
    assert complaints.splitlines() == [
        *[cut, cut, cut],
        "tele: /nonsense: no such command; /help lists them, and a space before it sends the line as it is",
        f"tele: {tmp_path / 'no' / 'such' / 'directory'}: No such file or directory",
        "tele: '~nobody-here/x': Could not determine home directory.",
        "tele: 'a\\x00b': embedded null byte",
        f"tele: {pipe}: is a named pipe, not a file",
    ]
    written = json.loads(figures.read_text())
    assert [reply["ended"] for reply in written["replies"]] == ["length"] * 4
    assert (written["template"], written["trained_on_dialogues"], written["sampling"]) == (
        "telechat_12b",
        True,
        RELEASED,
    )
    assert written["messages"] == second["messages"]


def test_the_commands_are_listed(work, monkeypatch, capsys):
    code, printed, complaints = converse(monkeypatch, capsys, work, "/help")
    assert (code, complaints) == (0, "")
    assert [line.split()[0] for line in printed.splitlines()[:5]] == ["/reset", "/system", "/save", "/help", "/quit"]


def test_nothing_on_standard_input(work, monkeypatch, capsys):
    assert converse(monkeypatch, capsys, work, "") == (0, "", "")


def test_a_pipe_that_is_not_utf8(work, monkeypatch, capsys):
    assert converse(monkeypatch, capsys, work, b"caf\xe9\n") == (2, "", "tele: standard input is not UTF-8\n")


def test_a_line_that_the_locale_took_for_something_else(work, monkeypatch, capsys):
    """In the C locale Python reads what is not UTF-8 as halves of surrogate pairs."""
    stdin = io.TextIOWrapper(io.BytesIO(b"/system caf\xe9\ncaf\xe9\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["chat", str(work)]) == 0
    expected = ["tele: the line: not UTF-8 at byte 11", "tele: the line: not UTF-8 at byte 3"]
    assert capsys.readouterr().err.splitlines() == expected


GENERATE, CHAT = ["generate", "--prompt", "The"], ["chat", "--message", "The"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "--prompt"),
        (["generate", "--prompt", ""], "--prompt is empty"),
        (["generate", "--prompt", "\udcff"], "--prompt: not UTF-8"),
        (["generate", "--prompt", "cat " * 40], "max_seq_len is 64"),
        ([*GENERATE, "--temperature", "-1"], "temperature=-1.0 must be 0 (greedy) or above"),
        ([*GENERATE, "--temperature", "nan"], "temperature=nan"),
        ([*GENERATE, "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        ([*GENERATE, "--top-p", "0"], "top_p=0.0 must be in (0, 1]"),
        ([*GENERATE, "--top-p", "1.5"], "top_p=1.5 must be in (0, 1]"),
        ([*GENERATE, "--top-k", "0"], "top_k=0 must be at least 1"),
        ([*GENERATE, "--repetition-penalty", "0"], "repetition_penalty=0.0 must be above 0"),
        ([*GENERATE, "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        ([*GENERATE, "--max-new-tokens", "64"], "max_new_tokens=64 are 66 together"),
        ([*GENERATE, "--seed", "-1"], "seed=-1"),
        ([*GENERATE, "--tokenizer", "nowhere.model"], "tokenizer nowhere.model: No such file"),
        ([*GENERATE, "--mesh", "tensor=16"], "--mesh tensor=16: takes 16 devices, but there are 8"),
        ([*GENERATE, "--mesh", "tensor=4"], "kv_heads=2 does not divide over mesh tensor=4"),
        ([*GENERATE, "--mesh", "tensor"], "--mesh tensor: expected AXIS=SIZE,... with data, fsdp and tensor"),
        ([*GENERATE, "--mesh", "tensor=2,tensor=2"], "--mesh tensor=2,tensor=2: gives tensor twice"),
        ([*GENERATE, "--mesh", "tensor=0"], "--mesh: tensor=0 must be above 0"),
        ([*GENERATE, "--mesh", "pipeline=2"], "--mesh.pipeline: unknown key of MeshConfig"),
        ([*CHAT, "--template", "vicuna"], "--template: invalid choice: 'vicuna'"),
        ([*CHAT, "--template", "tele_flm_instruct"], "it has no piece '</s>'"),
        ([*CHAT, "--template", "telechat_7b", "--system", "S"], "has no place for a system message"),
        ([*CHAT, "--temperature", "-1"], "temperature=-1.0"),
        ([*CHAT, "--max-new-tokens", "63"], "leaves 1 of the model's max_seq_len=64"),
        ([*CHAT, "--seed", "-1"], "seed=-1"),
        (["chat", "--message", ""], "--message is empty"),
        (["chat", "--message", "The", "--system", ""], "--system is empty"),
        (["chat", "--message", "\udcff"], "--message: not UTF-8"),
    ],
    ids=str,
)
def test_wrong_arguments(work, capsys, arguments, message):
    verb, *rest = arguments
    assert message in tele(capsys, verb, work, *rest, code=2)


@pytest.mark.parametrize("arguments", [GENERATE, CHAT])
def test_no_checkpoint(tmp_path, capsys, arguments):
    verb, *rest = arguments
    assert "no such directory" in tele(capsys, verb, tmp_path / "nowhere", *rest, code=2)
    assert "an empty directory" in tele(capsys, verb, tmp_path, *rest, code=2)


@pytest.mark.parametrize("arguments", [GENERATE, CHAT])
def test_tokenizers_that_do_not_fit(work, tmp_path, capsys, arguments):
    verb, *rest = arguments
    step = tmp_path / "10"
    checkpoint.save(step, *model(vocab_size=400), step=10)
    assert "name one with --tokenizer" in tele(capsys, verb, step, *rest, code=2)
    (step / "tokenizer.model").write_bytes(b"not a model")
    assert "not a SentencePiece model" in tele(capsys, verb, step, *rest, code=2)
    (step / "tokenizer.model").write_bytes(tokenizer_bytes())
    assert "440 ids, but the model's vocab_size is 400" in tele(capsys, verb, step, *rest, code=2)


def test_a_damaged_checkpoint_is_no_mistake_of_the_user(tmp_path, capsys):
    work = work_directory(tmp_path / "W")
    step = work / "sft" / "checkpoints" / "10"
    (step / "meta" / "meta.json").write_text("{}")
    assert "damaged" in tele(capsys, "generate", work, "--prompt", "The", code=1)


def test_a_vocabulary_without_dialogue_markers(work, tmp_path, capsys):
    proto = __import__("sentencepiece.sentencepiece_model_pb2", fromlist=["ModelProto"]).ModelProto()
    proto.ParseFromString(tokenizer_bytes())
    for piece in proto.pieces:
        piece.piece = {"<_user>": "<other>"}.get(piece.piece, piece.piece)
    (tmp_path / "plain.model").write_bytes(proto.SerializeToString())
    plain = ("--tokenizer", tmp_path / "plain.model")
    message = tele(capsys, "chat", work, "--message", "The", *plain, code=2)
    assert "it has no piece '<_user>'" in message and "name it with --template" in message
    assert "name it with --template" in tele(capsys, "generate", work, "--prompt", "The", "--sample", *plain, code=2)
    tele(capsys, "generate", work, "--prompt", "The", "--max-new-tokens", 2, *plain)  # a base model needs no template


def test_a_json_tokenizer_serves_as_well(tmp_path, texts, capsys):
    work = work_directory(tmp_path / "W", *model(vocab_size=700))
    (work / "tokenizer.model").unlink()
    (work / "tokenizer.json").write_text(json.dumps(byte_level(texts, 400)))
    vocabulary = load_vocabulary(work / "tokenizer.json")
    printed = tele(capsys, "generate", work, "--prompt", "The 蛇", "--max-new-tokens", 7)
    (tokens,) = generate(*model(vocab_size=700), [vocabulary.encode("The 蛇")], max_new_tokens=7, stop_ids=[2])
    assert printed == spoken(vocabulary, tokens) + "\n"
    tele(capsys, "chat", work, "--template", "telechat_52b", "--message", "The", "--max-new-tokens", 2)
    assert "no piece '<_user>'" in tele(capsys, "chat", work, "--message", "The", code=2)


def test_a_conversation_on_a_terminal(work, tmp_path):
    """A real one: what is typed is echoed, answers stream, mistakes are told, and Ctrl-D ends it."""
    saved = tmp_path / "dialogues.jsonl"
    main_end, terminal = pty.openpty()
    command = [sys.executable, "-m", "tele_jax.cli.main", "chat", str(work), "--max-new-tokens", "6"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "dumb"}
    # Where pytest was started in the background it ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    signal.signal(signal.SIGINT, before)
    os.close(terminal)
    screen, seen = b"", 0

    def until(text):
        """What came after the last call, up to and with text."""
        nonlocal screen, seen
        while (found := screen.find(text, seen)) < 0:
            assert select.select([main_end], [], [], 120)[0], screen
            screen += os.read(main_end, 4096)
        start, seen = seen, found + len(text)
        return screen[start:seen].decode(errors="replace").replace("\r\n", "\n")

    def say(line):
        os.write(main_end, line.encode() + b"\n")

    try:
        assert "/help lists the commands." in until(b"> ")
        say("The cat?")
        until(b"tokens/s")
        until(b"> ")
        # Ctrl-C; again, because between the prompt and the wait for a line readline keeps a signal to itself.
        for _ in range(60):
            process.send_signal(signal.SIGINT)
            if select.select([main_end], [], [], 2)[0]:
                break
        until(b"(Ctrl-D or /quit ends)")
        until(b"> ")
        say("/nonsense")
        assert "tele: /nonsense: no such command" in until(b"> ")
        say("/system Be brief.")
        until(b"> ")
        say("画蛇")
        until(b"tokens/s")
        until(b"> ")
        say(f"/save {saved}")
        until(b"> ")
        os.write(main_end, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(main_end)
    (conversation,) = map(json.loads, saved.read_text().splitlines())
    dialogue.check(conversation["messages"])
    assert [m["content"] for m in conversation["messages"]][:2] == ["Be brief.", "画蛇"]
    assert conversation["messages"][2]["content"].encode() in screen.replace(b"\r\n", b"\n")


def test_an_interrupted_answer_does_not_end_the_conversation(work, monkeypatch, capsys):
    answer = Chat.reply

    def reply(self, question, on_text):
        if question == "long":
            on_text("Well")
            raise KeyboardInterrupt
        return answer(self, question, on_text)

    monkeypatch.setattr(Chat, "reply", reply)
    code, printed, complaints = converse(monkeypatch, capsys, work, "long\nHello\n")
    assert (code, complaints.splitlines()[:2]) == (0, ["", "(stopped)"])
    assert printed.startswith("Well") and len(printed) > len("Well")


def test_chat_says_once_what_it_leaves_out(work, monkeypatch, capsys, tmp_path):
    long = "0123456789" * 7
    code, _, complaints = converse(
        monkeypatch, capsys, work, f"Hello\n{long}\n{long}\n", "--json", tmp_path / "figures.json"
    )
    room = "beside an answer of 6 tokens in the model's context of 64"
    assert code == 0
    assert complaints.splitlines() == [
        "tele: the answer was cut after 6 tokens (--max-new-tokens)",
        f"tele: the conversation does not fit {room}: its oldest turns are left out from here on",
        f"tele: the question does not fit {room}: its beginning is left out",
        "tele: the answer was cut: it fills the model's context of 64 tokens",
    ]
    replies = json.loads((tmp_path / "figures.json").read_text())["replies"]
    assert [reply["dropped_turns"] for reply in replies] == [0, 1, 2]
    assert [reply["cut_question"] for reply in replies] == [False, True, True]
    assert [reply["ended"] for reply in replies] == ["length", "context", "context"]


def test_chat_says_that_an_answer_is_empty_and_a_model_not_made_for_chat(tmp_path, monkeypatch, capsys):
    work = work_directory(tmp_path / "W")
    step = work / "pretrain" / "checkpoints" / "1"
    checkpoint.save(step, *model(), step=1, provenance=[{"stage": "pretrain", "kind": "pretrain", "step": 1}])
    (step / "tokenizer.model").write_bytes(tokenizer_bytes())
    ends = lambda *a, on_token, **options: [[]]  # noqa: E731
    monkeypatch.setattr("tele_jax.inference.chat.generate", ends)
    code, printed, complaints = converse(
        monkeypatch, capsys, step, "Hello\nHello\n", "--json", tmp_path / "figures.json"
    )
    assert (code, printed) == (0, "\n\n")
    assert complaints.splitlines() == [
        f"tele: {step} was last trained on plain text (stage pretrain), not on dialogues: expect it to continue text "
        "rather than to answer",
        "tele: the answer is empty: it and its question are left out of the conversation",
    ]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["messages"] == [] and not figures["trained_on_dialogues"]
    assert [(r["ended"], r["remembered"]) for r in figures["replies"]] == [("eos", False)] * 2


def test_what_conditions_the_first_token_in_training_does_so_in_generation(tmp_path, capsys):
    """A model that was trained here saw a separator before every document; so does a prompt."""
    provenance = [{"stage": "pretrain", "kind": "pretrain"}, {"stage": "grow", "kind": "grow"}, {"kind": "sft"}]
    step = tmp_path / "10"
    checkpoint.save(step, *model(), step=10, provenance=provenance)
    (step / "tokenizer.model").write_bytes(tokenizer_bytes())
    vocabulary = load_vocabulary(step / "tokenizer.model")
    figures = tmp_path / "figures.json"
    printed = tele(capsys, "generate", step, "--prompt", "The cat", "--max-new-tokens", 5, "--json", figures)
    prompt = [vocabulary.eos_id, *vocabulary.encode("The cat")]
    (tokens,) = generate(*model(), [prompt], max_new_tokens=5, stop_ids=[vocabulary.end_id], **RELEASED)
    assert printed == spoken(vocabulary, tokens) + "\n"
    written = json.loads(figures.read_text())
    assert written["document_start"] == vocabulary.eos_id
    assert written["continuations"][0]["prompt_tokens"] == len(prompt)
