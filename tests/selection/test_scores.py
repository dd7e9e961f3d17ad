"""A model's losses and states against the float64 reference, and the stages that stand on them."""

import json
import shutil

import jax
import numpy as np
import pytest

import tele_jax as tele
from tele_jax import checkpoint
from tele_jax.data import dialogue
from tele_jax.data.templates import TEMPLATES
from tele_jax.data.vocabulary_training import train_vocabulary
from tele_jax.errors import UserError
from tele_jax.eval import model as models
from tele_jax.selection import pipeline, samples, scores
from tele_jax.selection.samples import Sample
from tele_jax.selection.settings import ModelConfig, select_config
from tests import reference
from tests.inference.test_chat import TEXTS, work_directory
from tests.inference.test_chat import model as small_model
from tests.selection import pools

pytestmark = pytest.mark.usefixtures("quick_compilation")
TURNS = ["The cat sat?", "on the mat", "And then?", "画蛇添足"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return work_directory(tmp_path_factory.mktemp("run") / "W", *small_model(max_seq_len=64))


def sample(*turns, number=0, **marks):
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    messages[1] |= marks
    return Sample(number, "x", messages)


def loss(cfg, params, before, answer):
    """Sum of the losses of the answer's ids, in float64."""
    tokens = np.array([[*before, *answer]])
    logits = reference.forward(cfg, params, tokens[:, :-1])
    weights = (np.arange(1, tokens.shape[1]) >= len(before))[None].astype(float)
    return reference.loss(logits, tokens[:, 1:], weights) * len(answer)


@pytest.mark.parametrize("form", ["plain", "template"])
def test_losses_with_and_without_the_question(form, work):
    scorer = scores.Scorer(ModelConfig(checkpoint=str(work), form=form))
    model = models.load(work)
    encode, newline = model.vocabulary.encode, model.vocabulary.encode_continuation("\n")
    made = [sample(*TURNS), sample(*TURNS[:2], number=1), sample(*TURNS, number=2, weight=0)]
    found = scorer.score(made)
    for i, one in enumerate(made):
        messages = list(one.messages)
        sums, count = np.zeros(2), 0
        for j in range(1, len(messages), 2):
            before = [model.prefix]
            if form == "template":
                before = dialogue.render_prompt(messages[:j], model.vocabulary)
            else:
                for message in messages[:j]:
                    before += [*encode(message["content"]), *newline]
            answer = encode(messages[j]["content"])
            if messages[j].get("weight") == 0:
                continue
            sums += [
                loss(model.cfg, model.params, before, answer),
                loss(model.cfg, model.params, [model.prefix], answer),
            ]
            count += len(answer)
        assert np.allclose([found.loss[i], found.alone[i]], sums / count, rtol=1e-4)


@pytest.mark.parametrize("layer", [None, 1])
def test_states_are_means_weighted_by_position(layer, work, monkeypatch):
    monkeypatch.setattr(models.EvalModel, "score", lambda *args: iter(()))  # losses have a test of their own
    monkeypatch.setattr(scores, "SHORT", (64,) if layer is None else (32, 64))  # rows of one length, and of two
    scorer = scores.Scorer(ModelConfig(checkpoint=str(work), layer=layer))
    model = models.load(work)
    made = [sample(*TURNS[: 2 * (1 + i % 2)], number=i) for i in range(4)] + [sample("a " * 15, "b", number=4)]
    found = scorer.score(made)
    layers = layer or model.cfg.num_layers
    cfg = model.cfg.replace(num_layers=layers, tie_embeddings=False)
    params = {**model.params, "lm_head": {"kernel": np.eye(cfg.embed_dim)}}  # the reference then gives the states
    for i, one in enumerate(made):
        ids, _ = scorer.encode(one)
        states = reference.forward(cfg, params, [ids])[0] / cfg.logit_mult
        weights = np.arange(1, len(ids) + 1) / np.arange(1, len(ids) + 1).sum()
        assert found.tokens[i] == len(ids) and np.allclose(found.states[i], weights @ states, atol=1e-4)
    # The other samples of a batch change nothing.
    assert np.allclose(scorer.score(made[2:3]).states, found.states[2:3], atol=1e-6)


def test_adapters_are_scored_as_the_model_that_they_make(work, tmp_path):
    lora = tele.lora.LoraConfig(rank=2, alpha=3.0, targets=("mlp",))
    cfg = checkpoint.open_lazy(work).cfg
    shapes = jax.eval_shape(lambda: tele.lora.init(cfg, lora, jax.random.key(0)))
    adapters = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)  # nothing is compiled
    adapter = checkpoint.adapter_for(work, lora)
    checkpoint.save(tmp_path / "W/sft/checkpoints/5", cfg, adapters, step=5, adapter=adapter)
    shutil.copy(work / "tokenizer.model", tmp_path / "W")
    merged = work_directory(tmp_path / "merged", cfg, checkpoint.load(tmp_path / "W").params)
    configs = [ModelConfig(checkpoint=str(place)) for place in (tmp_path / "W", merged, work)]
    adapted, same, base = (scores.Scorer(config).score([sample(*TURNS[:2])]) for config in configs)
    assert np.allclose([adapted.loss, adapted.alone], [same.loss, same.alone], rtol=1e-6)
    assert np.allclose(adapted.states, same.states) and abs(adapted.loss - base.loss) > 1e-3
    assert len({scores.examine(config) for config in configs}) == 3
    shutil.move(work, tmp_path / "away")
    try:
        with pytest.raises(UserError, match=r"holds adapters of the checkpoint .*, which is not there"):
            scores.examine(configs[0])
    finally:
        shutil.move(tmp_path / "away", work)


