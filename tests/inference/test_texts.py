"""Continued texts: log-probabilities, stop strings, and files of prompts whose work goes on after a kill."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax.errors import DamageError
from tele_jax.inference import texts
from tele_jax.inference.chat import TextStream
from tele_jax.inference.texts import continue_texts, describe
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests import reference
from tests.inference.test_chat import _vocabulary, model

pytestmark = pytest.mark.usefixtures("quick_compilation")


def log_softmax(cfg, params, prompt, tokens):
    """log softmax of the float64 reference at the tokens after the prompt."""
    logits = reference.forward(cfg, params, np.array([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    logits -= logits.max(axis=-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[np.arange(len(tokens)), tokens]


SAMPLED = dict(temperature=1.3, top_k=50, repetition_penalty=1.2, seed=3)


CASES = {
    "greedy": ({}, None),
    "sampled": (SAMPLED, None),
    "streamed on a mesh": (SAMPLED | dict(on_text=lambda row, text: None), dict(data=2, tensor=2)),
}


@pytest.mark.parametrize(("options", "mesh"), CASES.values(), ids=CASES)
def test_log_probabilities_are_those_of_the_model_however_tokens_are_drawn(options, mesh):
    vocabulary = _vocabulary()
    cfg, params = model()
    placed = params
    if mesh is not None:
        devices = make_mesh(MeshConfig(**mesh), jax.devices()[: math.prod(mesh.values())])
        placed = jax.device_put(params, param_shardings(tele.spec(cfg), devices))
    prompts = [vocabulary.encode("The cat"), vocabulary.encode("画蛇添足"), [7]]
    found = continue_texts(cfg, placed, vocabulary, prompts, max_new_tokens=6, **options)
    for prompt, continuation in zip(prompts, found, strict=True):
        assert len(continuation.tokens) == 6 and continuation.ended == "length"
        expected = log_softmax(cfg, params, prompt, continuation.tokens)
        np.testing.assert_allclose(continuation.logprobs, expected, atol=1e-5, rtol=1e-5)
        rows = describe(continuation, prompt, vocabulary, logprobs=True)["logprobs"]
        assert [row["token"] for row in rows] == continuation.tokens
        assert [row["logprob"] for row in rows] == continuation.logprobs.tolist()
        assert json.loads(json.dumps(rows)) == rows


def test_keys_of_a_row_are_those_of_its_number():
    vocabulary = _vocabulary()
    cfg, params = model()
    prompts = [vocabulary.encode(text) for text in ("The cat", "The", "画蛇")]
    how = dict(max_new_tokens=5, **SAMPLED)
    whole = [found.tokens for found in continue_texts(cfg, params, vocabulary, prompts, **how)]
    part = continue_texts(cfg, params, vocabulary, [prompts[2], prompts[0]], numbers=[2, 0], **how)
    assert [found.tokens for found in part] == [whole[2], whole[0]]


# ---- stop strings --------------------------------------------------------------------------------------------------


def before_first(text, stops):
    """The text before the stop string that is the first to be complete; of those with one end, the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


LETTERS = "ab蛇🎉é"


@given(st.data())
def test_streamed_text_is_that_before_the_first_stop_string_whatever_the_tokens(data):
    text = data.draw(st.text(LETTERS, max_size=20))
    stops = data.draw(st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=3))
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    tokens = [raw[begin:end] for begin, end in itertools.pairwise(cuts)]
    expected, stopped = before_first(text, stops)
    stream = TextStream(SimpleNamespace(spelled=lambda token, first: token), continues=True, stop=stops)
    shown, given_bytes = "", 0
    for token in tokens:
        shown += stream.add(token)
        given_bytes += len(token)
        assert expected.startswith(shown)
        so_far = raw[:given_bytes].decode(errors="ignore")  # whole characters
        assert stream.stopped == before_first(so_far, stops)[1]
    assert (shown + stream.end(), stream.stopped) == (expected, stopped)


