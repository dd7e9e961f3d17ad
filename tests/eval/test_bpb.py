"""Bits per byte against the float64 reference on windows of its own; documents, intervals and a killed evaluation."""

import json
import lzma
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.cli.main import main
from tele_jax.cli.pages import load_page
from tele_jax.config import Ntk, Rope, from_dict
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.eval import bpb, harness
from tele_jax.eval import text as evaluated
from tele_jax.eval.bpb import evaluate, windows
from tele_jax.eval.model import EvalModel, Leader
from tele_jax.eval.text import BpbConfig, Domain, read_texts, survey
from tele_jax.files import held_alone
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh, param_shardings
from tests import reference
from tests.inference.test_chat import model as small_model
from tests.inference.test_chat import tokenizer_bytes, work_directory

pytestmark = pytest.mark.usefixtures("quick_compilation")

PREFIX = 1
EN = ["The cat sat on the mat. " * 9, "", "A mat", "def f(x):\n    return x + 1\n" * 5]
# Scripts that the tokenizer has no pieces for: every character is cut into its bytes.
OTHER = ["画蛇添足比喻做了多余的事。" * 3, "قالت القطة شيئا ما", "ไม่มีใครรู้ 🐈‍⬛🐈", "", "ὁ αἴλουρος"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_bytes())
    return load_vocabulary(path)


@pytest.fixture
def files(tmp_path):
    """DOMAIN=FILES of two domains, one of them in two files and under both keys."""
    written = {"en.jsonl": ("text", EN), "zh_1.jsonl": ("data", OTHER[:2]), "zh_2.jsonl": ("text", OTHER[2:])}
    for name, (key, texts) in written.items():
        (tmp_path / name).write_text("\n".join(json.dumps({key: text}) for text in texts) + "\n\n")
    return {"en": (str(tmp_path / "en.jsonl"),), "other": (str(tmp_path / "zh_*.jsonl"),)}


def loaded(vocabulary, params=None, **changes):
    cfg, stored = small_model()
    return EvalModel("ckpt", cfg.replace(**changes), params or stored, vocabulary, None, None, PREFIX, [])


def evaluation(model, config, **how):
    with Leader(model) as leader:
        return evaluate(leader, config, survey(config), **how)