def test_scores_depend_on_the_tokenizer_and_on_the_template_that_a_checkpoint_names(work, tmp_path, monkeypatch):
    shutil.copytree(work, tmp_path / "W")
    config = ModelConfig(checkpoint=str(tmp_path / "W"), form="template")
    before = scores.examine(config)
    assert before == scores.examine(ModelConfig(checkpoint=str(work), form="template"))
    other = train_vocabulary(TEXTS, preset="telechat_12b", vocab_size=430, character_coverage=1.0)
    (tmp_path / "W/tokenizer.model").write_bytes(other.model)
    after = scores.examine(config)
    monkeypatch.setattr(models.templates, "choose", lambda *args: TEMPLATES["telechat_7b"])
    assert len({before, after, scores.examine(config)}) == 3


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    records = [pools.record(f"Cat {i * i % 97}?", f"mat {i * 7 % 31}", "en" if i % 3 else "zh") for i in range(24)]
    records[5] = pools.record("long " * 20, "An answer.", "en")
    records[10] = records[8]
    pools.write(folder / "a.jsonl", records)
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(samples, "CHUNK", 12)
    monkeypatch.setattr(scores, "SHORT", (64,))  # one program, and little work
    monkeypatch.setattr(scores, "BATCH_TOKENS", 256)


def page(folder, work, **values):
    table = {
        "sources": {"pool": {"files": (f"{folder}/*.jsonl",)}},
        "count": 6,
        "stages": ("difficulty", "perplexity"),
        "difficulty": {"max": 1.1},
        "model": {"checkpoint": str(work)},
        "clusters": {"count": 4, "features": "states", "within": "hardest"},
    }
    return select_config(table | values)