def test_a_row_that_stops_changes_no_other_row():
    vocabulary = _vocabulary()
    cfg, params = model()
    prompts = [vocabulary.encode(text) for text in ("The cat", "画蛇添足", "mat")]
    how = dict(max_new_tokens=9, **SAMPLED)
    free = continue_texts(cfg, params, vocabulary, prompts, **how)
    within, across = free[0].text[:2], free[1].text[2:5]  # at the very beginning, and in the middle
    assert len(within) == 2 and len(across) == 3
    parts = ["", "", ""]

    def on_text(row, text):
        parts[row] += text

    cut = continue_texts(cfg, params, vocabulary, prompts, stop=[within, across], on_text=on_text, **how)
    assert parts == [found.text for found in cut]
    assert cut[0].text == "" and cut[0].ended == "stop" and len(cut[0].tokens) < 9
    for before, after in zip(free, cut, strict=True):
        text, stopped = before_first(before.text, [within, across])
        assert (after.text, after.ended == "stop") == (text, stopped)
        assert after.tokens == before.tokens[: len(after.tokens)] and (stopped or len(after.tokens) == 9)
        np.testing.assert_allclose(after.logprobs, before.logprobs[: len(after.tokens)], rtol=1e-5, atol=1e-5)
    assert {found.ended for found in cut} == {"stop", "length"}


# ---- files of prompts ----------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """The end of a run before its time."""


def run(out, records, lengths, batch_size=2, origin=None, calls=None, until=None, progress=lambda done, total: None):
    """continue_file with answers that name their batch, interrupted before the batch number `until`."""
    calls = [] if calls is None else calls

    def answer(rows):
        if until is not None and len(calls) == until:
            raise Interrupted
        calls.append(rows)
        return [{"text": f"{row} of {rows}"} for row in rows]

    how = {"origin": origin or {"seed": 0}, "batch_size": batch_size, "progress": progress}
    return texts.continue_file(out, records, lengths, answer, **how)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=80),
    batch_size=st.integers(1, 3),
    until=st.integers(0, 20),
    torn=st.binary(max_size=9).filter(lambda data: b"\n" not in data),
)
def test_an_interrupted_file_is_completed_to_the_bit(tmp_path_factory, lengths, batch_size, until, torn):
    directory = tmp_path_factory.mktemp("files")
    records = [{"prompt": "蛇", "id": i} for i in range(len(lengths))]
    whole, part = directory / "whole.jsonl", directory / "part.jsonl"
    all_calls, calls, seen = [], [], []
    assert run(whole, records, lengths, batch_size, calls=all_calls) == 0
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(len(lengths)))  # in the order of the input
    assert all(len(rows) <= batch_size for rows in all_calls)
    assert sorted(itertools.chain.from_iterable(all_calls)) == list(range(len(lengths)))  # each once
    try:
        run(part, records, lengths, batch_size, until=until)
    except Interrupted:
        with part.open("ab") as file:
            file.write(torn)
    had = part.read_bytes().count(b"\n")
    assert run(part, records, lengths, batch_size, calls=calls, progress=lambda *now: seen.append(now)) == had
    assert part.read_bytes() == whole.read_bytes()
    assert all(max(rows) >= had for rows in calls)  # nothing that is complete is done again
    assert seen == sorted(seen) and seen[-1] == (len(lengths), len(lengths))


def test_batches_are_of_like_length(tmp_path):
    lengths, calls = [1, 9, 1, 9, 1, 9], []
    run(tmp_path / "out", [{"id": i} for i in range(6)], lengths, 3, calls=calls)
    assert sorted([lengths[row] for row in rows] for rows in calls) == [[1, 1, 1], [9, 9, 9]]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.inference import test_texts
class Calls(list):
    def append(self, rows):
        if len(self) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        super().append(rows)