def formula(model, texts, window, stride):
    """(nats, tokens, bytes, {position: nats}): every token by itself, in the first window that holds it."""
    total, tokens, num_bytes, places = 0.0, 0, 0, {}
    for text in texts:
        ids, num_bytes = model.vocabulary.encode(text), num_bytes + len(text.encode())
        inputs, tokens = [PREFIX, *ids], tokens + len(ids)
        for i, target in enumerate(ids):
            last = (
                i if i < window else window + ((i - window) // stride + 1) * stride - 1
            )  # of the window that holds it
            last = min(last if i >= window else window - 1, len(ids) - 1)
            seen = inputs[max(0, last + 1 - window) : i + 1]
            key = (tuple(seen), target)
            if key not in _LOSSES:
                cfg, params = model.cfg, small_model()[1]
                logits = reference.forward(cfg, params, np.array([seen + [0] * (min(window, last + 1) - len(seen))]))
                _LOSSES[key] = reference.loss(logits[:, len(seen) - 1], np.array([target]), np.ones(1))
            total += _LOSSES[key]
            places.setdefault(i, []).append(_LOSSES[key])
    return total, tokens, num_bytes, places


_LOSSES: dict = {}


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 5), (64, 64), (11, 1)])
def test_bits_per_byte_are_those_of_the_formula(vocabulary, files, window, stride, monkeypatch):
    monkeypatch.setattr(bpb, "FIRST_BUCKET", 4)
    model = loaded(vocabulary)
    assert any("\N{REPLACEMENT CHARACTER}" in vocabulary.decode([i]) for i in vocabulary.encode(OTHER[1]))
    config = BpbConfig(text=files, window=window, stride=stride, resamples=10)
    found = evaluation(model, config)["domains"]
    for name, texts in (("en", EN), ("other", OTHER)):
        nats, tokens, num_bytes, places = formula(model, texts, window, stride or window)
        got = found[name]
        assert (got["documents"], got["tokens"], got["bytes"]) == (len(texts), tokens, num_bytes)
        assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
        assert got["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert got["tokens_per_byte"] == tokens / num_bytes
        assert got["positions"][0]["from"] == 0 and [p["to"] for p in got["positions"][:2]] == [4, 8]
        for part in got["positions"]:
            inside = [x for i, xs in places.items() if part["from"] <= i < (part["to"] or math.inf) for x in xs]
            assert part["tokens"] == len(inside)
            assert part["perplexity"] == pytest.approx(math.exp(np.mean(inside)), rel=1e-4)
        assert sum(part["tokens"] for part in got["positions"]) == tokens


def test_a_window_beyond_training_has_the_rotation_of_its_length(vocabulary, files):
    model = loaded(vocabulary, rope=Rope(ntk=Ntk(original_length=8, trained_length=16)), max_seq_len=16)
    (text,) = [EN[3]]
    config = BpbConfig(text=files, window=200)
    ids = [PREFIX, *vocabulary.encode(text)]
    logits = reference.forward(model.cfg, model.params, np.array([ids[:-1]]))
    expected = reference.loss(logits, np.array([ids[1:]]), np.ones((1, len(ids) - 1))) * (len(ids) - 1)
    journal = bpb.Journal(None, {})
    with Leader(model) as leader:
        bpb.score_texts(leader, [text], journal, window=200, stride=200)
    (scored,) = journal.scores.values()
    assert 16 < scored.tokens < 200 and scored.nats == pytest.approx(expected, rel=1e-5)
    assert config.sizes(model.cfg, vocabulary) == (200, 200)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_every_token_is_scored_once_by_a_window_that_is_full(num_tokens, window, data):
    stride = data.draw(st.integers(1, window))
    found = list(windows(num_tokens, window, stride))
    assert [i for _, begin, end in found for i in range(begin, end)] == list(range(num_tokens))
    for number, (first, begin, end) in enumerate(found):
        assert end - begin <= (stride if number else window)
        assert end - 1 - first == (window if number else end), "so many tokens are read"


@given(st.integers(1, 60), st.integers(2, 20))
def test_a_stride_of_a_window_gives_the_windows_of_the_harness(num_tokens, window):
    utils = pytest.importorskip("lm_eval.utils", reason="the extra [eval] is not installed")
    ids = list(range(100, 100 + num_tokens))
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 7, window, 1))
    ours = windows(num_tokens, window, window)
    assert [(([7] if a < 0 else ids[a:b]), ids[b:c]) for a, b, c in ours] == list(theirs)


def test_a_document_has_the_loss_that_the_harness_asks_for(vocabulary, files):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    model, texts = loaded(vocabulary, max_seq_len=16), [text for text in EN if text]
    with Leader(model) as leader:
        rolling = harness.adapter(leader).loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts])
    found = evaluation(model, BpbConfig(text=files, resamples=2))["domains"]["en"]
    assert found["loss"] * found["tokens"] == pytest.approx(-sum(rolling), rel=1e-6)


def test_figures_do_not_depend_on_batches_order_or_devices(vocabulary, files, monkeypatch):
    config = BpbConfig(text=files, window=16, stride=7, resamples=10)
    base = evaluation(loaded(vocabulary), config)["domains"]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    cfg, params = small_model()
    placed = jax.device_put(params, param_shardings(tele.spec(cfg), mesh))
    others = [evaluation(loaded(vocabulary, placed), config)]
    turned = BpbConfig(text=dict(reversed(files.items())), window=16, stride=7, resamples=10)
    monkeypatch.setattr(bpb, "GROUP", 50)  # in the middle of a document
    others.append(evaluation(loaded(vocabulary), turned))
    for other in others:
        for name, found in other["domains"].items():
            for key in ("bits_per_byte", "loss"):
                assert found[key] == pytest.approx(base[name][key], rel=2e-6)


def test_the_end_of_sequence_counts_where_it_is_asked_for(vocabulary, files):
    texts = [text for text in EN if text]
    without, with_end = (
        evaluation(loaded(vocabulary), BpbConfig(text=files, eos=eos))["domains"]["en"] for eos in (0, 1)
    )
    assert with_end["tokens"] == without["tokens"] + len(texts) and with_end["bytes"] == without["bytes"]
    assert with_end["bits_per_byte"] > without["bits_per_byte"]


# -------------------------------------------------------------------------------------------------- intervals, averages


def domain(sizes, name="x"):
    return Domain(name, (), [(str(i), int(size)) for i, size in enumerate(sizes)], 1.0)


