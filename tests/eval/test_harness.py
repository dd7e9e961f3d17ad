"""The harness on a model of ours: equal to plain forward passes, whatever the batches, order and devices; going on."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

import tele_jax as tele
from tele_jax.cli.main import main
from tele_jax.data import dialogue, templates
from tele_jax.data.vocabulary_training import train_vocabulary
from tele_jax.errors import DamageError, UserError
from tele_jax.eval import harness, tasks
from tele_jax.eval import model as models
from tele_jax.inference import score
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh
from tests.eval import files
from tests.inference.test_chat import TEXTS, work_directory
from tests.inference.test_chat import model as small_model
from tests.ports import free_port

pytestmark = pytest.mark.usefixtures("quick_compilation")
LENGTH = 512
plain = jax.jit(tele.forward, static_argnums=0)
NAMES = ["mmlu", "winogrande", "truthfulqa_mc2", "evals_numerals"]
HISTORY = [("user", "The cat?"), ("assistant", "sat"), ("user", "画蛇？")]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return work_directory(tmp_path_factory.mktemp("run") / "W", *small_model(max_seq_len=LENGTH))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return files.write(
        tmp_path_factory.mktemp("data"), ["mmlu", "winogrande", "truthfulqa", "evals_numerals", "idioms"]
    )


@pytest.fixture(scope="module")
def loaded(work):
    return models.load(work)


@pytest.fixture(scope="module")
def once(loaded, data, tmp_path_factory):
    """(results, scores of every item) of an evaluation that nothing disturbs."""
    return evaluated(loaded, data, tmp_path_factory.mktemp("once") / "out")


def evaluated(model, data, out, names=NAMES, **how):
    with models.Leader(model) as leader:
        results = harness.evaluate(leader, tasks.find(names, data), out=out, **how)
    return results, answers(out)


def answers(out):
    """{(task, item): what the model gave for it}."""
    found = {}
    for path in sorted(out.glob("samples_*.jsonl")):
        for item in map(json.loads, path.read_text().splitlines()):
            found[path.stem, item["doc_id"]] = item["resps"]
    return found


def alike(one, other):
    """True where the texts and the choices are equal, and log-probabilities but for the rounding of other shapes."""

    def rounded(resps):
        return [r if isinstance(r, str) else (pytest.approx(r[0], abs=1e-4), r[1]) for (r,) in resps]

    plain = {key: [r if isinstance(r, str) else tuple(r) for (r,) in resps] for key, resps in other.items()}
    return {key: rounded(resps) for key, resps in one.items()} == plain


def requests(kind, arguments):
    return [Instance(kind, {}, args, 0) for args in arguments]


def logprobs(model, ids):
    """log P(next id) at every place, float64[n, V], of a plain forward pass; what comes after ids changes nothing."""
    padded = np.zeros((1, 64 if len(ids) <= 64 else LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(plain(model.cfg, model.params, padded), np.float64)[0, : len(ids), : model.cfg.vocab_size]
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected_score(model, context, continuation):
    found = logprobs(model, (context + continuation)[:-1])[len(context) - 1 :]
    picked = found[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((found.argmax(-1) == continuation).all())


def test_loglikelihoods_are_those_of_plain_forward_passes(loaded):
    pairs = [
        ("The cat", " sat on"),
        ("The cat ", "sat"),
        ("", "The mat"),
        ("画蛇添足", "是什么"),
        ("The cat", " sat on"),
    ]
    with models.Leader(loaded) as leader:
        found = harness.adapter(leader).loglikelihood(requests("loglikelihood", pairs))
    encode = loaded.vocabulary.encode
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        kept = context.rstrip()
        whole, length = encode(context + continuation), len(encode(kept)) if kept else 0
        start = [loaded.prefix] if not kept or loaded.document_start is not None else []
        wanted = expected_score(loaded, start + whole[:length], whole[length:])
        assert logprob == pytest.approx(wanted[0], abs=1e-4) and is_greedy == wanted[1]


def test_rolling_loglikelihoods_cover_a_document_longer_than_the_window(loaded):
    texts = ["The cat sat on the mat. " * 120, "画蛇"]
    with models.Leader(loaded) as leader:
        adapter = harness.adapter(leader)
        found = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    total = 0
    for text, got in zip(texts, found, strict=True):
        ids = loaded.vocabulary.encode(text)
        wanted = 0.0
        for start in range(0, len(ids), LENGTH):
            end = min(start + LENGTH, len(ids))
            first = max(0, end - LENGTH - 1) if start else 0  # the last window looks back as far as it can
            context = ids[first:start] if start else [loaded.prefix]
            wanted += expected_score(loaded, context, ids[start:end])[0]
        total += len(ids)
        assert got == pytest.approx(wanted, rel=1e-5)
    assert total > 2 * LENGTH and adapter.counts["tokens"] == total


def test_generation_is_greedy_and_ends_at_a_stop_string(loaded):
    prompts = ["The cat", "画蛇添足", "def f"]

    def greedy(prompt, count):
        ids = loaded.encode(prompt)
        for _ in range(count):
            ids.append(int(logprobs(loaded, ids)[-1].argmax()))
            if ids[-1] in loaded.stop_ids:
                return ids[len(loaded.encode(prompt)) : -1]
        return ids[len(loaded.encode(prompt)) :]

    with models.Leader(loaded) as leader:
        adapter = harness.adapter(leader)
        asked = [(prompt, {"until": [], "max_gen_toks": 9, "do_sample": False}) for prompt in prompts]
        found = adapter.generate_until(requests("generate_until", asked))
        for prompt, text in zip(prompts, found, strict=True):
            written = loaded.vocabulary.decode(loaded.encode(prompt) + greedy(prompt, 9))
            assert written.endswith(text) and len(text) >= 1
        stop = found[0][2:4]
        asked = [(prompts[0], {"until": [stop], "max_gen_toks": 9})]
        assert adapter.generate_until(requests("generate_until", asked)) == [found[0][: found[0].index(stop)]]
        with pytest.raises(UserError, match="asks for beams in generation"):
            adapter.generate_until(requests("generate_until", [("a", {"beams": 2})]))
        with pytest.raises(UserError, match=f"{LENGTH} new tokens; the model has {LENGTH} positions"):
            adapter.generate_until(requests("generate_until", [("a", {"max_gen_toks": LENGTH})]))


@pytest.mark.parametrize("system", [False, True])
def test_dialogues_have_the_ids_of_training(loaded, system):
    history = [{"role": role, "content": text} for role, text in HISTORY]
    told = [{"role": "system", "content": "Be short."}] if system else []
    with models.Leader(loaded) as leader:
        adapter = harness.adapter(leader)
        text = adapter.apply_chat_template(told + history)
    if system and loaded.template.system is None:  # an instruction of a task goes to the first question
        history[0]["content"] = f"Be short.\n\n{history[0]['content']}"
    else:
        history = told + history
    ids = dialogue.render_prompt(history, loaded.vocabulary, template=loaded.template)
    assert adapter.tok_encode(text) == ids
    ((_, context, continuation),) = [(None, *adapter._encode_pair(text, "sat"))]
    assert context == ids and continuation == loaded.vocabulary.encode_continuation("sat")


@pytest.mark.parametrize("change", ["batch", "order", "mesh"])
def test_results_do_not_depend_on_batches_order_and_devices(loaded, work, data, once, tmp_path, monkeypatch, change):
    model, names = loaded, NAMES
    if change == "batch":
        monkeypatch.setattr(score, "CPU_BATCH", 256)
        monkeypatch.setattr(models, "ROWS", 1)
    elif change == "order":
        names = NAMES[::-1]
    else:
        model = models.load(work, mesh=make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4]))
    results, found = evaluated(model, data, tmp_path / "out", names)
    assert alike(found, once[1]) and results["counts"] == once[0]["counts"]
    for task, figures in once[0]["results"].items():
        for name, value in figures.items():
            assert name == "sample_count" or results["results"][task][name] == pytest.approx(value, abs=1e-4)


def test_what_is_written_and_counted(once, data):
    results, found = once
    assert {"mmlu", "mmlu_law", *NAMES} == results["results"].keys()
    assert results["counts"]["requests"] == 2 * 4 + 2 * 2 + 2 * 3 + 2 and results["counts"]["kept"] == 0
    assert len(found) == 8 and results["n-shot"]["mmlu_law"] == 5


class Killed(models.Leader):
    """Dies after some answers, as a process that is killed."""

    left = 5

    def _die(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def score(self, requests):
        for found in super().score(requests):
            self._die()
            yield found


def test_a_killed_evaluation_goes_on(loaded, data, once, tmp_path):
    out = tmp_path / "out"
    with Killed(loaded) as leader, pytest.raises(KeyboardInterrupt):
        harness.evaluate(leader, tasks.find(NAMES, data), out=out)
    assert not (out / "results.json").exists()
    kept = (out / "answers.jsonl").read_bytes()
    assert kept.count(b"\n") == 5
    (out / "answers.jsonl").write_bytes(kept[:-3])  # killed while it wrote
    asked = []

    class Watched(models.Leader):
        def score(self, requests):
            asked.extend(requests)
            return super().score(requests)

    with Watched(loaded) as leader:
        results = harness.evaluate(leader, tasks.find(NAMES, data), out=out)
    assert len(asked) == once[0]["counts"]["requests"] - 2 - 4, "two are written, four were kept"
    assert results["counts"] == once[0]["counts"] | {"kept": 4} and alike(answers(out), once[1])
    assert [f.get("acc,none") for f in results["results"].values()] == pytest.approx(
        [f.get("acc,none") for f in once[0]["results"].values()], abs=1e-4
    )


def test_a_directory_of_another_run_is_refused(loaded, work, data, tmp_path):
    out = tmp_path / "out"
    evaluated(loaded, data, out, ["idioms"], limit=1)
    before = (out / "results.json").read_bytes()
    other = models.load(work_directory(tmp_path / "other", *small_model(max_seq_len=LENGTH, tie_embeddings=True)))
    for model, names, how, what in (
        (other, ["idioms"], {"limit": 1}, "parameters was"),
        (loaded, ["winogrande"], {"limit": 1}, r"tasks was \[.idioms.\]"),
        (loaded, ["idioms"], {"limit": 2}, "limit was 1 and is now 2"),
        (loaded, ["idioms"], {"limit": 1, "chat": True}, "chat was false and is now true"),
    ):
        with pytest.raises(UserError, match=f"holds another run, whose {what}"):
            evaluated(model, data, out, names, **how)
    changed = files.write(tmp_path / "data", ["idioms"])
    path = changed / "idioms" / "test.jsonl"
    path.write_text(path.read_text().replace("Wet", "Dry"))
    with pytest.raises(UserError, match="whose items was"):
        evaluated(loaded, changed, out, ["idioms"], limit=1)
    assert (out / "results.json").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        evaluated(loaded, data, tmp_path / "full", ["idioms"])


def test_a_prompt_beyond_the_window_is_cut_and_counted_or_refused(data, tmp_path):
    model = models.load(work_directory(tmp_path / "W", *small_model(max_seq_len=64)))
    results, _ = evaluated(model, data, tmp_path / "cut", ["mmlu"])
    assert results["counts"]["cut"] == 8
    with pytest.raises(UserError, match=r"a prompt of \d+ tokens, but the model has room for 65; --long cut cuts"):
        evaluated(model, data, tmp_path / "refuse", ["mmlu"], long="refuse")


def test_the_command_says_what_it_found_and_nothing_else(work, data, tmp_path, capfd):
    command = ["eval", "harness", str(work), "--data", str(data), "--tasks", "telechat_mmlu", "--limit", "1"]
    capfd.readouterr()
    assert main([*command, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "f.json")]) == 0
    out, err = capfd.readouterr()
    assert err == "" and "telechat_mmlu_law" in out and "unreadable" in out and "lost their beginning" in out
    results = json.loads((tmp_path / "f.json").read_text())
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    (item,) = map(json.loads, (tmp_path / "out" / "samples_telechat_mmlu_law.jsonl").read_text().splitlines())
    turns = item["arguments"][0][0]
    assert turns.count("<user> ") == 6 and turns.count("<assistant> Answer: B\n") == 5, "five examples as turns"
    wrong = [("--limit 0", "--limit 0: must be above 0")]
    wrong += [
        (f"--limit {n}", f"--limit {n}: must be a whole number of items, or a share") for n in ("nan", "inf", "1.5")
    ]
    wrong += [
        ("--tasks mmlu --system S", "--system: is a message of dialogues; add --chat"),
        ("--template none", "none"),
    ]
    wrong += [(f"--out {work}/tokenizer.model", "tokenizer.model: is a file; --out is a directory")]
    for flags, message in wrong:
        assert main([*command, "--out", str(tmp_path / "o2"), *flags.split()]) == 2
        out, err = capfd.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "o2").exists()


def test_a_reply_ends_at_the_next_question(tmp_path):
    cfg, params = small_model(max_seq_len=64)
    work = work_directory(tmp_path / "W", cfg, params)
    model = models.load(work)
    assert set(model.stop_ids) >= set(templates.stop_ids(model.template, model.vocabulary))
    prompt, user = model.prompt([{"role": "user", "content": "The cat?"}]), model.vocabulary.user_id
    found = logprobs(model, prompt)[-1].argmax()
    assert found not in model.stop_ids and user in model.stop_ids
    head = model.params["lm_head"]["kernel"]
    model.params["lm_head"]["kernel"] = head.at[:, [found, user]].set(head[:, [user, found]])
    assert logprobs(model, prompt)[-1].argmax() == user, "the model asks the next question at once"
    assert model.continue_texts([prompt], max_new_tokens=8) == [""]


def test_a_choice_longer_than_the_window_and_damaged_answers(loaded, data, tmp_path):
    path = files.write(tmp_path / "long", ["idioms"]) / "idioms" / "test.jsonl"
    path.write_text(json.dumps({"question": "q", "choices": ["a", "画" * 2 * LENGTH], "answer": 0}))
    named = rf"--tasks idioms, item 0: a choice of \d+ tokens leaves no room .* has {LENGTH} positions"
    with pytest.raises(UserError, match=named):
        evaluated(loaded, tmp_path / "long", tmp_path / "a", ["idioms"])
    evaluated(loaded, data, tmp_path / "b", ["idioms"], limit=1)
    kept = tmp_path / "b" / "answers.jsonl"
    key = json.loads(kept.read_text().split("\n")[0])[0]
    for damage in ([key, "x"], [key, 5], [key, [1.0]], [key, [True, 1.0]], [key], {"a": 1}):
        kept.write_text(json.dumps(damage) + "\n")
        with pytest.raises(DamageError, match=r"answers.jsonl.*: damaged, .*; remove the file to ask again"):
            evaluated(loaded, data, tmp_path / "b", ["idioms"], limit=1)


def test_a_model_mid_growth_and_a_vocabulary_that_does_not_fit(data, tmp_path, capfd):
    cfg, params = small_model(max_seq_len=64)
    work = work_directory(tmp_path / "W", cfg, params)
    growing = {"stage": "grow", "kind": "grow", "policy": "msg", "seed": 0, "plan": "x", "mask": 0.5}
    tele.checkpoint.save(tmp_path / "growing", cfg, params, provenance=[growing])
    how = ["--data", str(data), "--tasks", "idioms", "--out", str(tmp_path / "out")]
    for path, message in ((tmp_path / "growing", "mask"), (work, "vocab")):
        tokenizer = work / "tokenizer.model"
        if message == "vocab":
            trained = train_vocabulary(TEXTS, preset="telechat_12b", vocab_size=470, character_coverage=1.0)
            tokenizer = tmp_path / "larger.model"
            tokenizer.write_bytes(trained.model)
        assert main(["eval", "harness", str(path), "--tokenizer", str(tokenizer), *how]) == 2
        err = capfd.readouterr().err
        assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


SCRIPT = """
import json, sys
from pathlib import Path
from tele_jax import processes
from tele_jax.cli import train as several
from tele_jax.eval import harness, tasks
from tele_jax.eval import model as models
from tele_jax.settings import MeshConfig
from tele_jax.sharding import make_mesh

number, port, work, data, out = int(sys.argv[1]), *sys.argv[2:]
with several.together(processes.Place(f"127.0.0.1:{port}", 2, number)):
    model = models.load(work, mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
    with models.Leader(model) as leader:
        if leader.leads:
            harness.evaluate(leader, tasks.find(NAMES, Path(data)), out=Path(out))
            (Path(out) / "wrong").mkdir()
    with models.Leader(model) as leader:
        if leader.leads:
            try:
                harness.evaluate(leader, tasks.find(NAMES, Path(data)), out=Path(out), limit=0)
            except ValueError as error:
                print(error)
    print("ended", flush=True)
"""


def test_process_0_runs_the_harness_and_both_compute(work, data, once, tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", SCRIPT.replace("NAMES", repr(NAMES))]
    port, places = str(free_port()), [str(work), str(data), str(tmp_path / "out")]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    children = [subprocess.Popen([*command, str(i), port, *places], **streams) for i in range(2)]
    said = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0] and all("ended" in out for out, _ in said), said
    assert "--limit 0" in said[0][0]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["counts"] == once[0]["counts"]
    assert alike(answers(tmp_path / "out"), once[1])