test_texts.run(Path(sys.argv[1]), [{"prompt": "a"}] * 50, [1] * 50, calls=Calls())
"""


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(tmp_path):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=environment, cwd=os.getcwd())
    assert killed.returncode == -signal.SIGKILL
    records = [{"prompt": "a"}] * 50
    assert run(out, records, [1] * 50) == 40
    run(whole, records, [1] * 50)
    assert out.read_bytes() == whole.read_bytes()


def test_a_file_made_from_something_else_or_changed_is_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    records = [{"prompt": "a"}, {"prompt": "b"}]
    run(out, records, [1, 1], origin={"seed": 0, "stop": ["x"]})
    kept = out.read_bytes()
    with pytest.raises(
        tele.UserError, match=r"made from something else \(seed was 0 and is 1, top_k was None and is 3"
    ):
        run(out, records, [1, 1], origin={"seed": 1, "stop": ("x",), "top_k": 3})
    out.write_bytes(kept.replace(b'"b"', b'"c"'))
    with pytest.raises(DamageError, match=r"out.jsonl:2: is not the answer to the prompt of this line"):
        run(out, records, [1, 1], origin={"seed": 0, "stop": ["x"]})
    out.write_bytes(kept + kept)
    with pytest.raises(DamageError, match=r"out.jsonl:3: is not the answer"):
        run(out, records, [1, 1], origin={"seed": 0, "stop": ["x"]})
    assert out.read_bytes() == kept + kept
    texts.made_by(out).unlink()
    with pytest.raises(tele.UserError, match=r"exists, and no out.jsonl.made_by.json says what made it"):
        run(out, records, [1, 1])
    out.unlink()
    out.mkdir()
    with pytest.raises(tele.UserError, match="is a directory"):
        run(out, records, [1, 1])


def test_a_full_disk_is_told_in_one_line_and_the_work_goes_on(tmp_path, monkeypatch):
    out, append = tmp_path / "out.jsonl", texts.files.append

    def full(path, data):
        append(path, data[: len(data) // 2])
        with open("/dev/full", "wb", buffering=0) as file, texts.files.writing(path):
            file.write(data)

    with monkeypatch.context() as patch:
        patch.setattr(texts.files, "append", full)
        with pytest.raises(
            DamageError, match=r"out.jsonl: could not be written \(No space left on device\); make room"
        ):
            run(out, [{"prompt": "a"}] * 3, [1] * 3)
    assert run(out, [{"prompt": "a"}] * 3, [1] * 3) == 0
    assert out.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n", ":1: not a table"),
        (b'{"prompt": "a"}\n\n', ":2: not a table"),
        (b'["a"]', ":1: not a table"),
        (b'{"prompt": "a"', ":1: damaged, not JSON"),
        (b'{"prompt": "\xff"}', ":1: damaged, not UTF-8"),
        (b'{"text": "a"}', ':1: must have either "prompt" or "messages"'),
        (b'{"prompt": "a", "messages": []}', ':1: must have either "prompt" or "messages"'),
        (b'{"prompt": 3}', ":1: prompt is 3, not a text"),
        (b'{"prompt": ""}', ":1: prompt is '', not a text"),
        (b'{"prompt": "a"}\n{"messages": []}', ':2: has "messages", and line 1 has not'),
        (b'{"prompt": "a", "ended": 1}', r":1: the field 'ended' is kept for the continuation"),
        (b'{"prompt": "a", "b": "\\ud800"}', ":1: a text has half a surrogate pair"),
        (b'{"prompt": "a", "prompt": "b"}', "occurs twice"),
    ],
    ids=str,
)
def test_lines_that_are_no_prompts_are_named(tmp_path, data, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(data)
    with pytest.raises(tele.UserError, match=message):
        texts.read_prompts(path)


def test_fields_of_prompts_are_kept(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\u2028", "id": 1}\n{"prompt": "b", "from": {"x": [null, 1.5]}}')
    assert texts.read_prompts(path) == [{"prompt": "a\u2028", "id": 1}, {"prompt": "b", "from": {"x": [None, 1.5]}}]