def test_the_bootstrap_is_seeded_and_leaves_empty_documents_out():
    rng = np.random.default_rng(0)
    sizes, nats = rng.integers(1, 99, 20), rng.uniform(1, 9, 20)
    config = BpbConfig(text={"x": ("f",)}, seed=3, resamples=50)
    found = bpb.bootstrap(nats, domain(sizes), config)
    assert found.tolist() == bpb.bootstrap(nats, domain(sizes), config).tolist()
    assert found.tolist() == bpb.bootstrap([0.0, *nats], domain([0, *sizes]), config).tolist()
    assert found.tolist() != bpb.bootstrap(nats, domain(sizes, "y"), config).tolist()
    low, high = bpb._interval(found)
    assert low < nats.sum() / sizes.sum() / math.log(2) < high


def test_nineteen_of_twenty_intervals_hold_the_figure_of_all_text():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        sizes = rng.integers(50, 500, 60)
        nats = sizes * rng.gamma(25.0, 1 / 25.0, 60) * math.log(2)  # 1 bit per byte, spread over the documents
        config = BpbConfig(text={"x": ("f",)}, seed=trial, resamples=200)
        low, high = bpb._interval(bpb.bootstrap(nats, domain(sizes), config))
        covered += low < 1.0 < high
    assert 0.90 <= covered / 200 <= 0.985


def test_averages_are_weighted_as_published_or_name_what_is_missing(vocabulary, tmp_path):
    names = ["WebText", "Github", "Wikipedia", "Book", "ArXiv", "StackExchange", "zh.QA"]
    for name in names:
        lines = (json.dumps({"text": f"{name} the cat {i}"}) for i in range(3))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    config = BpbConfig(text={name: (str(tmp_path / f"{name}.jsonl"),) for name in names}, resamples=50)
    found = evaluation(loaded(vocabulary), config)
    bits = [found["domains"][name]["bits_per_byte"] for name in names[:6]]
    assert found["averages"]["en L-Prop"]["bits_per_byte"] == pytest.approx(
        np.average(bits, weights=[82, 4.5, 4.5, 4.5, 2.5, 2.0])
    )
    assert found["averages"]["en F-Prop"]["bits_per_byte"] == pytest.approx(
        np.average(bits, weights=[75.17, 13.48, 3.56, 5.26, 1.46, 1.07])
    )
    low, high = found["averages"]["en L-Prop"]["interval"]
    assert low <= found["averages"]["en L-Prop"]["bits_per_byte"] <= high
    missing = ["WebText", "Code", "Book", "WorldKnowledge", "Classical", "Professional"]
    assert found["averages"]["zh weighted"] == {"missing": missing}


def test_documents_that_are_cut_at_a_length_reach_it():
    scores = [bpb.Scored(n, 0.0, [(min(n, 2), 2.0), (max(n - 2, 0), 6.0), (0, 0.0)]) for n in (1, 2, 4)]
    figures = bpb._figures(domain([5, 5, 5]), scores, [0, 2, 4], np.zeros(1))
    assert [part["cut"] for part in figures["positions"]] == [
        {"documents": 2, "loss": 1.0},
        {"documents": 1, "loss": 2.0},
    ]