def test_samples_outside_the_bands_are_dropped_and_a_kill_changes_nothing(pool, work, tmp_path, monkeypatch):
    once = tmp_path / "once"
    bounds = {"perplexity": {"min": 1.5, "max": 1e6}}
    summary = pipeline.select(page(pool, work, **bounds), once)
    lines = pools.read(once / "manifest.jsonl")
    long = lines.pop(5)
    assert long["reason"] == "too long, or no token to learn" and "loss" not in long and long["model_tokens"] > 64
    for line in lines:
        assert line["difficulty"] == pytest.approx(line["loss"] / line["loss_alone"], rel=1e-4)
        assert line["perplexity"] == pytest.approx(np.exp(line["loss"]), rel=1e-4)
        assert (line.get("reason") == "difficulty above 1.1") == (line["difficulty"] > 1.1)
    assert summary["dropped"][0]["samples"] == 1 and summary["left"] < 23
    by_cell = {}
    for line in lines:
        if line["fate"] != "dropped":
            by_cell.setdefault((line["category"], line["cluster"]), []).append((line["difficulty"], line["fate"]))
    for cell in by_cell.values():  # the hardest first
        fates = [fate for _, fate in sorted(cell, reverse=True)]
        assert fates == sorted(fates, reverse=True)
    report = (once / "report.html").read_text()
    assert "difficulty: loss with the question" in report and "the states of the model" in report
    calls, real = [], scores.Scorer.score

    def dying(scorer, wanted):
        calls.append(len(wanted))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(scorer, wanted)

    monkeypatch.setattr(scores.Scorer, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        pipeline.select(page(pool, work, **bounds), tmp_path / "again")
    pipeline.select(page(pool, work, **bounds), tmp_path / "again")
    assert len(calls) == 3  # two chunks, one of them begun twice
    for name in ("selected.jsonl", "manifest.jsonl", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (once / name).read_bytes()


@pytest.mark.parametrize("features", ["hashed", "states"])
def test_other_bands_go_on_from_the_same_scores(features, pool, work, tmp_path, monkeypatch):
    clusters = {"count": 4, "dims": 4, "features": features, "within": "hardest"}
    bands = {"stages": ("difficulty",), "clusters": {**clusters, "count": 3}}
    pipeline.select(page(pool, work, **bands), tmp_path / "once")
    kept = tmp_path / "results"
    first = pipeline.select(
        page(pool, work, clusters=clusters, difficulty={"max": 5.0}), tmp_path / "first", results=kept
    )
    monkeypatch.setattr(scores.Scorer, "score", lambda *args: pytest.fail("scored again"))
    second = pipeline.select(page(pool, work, **bands), tmp_path / "second", results=kept)
    assert first["left"] != second["left"]
    for name in ("selected.jsonl", "manifest.jsonl", "report.html", "summary.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    with pytest.raises(UserError, match="results: holds results of another page, other files or another model"):
        pipeline.select(page(pool, work, model={"checkpoint": str(work), "layer": 1}), tmp_path / "x", results=kept)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"quotas": {"fr": 1}}, "quotas.fr: the pool has no such category"),
        ({"quotas": {"zh": 9}, "count": 9}, "quotas.zh=9: 8 samples are left of this category"),
        ({"count": 25}, "count=25: 25 are to be selected, but 24 are left"),
        ({"count": 24, "stages": ("duplicates",)}, "count=24: 24 are to be selected, but 23 are left"),
    ],
)
def test_counts_that_cannot_be_are_named_before_anything_is_scored(values, message, pool, work, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "Scorer", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(UserError) as error:
        pipeline.select(page(pool, work, **values), tmp_path / "out")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"layer": 3}, "model.layer=3: the model has 2"),
        ({"max_tokens": 65}, "model.max_tokens=65: the model's max_seq_len is 64"),
        ({"tokenizer": "none.model"}, "none.model"),
        ({"form": "template", "template": "nowhere"}, "nowhere"),
    ],
)
def test_a_model_that_does_not_fit_is_named_before_anything_is_read(model, message, pool, work, tmp_path):
    with pytest.raises(UserError) as error:
        pipeline.select(page(pool, work, model={"checkpoint": str(work), **model}), tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_an_unfinished_selection_of_another_model_is_left_alone(pool, work, tmp_path):
    with pytest.raises(UserError, match="are to be selected"):
        pipeline.select(page(pool, work, count=24), tmp_path / "out")
    known = tmp_path / "out" / "unfinished" / "selection.json"
    known.write_text(json.dumps(json.loads(known.read_text()) | {"model": "0"}))
    with pytest.raises(UserError, match="holds an unfinished selection of another page, other files or another model"):
        pipeline.select(page(pool, work, count=24), tmp_path / "out")
