"""Tasks of the harness while a stage trains: when they are evaluated, what is written, which checkpoint stays."""

import json
import types

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError
from tele_jax.eval import in_training
from tele_jax.eval import model as models
from tele_jax.inference.score import encode_pair
from tele_jax.settings import TasksConfig
from tele_jax.train import metrics
from tests.inference.test_chat import tokenizer_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASK = """\
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ITEMS = [{"q": f"{i} and {i + 1} are", "choices": ["not", "equal", "text 1"], "gold": i % 3} for i in range(8)]


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("train", "held_out"):
        lines = (json.dumps({"text": f"{name} {i} and {i + 1} are not {2 * i}"}) + "\n" for i in range(300))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(file=tmp_path / "tasks" / "items.jsonl"))
    source = {"files": [str(tmp_path / "train.jsonl")], "validation_files": [str(tmp_path / "held_out.jsonl")]}
    data = {"tokenizer": str(tmp_path / "tokenizer.model"), "sources": {"en": source | {"format": "jsonl"}}}
    model = dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, vocab_size=600, dtype="float32", max_seq_len=64)
    stage = {"kind": "pretrain", "data": data, "steps": 6, "batch_size": 4, "seq_len": 32, "model": model}
    stage |= {"optimizer": {"learning_rate": 3e-2}, "eval_every": 2, "checkpoint_every": 6}
    stage |= {"tasks": {"names": {"sums": 0.5}, "data": str(tmp_path / "tasks"), "every": 3}}
    return {"run": ["only"], "only": stage}


def accuracy(cfg, params, vocabulary, items):
    """By the plain model: the likeliest of the choices, each scored after the question by itself."""
    right = 0
    for item in items:
        values = []
        for choice in item["choices"]:
            prompt, answer = encode_pair(vocabulary, item["q"], f" {choice}")
            prompt = [vocabulary.eos_id, *prompt]  # what a pretrained model has seen before a text
            logits = np.asarray(tele.forward(cfg, params, [prompt + answer])[0], np.float64)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            values.append(sum(logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)))
        right += int(np.argmax(values)) == item["gold"]
    return right / len(items)


def test_a_stage_evaluates_tasks_on_the_way_and_keeps_the_best_checkpoint(page, tmp_path):
    page["only"]["keep_best"] = "bits_per_byte/en"
    (summary,) = tele.run(page, tmp_path / "w")
    lines = metrics.read(tmp_path / "w" / "only" / "metrics" / "metrics.jsonl")
    tasks = {int(line["step"]): line["eval/tasks/sums/acc"] for line in lines if "eval/tasks/sums/acc" in line}
    bits = {int(line["step"]): line["eval/bits_per_byte/en"] for line in lines if "eval/bits_per_byte/en" in line}
    assert list(tasks) == [0, 3, 6] and list(bits) == [0, 2, 4, 6]
    last = checkpoint.load(tmp_path / "w" / "only")
    vocabulary = load_vocabulary(tmp_path / "tokenizer.model")
    assert tasks[6] == accuracy(last.cfg, last.params, vocabulary, ITEMS[:4]), "the first half of the items"
    assert summary["tasks_after"] == {"sums/acc": tasks[6]} and summary["tasks_before"] == {"sums/acc": tasks[0]}
    best = min((step for step in bits if step), key=bits.get)
    assert checkpoint.open_lazy(tmp_path / "w" / "only" / "best").step == best
    kept = checkpoint.load(tmp_path / "w" / "only" / "best")
    if best == 6:
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (kept.params, last.params)), strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tasks": {"names": {"summs": 1.0}}}, r"config.only.tasks: --tasks summs: no such task"),
        ({"tasks": {"names": {"sums": 1.5}}}, r"names.sums=1.5 is a share of the items, above 0 and at most 1"),
        ({"tasks": {"names": {}}}, "names is empty"),
        ({"keep_best": "loss"}, "keep_best='loss': expected bits_per_byte/DOMAIN, or tasks/TASK/METRIC"),
        ({"keep_best": "tasks/other/acc"}, "keep_best='tasks/other/acc': expected"),
        ({"keep_best": "tasks/sums/word_perplexity"}, "is kept by the share of right answers"),
        ({"keep_best": "bits_per_byte/zh"}, "keep_best='bits_per_byte/zh': the evaluations have bits_per_byte/en"),
        (
            {"keep_best": "tasks/sums/f1"},
            "keep_best='tasks/sums/f1': the evaluations have bits_per_byte/en, tasks/sums",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_named_before_the_first_step(page, tmp_path, change, named):
    tasks = page["only"]["tasks"] | change.get("tasks", {})
    page["only"] |= change | {"tasks": tasks}
    with pytest.raises(UserError, match=named):
        tele.run(page, tmp_path / "w")
    assert not list((tmp_path / "w").glob("only/checkpoints/*"))


def test_equal_prompts_are_drawn_apart_whatever_the_batch(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    vocabulary = load_vocabulary(tmp_path / "tokenizer.model")
    size = vocabulary.vocab_size
    cfg = tele.ModelConfig(num_layers=1, embed_dim=8, num_heads=1, mlp_dim=8, vocab_size=size, dtype="float32")
    model = models.of_params("a model", cfg, tele.init(cfg, jax.random.key(0)), vocabulary, [])
    prompts = [[5, 6]] * (models.ROWS + 2)
    texts = model.continue_texts(prompts, max_new_tokens=12, temperature=1.0, seed=3)
    assert len(set(texts)) == len(prompts), "rows of the second batch do not repeat those of the first"
    assert model.continue_texts(prompts[:4], max_new_tokens=12, temperature=1.0, seed=3) == texts[:4]


def test_prompts_that_are_cut_are_counted_beside_the_figures(page, tmp_path):
    items = [ITEMS[0] | {"q": "1 and 2 " * 100}, *ITEMS[1:]]
    (tmp_path / "tasks" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    vocabulary = load_vocabulary(tmp_path / "tokenizer.model")
    settings = TasksConfig(names={"sums": 1.0}, data=page["only"]["tasks"]["data"])
    stage = types.SimpleNamespace(tasks=settings, data=types.SimpleNamespace(template=None))
    cfg = tele.ModelConfig(**page["only"]["model"])
    evaluate = in_training.open_tasks(stage, vocabulary, "config.only")
    figures = evaluate(cfg, tele.init(cfg, jax.random.key(0)), None, [])
    assert figures["sums/prompts_cut"] == 3 and "sums/acc" in figures


def test_tasks_that_are_named_after_the_last_step_are_not_evaluated(page, tmp_path):
    tasks = page["only"].pop("tasks")
    page["only"] |= {"steps": 1, "checkpoint_every": 1}
    tele.run(page, tmp_path / "w")
    (tmp_path / "w" / "only" / "summary.json").unlink()  # as after a kill at the very end
    page["only"]["tasks"] = tasks
    (summary,) = tele.run(page, tmp_path / "w")
    assert summary["tasks_before"] == summary["tasks_after"] == {}