def test_lines_of_json_are_known_by_a_name_of_any_case(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert list(read_texts([str(tmp_path / "A.JSONL")])) == ["a", "b"]


def test_the_floor_is_xz_on_pieces_of_a_megabyte(tmp_path, monkeypatch):
    assert evaluated.FLOOR_BYTES == 1_000_000
    monkeypatch.setattr(evaluated, "FLOOR_BYTES", 1_000)
    whole = "".join(random.Random(0).choices("abcdefgh \n", k=2_400))
    for i, part in enumerate((whole[:700], whole[700:])):
        (tmp_path / f"{i}.txt").write_text(part)
    (found,) = survey(BpbConfig(text={"x": (str(tmp_path / "*.txt"),)}))
    pieces = [whole[i : i + 1_000].encode() for i in (0, 1_000, 2_000)]
    assert found.xz == 8 * sum(len(lzma.compress(piece)) for piece in pieces) / 2_400
    assert [size for _, size in found.documents] == [700, 1_700]


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return work_directory(tmp_path_factory.mktemp("run") / "W")


def tele_eval(capsys, *arguments, code=0):
    """Runs `tele eval bpb`; returns what it printed, or its one line."""
    capsys.readouterr()
    assert main(["eval", "bpb", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    if code == 0:
        return printed.out
    assert printed.err.startswith("tele: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


def text_flags(files):
    return ["--text", *(f"{name}={patterns[0]}" for name, patterns in files.items())]


def test_two_checkpoints_stand_side_by_side(work, files, tmp_path, capsys, vocabulary):
    page = tmp_path / "page.py"
    page.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict(dict(text={files!r}, window=16, resamples=20))\n"
    )
    other = work_directory(tmp_path / "other", *small_model(rms_eps=0.1))
    how = ("--config", page, "--config.stride=8", "--out", tmp_path / "out", "--json", tmp_path / "f.json")
    printed = tele_eval(capsys, work, other, *how, "--by-position")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures == json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(figures["models"]) == [str(work), str(other)]
    first, second = (model["domains"]["en"]["bits_per_byte"] for model in figures["models"].values())
    assert first != second and f"{first:.4f} [" in printed and f"{second:.4f} [" in printed
    expected = evaluation(loaded(vocabulary), BpbConfig(text=files, window=16, stride=8, resamples=20))
    assert figures["models"][str(work)]["window"] == 16 and figures["models"][str(work)]["stride"] == 8
    assert figures["text"]["en"] | {"files": []} == {
        **{"files": [], "documents": 4, "empty": 1, "bytes": sum(len(t.encode()) for t in EN)},
        "xz": survey(BpbConfig(text=files))[0].xz,
    }
    # The tokenizer of the 12B has a token that begins every document.
    assert first == pytest.approx(expected["domains"]["en"]["bits_per_byte"], rel=0.1)
    assert (tmp_path / "out" / "bits_per_byte.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_the_repository_is_one():
    page = load_page(str(Path(__file__).parents[2] / "configs" / "eval" / "bpb.py"))
    assert list(from_dict(BpbConfig, dict(page.items()), "config").text) == ["code", "en", "zh"]


def test_a_killed_evaluation_goes_on(work, files, tmp_path, capsys, monkeypatch):
    how = [str(work), *text_flags(files), "--window", "16", "--out"]
    asked, limit = [], [math.inf]
    score = EvalModel.score

    def counted(model, requests):
        if sum(asked) >= limit[0]:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return score(model, requests)

    monkeypatch.setattr(EvalModel, "score", counted)
    whole, out = tmp_path / "whole", tmp_path / "out"
    tele_eval(capsys, *how, whole)
    total = sum(asked)
    monkeypatch.setattr(bpb, "GROUP", 1)
    limit[0] = total + total // 2
    assert main(["eval", "bpb", *how, str(out)]) == 130
    (kept,) = out.glob("scores-*.jsonl")
    _, *lines = kept.read_text().splitlines()
    scored = sum(len(list(windows(json.loads(line)[1], 16, 16))) for line in lines)
    assert 2 <= len(lines) < sum(map(bool, EN + OTHER)) and 0 < scored <= total // 2
    with kept.open("ab") as file:
        file.write(b'["cut sh')  # a kill in the middle of a line
    asked.clear()
    limit[0] = math.inf
    tele_eval(capsys, *how, out)
    assert sum(asked) == total - scored, "what was scored is not scored again"
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (out, whole))
    for name, found in ours["models"][str(work)]["domains"].items():
        expected = theirs["models"][str(work)]["domains"][name]
        assert found["tokens"] == expected["tokens"]
        assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=2e-6)
    asked.clear()
    tele_eval(capsys, *how, out)
    assert sum(asked) == 0
    assert "was made with another stride" in tele_eval(capsys, *how, out, "--stride", 8, code=2)
    (out / "results.json").unlink()
    tele_eval(capsys, *how, out, "--stride", 8)
    assert sum(asked) > total, "scores of other windows do not serve"
    (out / "results.json").unlink()
    whole_line = kept.read_text()
    for damaged in (whole_line.replace("[[", "[{", 1), re.sub(r"\[\[.*\]\]", "[]", whole_line, count=1)):
        kept.write_text(damaged)
        assert ", line 2: damaged" in tele_eval(capsys, *how, out, code=1)


def test_results_of_something_else_and_a_directory_in_use_are_left_alone(work, files, tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"results": {}}')
    message = tele_eval(capsys, work, *text_flags(files), "--out", tmp_path, code=2)
    assert "holds results of something else" in message
    assert (tmp_path / "results.json").read_text() == '{"results": {}}'
    other = {"kind": "bits_per_byte", "models": {"W0": {}}}
    (tmp_path / "results.json").write_text(json.dumps(other))
    message = tele_eval(capsys, work, *text_flags(files), "--out", tmp_path, code=2)
    assert "results.json: holds results of W0; name it as well, or choose another --out" in message
    assert json.loads((tmp_path / "results.json").read_text()) == other
    (tmp_path / "results.json").write_text('{"kind": "bits_per_byte", "models": [1]}')
    assert "holds results of something else" in tele_eval(capsys, work, *text_flags(files), "--out", tmp_path, code=2)
    with held_alone(tmp_path / "other" / ".lock", ""):
        message = tele_eval(capsys, work, *text_flags(files), "--out", tmp_path / "other", code=2)
    assert "another tele eval writes there" in message


def test_progress_counts_every_byte_once_also_of_equal_documents(vocabulary, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*EN, *EN, "x"]))
    monkeypatch.setattr(bpb, "GROUP", 30)
    seen: list[int] = []
    config = BpbConfig(text={"x": (str(tmp_path / "x.jsonl"),), "y": (str(tmp_path / "x.jsonl"),)}, resamples=2)
    evaluation(loaded(vocabulary), config, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 4 * sum(len(text.encode()) for text in EN) + 2


BAD_TEXT = {
    "no file": (lambda path: None, "no file matches"),
    "no document": (lambda path: path.write_text("\n"), "there is not one document with text"),
    "empty documents": (lambda path: path.write_text('{"text": ""}\n'), "there is not one document with text"),
    "an empty file": (lambda path: path.write_text(""), "the file is empty"),
    "no JSON": (lambda path: path.write_text('{"text": "a"}\nnone\n'), "line 2: not JSON"),
    "no key": (lambda path: path.write_text('{"content": "a"}\n'), 'line 1: not a table with the key "text" or "data"'),
    "no UTF-8": (lambda path: path.write_bytes(b'{"text": "\xff"}\n'), "not UTF-8 at byte 10"),
    "packed": (lambda path: path.write_bytes(b"\x1f\x8b1234567890"), "is compressed"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_text_that_cannot_be_read_is_named(case, tmp_path):
    write, message = BAD_TEXT[case]
    path = tmp_path / "x.jsonl"
    write(path)
    with pytest.raises(UserError, match=message) as error:
        survey(BpbConfig(text={"x": (str(path),)}))
    assert "x.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no domain; give DOMAIN=FILES"),
        (["--text", "en"], "--text en: expected DOMAIN=FILES"),
        (["--text", "=x"], "--text =x: expected DOMAIN=FILES"),
        (["--text", "en=EN", "--window", 1], "window=1 must be at least 2"),
        (["--text", "en=EN", "--window", 65], "window=65 is above the model's max_seq_len=64"),
        (["--text", "en=EN", "--window", 8, "--stride", 9], "stride=9 is above the window of 8 tokens"),
        (["--text", "en=EN", "--stride", 65], "stride=65 is above the window of 64 tokens"),
        (["--text", "en=EN", "--stride", 0], "stride=0 must be above 0"),
        (["--text", "en=EN", "--config.seed=1"], "--config.seed=1: changes a page, and --config names none"),
        (["--text", "en=nowhere"], "no file matches nowhere"),
        (["--config", "PAGE"], "config.windw: unknown key of BpbConfig; did you mean 'window'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_command_is_one_line(flags, message, work, files, tmp_path, capsys):
    (tmp_path / "page.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict(dict(text={}, windw=3))\n"
    )
    places = {"en=EN": f"en={files['en'][0]}", "PAGE": tmp_path / "page.py"}
    assert message in tele_eval(capsys, work, *(places.get(flag, flag) for flag in flags), code=2)


@pytest.mark.parametrize(
    ("changes", "provenance", "message"),
    [
        ({}, ({"mask": 0.25},), "grown behind masks that stand at 0.25"),
        ({"vocab_size": 430}, (), "it has 440 ids, but the model's vocab_size is 430"),
        ({"max_seq_len": 8}, (), "window=16 is above the model's max_seq_len=8"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_another_is_scored(
    changes, provenance, message, work, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(EvalModel, "score", None)
    checkpoint.save(tmp_path / "other", *small_model(**changes), step=1, provenance=provenance)
    (tmp_path / "other" / "tokenizer.model").write_bytes(tokenizer_bytes())
    how = (*text_flags(files), "--window", 16)
    assert message in tele_eval(capsys, work, tmp_path / "other", *how, code=2)
